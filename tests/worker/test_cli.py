"""The command line of the worker: what it says before any work begins."""

import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from jobs import Settings, StorageError
from jobs.redaction import shown_url
from worker import THIS_WORKER, exit_codes
from worker.cli import child_command, demo, worker
from worker.logs import JsonFormatter
from worker.preflight import open_services
from worker.process import worker_name


def test_a_device_that_cannot_be_is_refused_with_the_choices() -> None:
    answer = CliRunner().invoke(worker, ["--device", "gpu7"])
    assert answer.exit_code == 2
    assert "'gpu7' is no device" in answer.output and "cuda:N" in answer.output


@pytest.mark.parametrize("module", ["worker.cli", "worker.supervisor"])
def test_the_command_line_needs_no_torch_until_it_works(module: str) -> None:
    code = f"import sys, {module}; sys.exit(bool({{'torch', 'numpy'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


def test_a_child_of_the_supervisor_gets_the_same_options_and_one_device() -> None:
    params = {
        "device": "all",
        "concurrency": 8,
        "max_units": None,
        "until_empty": True,
        "as_json": True,
        "verbose": False,
    }
    command = child_command("cuda:1", params)
    assert command[4:] == ["--device", "cuda:1", "--concurrency", "8", "--until-empty", "--json"]


def test_every_start_has_a_name_of_its_own() -> None:
    assert worker_name() != worker_name()
    assert worker_name().count(":") == 2


def test_passwords_are_not_shown() -> None:
    assert shown_url("redis://user:secret@host:6379/0") == "redis://user:***@host:6379/0"
    assert shown_url("redis://:secret@host:6379/0") == "redis://:***@host:6379/0"
    assert shown_url("redis://host:6379/0") == "redis://host:6379/0"


def test_json_log_lines_are_one_object_each() -> None:
    record = logging.LogRecord("worker", logging.INFO, __file__, 1, "job %s\nclaimed", ("x",), None)
    line = JsonFormatter().format(record)
    assert "\n" not in line
    assert json.loads(line)["message"] == "job x\nclaimed"


@pytest.mark.parametrize(
    ("variable", "value", "code", "says"),
    [
        ("NIGHTSHIFT_BROKER_URL", "redis://127.0.0.1:1/0", 69, "the broker redis://127.0.0.1:1/0 does not answer"),
        ("NIGHTSHIFT_DATABASE_URL", "postgresql://u:hidden@127.0.0.1:1/x", 69, "does not answer"),
        ("NIGHTSHIFT_DATABASE_URL", "mysql://host/x", 2, "NIGHTSHIFT_DATABASE_URL"),
        ("NIGHTSHIFT_MODELS", "torn=/nowhere", 2, "no model can be loaded"),
    ],
)
def test_what_keeps_a_worker_from_starting_is_told_in_a_sentence(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, code: int, says: str
) -> None:
    monkeypatch.setenv("NIGHTSHIFT_HOME", str(settings.home))
    monkeypatch.setenv(variable, value)
    ended = subprocess.run(
        [sys.executable, "-m", "worker", "--device", "cpu"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert ended.returncode == code
    assert says in ended.stderr
    assert "Traceback" not in ended.stderr and "hidden" not in ended.stderr


def test_a_storage_that_cannot_be_written_keeps_a_worker_from_starting(settings: Settings) -> None:
    settings.make_home()
    (settings.home / "storage").mkdir()
    (settings.home / "storage" / "images").write_text("in the way")
    with pytest.raises(StorageError, match="cannot reach images/probe-"):
        open_services(settings)


def test_a_heartbeat_slower_than_its_lease_is_refused() -> None:
    answer = CliRunner().invoke(worker, ["--lease-seconds", "10", "--heartbeat-seconds", "6"])
    assert answer.exit_code == 2
    assert "--heartbeat-seconds" in answer.output and "at most half of it, 5" in answer.output


def test_one_process_alone_drives_one_device() -> None:
    answer = CliRunner().invoke(worker, ["--device", "all", "--no-supervisor"])
    assert answer.exit_code == 2
    assert "'--device'" in answer.output and "one process drives one device" in answer.output


def test_a_hang_limit_shorter_than_the_signs_of_life_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIGHTSHIFT_HANG_LIMIT_SECONDS", "1")
    answer = CliRunner().invoke(worker, [])
    assert answer.exit_code == 2
    assert "'--hang-limit-seconds': 1.0 is not in the range 5.0<=x" in answer.output


@pytest.mark.parametrize("name", ["LEASE", "HEARTBEAT", "GRACE", "STEP_LIMIT", "HANG_LIMIT", "STORAGE_PATIENCE"])
def test_seconds_that_are_no_number_are_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(f"NIGHTSHIFT_{name}_SECONDS", "nan")
    answer = CliRunner().invoke(worker, [])
    assert answer.exit_code == 2
    assert f"'--{name.lower().replace('_', '-')}-seconds': 'nan' is no number of seconds" in answer.output


def test_help_names_every_exit_code() -> None:
    codes = {value for name, value in vars(exit_codes).items() if name.isupper()}
    text = CliRunner().invoke(worker, ["--help"]).output.partition("Exit codes:")[2]
    assert {int(number) for number in re.findall(r"\d+", text)} == codes


@pytest.mark.parametrize("command", [worker, demo])
def test_help_ends_with_an_example(command: click.Command) -> None:
    assert f"nightshift {command.name}" in CliRunner().invoke(command, ["--help"]).output.partition("Example")[2]


def test_a_folder_called_worker_where_somebody_stands_is_not_taken_for_ours(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text("raise SystemExit('a stranger')")
    ended = subprocess.run([*THIS_WORKER, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize(
    ("option", "value", "choices"),
    [("--dtype", "half", "auto, fp32, fp16, bf16"), ("--offload", "lazy", "resident, idle, sequential")],
)
def test_a_choice_that_is_none_is_refused_with_the_choices(option: str, value: str, choices: str) -> None:
    answer = CliRunner().invoke(worker, [option, value])
    assert answer.exit_code == 2
    assert f"'{option}'" in answer.output and all(f"'{choice}'" in answer.output for choice in choices.split(", "))


def test_the_children_of_the_supervisor_get_dtype_offload_and_fixed_packs() -> None:
    params = {"device": "all", "dtype": "fp16", "offload": "idle", "deterministic": True}
    command = child_command("cuda:0", params)
    assert command[4:] == ["--device", "cuda:0", "--dtype", "fp16", "--offload", "idle", "--deterministic"]
