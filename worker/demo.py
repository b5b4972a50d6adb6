"""``nightshift demo``: the main job, end to end, on the embedded default, in a data directory of its own."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import click

from jobs import Client, JobSpec, Settings, State
from jobs.errors import NightshiftError
from jobs.settings import database_in, storage_in
from jobs.views import JobView
from worker import THIS_WORKER
from worker.lifeline import Listening
from worker.model_shelf import served
from worker.sheet import Print, contact_sheet

#: Seconds. Far above what two slow cores need; a demo that hangs helps nobody.
PATIENCE_S = 600.0
BATCH = "demo"
WORKER_COMMAND = THIS_WORKER

# (prompt, what differs from the defaults). The first picture is what the img2img jobs start from.
FIRST: tuple[str, dict[str, Any]] = ("a large red star on a blue background", {"steps": 20, "guidance": 4.0})
FROM_TEXT: Sequence[tuple[str, dict[str, Any]]] = (
    ("a large green circle on a white background", {"sampler": "ddim", "steps": 20, "guidance": 4.0}),
    ("a small yellow heart on a purple background", {"sampler": "euler", "steps": 16, "guidance": 5.0}),
    ("a large blue square on a yellow background", {"sampler": "euler_a", "steps": 24, "guidance": 4.0}),
    ("a large orange triangle on a black background", {"sampler": "euler_karras", "steps": 14, "guidance": 3.0}),
    ("a small white cross on a red background", {"sampler": "euler_a_karras", "steps": 18, "guidance": 6.0}),
    ("a large pink heart on a green background", {"sampler": "dpmpp_2m", "steps": 12, "guidance": 4.0}),
    ("a large purple star on a white background", {"sampler": "ddpm", "steps": 30, "guidance": 3.0}),
    ("a large yellow circle on a black background", {"width": 128, "height": 96, "steps": 15, "guidance": 4.0}),
    ("a small red triangle on a white background", {"width": 96, "height": 128, "steps": 15, "guidance": 4.0}),
    ("a large black square on a pink background", {"width": 64, "height": 64, "steps": 10, "guidance": None}),
    ("a large red heart on a white background", {"images": 2, "steps": 16, "guidance": 4.0}),
)
FROM_IMAGE: Sequence[tuple[str, dict[str, Any]]] = (
    ("a large yellow star on a blue background", {"strength": 0.8, "steps": 20, "guidance": 5.0}),
    ("a large red star on a green background", {"strength": 0.6, "steps": 20, "sampler": "ddim", "guidance": 5.0}),
    ("a large purple circle on a blue background", {"strength": 0.9, "steps": 18, "sampler": "euler", "guidance": 5.0}),
)


@dataclass(frozen=True, slots=True)
class Summary:
    """What the demo made. ``seconds``: from the first submit to the last finished job, the worker's start included."""

    home: Path
    sheet: Path
    jobs: int
    failed: int
    images: int
    seconds: float
    errors: tuple[str, ...]
    pictures: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return self.failed == 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"home": str(self.home), "sheet": str(self.sheet), "ok": self.ok}

    def as_text(self) -> str:
        lines = [
            f"{self.jobs} jobs, {self.images} images in {self.seconds:.1f} s"
            + (f", {self.failed} failed" if self.failed else ""),
            *(f"  failed: {error}" for error in self.errors),
            f"contact sheet  {self.sheet}",
            f"pictures       {self.home / 'storage' / 'images'}",
            f"database       {self.home / 'nightshift.db'}",
        ]
        return "\n".join(lines)


def new_home(parent: Path) -> Path:
    """A data directory that is not there yet, so that one demo never mixes with another."""
    return parent / datetime.now().strftime("%Y%m%d-%H%M%S")


def embedded(home: Path) -> Settings:
    """The embedded default in ``home``, whatever services the environment names; only the models are taken from it."""
    home = home.absolute()
    places = {"database_url": database_in(home), "broker_url": "memory://", "storage_url": storage_in(home)}
    usual = Settings(**places)  # its home has the shelf
    models = {"models": served(usual)} if not usual.serves_whole_shelf else {}
    return Settings(home=home, **places, **models)


def run_demo(
    home: Path, *, show: Callable[[str], None] | None = None, worker_command: Sequence[str] = WORKER_COMMAND
) -> Summary:
    """Submit, wait, lay out the contact sheet. ``show`` gets what a person would like to read meanwhile."""
    tell = show or (lambda _: None)
    settings = embedded(home)
    settings.home.mkdir(mode=0o700, parents=True, exist_ok=True)
    began = time.monotonic()
    with Client(settings) as client:
        with running_worker(settings, worker_command) as process:
            tell(f"worker {process.pid}, log in {log_path(settings)}")
            watch = _Watch(client, process, settings, total=1 + len(FROM_TEXT) + len(FROM_IMAGE), bar=show is not None)
            with watch:
                ids = submit_all(client, watch)
            seconds = time.monotonic() - began
        jobs = [client.get(id) for id in ids]
        sheet = settings.home / "contact-sheet.png"
        contact_sheet(prints(client, jobs), sheet)
    return summarise(settings, sheet, jobs, seconds)


