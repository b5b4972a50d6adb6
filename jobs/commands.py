"""The producer's commands: submit, bulk, status, cancel, retry, db upgrade."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from jobs import schema
from jobs.bulkfile import Row, read_alone, read_bulk
from jobs.client import Client, as_id
from jobs.db import open_engines
from jobs.errors import BadFile, InvalidSpec, StorageError
from jobs.models import SCHEMA_REVISION
from jobs.options import (
    GroupedCommand,
    as_json,
    counts_as_json,
    counts_as_text,
    details_as_text,
    from_words,
    given_fields,
    jobs_as_text,
    on_terminal,
    spec_options,
)
from jobs.settings import Settings
from jobs.spec import JobSpec, read_spec
from jobs.spec_checks import NEEDS
from jobs.states import State
from jobs.views import JobView, Output

#: Bad rows that are listed; the rest is counted.
SHOWN_ERRORS = 50


def _print_json(value: object) -> None:
    # ASCII alone: whatever the terminal's encoding, and whatever stands in a bad row, the reader gets it whole.
    click.echo(json.dumps(value))


@click.command(
    cls=GroupedCommand,
    epilog="""\b
Examples:
  nightshift submit "a small red star on a blue background"
  nightshift submit "a castle" --steps 30 --seed 7 --images 4 --wait
  nightshift submit "a castle" --sampler "DPM++ 2M Karras" --clip-skip 2
  nightshift submit "a castle" --init-image sketch.png --strength 0.6
  nightshift submit "a tower" --init-image castle.png --mask tower.png --mask-blur 4
  nightshift submit "a castle" --upscale 2 --upscale-strength 0.6""",
)
@click.argument("prompt")
@spec_options
@click.option("--batch", metavar="NAME", help="Add the job to this named batch.")
@click.option("--idempotency-key", metavar="KEY", help="Submitting again with this key gives the first job.")
@click.option("--wait", is_flag=True, help="Wait until the job has ended; exit 1 if it did not succeed.")
@click.option(
    "--timeout", type=click.FloatRange(min=0), metavar="SECONDS", help="With --wait: give up after this time."
)
@click.option("--json", "json_form", is_flag=True, help="Print the job as JSON.")
@click.pass_context
def submit(context: click.Context, /, prompt: str, json_form: bool, wait: bool, **options: Any) -> None:
    """Submit one job; prints its id."""
    spec = read_spec(from_words({"prompt": prompt, **given_fields(options)}), from_text=True)
    with Client() as client:
        (view,) = client.submit_many([spec], batch=options["batch"], idempotency_keys=[options["idempotency_key"]])
        if wait:
            view = client.wait(view, options["timeout"])
        _show_submitted(client, view, json_form=json_form)
    if wait and view.state != State.succeeded:
        context.exit(1)


def _show_submitted(client: Client, view: JobView, *, json_form: bool) -> None:
    if json_form:
        _print_json(as_json(view))
        return
    click.echo(view.id)
    for image in view.images:
        click.echo(client.image_url(view.id, image.index))
    if view.ended and view.state != State.succeeded:
        click.echo(f"{view.state}: {view.error or 'no reason given'}", err=True)


@click.command(
    cls=GroupedCommand,
    epilog="""\b
Examples:
  nightshift bulk prompts.txt --batch tonight --steps 30
  nightshift bulk jobs.csv --batch tonight       (header: prompt,seed,steps,...)
  nightshift bulk jobs.jsonl --skip-invalid      ({"prompt": "...", "seed": 7, "upscale": 2})""",
)
@click.argument("file", type=click.Path(path_type=Path))
@spec_options
@click.option("--batch", metavar="NAME", help="Add the jobs to this named batch.")
@click.option("--skip-invalid", is_flag=True, help="Enqueue the good rows although some are bad.")
@click.option("--json", "json_form", is_flag=True, help="Print the outcome as JSON.")
@click.pass_context
def bulk(
    context: click.Context, /, file: Path, batch: str | None, skip_invalid: bool, json_form: bool, **options: Any
) -> None:
    """Submit every row of FILE (txt: a prompt a line, csv, jsonl) in one transaction.

    Options set fields that a row does not give itself. Bad rows are listed by line, and then nothing is enqueued
    unless --skip-invalid. Exit code 2 says that nothing was enqueued because of bad rows.
    """
    defaults = given_fields(options)
    read_alone(defaults)  # the options' own mistakes
    with _without_search_for_cycles(), Client() as client:
        rows = _stored(client, _read(file, defaults))
        if not rows:
            raise BadFile(f"{file}: has no rows")
        bad = [row for row in rows if row.errors]
        specs = [row.spec for row in rows if row.spec is not None]
        refused = bool(bad) and (not skip_invalid or not specs)
        views = [] if refused else client.submit_many(specs, batch=batch)
    _report_bulk(views, bad, batch, json_form=json_form)
    if refused:
        context.exit(2)
    _tell_unused(defaults, specs)


@contextmanager
def _without_search_for_cycles() -> Iterator[None]:
    """A file of 100,000 rows is a million objects, all in use until the end: to look for garbage among them again and
    again would take a third of the time."""
    searched = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if searched:
            gc.enable()


def _tell_unused(common: Iterable[str], specs: Sequence[JobSpec]) -> None:
    """The options that not one row could use: left out silently, they would seem to have been obeyed."""
    for field in common:
        need = NEEDS.get(field)
        if need is not None and not any(need.met(getattr(spec, need.of)) for spec in specs):
            click.echo(f"{field}: was used by no row; none has {need.what}", err=True)


def _read(file: Path, defaults: dict[str, str]) -> list[Row]:
    rows = read_bulk(file, defaults)
    if not on_terminal():
        return list(rows)
    with click.progressbar(rows, label="reading", file=sys.stderr) as watched:
        found: list[Row] = list(watched)
    return found


def _stored(client: Client, rows: Sequence[Row]) -> list[Row]:
    """The rows with their pictures stored; a picture that cannot be used makes its row bad."""
    inputs, checked = client.inputs(), []
    for row in rows:
        if row.spec is not None and row.spec.init_image is not None:
            try:
                row = Row(row.line, inputs.stored(row.spec))
            except InvalidSpec as error:
                row = Row(row.line, None, error.errors)
        checked.append(row)
    return checked


def _report_bulk(views: Sequence[JobView], bad: Sequence[Row], batch: str | None, *, json_form: bool) -> None:
    for row in bad[:SHOWN_ERRORS]:
        for error in row.errors:
            click.echo(f"line {row.line}: {error}", err=True)
    if len(bad) > SHOWN_ERRORS:
        click.echo(f"... and {len(bad) - SHOWN_ERRORS} more bad rows", err=True)
    if bad and not views:
        click.echo(f"{len(bad)} bad rows; nothing was enqueued (--skip-invalid enqueues the good ones)", err=True)
    if json_form:
        invalid = [{"line": row.line, "errors": [str(error) for error in row.errors]} for row in bad]
        _print_json(
            {"batch": batch, "enqueued": len(views), "ids": [str(view.id) for view in views], "invalid": invalid}
        )
    elif views:
        named = f" in batch {batch}" if batch else ""
        skipped = f", {len(bad)} skipped" if bad else ""
        click.echo(f"{len(views)} jobs enqueued{named}{skipped}")


@click.command(
    epilog="""\b
