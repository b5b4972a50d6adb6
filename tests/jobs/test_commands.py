"""The producer's commands, from the command line's words to its exit code."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import click
import pytest
import sqlalchemy as sa
from click.testing import CliRunner, Result
from PIL import Image

from jobs import Client, InvalidSpec, JobSpec, State, cli, commands
from jobs.db import open_engines
from jobs.models import job as job_table
from jobs.options import GROUPS
from jobs.store import Store
from tests.servers import free_port

PRODUCER = {
    "submit": commands.submit,
    "bulk": commands.bulk,
    "status": commands.status,
    "cancel": commands.cancel,
    "retry": commands.retry,
    "db": commands.db,
}
POINTS = [
    *(EntryPoint(name, f"jobs.commands:{name}", cli.GROUP) for name in PRODUCER),
    EntryPoint("worker", "no_such_package.cli:worker [worker]", cli.GROUP),
]


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The producer's half is installed, the worker's is named but not there; whatever this machine has."""

    def points(group: str, name: str | None = None) -> list[EntryPoint]:
        return [point for point in POINTS if point.group == group and name in (None, point.name)]

    monkeypatch.setattr(cli, "entry_points", points)


def run(*words: str) -> Result:
    result = CliRunner().invoke(cli.nightshift, list(words))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_help_lists_every_command_and_says_what_is_not_installed() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for name in PRODUCER:
        assert re.search(rf"^  {name} ", result.stdout, re.MULTILINE)
    assert re.search(r"worker +\(not installed: pip install 'nightshift\[worker\]'\)", result.stdout)


@pytest.mark.parametrize("words", [["worker"], ["worker", "--device", "cpu"], ["worker", "--help"]])
def test_a_command_whose_extra_is_missing_says_which(words: list[str]) -> None:
    result = run(*words)
    assert result.exit_code == 2
    assert "pip install 'nightshift[worker]'" in result.stderr
    assert "no_such_package" in result.stderr


def test_an_unknown_command_is_a_usage_error() -> None:
    assert run("sumbit").exit_code == 2


@pytest.mark.parametrize("name", [name for name in PRODUCER if name != "db"])
def test_every_command_has_help_with_an_example(name: str) -> None:
    result = run(name, "--help")
    assert result.exit_code == 0
    assert f"nightshift {name}" in result.stdout.partition("Example")[2]


def test_submit_prints_the_id() -> None:
    result = run("submit", "a red star", "--steps", "5", "--guidance", "none", "--batch", "b")
    assert result.exit_code == 0
    with Client() as client:
        (view,) = client.batch("b").jobs()
    assert result.stdout == f"{view.id}\n"
    assert (view.spec.steps, view.spec.guidance) == (5, None)


def test_submit_tells_every_bad_option() -> None:
    result = run("submit", "x", "--steps", "0", "--width", "wide", "--sampler", "plums")
    assert result.exit_code == 2
    for field in ("steps: '0'", "width: 'wide'", "sampler: 'plums'", "allowed:"):
        assert field in result.stderr
    assert run("submit").exit_code == 2


def test_submit_takes_every_field_of_a_spec(tmp_path: Path) -> None:
    for name in ("init.png", "mask.png"):
        Image.new("RGB", (96, 64)).save(tmp_path / name)
    given = {
        "negative_prompt": "blur",
        "width": 96,
        "height": 64,
        "seed": 7,
        "images": 2,
        "model": "mine",
        "priority": 3,
        "steps": 9,
        "sampler": "ddim",
        "eta": 0.5,
        "guidance": 3.0,
        "guidance_rescale": 0.25,
        "guidance_start": 0.125,
        "guidance_stop": 0.75,
        "deepcache_interval": 3,
        "token_merging_ratio": 0.5,
        "decoder": "tiny",
        "clip_skip": 2,
        "noise": "cuda",
        "init_image": tmp_path / "init.png",
        "strength": 0.5,
        "mask": tmp_path / "mask.png",
        "mask_blur": 4.0,
        "resize": "crop",
        "upscale": 2.0,
        "upscale_strength": 0.7,
        "upscale_steps": 5,
        "upscale_by": "pixel",
    }
    options = [word for field, value in given.items() for word in (f"--{field.replace('_', '-')}", str(value))]
    assert run("submit", "x", *options).exit_code == 0
    with Client() as client:
        (view,) = client.jobs()
    differ = {field for field in given if getattr(view.spec, field) != given[field]}
    assert {"prompt", *given} == set(JobSpec.model_fields)
    assert differ == {"init_image", "mask"} and view.spec.input_key and view.spec.mask_key