def submit_all(client: Client, watch: "_Watch") -> list[UUID]:
    """Submit the txt2img jobs, then, from the first picture, the img2img jobs; returns when all have ended."""
    model = next(iter(client.settings.models))
    first, *others = client.submit_many(specs([FIRST, *FROM_TEXT], model), batch=BATCH)
    watch.until_ended([first.id])
    if client.get(first.id).state is not State.succeeded:
        raise NightshiftError(f"the first picture failed ({client.get(first.id).error}); see {watch.log}")
    picture = client.image_bytes(first.id)
    later = client.submit_many(specs(FROM_IMAGE, model, init_image=picture), batch=BATCH)
    ids = [job.id for job in (first, *others, *later)]
    watch.until_ended(ids)
    return ids


def specs(choices: Sequence[tuple[str, dict[str, Any]]], model: str, **more: Any) -> list[JobSpec]:
    """One spec per choice, each with a seed of its own, so that two demos draw the same pictures."""
    return [
        JobSpec.model_validate({"prompt": prompt, "seed": 100 + 10 * number, "model": model} | fields | more)
        for number, (prompt, fields) in enumerate(choices)
    ]


def prints(client: Client, jobs: Sequence[JobView]) -> list[Print]:
    """Every image of every job that succeeded, with how it was drawn."""
    return [
        Print(client.image_bytes(job.id, image.index), job.spec.prompt, caption(job.spec, image.width, image.height))
        for job in jobs
        for image in job.images
    ]


def caption(spec: JobSpec, width: int, height: int) -> str:
    """``euler, 16 steps, 5, 96x96``; img2img is marked with its strength."""
    guidance = "unguided" if spec.guidance is None else f"{spec.guidance:g}"
    start = f"img {spec.strength:g}, " if spec.init_image is not None else ""
    return f"{start}{spec.sampler}, {spec.steps}, {guidance}, {width}x{height}"


def summarise(settings: Settings, sheet: Path, jobs: Sequence[JobView], seconds: float) -> Summary:
    failed = [job for job in jobs if job.state is not State.succeeded]
    return Summary(
        home=settings.home,
        sheet=sheet,
        jobs=len(jobs),
        failed=len(failed),
        images=sum(len(job.images) for job in jobs),
        seconds=round(seconds, 1),
        errors=tuple(f"{job.spec.prompt}: {job.error}" for job in failed),
        pictures=tuple(image.key for job in jobs for image in job.images),
    )


def log_path(settings: Settings) -> Path:
    return settings.home / "worker.log"


@contextmanager
def running_worker(settings: Settings, command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A worker process of its own, as in real use; it is told to leave at the end, and made to if it does not. It
    leaves by itself when this process is gone without having told it."""
    line = Listening()
    environment = os.environ | {
        "NIGHTSHIFT_HOME": str(settings.home),
        "NIGHTSHIFT_DATABASE_URL": settings.database_url,
        "NIGHTSHIFT_BROKER_URL": settings.broker_url,
        "NIGHTSHIFT_STORAGE_URL": settings.storage_url,
        "NIGHTSHIFT_MODELS": ",".join(f"{name}={path}" for name, path in settings.models.items()),
    }
    with log_path(settings).open("ab") as log:
        process = subprocess.Popen(
            command,
            env=environment | line.environment,
            pass_fds=line.pass_fds,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    line.started()
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        line.close()


class _Watch:
    """Waits for jobs, with a progress bar on a terminal and silence elsewhere; notices a worker that died."""

    def __init__(
        self, client: Client, process: subprocess.Popen[bytes], settings: Settings, *, total: int, bar: bool
    ) -> None:
        self._client, self._process, self.log = client, process, log_path(settings)
        self._give_up_at = time.monotonic() + PATIENCE_S
        shown = bar and sys.stderr.isatty()
        self._bar = click.progressbar(length=total, label="rendering", file=sys.stderr) if shown else None
        self._ended = 0

    def __enter__(self) -> None:
        if self._bar is not None:
            self._bar.__enter__()

    def __exit__(self, *exception: Any) -> None:
        if self._bar is not None:
            self._bar.__exit__(*exception)

    def until_ended(self, ids: Sequence[UUID]) -> None:
        """Returns when all of ``ids`` have ended. Raises NightshiftError when the worker died or time is up."""
        while not self._look(ids):
            if self._process.poll() is not None:
                raise NightshiftError(f"the worker ended with {self._process.returncode}; see {self.log}")
            if time.monotonic() > self._give_up_at:
                raise NightshiftError(f"not done after {PATIENCE_S:.0f} s; see {self.log}")
            time.sleep(0.2)

    def _look(self, ids: Sequence[UUID]) -> bool:
        counts = self._client.batch(BATCH).counts()
        ended = sum(counts[state] for state in (State.succeeded, State.failed, State.cancelled))
        if self._bar is not None:
            self._bar.update(ended - self._ended)
        self._ended = ended
        return all(self._client.get(id).ended for id in ids)
