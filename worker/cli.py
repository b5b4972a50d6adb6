"""The commands ``nightshift worker`` and ``nightshift demo``.

This module is imported by ``nightshift --help``: what needs torch, Celery or a database is imported by the command that
needs it, so that help and usage errors answer at once and without the extra.
"""

import json
import logging
import math
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import click

from worker import THIS_WORKER
from worker.exit_codes import DONE
from worker.lifeline import Lifeline
from worker.memory import keep_freed_memory
from worker.told import told_in_a_sentence

MAX_SECONDS = 86400.0  # beyond a day it is a slip, and somewhere more than a clock can count
USABLE_DEVICES = "auto, cpu, mps, cuda, cuda:N or all"
#: As the engine has them; named here again, because help must not wait for torch.
DTYPES = ("auto", "fp32", "fp16", "bf16")
OFFLOADS = ("resident", "idle", "sequential")


def _device(context: click.Context, option: click.Parameter, value: str) -> str:
    kind, _, number = value.partition(":")
    if value in ("auto", "cpu", "mps", "cuda", "all") or (kind == "cuda" and number.isdecimal()):
        return value
    raise click.BadParameter(f"{value!r} is no device; write {USABLE_DEVICES}")


class _Seconds(click.FloatRange):
    """A range of seconds. What is no number lies in no range, though no comparison with its bounds says so."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        seconds = super().convert(value, param, ctx)
        if math.isnan(seconds):
            self.fail(f"{value!r} is no number of seconds", param, ctx)
        return seconds


def _seconds(name: str, default: float | None, text: str, *, least: float = 0.1) -> Callable[[Any], Any]:
    return click.option(
        f"--{name}-seconds", type=_Seconds(min=least, max=MAX_SECONDS), default=default,
        show_default=default is not None, envvar=f"NIGHTSHIFT_{name.upper().replace('-', '_')}_SECONDS", help=text,
    )  # fmt: skip


@click.command(
    epilog="""\b
Examples:
  nightshift worker
  nightshift worker --device cuda:1 --concurrency 32
  nightshift worker --device all --json          (one process per GPU)
  nightshift worker --until-empty; echo $?       (0: nothing is left to do)
  nightshift worker --dtype fp16 --offload idle --max-units 16384
                                                 (SD 1.5 on a card of 4 GB)

