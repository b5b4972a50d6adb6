"""All that a GPU is asked: is it right, how fast at each pack size, how near to the machine and to the reference.

    python -m benchmarks.gpu                                 (on a CUDA machine; some 50 minutes)
    python -m benchmarks.gpu --quick --device cpu            (the code alone, on a tiny model; says nothing about speed)

or in parts, the first of which decide the most; each keeps what the ones before it wrote, and `--seconds` ends it:

    python -m benchmarks.gpu --seconds 540 --stages correct,ceilings,packs --sizes 32,16 \\
        --ways "eager, channels-last;compiled, channels-last"
    python -m benchmarks.gpu --seconds 540 --stages attention,norm,vae,no_wait,packs \\
        --ways "compiled, graphs;eager, channels-last, best attention"
    python -m benchmarks.gpu --seconds 540 --stages reference,packs --sizes 16,32 --ways "eager;compiled"
    python -m benchmarks.gpu --seconds 540 --stages packs --sizes 64,8,4,1,2,3 --ways "compiled, channels-last"
    python -m benchmarks.gpu --seconds 540 --stages buckets,packs --sizes 16,32 \\
        --ways "compiled, channels-last, best attention;compiled, channels-last, other half"

SD 1.5's size with random weights, 512 x 512, 20 guided steps. Stages, in this order; after every figure all that is
known is written, so that a run that is cut leaves what it had; a stage begins no figure past its own time limit:

- correct: half precision beside float32, on the device and on the CPU. Where that is wrong, no speed is measured.
- ceilings: matrix products and the U-Net's convolutions, TFLOP/s. `share` is of the fastest matrix product.
- attention: every backend at every level. norm: GroupNorm and SiLU at every level, eager and compiled, in both layouts.
- vae: decoding alone.
- no_wait: where a step waits for the device, if it does, and what a profile of one counts; eager and compiled.
- packs: pictures per second by pictures of a pack; eager and compiled, contiguous and channels-last, with the fastest
  attention of each level, in the other half precision, as CUDA graphs; peak memory.
- buckets: pictures that end one by one, in packs as they come and in packs padded to a few sizes.
- reference: the reference's pipeline, eager and compiled, in the same run (needs diffusers).

Writes `benchmarks/results/gpu.json` (in float16 `gpu_float16.json`) and a plot. Without a CUDA device it says so and
exits with 2; with 1 where a result is wrong, a step waits, or anything failed.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from json import dumps, loads
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks import gpu_model, gpu_packs, gpu_stages, plots
from benchmarks.goals import as_json, at_least
from benchmarks.gpu_model import Setup
from benchmarks.gpu_stages import Figure, Stage
from benchmarks.report import result_file, stamp, write
from sd_engine.devices import DTYPES

GOALS: Final = (11.0, 13.0)  # pictures per second on an H200
DATASHEET: Final = 989.5  # TFLOP/s of an H200 or H100, dense, half precision


def _reference(setup: Setup) -> Iterator[Figure]:
    """Its module needs the reference's library, which need not be there."""
    if importlib.util.find_spec("diffusers") is None:
        yield {"left_out": "diffusers is not installed here"}
        return
    yield from importlib.import_module("benchmarks.gpu_reference").reference(setup)


# Each with its limit in seconds.
STAGES: Final[dict[str, tuple[Stage, float]]] = {
    "correct": (gpu_stages.correct, 300),  # cut, nothing else would be measured
    "ceilings": (gpu_stages.ceilings, 60),
    "attention": (gpu_stages.attention, 60),
    "norm": (gpu_stages.norm, 60),
    "vae": (gpu_stages.vae, 60),
    "no_wait": (gpu_packs.no_wait, 180),
    "packs": (gpu_packs.packs, 1500),
    "buckets": (gpu_packs.buckets, 420),
    "reference": (_reference, 390),
}


