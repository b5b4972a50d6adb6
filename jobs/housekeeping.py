"""The commands that look after a house in use: prune, repair, doctor."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from importlib.metadata import EntryPoint

import click

from jobs.checks import Finding, Mark, installed_checks
from jobs.client import Client
from jobs.errors import SettingsError
from jobs.options import on_terminal
from jobs.prune import Order, Pruned, silently
from jobs.redaction import hide
from jobs.repair import Damage
from jobs.settings import Settings
from jobs.states import TERMINAL, State

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
MAX_AGE = timedelta(days=36500)  # no job is older; far beyond it no calendar has a date to compare with
#: Damaged pictures that are listed; the rest is counted.
SHOWN_DAMAGE = 50


def _age(context: click.Context, param: click.Parameter, value: str) -> timedelta:
    """A time span in one unit: 90s, 30m, 12h, 30d, 4w."""
    match = re.fullmatch(r"([0-9]{1,6})([smhdw])", value.strip())
    if match is None:
        raise click.BadParameter(f"{value!r} is no age; write a number and one of s, m, h, d, w: 12h, 30d")
    age = timedelta(**{_UNITS[match[2]]: int(match[1])})
    if age > MAX_AGE:
        raise click.BadParameter(f"{value!r} is more than a job can be old; write at most {MAX_AGE.days}d")
    return age


def _states(context: click.Context, param: click.Parameter, value: str | None) -> frozenset[State]:
    """Some of the states that end a job, separated by commas; all of them when none is given."""
    names = TERMINAL if value is None else {word.strip() for word in value.split(",")}
    if not names <= TERMINAL:
        allowed = ", ".join(sorted(TERMINAL))
        raise click.BadParameter(f"{value!r} is not allowed; allowed: {allowed}, separated by commas")
    return frozenset(State(name) for name in names)


@click.command(
    epilog="""\b
Examples:
  nightshift prune --older-than 30d --dry-run
  nightshift prune --older-than 30d
  nightshift prune --older-than 7d --state failed,cancelled --batch tonight

Safe beside workers, and to be stopped at any moment: the next prune goes on. Exit code 0: done."""
)
@click.option(
    "--older-than", callback=_age, required=True, metavar="AGE", help="jobs that ended longer ago: 12h, 30d, 4w"
)
@click.option(
    "--state", "states", callback=_states, metavar="STATE,...", help="only of these: succeeded, failed, cancelled"
)
@click.option("--batch", metavar="NAME", help="only the jobs of this batch")
@click.option(
    "--orphans-older-than", callback=_age, default="1d", metavar="AGE", show_default=True,
    help="objects that no job names, stored longer ago",
)  # fmt: skip
@click.option(
    "--unknown", is_flag=True, help="also objects of jobs that this database never had (another database's, a gallery)"
)
@click.option("--dry-run", is_flag=True, help="count what would go, and remove nothing")
@click.option("--json", "json_form", is_flag=True, help="print the counts as JSON")
def prune(
    older_than: timedelta,
    states: frozenset[State],
    batch: str | None,
    orphans_older_than: timedelta,
    unknown: bool,
    dry_run: bool,
    json_form: bool,
) -> None:
    """Remove old jobs with their pictures, and objects that no job names."""
    order = Order(older_than, states, batch, orphans_older_than, unknown, dry_run)
    with Client() as client:
        done = client.prune(order, _watch if on_terminal() else silently)
    if json_form:
        click.echo(json.dumps({"dry_run": dry_run, **asdict(done)}))
        return
    for line in _told(done, order):
        click.echo(line)


def _told(done: Pruned, order: Order) -> Iterator[str]:
    would = "would be removed" if order.dry_run else "removed"
    yield (
        f"{done.jobs} jobs with {done.objects} objects, {done.batches} empty batches, {done.inputs} inputs and "
        f"{done.orphans} orphans {would}"
    )
    if done.unfinished:
        yield f"{done.unfinished} unfinished files {would}"
    if done.unknown and not order.unknown:
        yield f"{done.unknown} objects of jobs that this database never had stay (--unknown removes them)"
    elif done.unknown:
        yield f"{done.unknown} objects of jobs that this database never had {would}"


def _watch(label: str, step: Iterable[int], total: int | None) -> None:
    """A bar where the number is known, else a line that counts."""
    if total is not None:
        with click.progressbar(length=total, label=label, file=sys.stderr) as bar:
            for count in step:
                bar.update(count)
        return
    seen = 0
    for count in step:
        seen += count
        click.echo(f"\r{label}: {seen}", nl=False, err=True)
    if seen:
        click.echo(err=True)


@click.command(
    epilog="""\b
