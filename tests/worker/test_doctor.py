"""The worker's half of the doctor: torch, the device, and every model that would be served."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from jobs import Settings
from jobs import doctor as jobs_doctor
from jobs.checks import Mark
from worker import doctor

ROOT = Path(__file__).resolve().parents[2]


def found(**values: object) -> dict[str, tuple[Mark, str]]:
    return {each.check: (each.mark, each.seen) for each in doctor.checks(Settings(**values))}


def test_the_shipped_model_and_the_device_are_told() -> None:
    seen = found()
    assert seen["torch version"][0] == seen["device"][0] == seen["model nightshift-mini"][0] == Mark.ok
    assert "auto takes" in seen["device"][1]


@pytest.mark.parametrize("place", ["missing.safetensors", "folder", "torn.safetensors"])
def test_a_model_that_no_worker_could_load_has_failed_and_the_others_are_told(tmp_path: Path, place: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "torn.safetensors").write_bytes(b"\xff" * 100)
    seen = found(models={"nightshift-mini": "shipped", "mine": str(tmp_path / place), "other": "shelf"})
    assert {name: seen[f"model {name}"][0] for name in ("nightshift-mini", "mine", "other")} == {
        "nightshift-mini": Mark.ok,
        "mine": Mark.failed,
        "other": Mark.failed,
    }


def test_the_floors_are_those_of_the_installation() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [Requirement(text) for text in project["dependencies"] + project["optional-dependencies"]["worker"]]
    floors = {
        each.name: tuple(int(part) for part in bound.version.split("."))
        for each in asked
        for bound in each.specifier
        if bound.operator == ">="
    }
    for package, floor in {**jobs_doctor.FLOORS, **doctor.FLOORS}.items():
        assert floors[package] == floor
