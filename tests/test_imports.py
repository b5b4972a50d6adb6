"""The import rule: who may import whom, read from the syntax trees, so that it also holds for code no test runs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("jobs", "migrations", "sd_engine", "worker")

_TENSORS = {"torch", "numpy", "safetensors", "tokenizers"}
# Compared with in tests and benchmarks, never needed to render.
_REFERENCE = {"diffusers", "transformers", "accelerate"}
_QUEUE = {"celery", "kombu", "redis"}
_SQL = {"sqlalchemy", "alembic", "psycopg", "sqlite3"}
_NETWORK = {"boto3", "botocore", "http", "requests", "socket", "urllib"}

# package -> what it may never import, at any depth and in any function
FORBIDDEN: Mapping[str, set[str]] = {
    "jobs": {"sd_engine", "worker"} | _TENSORS | _REFERENCE,
    "migrations": {"sd_engine", "worker"} | _TENSORS | _REFERENCE,
    "sd_engine": {"jobs", "migrations", "worker", "pydantic_settings"} | _QUEUE | _SQL | _NETWORK | _REFERENCE,
    "worker": _REFERENCE,
}

# The only places where a function may import something, each with its reason.
# A command line loads its heavy half when the command runs, so that `nightshift --help` answers at once.
COMMAND_MODULES = {"jobs/commands.py", "worker/cli.py", "worker/models_cli.py", "sd_engine/training/cli.py"}
LAZY_ANYWHERE = {"torch"}  # deliberate: the torch-free modules of the engine stay importable without it
LAZY_HERE = {
    ("jobs/storage.py", "jobs.storage_s3"),  # boto3 is an extra that a directory as storage does not need
    ("sd_engine/__init__.py", "<computed>"),  # the torch half of the public names, loaded when it is asked for
}

TORCH_FREE_ENGINE = ("sd_engine.packer", "sd_engine.request", "sd_engine.samplers", "sd_engine.schedules")


@dataclass(frozen=True, slots=True)
class Import:
    """One imported module: absolute dotted name, where, and how it is guarded."""

    file: str
    line: int
    module: str
    in_function: bool
    for_types_only: bool

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


def _files(root: Path, package: str) -> list[Path]:
    return sorted((root / package).rglob("*.py"))


def _module_name(root: Path, file: Path) -> str:
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _targets(node: ast.AST, module: str, is_package: bool) -> list[str]:
    """Dotted names that a node may load; `from a import b` may mean the module a.b, so it gives a and a.b."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.Call):
        return _by_name(node)
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:
        parts = module.split(".")
        kept = parts[: len(parts) - node.level + is_package]
        base = ".".join([*kept, *([base] if base else [])])
    return [base, *(f"{base}.{alias.name}" for alias in node.names)]


def _by_name(call: ast.Call) -> list[str]:
    """The module of `importlib.import_module("a.b")` and `__import__("a.b")`."""
    called = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if called not in ("import_module", "__import__") or not call.args:
        return []
    name = call.args[0]
    return [name.value if isinstance(name, ast.Constant) and isinstance(name.value, str) else "<computed>"]


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def _walk(node: ast.AST, in_function: bool, types_only: bool) -> Iterator[tuple[ast.AST, bool, bool]]:
    for child in ast.iter_child_nodes(node):
        inside = in_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        guarded = types_only or _is_type_checking(child)
        yield child, inside, guarded
        yield from _walk(child, inside, guarded)


def imports_of(root: Path, package: str) -> list[Import]:
    """Every import statement of a package, absolute."""
    found = []
    for file in _files(root, package):
        name, tree = _module_name(root, file), ast.parse(file.read_text(), str(file))
        for node, inside, guarded in _walk(tree, False, False):
            for target in _targets(node, name, file.name == "__init__.py"):
                line = getattr(node, "lineno", 0)
                found.append(Import(str(file.relative_to(root)), line, target, inside, guarded))
    return found


def forbidden(root: Path, package: str) -> list[str]:
    """Imports that cross a border."""
    return [str(i) for i in imports_of(root, package) if i.module.split(".")[0] in FORBIDDEN[package]]


def hidden(root: Path, package: str) -> list[str]:
    """Imports inside functions that are not among the listed ones."""
    return [
        str(i)
        for i in imports_of(root, package)
        if i.in_function
        and i.file not in COMMAND_MODULES
        and (i.file, i.module) not in LAZY_HERE
        and i.module.split(".")[0] not in LAZY_ANYWHERE
    ]