@dataclass(frozen=True, slots=True)
class Kept:
    """The file of all figures, written after every one. deadline: on `time.monotonic`, when no more is begun."""

    out: Path
    known: dict[str, Any]
    setup: Setup
    deadline: float = math.inf

    @property
    def stages(self) -> dict[str, Any]:
        stages: dict[str, Any] = self.known.setdefault("stages", {})
        return stages

    @property
    def wrong(self) -> bool:
        """Whether a result was not what it must be, or was not all looked at."""
        correct = self.stages.get("correct", {})
        whole = "failed" not in correct and not correct.get("cut", False)
        return not (whole and all(figure["right"] for figure in correct.get("figures", ())))

    @property
    def flawed(self) -> bool:
        """Whether anything is wrong, waits or failed."""
        found = [figure for stage in self.stages.values() for figure in stage["figures"]]
        return any("failed" in each or not each.get("right", True) for each in (*found, *self.stages.values()))

    def begin(self, name: str) -> None:
        """A stage, whose figures of earlier runs stay until others come in their place."""
        earlier = self.stages.get(name, {}).get("figures", [])
        self.stages[name] = {"figures": earlier, "cut": False}

    def add(self, name: str, figure: Figure) -> None:
        """A figure, in the place of an earlier one of the same."""
        others = [each for each in self.stages[name]["figures"] if not _replaces(figure, each)]
        self.stages[name]["figures"] = [*others, figure | {"made": stamp(self._device)}]
        self.write()

    def write(self) -> None:
        """All that is known, and what follows from it."""
        summarize(self.known)
        # What one kernel gave as "not a number" would be no JSON.
        known = loads(dumps(self.known, default=str), parse_constant=lambda _: None)
        write(self.out, known, device=self._device, beside=("diffusers",))

    @property
    def _device(self) -> str:
        return torch.cuda.get_device_name(self.setup.device) if self.setup.cuda else "cpu"


_IDENTITY: Final = ("way", "pictures", "what", "how", "level", "kind", "buckets")


def _replaces(figure: Figure, earlier: Figure) -> bool:
    """Whether an earlier figure is one of the same, or a speed of a way that turns out to be wrong or to fail."""
    if "way" in figure and "pictures" not in figure and ("failed" in figure or not figure.get("right", True)):
        return figure.get("way") == earlier.get("way")
    return all(figure.get(name) == earlier.get(name) for name in _IDENTITY)


def run(names: list[str], kept: Kept) -> int:
    """Run the stages, writing after every figure -> exit code."""
    for name in names:
        if kept.wrong and name != "correct":
            print("the results are wrong: no speed is measured", file=sys.stderr)
            break
        if time.monotonic() > kept.deadline:
            print(f"no time is left for {name}", file=sys.stderr)
            continue
        stage, limit = STAGES[name]
        kept.begin(name)
        print(f"--- {name}", flush=True)
        _figures(name, stage(kept.setup), min(time.monotonic() + limit, kept.deadline), kept)
    for goal in kept.known.get("goals", ()):
        print(goal)
    _plot(kept.known, kept.out)
    return 1 if kept.flawed else 0


