"""What can be known about the images and the compose files without a Docker engine."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from importlib.metadata import distribution, entry_points
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import Settings
from worker.cli import worker

ROOT = Path(__file__).resolve().parents[1]
DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
COMPOSE: Mapping[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
GPU: Mapping[str, Any] = yaml.safe_load((DOCKER / "compose.gpu.yaml").read_text())
SERVICES: Mapping[str, Any] = COMPOSE["services"]
OURS = ("migrate", "worker", "producer")
PASSWORDS = {"POSTGRES_PASSWORD": "secret1", "REDIS_PASSWORD": "secret2", "S3_SECRET": "secret3", "TORCH_INDEX_URL": ""}


def _instructions(dockerfile: Path) -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", dockerfile.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    pairs = [line.split(None, 1) for line in text.splitlines() if line.strip()]
    return [(pair[0], pair[1]) for pair in pairs]


def _resolved(text: str) -> str:
    """Compose's ${NAME:?message} and ${NAME:-default}, filled in."""
    return re.sub(r"\$\{(\w+)[^}]*\}", lambda match: PASSWORDS[match[1]], text)


def _settings_named(text: str) -> set[str]:
    return set(re.findall(r"\bNIGHTSHIFT_\w+", text))


def test_the_compose_file_has_the_services_of_production() -> None:
    assert set(SERVICES) == {"postgres", "redis", "s3", "migrate", "worker", "producer"}


def test_every_volume_and_every_dependency_named_in_the_compose_file_is_there() -> None:
    for name, service in SERVICES.items():
        assert set(service.get("depends_on", {})) <= set(SERVICES), name
        assert {volume.split(":")[0] for volume in service.get("volumes", [])} <= set(COMPOSE["volumes"]), name
        for needed, how in service.get("depends_on", {}).items():
            if how["condition"] == "service_healthy":
                assert "healthcheck" in SERVICES[needed], f"{name} waits for the health of {needed}, which has no check"


def test_every_server_image_is_named_with_a_version() -> None:
    for name in ("postgres", "redis", "s3"):
        tag = SERVICES[name]["image"].rpartition(":")[2]
        assert re.match(r"\d", tag), f"{name}: {tag}"


@pytest.mark.parametrize("service", OURS)
def test_the_environment_of_our_services_is_a_valid_production_setting(
    service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SERVICES[service]["environment"].items():
        monkeypatch.setenv(name, _resolved(value))
    settings = Settings()
    assert settings.database_url.startswith("postgresql") and "secret1@postgres/" in settings.database_url
    assert settings.broker_url == "redis://:secret2@redis:6379/0"
    assert settings.storage_url.startswith("s3://")
    assert not settings.embedded


@pytest.mark.parametrize("file", [*DOCKERFILES, *sorted(DOCKER.glob("*.yaml"))], ids=lambda file: file.name)
def test_every_variable_of_ours_is_a_setting(file: Path) -> None:
    known = {f"NIGHTSHIFT_{field.upper()}" for field in Settings.model_fields}
    assert _settings_named(file.read_text()) <= known


def test_every_secret_of_the_compose_file_is_in_the_example_and_has_no_default() -> None:
    text = (DOCKER / "compose.yaml").read_text()
    asked = set(re.findall(r"\$\{(\w+):\?", text))
    example = dict(line.split("=", 1) for line in (DOCKER / ".env.example").read_text().splitlines() if "=" in line)
    assert asked == {"POSTGRES_PASSWORD", "REDIS_PASSWORD", "S3_SECRET"}
    assert set(example) == set(PASSWORDS) and not any(example.values())


def test_the_migration_runs_once_and_the_workers_wait_for_it() -> None:
    assert SERVICES["migrate"]["command"] == ["db", "upgrade"] and SERVICES["migrate"]["restart"] == "no"
    assert SERVICES["worker"]["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}


def test_the_worker_can_be_scaled() -> None:
    assert {"container_name", "ports", "hostname"}.isdisjoint(SERVICES["worker"])


def test_the_worker_has_longer_to_leave_than_it_gives_its_jobs() -> None:
    (grace,) = (option.default for option in worker.params if option.name == "grace_seconds")
    assert isinstance(grace, float)
    assert float(SERVICES["worker"]["stop_grace_period"].removesuffix("s")) > grace


def test_nothing_is_published_on_the_host() -> None:
    assert not any("ports" in service for service in SERVICES.values())


def test_the_gpu_file_changes_only_the_worker() -> None:
    assert set(GPU["services"]) == {"worker"}
    (device,) = GPU["services"]["worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]


@pytest.mark.parametrize(
    "arguments",
    [
        SERVICES["migrate"]["command"],
        GPU["services"]["worker"]["command"],
        *(
            shlex.split(value.strip("[]").replace(",", " "))
            for f in DOCKERFILES
            for k, value in _instructions(f)
            if k == "CMD"
        ),
    ],
    ids=" ".join,
)
def test_the_commands_are_commands_of_ours(arguments: list[str]) -> None:
    assert arguments[0] in entry_points(group="nightshift.commands").names | {"--help"}


@pytest.mark.parametrize("name", OURS)
def test_a_service_of_ours_is_built_from_a_file_that_is_there(name: str) -> None:
    build = SERVICES[name]["build"]
    context = (DOCKER / build["context"]).resolve()
    assert context == ROOT and (context / build["dockerfile"]).is_file()
    arguments = {value.split("=")[0] for key, value in _instructions(context / build["dockerfile"]) if key == "ARG"}
    assert set(build.get("args", {})) <= arguments


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_everything_that_an_image_copies_is_there_and_not_ignored(file: Path) -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copies = [value.split()[:-1] for key, value in _instructions(file) if key == "COPY" and "--from" not in value]
    copied = {name for names in copies for name in names}
    assert copied and all((ROOT / name).exists() for name in copied)
    assert copied == kept, "the build context has more or less than the image needs"


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_an_image_runs_as_an_ordinary_user(file: Path) -> None:
    steps = _instructions(file)
    users = [value for key, value in steps if key == "USER"]
    assert users == ["nightshift"]
    after = [key for key, _ in steps[steps.index(("USER", "nightshift")) :]]
    assert "RUN" not in after
    assert any(key == "RUN" and "useradd --uid 10001" in value for key, value in steps)


def _extras(file: Path) -> set[str]:
    (found,) = re.findall(r'"\.\[([\w,]+)\]"', file.read_text())
    return set(found.split(","))


def test_the_producer_image_has_no_torch_and_the_worker_image_has_it() -> None:
    assert _extras(DOCKER / "worker.Dockerfile") == {"worker", "s3", "postgres"}
    assert _extras(DOCKER / "producer.Dockerfile") == {"s3", "postgres"}
    assert "torch==" not in (DOCKER / "producer.Dockerfile").read_text()
    assert {"worker", "s3", "postgres"} <= set(distribution("nightshift").metadata.get_all("Provides-Extra") or ())


def test_the_worker_image_installs_the_tested_torch() -> None:
    (pinned,) = (line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    assert f"ARG TORCH={pinned}" in (DOCKER / "worker.Dockerfile").read_text()
    assert f"TORCH ?= {pinned}" in (ROOT / "Makefile").read_text()