Examples:
  nightshift repair --dry-run
  nightshift repair --batch tonight --deep
  nightshift repair --job 018f2a5c-0000-7000-8000-000000000000

Exit code 0: nothing was missing, or its jobs are queued again; 1 with --dry-run: something is missing."""
)
@click.option("--batch", metavar="NAME", help="only the jobs of this batch")
@click.option("--job", "jobs", metavar="ID", multiple=True, help="only this job; may be given again")
@click.option("--deep", is_flag=True, help="read every picture and compare its sha256")
@click.option("--all-missing", is_flag=True, help="queue the jobs again although not one picture is there")
@click.option("--dry-run", is_flag=True, help="list what is missing, and queue nothing")
@click.option("--json", "json_form", is_flag=True, help="print what was found as JSON")
@click.pass_context
def repair(
    context: click.Context,
    /,
    batch: str | None,
    jobs: tuple[str, ...],
    deep: bool,
    all_missing: bool,
    dry_run: bool,
    json_form: bool,
) -> None:
    """Find pictures that the storage has lost, and queue their jobs again."""
    if batch is not None and jobs:
        raise click.UsageError("give --batch or --job, not both")
    with Client() as client:
        with _counted("looking", len(jobs) or client.count_succeeded(batch)) as seen:
            found = client.check_images(batch=batch, job_ids=jobs, deep=deep, all_missing=all_missing, seen=seen)
        queued = [] if dry_run else client.repair(found)
    if json_form:
        damage = [{"job": str(each.job_id), "image": each.index, "reason": each.reason} for each in found]
        click.echo(json.dumps({"dry_run": dry_run, "damaged": damage, "queued": [str(job) for job in queued]}))
    else:
        _tell_damage(found, len(queued))
    context.exit(1 if dry_run and found else 0)


def _tell_damage(found: Sequence[Damage], queued: int) -> None:
    for each in found[:SHOWN_DAMAGE]:
        click.echo(f"{each.job_id}  image {each.index} {each.reason}")
    if len(found) > SHOWN_DAMAGE:
        click.echo(f"... and {len(found) - SHOWN_DAMAGE} more")
    click.echo(f"{len(found)} damaged pictures, {queued} jobs queued again")


@contextmanager
def _counted(label: str, total: int) -> Iterator[Callable[[int], None]]:
    if not on_terminal():
        yield lambda count: None
        return
    with click.progressbar(length=total, label=label, file=sys.stderr) as bar:
        yield bar.update


@click.command(epilog="\b\nExamples:\n  nightshift doctor\n  nightshift doctor --json\n\nExit code 1: a check failed.")
@click.option("--json", "json_form", is_flag=True, help="print the checks as JSON")
@click.pass_context
def doctor(context: click.Context, /, json_form: bool) -> None:
    """Look at database, broker, storage, models and device, and say what to do."""
    found = list(_findings())
    if json_form:
        click.echo(json.dumps([asdict(each) for each in found]))
    else:
        width = max(len(each.check) for each in found)
        for each in found:
            click.echo(f"{each.mark:<7}  {each.check:<{width}}  {each.seen}")
            if each.remedy and each.mark != Mark.ok:
                click.echo(f"{'':<9}{'':<{width}}  -> {each.remedy}")
    context.exit(1 if any(each.mark == Mark.failed for each in found) else 0)


def _findings() -> Iterator[Finding]:
    try:
        settings = Settings()
    except SettingsError as error:
        yield Finding("settings", Mark.failed, hide(str(error)), "set it right; the README lists every setting")
        return
    for point in installed_checks():
        yield from _of_package(point, settings)


def _of_package(point: EntryPoint, settings: Settings) -> Iterator[Finding]:
    try:
        checks = point.load()
    except ModuleNotFoundError as error:
        remedy = f"pip install 'nightshift[{point.name}]', where jobs are to be rendered"
        yield Finding(point.name, Mark.skipped, f"{error.name} is not installed", remedy)
        return
    for each in checks(settings):
        yield Finding(each.check, each.mark, hide(each.seen), each.remedy)
