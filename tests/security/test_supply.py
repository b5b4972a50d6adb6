"""What is installed and loaded: exact versions above the floors of their advisories, nothing fetched while we run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]

#: The oldest version without a known hole that would matter here, and where that is written.
FLOORS = {
    "torch": "2.10",  # CVE-2025-32434 (before 2.6), CVE-2026-24747: code from pickles in spite of weights_only
    "pillow": "12.3",  # CVE-2026-40192, -42308, -42309, -54059, -54060, -55379, -55380, -59200: decoders
    "celery": "5.7",  # before 5.6 a broker's password was logged
    "kombu": "5.7",
    "diffusers": "0.38",  # CVE-2026-44513: code from model folders; used by tests alone
    "safetensors": "0.5",
}


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line.partition("#")[0].strip() for line in lines]
    return {canonicalize_name(pin.partition("==")[0]): pin.partition("==")[2] for pin in pins if pin}


def required() -> dict[str, Requirement]:
    """The requirements of the distribution, of every extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    found = [Requirement(word) for words in lists for word in words]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def test_every_constraint_is_one_exact_version() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line.partition("#")[0].strip() for line in lines if line.partition("#")[0].strip()]
    assert len(pins) > 50
    assert [pin for pin in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.!+_-]*", pin)] == []


@pytest.mark.parametrize("name", FLOORS)
def test_no_version_below_the_floor_is_pinned_allowed_or_installed(name: str) -> None:
    floor = Version(FLOORS[name])
    assert Version(pinned()[name]) >= floor
    assert Version(metadata.version(name)) >= floor
    allowed = required().get(name)
    if allowed is not None:
        lower = [Version(part.version) for part in allowed.specifier if part.operator in (">=", "==", "~=")]
        assert lower and max(lower) >= floor, f"pyproject.toml allows {allowed}"


def test_everything_that_we_ask_for_is_pinned() -> None:
    assert sorted(set(required()) - set(pinned())) == []


def test_no_module_of_ours_reads_pickles_or_evaluates_text() -> None:
    chosen = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]["select"]
    assert {"S301", "S302", "S307", "TID251"} <= set(chosen), "the rules of `make check`"
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--select", "S301,S302,S307,S102"]
    result = subprocess.run(
        [*command, "jobs", "sd_engine", "worker", "migrations"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout
    for package in ("jobs", "sd_engine", "worker", "migrations"):
        for file in (ROOT / package).rglob("*.py"):
            found = re.search(r"^\s*(import|from) (pickle|marshal|shelve|dill|cloudpickle)\b", file.read_text(), re.M)
            assert found is None, f"{file}: {found}"


def test_the_lint_sees_a_pickle(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("import pickle\n\n\ndef f(data: bytes) -> object:\n    return pickle.loads(data)\n")
    command = [sys.executable, "-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml"), "--no-cache"]
    result = subprocess.run([*command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert "S301" in result.stdout and "TID251" in result.stdout


OFFLINE = """
import sys
calls = []
def hook(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen"):
        calls.append((event, arguments[:2]))
        raise PermissionError("no network here")
sys.addaudithook(hook)
import torch
from sd_engine import Engine, Request, load_model, shipped_model
(image,) = Engine(load_model(shipped_model())).render([Request("a red star", steps=1, width=64, height=64)])
print(image.shape, calls)
"""


def test_the_engine_draws_without_asking_anybody_anything() -> None:
    """Neither a model hub nor a name server, without HF_HUB_OFFLINE to help."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", OFFLINE], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stderr[-800:]
    assert result.stdout.strip() == "(64, 64, 3) []"