Examples:
  nightshift status
  nightshift status --batch tonight --state failed
  nightshift status 018f2a5c-0000-7000-8000-000000000000 --json"""
)
@click.argument("ids", metavar="[ID]...", nargs=-1)
@click.option("--batch", metavar="NAME", help="Only the jobs of this batch.")
@click.option("--state", type=click.Choice([str(state) for state in State]), help="List only jobs in this state.")
@click.option("--limit", type=click.IntRange(min=0), default=20, show_default=True, help="List at most this many jobs.")
@click.option("--json", "json_form", is_flag=True, help="Print counts and jobs as JSON.")
def status(ids: tuple[str, ...], batch: str | None, state: str | None, limit: int, json_form: bool) -> None:
    """Show how many jobs are in each state, and the newest jobs; of jobs named, all that is known."""
    wanted = [as_id(text) for text in ids]
    with Client() as client:
        counts = client.counts(batch)
        if wanted:
            views = [client.get(job_id) for job_id in wanted]
        else:
            views = client.jobs(batch=batch, state=State(state) if state else None, limit=limit)
        pictures = {view.id: [_picture(client, view, image) for image in view.images] for view in views if wanted}
    if json_form:
        _print_json(
            {"counts": counts_as_json(counts), "jobs": [as_json(view, pictures.get(view.id)) for view in views]}
        )
        return
    click.echo(counts_as_text(counts))
    for view, line in zip(views, jobs_as_text(views), strict=True):
        click.echo(line)
        for detail in details_as_text(view) if wanted else ():
            click.echo(detail)
        for picture in pictures.get(view.id, ()):
            click.echo(f"  {picture['url'] or picture['problem']}")


def _picture(client: Client, view: JobView, image: Output) -> dict[str, str | None]:
    """Where the picture is, or why it is not there and what brings it back."""
    try:
        return {"url": client.image_url(view, image.index), "problem": None}
    except StorageError as error:  # also a storage that does not answer: the rest is worth showing
        return {"url": None, "problem": str(error)}


@click.command(
    epilog="""\b
Example:
  nightshift cancel 018f2a5c-0000-7000-8000-000000000000

\b
Exit codes: 0 cancelled or asked to stop, 1 it had ended before or a service does not answer, 2 no such job."""
)
@click.argument("job_id", metavar="ID")
def cancel(job_id: str) -> None:
    """Cancel a queued job, or ask the worker of a running one to stop."""
    with Client() as client:
        state = client.cancel(job_id)
    click.echo("cancelled" if state == State.cancelled else "its worker was asked to stop")


@click.command(
    epilog="""\b
Example:
  nightshift retry 018f2a5c-0000-7000-8000-000000000000

\b
Exit codes: 0 queued again, 1 it has not failed or a service does not answer, 2 no such job."""
)
@click.argument("job_id", metavar="ID")
def retry(job_id: str) -> None:
    """Put a failed job back into the queue."""
    with Client() as client:
        client.retry(job_id)
    click.echo("queued")


@click.group()
def db() -> None:
    """Look after the database's tables."""


@db.command(epilog="\b\nExample:\n  NIGHTSHIFT_DATABASE_URL=postgresql://me@host/nightshift nightshift db upgrade")
def upgrade() -> None:
    """Bring the tables to this version. Safe to repeat, and to run from several machines at once."""
    settings = Settings()
    settings.make_home()
    engines = open_engines(settings.database_url)
    try:
        before = schema.upgrade(engines)
    finally:
        engines.dispose()
    after = SCHEMA_REVISION
    click.echo(f"{engines.shown} is at revision {after}" + ("" if before == after else f" (was {before or 'empty'})"))
