"""A producer machine installs the wheel without extras: no torch there, and everything it needs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
SITE = Path(sysconfig.get_path("purelib"))
BUILD_INPUTS = ("pyproject.toml", "README.md", "LICENSE", "jobs", "migrations", "sd_engine", "worker")
NOT_ON_A_PRODUCER = ("torch", "numpy", "transformers", "tokenizers", "safetensors", "diffusers", "boto3", "psycopg")


@dataclass(frozen=True, slots=True)
class Producer:
    """A virtual environment with the wheel and its base dependencies only, and a data directory of its own."""

    folder: Path
    home: Path

    def run(self, *command: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Run one of the environment's programs with nothing of ours in the environment variables."""
        environment = {"PATH": f"{self.folder / 'bin'}:{os.defpath}", "NIGHTSHIFT_HOME": str(self.home)}
        program = str(self.folder / "bin" / command[0])
        return subprocess.run(
            [program, *command[1:]],
            env=environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def output(self, *command: str) -> str:
        """The standard output of a command that must succeed."""
        result = self.run(*command)
        assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built from a copy: building in place would leave build/ behind, and reuse a stale one."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in BUILD_INPUTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    _pip("wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(out), str(source))
    (built,) = out.glob("nightshift-*.whl")
    return built


@pytest.fixture(scope="module")
def producer(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Producer:
    folder = tmp_path_factory.mktemp("producer") / "venv"
    venv.create(folder, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    for needed in base_dependencies(wheel).values():
        _link(needed, site)
    _pip("--python", str(folder / "bin" / "python"), "install", "--no-deps", "--no-index", str(wheel))
    return Producer(folder, tmp_path_factory.mktemp("home"))


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr


def _metadata_requirements(wheel: Path) -> list[Requirement]:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().split("\n\n", 1)[0].splitlines()
    return [Requirement(line.removeprefix("Requires-Dist: ")) for line in lines if line.startswith("Requires-Dist: ")]


def _applicable(requirements: list[Requirement], extras: set[str]) -> Iterator[Requirement]:
    for requirement in requirements:
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in extras | {""}):
            yield requirement


def base_dependencies(wheel: Path) -> Mapping[str, Distribution]:
    """What pip would install beside the wheel without extras: the closure of its requirements, as installed here."""
    found: dict[str, Distribution] = {}
    asked: set[tuple[str, frozenset[str]]] = set()
    open_ones = list(_applicable(_metadata_requirements(wheel), set()))
    while open_ones:
        requirement = open_ones.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) in asked:
            continue
        asked.add((name, extras))
        found[name] = distribution(name)
        below = [Requirement(text) for text in found[name].requires or ()]
        open_ones += _applicable(below, set(extras))
    return found


def _link(needed: Distribution, site: Path) -> None:
    """Put an installed distribution into another site folder, by links to its top-level files and folders."""
    for top in {file.parts[0] for file in needed.files or ()} - {"..", "__pycache__"}:
        if not (site / top).exists():
            (site / top).symlink_to(SITE / top)


def test_the_wheel_carries_the_migrations_the_type_markers_and_the_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    wanted = {"jobs/migrations/env.py", "jobs/migrations/script.py.mako", "jobs/py.typed", "sd_engine/py.typed"}
    assert wanted | {"worker/py.typed", "sd_engine/training/__init__.py"} <= names
    versions = {f"jobs/{file.relative_to(ROOT)}" for file in (ROOT / "migrations" / "versions").glob("*.py")}
    assert versions and versions <= names
    assert any(re.fullmatch(r"nightshift-[^/]+\.dist-info/licenses/LICENSE", name) for name in names)


def test_the_wheel_carries_every_module_and_every_file_of_the_shipped_model(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    modules = {str(f.relative_to(ROOT)) for p in ("jobs", "sd_engine", "worker") for f in (ROOT / p).rglob("*.py")}
    models = {str(f.relative_to(ROOT)) for f in (ROOT / "sd_engine" / "models").rglob("*") if f.is_file()}
    assert models, "there is no shipped model"
    assert modules | models <= names


def test_the_base_install_asks_for_nothing_of_the_workers_half(wheel: Path) -> None:
    assert base_dependencies(wheel).keys().isdisjoint(NOT_ON_A_PRODUCER)


@pytest.mark.parametrize("module", NOT_ON_A_PRODUCER)
def test_a_producer_has_no(producer: Producer, module: str) -> None:
    result = producer.run("python", "-c", f"import {module}")
    assert result.returncode != 0 and f"No module named '{module}'" in result.stderr


def test_a_producer_imports_jobs_with_warnings_as_errors(producer: Producer) -> None:
    assert "site-packages" in producer.output("python", "-W", "error", "-c", "import jobs; print(jobs.__file__)")


def test_a_producer_sees_every_command_in_the_help(producer: Producer) -> None:
    text = producer.output("nightshift", "--help")
    commands = {entry.name for entry in distribution("nightshift").entry_points.select(group="nightshift.commands")}
    assert commands and all(re.search(rf"^  {name}\b", text, re.MULTILINE) for name in commands)


def test_a_producer_submits_and_reads_the_status(producer: Producer) -> None:
    producer.output("nightshift", "submit", "a small red star on a blue background")
    status = json.loads(producer.output("nightshift", "status", "--json"))
    assert status["counts"]["queued"] == 1
    assert [job["state"] for job in status["jobs"]] == ["queued"]


def test_a_producers_doctor_looks_at_its_own_half_and_skips_the_workers(producer: Producer) -> None:
    found = {each["check"]: each for each in json.loads(producer.output("nightshift", "doctor", "--json"))}
    assert (found["worker"]["mark"], "torch" in found["worker"]["seen"]) == ("skipped", True)
    assert {found[check]["mark"] for check in ("settings", "kombu version", "pillow version")} == {"ok"}
    assert not any(each["mark"] == "failed" for each in found.values())


def test_a_producer_upgrades_a_database_from_the_wheels_own_migrations(producer: Producer) -> None:
    producer.output("nightshift", "db", "upgrade")
    assert (producer.home / "nightshift.db").is_file()


@pytest.mark.parametrize("command", ["worker", "demo", "models", "train-mini"])
def test_a_command_of_the_workers_half_names_the_extra_to_install(producer: Producer, command: str) -> None:
    result = producer.run("nightshift", command)
    assert result.returncode != 0
    assert "nightshift[worker]" in result.stderr
    assert "Traceback" not in result.stderr and len(result.stderr.strip().splitlines()) == 1