def _figures(name: str, figures: Iterator[Figure], deadline: float, kept: Kept) -> None:
    """Take figures while there is time for one as long as the longest of this stage so far.

    One that fails ends its stage, not the run: the machine is lent for minutes.
    """
    stage, began, longest = kept.stages[name], time.monotonic(), 0.0
    asked = began
    try:
        for figure in figures:
            now = time.monotonic()
            longest, asked = max(longest, now - asked), now
            stage["seconds"] = now - began
            print(dumps(figure, default=str)[:400], flush=True)
            kept.add(name, figure)
            if now + longest > deadline:
                stage["cut"] = True
                kept.write()
                break
    except Exception as error:  # whatever it is: the other stages are still to be measured
        stage["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        print(stage["failed"], file=sys.stderr, flush=True)
        kept.write()


def summarize(known: dict[str, Any]) -> None:
    """The fastest way, its share of the machine, the ratio to the reference, and the goals."""
    stages = known["stages"]
    known.pop("best", None)
    comparable = (figure for figure in _speeds(stages, "packs") if figure["dtype"] == known["dtype"])
    best = max(comparable, key=lambda figure: float(figure["images_per_s"]), default=None)
    theirs = max((figure["images_per_s"] for figure in _speeds(stages, "reference")), default=None)
    products = [each["tflops"] for each in stages.get("ceilings", {}).get("figures", ()) if "matmul" in each["what"]]
    for figure in _speeds(stages, "packs"):
        figure["share"] = figure["tflops"] / max(products) if products else None
    known["goals"] = []
    if best is None or known["quick"]:
        return
    known["best"] = best | {
        "share_of_datasheet": best["tflops"] / DATASHEET,
        "times_the_reference": best["images_per_s"] / theirs if theirs else None,
    }
    known["goals"] = as_json([
        at_least(f"pictures per second on an H200, {goal:g}", best["images_per_s"], goal, best["way"]) for goal in GOALS
    ])  # fmt: skip


def _speeds(stages: dict[str, Any], name: str) -> list[Figure]:
    return [figure for figure in stages.get(name, {}).get("figures", ()) if "images_per_s" in figure]


def _plot(known: dict[str, Any], out: Path) -> None:
    lines: dict[str, list[tuple[float, float]]] = {}
    for name, who in (("packs", "ours"), ("reference", "reference")):
        for figure in _speeds(known["stages"], name):
            lines.setdefault(f"{who}, {figure['way']}", []).append((figure["pictures"], figure["images_per_s"]))
    lines = {who: sorted(points) for who, points in lines.items()}
    if lines:
        plots.curves(out.with_suffix(".png"), "SD 1.5's size on a GPU", ("pictures of a pack", "pictures/s"), lines)


def _stages(text: str) -> list[str]:
    asked = text.split(",")
    unknown = [name for name in asked if name not in STAGES]
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is not allowed: {', '.join(STAGES)}")
    return asked


def _ways(text: str) -> tuple[str, ...]:
    asked = tuple(name.strip() for name in text.split(";"))
    unknown = [name for name in asked if name not in gpu_packs.WAYS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{'; '.join(unknown)} is not allowed: {'; '.join(gpu_packs.WAYS)}")
    return asked


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(","))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, two steps")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=list(DTYPES), help="bf16; on a CPU fp32")
    parser.add_argument(
        "--stages", type=_stages, default=list(STAGES), help="comma-separated, of: " + ", ".join(STAGES)
    )
    ways = "; ".join(gpu_packs.WAYS)
    parser.add_argument("--ways", type=_ways, default=(), help=f"of packs, between semicolons: {ways}")
    parser.add_argument("--sizes", type=_sizes, help="pictures of a pack, comma-separated")
    parser.add_argument(
        "--seconds", type=float, default=math.inf,
        help="begin no stage after so many, nor a figure that would end later if it took as long as the longest before",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu.json, in float16 gpu_float16.json")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(
            "there is no CUDA device on this machine: run it where one is, or --quick --device cpu to try the script",
            file=sys.stderr,
        )
        return 2
    dtype = DTYPES[args.dtype or ("bf16" if device.type == "cuda" else "fp32")]
    name = "gpu.json" if dtype == torch.bfloat16 else f"gpu_{gpu_stages.name_of(dtype)}.json"
    args.out = args.out or result_file(name, quick=args.quick)
    setup = replace((gpu_model.quick if args.quick else gpu_model.full)(device, dtype), ways=args.ways)
    setup = replace(setup, sizes=args.sizes or setup.sizes)
    known = loads(args.out.read_text("utf-8")) if args.out.exists() else {}
    if device.type == "cuda":
        torch.cuda.set_device(device)  # events and streams are the current device's
    name = torch.cuda.get_device_name(device) if setup.cuda else "cpu"
    asked = {"quick": args.quick, "dtype": str(dtype), "side": setup.side, "steps": setup.steps, "on": name}
    if known and any(known.get(key) != value for key, value in asked.items()):
        print(f"{args.out} holds figures of something else than {asked}: name another file by --out", file=sys.stderr)
        return 2
    deadline = time.monotonic() + args.seconds
    return run(args.stages, Kept(args.out, known | asked, setup, deadline))


if __name__ == "__main__":
    sys.exit(main())
