"""The one command `nightshift`: its subcommands come from entry points, each loaded when it is called.

So nothing here imports upwards, and the producer's half works where torch is not installed.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

import click
import sqlalchemy.exc

from jobs.errors import BadFile, InvalidSpec, JobNotFound, NightshiftError, SettingsError
from jobs.redaction import guard_tracebacks, hide

GROUP = "nightshift.commands"
_WRONG_INPUT = (BadFile, InvalidSpec, JobNotFound, SettingsError)


class Wrong(click.ClickException):
    """What was asked for is wrong; also a command whose part of Nightshift is not installed."""

    exit_code = 2


class Failed(click.ClickException):
    """What was asked for did not work."""

    exit_code = 1


class EntryPointGroup(click.Group):
    """A group whose commands are the entry points of `nightshift.commands`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Every installed command, by name."""
        return sorted(point.name for point in entry_points(group=GROUP))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, loaded now; one whose extra is missing answers with a sentence."""
        for point in entry_points(group=GROUP, name=cmd_name):
            return load(point)
        return None

    def invoke(self, ctx: click.Context) -> object:
        """Run; an error meant for people becomes a sentence and an exit code."""
        try:
            return super().invoke(ctx)
        except NightshiftError as error:
            raise (Wrong if isinstance(error, _WRONG_INPUT) else Failed)(hide(str(error))) from error
        except sqlalchemy.exc.DBAPIError as error:  # the connection broke in the middle
            raise Failed(hide(_told(error))) from error


def _told(error: sqlalchemy.exc.DBAPIError) -> str:
    reason = str(error.orig).strip().splitlines()[0] if error.orig else "no reason given"
    if "disk" in reason or "No space left" in reason:  # SQLite: database or disk is full, disk I/O error
        return f"the database cannot write: {reason}; make room on its disk, and try again"
    return f"the database stopped answering: {reason}"


def load(point: EntryPoint) -> click.Command:
    """The entry point's command, or a stand-in that says which extra to install."""
    try:
        command = point.load()
    except ModuleNotFoundError as error:
        return _stand_in(point, error.name or "a module")
    if not isinstance(command, click.Command):
        raise TypeError(f"entry point {point.name} of {GROUP} is no click command")
    return command


def _stand_in(point: EntryPoint, missing: str) -> click.Command:
    extra = point.extras[0] if point.extras else "worker"
    remedy = f"pip install 'nightshift[{extra}]'"

    def explain(arguments: tuple[str, ...]) -> None:
        raise Wrong(f"`nightshift {point.name}` needs {missing}, which is not installed: {remedy}")

    return click.Command(
        point.name,
        callback=explain,
        params=[click.Argument(["arguments"], nargs=-1, type=click.UNPROCESSED)],
        short_help=f"(not installed: {remedy})",
        # Whatever options the real command has, the answer is the same; also for --help.
        context_settings={"ignore_unknown_options": True},
        add_help_option=False,
    )


@click.group(
    cls=EntryPointGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Settings are read from NIGHTSHIFT_HOME, _DATABASE_URL, _BROKER_URL, _STORAGE_URL and _MODELS; "
    "with none set, everything lives in one data directory and nothing has to be started.",
)
@click.version_option(package_name="nightshift", prog_name="nightshift")
def nightshift() -> None:
    """Render Stable Diffusion jobs from a queue."""


def main() -> None:
    """The console script."""
    guard_tracebacks()
    nightshift(prog_name="nightshift")


if __name__ == "__main__":
    main()