def _graph(root: Path, packages: tuple[str, ...]) -> dict[str, set[str]]:
    """Module -> modules that it loads when it is imported itself."""
    names = {_module_name(root, file): file for package in packages for file in _files(root, package)}
    graph: dict[str, set[str]] = {name: set() for name in names}
    files = {str(file.relative_to(root)): name for name, file in names.items()}
    for package in packages:
        for found in imports_of(root, package):
            if found.in_function or found.for_types_only or found.module not in names:
                continue
            graph[files[found.file]].add(found.module)
    return graph


def _needs_parent(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """`from a import b` names both a and a.b; where a.b is a module of ours, a itself is not what is meant."""
    return {
        module: {t for t in targets if not any(other.startswith(f"{t}.") for other in targets)} - {module}
        for module, targets in graph.items()
    }


def cycles(root: Path, packages: tuple[str, ...]) -> list[str]:
    """Import cycles between modules, each as "a -> b -> a"; type-only imports do not count."""
    graph, done, found = _needs_parent(_graph(root, packages)), set[str](), list[str]()

    def visit(module: str, path: tuple[str, ...]) -> None:
        if module in path:
            found.append(" -> ".join((*path[path.index(module) :], module)))
        elif module not in done:
            for target in sorted(graph[module]):
                visit(target, (*path, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_what_its_place_in_the_house_allows(package: str) -> None:
    assert _files(ROOT, package), f"{package} has no modules: the rule would hold for nothing"
    assert forbidden(ROOT, package) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_hide_in_functions_only_where_it_is_listed(package: str) -> None:
    assert hidden(ROOT, package) == []


def test_no_import_cycles() -> None:
    assert cycles(ROOT, PACKAGES) == []


def test_only_the_worker_imports_both_the_engine_and_the_jobs() -> None:
    both = [
        package
        for package in PACKAGES
        if {"jobs", "sd_engine"} - {package} <= {i.module.split(".")[0] for i in imports_of(ROOT, package)}
        and package not in ("jobs", "sd_engine")
    ]
    assert both == ["worker"]


def _import_without(modules: list[str], blocked: set[str]) -> subprocess.CompletedProcess[str]:
    """Import modules in a fresh interpreter in which the blocked ones cannot be found."""
    code = f"import sys\nfor b in {sorted(blocked)!r}: sys.modules[b] = None\nimport {', '.join(modules)}"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_every_module_of_jobs_imports_without_torch_and_numpy() -> None:
    modules = [_module_name(ROOT, file) for file in _files(ROOT, "jobs") if file.name != "__main__.py"]
    result = _import_without(modules, _TENSORS | _REFERENCE)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("module", TORCH_FREE_ENGINE)
def test_the_host_side_of_the_engine_imports_without_torch(module: str) -> None:
    result = _import_without([module], {"torch", "transformers", "safetensors"})
    assert result.returncode == 0, result.stderr


def _write(root: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_the_rule_sees_an_import_across_a_border_wherever_it_stands(tmp_path: Path) -> None:
    _write(
        tmp_path,
        {
            "jobs/a.py": "import torch.nn",
            "jobs/b.py": "def f():\n    from sd_engine import Engine",
            "jobs/c.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import numpy",
            "jobs/d.py": "import importlib\nimportlib.import_module('worker.app')",
            "jobs/e.py": "import torchlike, celery",
        },
    )
    found = {line.split(":")[0] for line in forbidden(tmp_path, "jobs")}
    assert found == {"jobs/a.py", "jobs/b.py", "jobs/c.py", "jobs/d.py"}


def test_the_rule_sees_an_import_hidden_in_a_function(tmp_path: Path) -> None:
    _write(
        tmp_path,
        {
            "jobs/commands.py": "def f():\n    import csv",
            "jobs/a.py": "import csv\ndef f():\n    import json",
            "jobs/b.py": "class A:\n    def f(self):\n        if self:\n            from . import a",
        },
    )
    assert [line.split(":")[0] for line in hidden(tmp_path, "jobs")] == ["jobs/a.py", "jobs/b.py", "jobs/b.py"]


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        ("from jobs import a", ["jobs.a -> jobs.b -> jobs.a"]),
        ("from .a import x", ["jobs.a -> jobs.b -> jobs.a"]),
        ("from . import x", ["jobs -> jobs.a -> jobs.b -> jobs"]),  # x lives in jobs/__init__.py
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from jobs import a", []),
        ("", []),
    ],
)
def test_the_rule_sees_a_cycle(tmp_path: Path, second: str, expected: list[str]) -> None:
    _write(
        tmp_path, {"jobs/__init__.py": "from jobs.a import x", "jobs/a.py": "import jobs.b\nx = 1", "jobs/b.py": second}
    )
    assert cycles(tmp_path, ("jobs",)) == expected
