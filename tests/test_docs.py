"""The README tells the truth: its Python runs, its tables are complete, its commands and options exist."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path

import click
import pytest

from jobs import Client, JobSpec, Settings, State
from jobs.bulkfile import read_bulk
from jobs.fields import ALLOWED
from jobs.options import GROUPS
from jobs.samplers import FAMILIES, members
from worker.cli import worker

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
GLOSSARY = ("spec", "job", "batch", "message", "request", "row", "pack", "lane", "schedule", "sampler")
COMMANDS = {point.name: point for point in entry_points(group="nightshift.commands")}


def blocks(language: str) -> list[str]:
    """The README's code blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def typed_commands() -> list[list[str]]:
    """Every `nightshift ...` line of the README's shell blocks, in words."""
    lines = "\n".join(blocks("sh")).splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("nightshift ")]


@pytest.fixture
def running_worker(tmp_path: Path) -> Iterator[Settings]:
    """`nightshift worker` on the embedded default, as the README starts it; its data directory is the test's own."""
    settings = Settings()
    settings.make_home()
    with (tmp_path / "worker.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "worker", "--device", "cpu"], stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        yield settings
    finally:
        process.terminate()
        try:
            process.wait(timeout=40)  # its grace time is 25 s
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _run(code: str, folder: Path) -> str:
    folder.mkdir()
    command = [sys.executable, "-W", "error", "-c", code]
    result = subprocess.run(command, cwd=folder, env=os.environ, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_quickstart_renders_and_saves_its_pictures(running_worker: Settings, tmp_path: Path) -> None:
    (code,) = (block for block in blocks("python") if "Client" in block)
    _run(code, tmp_path / "producer")
    pictures = sorted((tmp_path / "producer").glob("*.png"))
    assert len(pictures) == 4 and all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
    with Client(running_worker) as client:
        counts = {state: count for state, count in client.counts().items() if count}
    assert counts == {State.succeeded: 4}


def test_the_engines_example_draws_as_it_says(tmp_path: Path) -> None:
    (code,) = (block for block in blocks("python") if "Engine" in block)
    assert re.fullmatch(r"\(\d+, \d+, 3\) uint8\n", _run(code, tmp_path / "engine"))


def test_the_bulk_examples_rows_are_good_rows(tmp_path: Path) -> None:
    (text,) = blocks("jsonl")
    (tmp_path / "prompts.jsonl").write_text(text)
    rows = list(read_bulk(tmp_path / "prompts.jsonl", {"guidance": "4"}))
    assert len(rows) == 2 and not any(row.errors for row in rows)


@pytest.mark.parametrize("words", typed_commands(), ids=" ".join)
def test_a_typed_command_has_the_options_it_is_typed_with(words: list[str]) -> None:
    command: click.Command = COMMANDS[words[0]].load()
    if isinstance(command, click.Group):
        command = command.commands[words[1]]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_is_in_the_readme(name: str) -> None:
    assert re.search(rf"^\| `nightshift {name}\b", README, re.MULTILINE)


def test_the_settings_table_is_complete_and_names_nothing_else() -> None:
    settings = {f"NIGHTSHIFT_{field.upper()}" for field in Settings.model_fields}
    options = {str(parameter.envvar) for parameter in worker.params if parameter.envvar}
    rows = set(re.findall(r"^\| `(NIGHTSHIFT_\w+)` \|", README, re.MULTILINE))
    assert rows == settings | options
    assert set(re.findall(r"NIGHTSHIFT_\w+", README)) <= rows


@pytest.mark.parametrize("word", GLOSSARY)
def test_a_word_of_the_glossary_is_explained_and_lives_where_it_says(word: str) -> None:
    (place,) = re.findall(rf"^\| {word} \| [^|]+ \| ([^|]+) \|$", README, re.MULTILINE)
    assert place == "Redis" or (ROOT / place.strip("`")).is_file()


def sampler_table() -> Iterator[str]:
    """The README's table of sampler names, from the names themselves."""
    yield "| name | A1111 | ComfyUI: `sampler_name` | its `scheduler` |"
    yield "|---|---|---|---|"
    for family in FAMILIES:
        named = list(members(family))
        comfy = [names.comfy for names in named if names.comfy]
        schedulers = ", ".join(f"`{scheduler}`" for _, scheduler in comfy) or "-"
        sampler = f"`{comfy[0][0]}`" if comfy else "-"
        ours = ", ".join(f"`{names.name}`" for names in named)
        yield f"| {ours} | {', '.join(names.a1111 for names in named)} | {sampler} | {schedulers} |"


def field_table() -> Iterator[str]:
    """The README's table of the spec's fields, from the spec itself."""
    yield "| field | is | allowed | default |"
    yield "|---|---|---|---|"
    meanings = {field: meaning for fields in GROUPS.values() for field, (_, meaning) in fields.items()}
    for field in ("prompt", *meanings):
        default = JobSpec.model_fields[field].default
        shown = "" if field == "prompt" else "none" if default in (None, "") else f"`{default}`"
        yield f"| `{field}` | {meanings.get(field, 'what is to be seen')} | {ALLOWED[field]} | {shown} |"


@pytest.mark.parametrize("table", [sampler_table, field_table])
def test_a_table_of_the_readme_is_that_of_the_code(table: Callable[[], Iterator[str]]) -> None:
    assert "\n".join(table()) in README, "write this table instead:\n" + "\n".join(table())


def test_the_way_of_a_job_has_eight_lines() -> None:
    section = README.split("## The way of a job\n")[1].split("\n## ")[0]
    assert [line.split(".")[0] for line in section.splitlines() if line] == [str(n) for n in range(1, 9)]


def test_every_make_target_of_the_readme_is_in_the_makefile() -> None:
    named = set(re.findall(r"(?:^|`)make (\.?[a-z][a-z-]*)", README, re.MULTILINE))
    targets = set(re.findall(r"^([.a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test", "check"} <= named <= targets


def test_every_file_that_the_readme_names_is_there() -> None:
    named = set(re.findall(r"`((?:jobs|sd_engine|worker|tests|docker)/[\w./-]*)`", README))
    assert named and [name for name in named if not (ROOT / name).exists()] == []
