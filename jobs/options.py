"""What the commands share: the options that describe a job, and how jobs are shown."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import click

from jobs.fields import ALLOWED
from jobs.spec import JobSpec
from jobs.states import State
from jobs.views import JobView

Decorated = TypeVar("Decorated", bound=Callable[..., Any])
#: The fields that may be none.
_OPTIONAL = {"guidance", *(field for field, info in JobSpec.model_fields.items() if info.default is None)}


#: The fields in groups: the word for the value, and what it is. Those of a picture are given as paths here.
GROUPS: Mapping[str, Mapping[str, tuple[str, str]]] = {
    "What is drawn": {
        "negative_prompt": ("TEXT", "what is not to be seen"),
        "width": ("PIXELS", "before a second pass"),
        "height": ("PIXELS", "before a second pass"),
        "seed": ("N", "image number i takes seed + i"),
        "images": ("N", "how many"),
        "model": ("NAME", "one of the worker's models"),
        "priority": ("0..9", "what is drawn first"),
    },
    "How it is drawn": {
        "steps": ("N", "of the sampler"),
        "sampler": ("NAME", "ours, or as A1111 and ComfyUI call it"),
        "eta": ("E", "noise of the sampler ddim; 1 is as much as ddpm's"),
        "guidance": ("G", "how closely the prompt is followed (CFG scale)"),
        "guidance_rescale": ("R", "how far strong guidance is kept from washing out"),
        "clip_skip": ("N", "layer of the text encoder, counted from its last, which is 1"),
        "noise": ("KIND", "whose random numbers: torch's on a CPU, or a CUDA device's"),
    },
    "Faster, but another picture": {
        "guidance_start": ("SHARE", "share of the steps before which none is guided"),
        "guidance_stop": ("SHARE", "share of the steps after which none is guided"),
        "deepcache_interval": ("N", "one of so many steps computes the whole U-Net, the others its last block"),
        "token_merging_ratio": ("R", "share of the positions that is merged in self-attention; for large sizes"),
        "decoder": ("WHAT", "what makes the picture of the last latent: tiny is the model's TAESD, if it has one"),
    },
    "From a picture": {
        "init_image": ("PATH", "what is started from"),
        "strength": ("S", "how much of it is drawn anew"),
        "mask": ("PATH", "of the init_image's size: white is drawn anew, black and transparent is kept"),
        "mask_blur": ("PIXELS", "how soft the mask's edge is made"),
        "resize": ("HOW", "how an init_image of another shape comes to width x height"),
    },
    "Larger, by a second pass": {
        "upscale": ("TIMES", "draw it again at so many times the size"),
        "upscale_strength": ("S", "how much is then drawn anew"),
        "upscale_steps": ("N", "that pass's own"),
        "upscale_by": ("WHAT", "what is enlarged between the passes"),
    },
}
_GROUP_OF = {field: group for group, fields in GROUPS.items() for field in fields}


class GroupedCommand(click.Command):
    """A command whose --help lists the options of the spec in the groups of its fields, before its own."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one section for each group."""
        sections: dict[str, list[tuple[str, str]]] = {group: [] for group in (*GROUPS, "Options")}
        for option in self.get_params(ctx):
            record = option.get_help_record(ctx)
            if record is not None and isinstance(option, click.Option):
                sections[_GROUP_OF.get(str(option.name), "Options")].append(record)
        for group, records in sections.items():
            with formatter.section(group):
                formatter.write_dl(records)


def spec_options(command: Decorated) -> Decorated:
    """Add one option per field of the spec; those not given are left out of `given_fields`.

    Values go to the spec as text, so that all complaints are the spec's.
    """
    told = {field: words for fields in GROUPS.values() for field, words in fields.items()}
    for field, (metavar, what) in reversed(told.items()):
        text = f"{what}: {ALLOWED[field]}{_default(field)}"
        flag = f"--{field.replace('_', '-')}"
        command = click.option(flag, field, metavar=metavar, help=text)(command)
    return command


def _default(field: str) -> str:
    default = JobSpec.model_fields[field].default
    return "" if default in (None, "") else f"  [default: {default}]"


def given_fields(options: Mapping[str, Any]) -> dict[str, str]:
    """The options that were given. `none` takes a default away (`--guidance none`: unguided)."""
    return {field: options[field] for field in _GROUP_OF if options.get(field) is not None}


def from_words(fields: Mapping[str, str]) -> dict[str, Any]:
    """Written values for `read_spec(from_text=True)`: the word `none` is None where the field knows it."""
    return {
        field: None if field in _OPTIONAL and value.strip().lower() == "none" else value
        for field, value in fields.items()
    }


def as_json(view: JobView, pictures: Sequence[Mapping[str, Any]] | None = None) -> dict[str, Any]:
    """A job as `status --json` shows it. pictures: what else is known of each image."""
    images = [{"key": image.key, "seed": image.seed, "sha256": image.sha256} for image in view.images]
    known = pictures or [{}] * len(images)
    return {
        "id": str(view.id),
        "state": str(view.state),
        "attempts": view.attempts,
        "error": view.error,
        "traceback": view.traceback,
        "suspect": view.suspect,
        "solo_crashes": view.solo_crashes,
        "images": [image | dict(more) for image, more in zip(images, known, strict=True)],
    }


def counts_as_json(counts: Mapping[State, int]) -> dict[str, int]:
    """Counts with plain names."""
    return {str(state): count for state, count in counts.items()}


def counts_as_text(counts: Mapping[State, int]) -> str:
    """`3 queued, 1 running, ...`."""
    return ", ".join(f"{count} {state}" for state, count in counts.items())


def jobs_as_text(views: Sequence[JobView]) -> list[str]:
    """One line per job."""
    return [f"{view.id}  {view.state:<9}  {view.attempts}  {_shortened(_told(view))}" for view in views]


def details_as_text(view: JobView) -> list[str]:
    """What the line of a job has no room for: why it is held back, its whole error, and the traceback of that."""
    lines = [f"  {'error:':<8} {view.error}"] if view.error else []
    if view.suspect and not view.ended:
        lines.append("  suspect: held by a worker that stopped answering; waits to be rendered alone")
    if view.solo_crashes:
        lines.append(f"  crashed: {view.solo_crashes} workers that rendered it alone")
    if view.traceback:
        lines += ["  traceback:", *(f"    {line}" for line in view.traceback.splitlines())]
    return lines


def _told(view: JobView) -> str:
    if view.error or view.unreadable:
        return view.error or f"(a spec that this version cannot read: {view.unreadable})"
    return view.spec.prompt


def _shortened(text: str, width: int = 70) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[: width - 3]}..."


def on_terminal() -> bool:
    """Whether a person watches: progress is for people, not for logs."""
    return sys.stderr.isatty()