\b
Exit codes: 0 done or told to leave, 2 wrong settings, 69 a service did not answer at the start. The supervisor starts
a worker again that ended by a signal or with 69, 70 (unforeseen), 71 (a step or the process hung) or 75 (it heard no
bell although rows waited); with --no-supervisor these are what you see."""
)
@click.option(
    "--device", default="auto", show_default=True, callback=_device, help=f"{USABLE_DEVICES}: one process a GPU"
)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default="auto",
    show_default=True,
    help="of weights and activations; auto: fp16 on CUDA, else fp32",
)
@click.option(
    "--offload",
    type=click.Choice(OFFLOADS),
    default="resident",
    show_default=True,
    help="idle: text encoder and VAE wait on the CPU; sequential: the U-Net too, layer by layer (slow, least memory)",
)
@click.option(
    "--deterministic", is_flag=True, help="packs of a fixed size: on a CPU, neighbours change no bit of a picture"
)
@click.option(
    "--concurrency",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="jobs held at once, with those that wait for a place in a step",
)
@click.option(
    "--max-units", type=click.IntRange(min=1), help="U-Net rows x latent area of a step; default: 65536, on a CPU 16384"
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of one operation; default: torch's")
@click.option("--until-empty", is_flag=True, help="leave when no job of these models is queued or running any more")
@_seconds("lease", 30.0, "how long a job stays ours without a sign of life")
@_seconds("heartbeat", None, "between two signs of life; default: a third of the lease")
@_seconds("grace", 25.0, "after SIGTERM: finish what fits, give the rest back, leave")
@_seconds("step-limit", None, "a step that lasts longer hangs: the process ends; default: 300, on a CPU 1800")
@_seconds("hang-limit", 60.0, "a process without a sign of life for so long is killed and started again", least=5.0)
@_seconds("storage-patience", 600.0, "how long drawn pictures wait for a storage that is away, before their job does")
@click.option("--no-supervisor", is_flag=True, help="no process beside that starts this one again: yours does that")
@click.option("--json", "as_json", is_flag=True, help="log JSON lines")
@click.option("--verbose", is_flag=True, help="log more")
@click.pass_context
def worker(
    context: click.Context,
    /,
    device: str,
    as_json: bool,
    verbose: bool,
    no_supervisor: bool,
    hang_limit_seconds: float,
    **options: Any,
) -> None:
    """Render queued jobs until told to leave (SIGTERM or Ctrl-C)."""
    lifeline = Lifeline.from_environment()
    alone = no_supervisor or lifeline is not None
    if alone:
        keep_freed_memory()  # before the first thread
    if lifeline is not None:
        lifeline.start()  # before anything that can hang, or take long to import
    lease_s, beat_s = options["lease_seconds"], options["heartbeat_seconds"]
    if beat_s is not None and beat_s > lease_s / 2:
        raise click.BadParameter(
            f"{beat_s:g} s between two signs of life, of which a lease of {lease_s:g} s must survive a missed one; "
            f"allowed: at most half of it, {lease_s / 2:g}",
            param_hint="'--heartbeat-seconds'",
        )
    if alone and device == "all":
        raise click.BadParameter(
            "one process drives one device; name it, or leave --no-supervisor away", param_hint="'--device'"
        )
    with told_in_a_sentence():
        from worker import logs

        logs.set_up(as_json=as_json, level=logging.DEBUG if verbose else logging.INFO)
        context.exit(_work(device, lifeline, **options) if alone else _supervise(device, context.params))


def _work(
    device: str,
    lifeline: Lifeline | None,
    *,
    concurrency: int,
    until_empty: bool,
    lease_seconds: float,
    heartbeat_seconds: float | None,
    grace_seconds: float,
    step_limit_seconds: float | None,
    storage_patience_seconds: float,
    **torch_options: Any,
) -> int:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(DONE))  # nothing is held yet: no drain, and no traceback of an import

    from jobs.settings import Settings
    from worker.preflight import open_services

    settings = Settings()
    services = open_services(settings)  # before torch is imported: a missing service is told in a moment

    from worker.model_shelf import served
    from worker.process import Options, run
    from worker.workshop import TorchOptions, open_workshop

    beat_s = heartbeat_seconds or lease_seconds / 3
    options = Options(
        concurrency=concurrency,
        lease_s=lease_seconds,
        beat_s=beat_s,
        poll_s=min(1.0, beat_s),
        grace_s=grace_seconds,
        until_empty=until_empty,
        step_limit_s=step_limit_seconds,
        patience_s=storage_patience_seconds,
    )
    code = run(
        services,
        settings,
        options,
        lambda: open_workshop(served(settings), TorchOptions(device, **torch_options)),
        lifeline,
    )
    _leave(code)


def _need_torch() -> None:
    """The process that needs torch is another one: its log would tell what is missing, one step away."""
    if find_spec("torch") is None:
        raise ModuleNotFoundError("torch is not installed", name="torch")


def _supervise(device: str, params: Mapping[str, Any]) -> int:
    _need_torch()
    from worker.supervisor import Supervisor

    commands = [child_command(name, params) for name in _devices(device)]
    supervisor = Supervisor(commands, grace_s=params["grace_seconds"] + 5.0, hang_limit_s=params["hang_limit_seconds"])
    supervisor.install_signal_handlers()
    _leave(supervisor.run())


def _devices(device: str) -> Sequence[str]:
    if device != "all":
        return [device]
    from worker.workshop import gpu_names

    return gpu_names() or ["cpu"]


def _leave(code: int) -> NoReturn:
    """End now. Python's own end would wait for threads that hang in a service, and a signal that comes meanwhile would
    be the exit code."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def child_command(device: str, params: Mapping[str, Any]) -> Sequence[str]:
    """The same worker command for one device, as this interpreter runs it."""
    command = [*THIS_WORKER, "--device", device]
    for name, value in params.items():
        flag = "--json" if name == "as_json" else "--" + name.replace("_", "-")
        if name == "device" or value is None or value is False:
            continue
        command += [flag] if value is True else [flag, str(value)]
    return command


@click.command(epilog="\b\nExamples:\n  nightshift demo\n  nightshift demo --home /tmp/demo --json")
@click.option(
    "--home",
    type=click.Path(file_okay=False, path_type=Path),
    help="data directory; default: a new one in demo-output/",
)
@click.option("--json", "as_json", is_flag=True, help="print the summary as JSON")
@click.pass_context
def demo(context: click.Context, /, home: Path | None, as_json: bool) -> None:
    """The main job in a minute: submit different jobs, render them together, store them, show them on one sheet."""
    with told_in_a_sentence():
        _need_torch()
        from worker.demo import new_home, run_demo

        # A killed demo must not leave its worker behind: SIGTERM ends it like Ctrl-C does, through its clean-up.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        summary = run_demo(home or new_home(Path("demo-output")), show=None if as_json else click.echo)
        click.echo(json.dumps(summary.as_dict(), indent=2) if as_json else summary.as_text())
        context.exit(0 if summary.ok else 1)
