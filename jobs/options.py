"""What the commands share: the options that describe a job, and how jobs are shown."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import click

from jobs.spec import ALLOWED
from jobs.states import State
from jobs.views import JobView

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

#: Field and what its value is called in --help. Values go to the spec as text, so that all complaints are the spec's.
SPEC_OPTIONS: Mapping[str, str] = {
    "negative_prompt": "TEXT",
    "width": "PIXELS",
    "height": "PIXELS",
    "steps": "N",
    "guidance": "G",
    "sampler": "NAME",
    "seed": "N",
    "images": "N",
    "init_image": "PATH",
    "strength": "S",
    "model": "NAME",
    "priority": "0..9",
}


def spec_options(command: Decorated) -> Decorated:
    """Add one option per field of the spec; those not given are left out of `given_fields`."""
    for field, metavar in reversed(list(SPEC_OPTIONS.items())):
        option = click.option(f"--{field.replace('_', '-')}", field, metavar=metavar, help=ALLOWED[field])
        command = option(command)
    return command


def given_fields(options: Mapping[str, Any]) -> dict[str, str]:
    """The options that were given. `none` takes a default away (`--guidance none`: unguided)."""
    return {field: options[field] for field in SPEC_OPTIONS if options.get(field) is not None}


def from_words(fields: Mapping[str, str]) -> dict[str, Any]:
    """Written values for `read_spec(from_text=True)`: the word `none` is None where the field knows it."""
    optional = {"width", "height", "guidance", "seed", "init_image"}
    return {
        field: None if field in optional and value.strip().lower() == "none" else value
        for field, value in fields.items()
    }


def as_json(view: JobView) -> dict[str, Any]:
    """A job as `status --json` shows it."""
    return {
        "id": str(view.id),
        "state": str(view.state),
        "attempts": view.attempts,
        "error": view.error,
        "images": [{"key": image.key, "seed": image.seed, "sha256": image.sha256} for image in view.images],
    }


def counts_as_json(counts: Mapping[State, int]) -> dict[str, int]:
    """Counts with plain names."""
    return {str(state): count for state, count in counts.items()}


def counts_as_text(counts: Mapping[State, int]) -> str:
    """`3 queued, 1 running, ...`."""
    return ", ".join(f"{count} {state}" for state, count in counts.items())


def jobs_as_text(views: Sequence[JobView]) -> list[str]:
    """One line per job."""
    return [
        f"{view.id}  {view.state:<9}  {view.attempts}  {_shortened(view.error or view.spec.prompt)}" for view in views
    ]


def _shortened(text: str, width: int = 70) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[: width - 3]}..."


def on_terminal() -> bool:
    """Whether a person watches: progress is for people, not for logs."""
    return sys.stderr.isatty()