def test_the_options_of_a_spec_are_shown_in_groups() -> None:
    text = run("submit", "--help").stdout
    headings = re.findall(r"^([A-Z].*):$", text, re.MULTILINE)
    assert headings == [*GROUPS, "Options"]
    own = text.split("\nOptions:")[1]
    assert all(re.search(rf"^  .*--{name}\b", own, re.MULTILINE) for name in ("batch", "wait", "json", "help"))


def test_submit_with_wait_gives_up_in_time() -> None:
    result = run("submit", "x", "--wait", "--timeout", "0")
    assert result.exit_code == 1
    assert "did not end" in result.stderr


def test_bulk_enqueues_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a\nb\nc\n")
    result = run("bulk", str(tmp_path / "a.txt"), "--batch", "tonight", "--steps", "7")
    assert (result.exit_code, result.stdout) == (0, "3 jobs enqueued in batch tonight\n")
    with Client() as client:
        assert [view.spec.prompt for view in client.batch("tonight").jobs()] == ["a", "b", "c"]


def test_bulk_with_bad_rows_enqueues_nothing_unless_told(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b", "steps": 0}\n{"prompt": "c", "init_image": "missing.png"}\n')
    refused = run("bulk", str(path), "--json")
    assert refused.exit_code == 2
    assert "line 2: steps: 0 is not allowed" in refused.stderr
    assert "line 3: init_image: cannot read" in refused.stderr
    outcome = json.loads(refused.stdout)
    assert (outcome["enqueued"], [row["line"] for row in outcome["invalid"]]) == (0, [2, 3])
    with Client() as client:
        assert client.counts()[State.queued] == 0
        skipped = run("bulk", str(path), "--skip-invalid")
        assert (skipped.exit_code, skipped.stdout) == (0, "1 jobs enqueued, 2 skipped\n")
        assert client.counts()[State.queued] == 1


def test_bulk_tells_line_and_field_of_masks_and_upscales(tmp_path: Path) -> None:
    for name, size in (("init.png", (96, 64)), ("small.png", (64, 64))):
        Image.new("RGB", size).save(tmp_path / name)
    (tmp_path / "a.csv").write_text(
        "prompt,init_image,mask,upscale,eta\n"
        "good,init.png,init.png,2,\n"
        "b,init.png,small.png,,\n"
        "c,,init.png,,\n"
        "d,,,9,\n"
        "e,,,,0.5\n"
    )
    result = run("bulk", str(tmp_path / "a.csv"))
    assert [line.split(" ")[:3] for line in result.stderr.splitlines()[:-1]] == [
        ["line", "3:", "mask:"],
        ["line", "4:", "mask:"],
        ["line", "5:", "upscale:"],
        ["line", "6:", "eta:"],
    ]


@pytest.mark.parametrize(
    ("options", "field"), [(["--eta", "0.5", "--sampler", "euler"], "eta"), (["--mask-blur", "x"], "mask_blur")]
)
def test_bulk_refuses_options_that_no_row_could_use(tmp_path: Path, options: list[str], field: str) -> None:
    (tmp_path / "a.txt").write_text("a\n")
    result = run("bulk", str(tmp_path / "a.txt"), *options)
    assert result.exit_code == 2 and f"Error: {field}:" in result.stderr


def test_bulk_tells_of_an_option_that_not_one_row_used(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,sampler\na,\nb,ddim\n")
    result = run("bulk", str(tmp_path / "a.csv"), "--mask", "m.png", "--eta", "0.5")
    assert (result.exit_code, result.stdout) == (0, "2 jobs enqueued\n")
    assert result.stderr == "mask: was used by no row; none has an init_image\n"


def test_bulk_with_nothing_good_is_refused_either_way(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,steps\na,0\n")
    assert run("bulk", str(tmp_path / "a.csv"), "--skip-invalid").exit_code == 2
    assert run("bulk", str(tmp_path / "missing.csv")).exit_code == 2
    assert "steps" in run("bulk", str(tmp_path / "a.csv"), "--steps", "x").stderr


def test_status_has_the_form_that_scripts_rely_on() -> None:
    with Client() as client:
        job = client.submit("a")
    result = run("status", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {
        "counts": {"queued": 1, "running": 0, "succeeded": 0, "failed": 0, "cancelled": 0},
        "jobs": [
            {
                "id": str(job.id),
                "state": "queued",
                "attempts": 0,
                "error": None,
                "traceback": None,
                "suspect": False,
                "solo_crashes": 0,
                "images": [],
            }
        ],
    }


def test_status_filters() -> None:
    with Client() as client:
        first, second = client.submit_many(["a", "b"], batch="tonight")
        client.submit("c")
        client.cancel(first.id)

    def ids(*words: str) -> list[str]:
        return [job["id"] for job in json.loads(run("status", "--json", *words).stdout)["jobs"]]

    assert ids("--batch", "tonight") == [str(second.id), str(first.id)]
    assert ids("--batch", "tonight", "--state", "cancelled") == [str(first.id)]
    assert len(ids("--limit", "1")) == 1
    assert ids(str(first.id)) == [str(first.id)]
    assert "1 queued, 0 running, 0 succeeded, 0 failed, 1 cancelled" in run("status", "--batch", "tonight").stdout
    assert run("status", "job-7").exit_code == 2


def test_status_shows_a_job_whose_spec_this_version_cannot_read_among_the_others() -> None:
    with Client() as client:
        strange, _ = client.submit_many(["strange", "fine"])
        with open_engines(client.settings.database_url).writer.begin() as connection:
            of_tomorrow = sa.update(job_table).where(job_table.c.id == strange.id)
            connection.execute(of_tomorrow.values(spec='{"prompt": "strange", "hologram": true}'))
        text = run("status").stdout
        assert "fine" in text
        assert re.search(rf"^{strange.id}  queued .*cannot read: hologram: unknown field", text, re.MULTILINE)
        assert len(json.loads(run("status", "--json").stdout)["jobs"]) == 2
        view = client.get(strange)
        assert view.unreadable is not None
        with pytest.raises(InvalidSpec, match="hologram"):
            _ = view.spec
        store = Store.open(client.settings.database_url)
        assert store.claim(strange.id, "w") is None
        store.close()
        after = client.get(strange)
        assert after.state == State.queued, "a newer worker may read it"
        assert after.error is not None and "hologram" in after.error


def test_cancel_and_retry_answer_in_words() -> None:
    with Client() as client:
        job = client.submit("a")
        assert run("cancel", str(job.id)).stdout == "cancelled\n"
        again = run("cancel", str(job.id))
        assert (again.exit_code, "cannot be cancelled" in again.stderr) == (1, True)
        assert run("retry", str(job.id)).exit_code == 1
        failed = client.submit("b")
        store = Store.open(client.settings.database_url)
        claim = store.claim(failed.id, "w")
        assert claim is not None
        store.fail(claim, "boom", retry=False)
        store.close()
        assert "boom" in run("status", str(failed.id)).stdout
        assert run("retry", str(failed.id)).stdout == "queued\n"
        assert client.get(failed.id).state == State.queued


def test_db_upgrade_on_postgres(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIGHTSHIFT_DATABASE_URL", postgres_url)
    before = run("status")
    assert (before.exit_code, "nightshift db upgrade" in before.stderr) == (1, True)
    assert "was empty" in run("db", "upgrade").stdout
    assert run("db", "upgrade").exit_code == 0
    assert run("status").exit_code == 0


@pytest.mark.parametrize(
    ("name", "value", "exit_code"),
    [
        ("NIGHTSHIFT_DATABASE_URL", f"postgresql://me:geheim@127.0.0.1:{free_port()}/x", 1),
        ("NIGHTSHIFT_DATABASE_URL", "mysql://me:geheim@host/x", 2),
        ("NIGHTSHIFT_BROKER_URL", "geheim", 2),
        ("NIGHTSHIFT_STORAGE_URL", "geheim", 2),
        ("NIGHTSHIFT_MODELS", "geheim=", 2),
    ],
)
def test_a_bad_setting_is_one_sentence(monkeypatch: pytest.MonkeyPatch, name: str, value: str, exit_code: int) -> None:
    monkeypatch.setenv(name, value)
    result = run("submit", "x")
    assert result.exit_code == exit_code
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert "geheim" not in result.output


def test_the_producers_half_needs_no_engine() -> None:
    loaded = {"torch", "numpy", "sd_engine", "worker"}
    program = f"import sys, jobs.cli, jobs.commands; print({loaded!r} & set(sys.modules))"
    import_only = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert import_only.stdout.strip() == "set()"


def test_an_entry_point_that_is_no_command_is_a_mistake_of_ours() -> None:
    with pytest.raises(TypeError, match="no click command"):
        cli.load(EntryPoint("x", "jobs.spec:JobSpec", cli.GROUP))
    assert isinstance(cli.load(POINTS[0]), click.Command)


def test_a_file_with_a_header_alone_has_no_rows(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,seed\n,\n")
    result = run("bulk", str(tmp_path / "a.csv"), "--batch", "none")
    assert (result.exit_code, "has no rows" in result.stderr) == (2, True)


def test_json_is_ascii_whatever_stands_in_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "sampler": "é🎨"}\n')
    result = run("bulk", str(tmp_path / "a.jsonl"), "--json")
    assert result.stdout.isascii()
    assert "é🎨" in json.loads(result.stdout)["invalid"][0]["errors"][0]
