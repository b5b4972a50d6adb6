"""All that a GPU is asked: is it right, how fast at each pack size, how near to the machine and to the reference.

    python -m benchmarks.gpu                                 (on a CUDA machine; 50 minutes at most)
    python -m benchmarks.gpu --quick --device cpu            (the code alone, on a tiny model; says nothing about speed)

or in parts of less than ten minutes, each of which keeps what the ones before it wrote:

    python -m benchmarks.gpu --stages correct,ceilings,attention,norm,vae,packs --ways "eager;eager, channels-last"
    python -m benchmarks.gpu --stages packs --ways "compiled, channels-last" --sizes 1,4,16,32
    python -m benchmarks.gpu --stages packs --ways "compiled, channels-last" --sizes 2,3,8,64
    python -m benchmarks.gpu --stages packs,no_wait --ways "compiled, graphs;eager, channels-last, best attention"
    python -m benchmarks.gpu --stages buckets
    python -m benchmarks.gpu --stages reference
    python -m benchmarks.gpu --stages packs --ways "compiled, channels-last, best attention;compiled"
    python -m benchmarks.gpu --stages packs --ways "eager, channels-last, other half"
    python -m benchmarks.gpu --stages packs --ways "compiled, channels-last, other half"

SD 1.5's size with random weights, 512 x 512, 20 guided steps. Stages, in this order; after every figure all that is
known is written, so that a run that is cut leaves what it had, and each stage ends at its own time limit:

- correct: half precision beside float32, on the device and on the CPU. Where that is wrong, no speed is measured.
- ceilings: matrix products and the U-Net's convolutions, TFLOP/s. `share` is of the fastest matrix product.
- attention: every backend at every level. norm: GroupNorm and SiLU at every level, eager and compiled, in both layouts.
- vae: decoding alone.
- no_wait: a step in which waiting for the device is an error, and what a profile of one counts; eager and compiled.
- packs: pictures per second by pictures of a pack; eager and compiled, contiguous and channels-last, with the fastest
  attention of each level, in the other half precision, as CUDA graphs; peak memory.
- buckets: pictures that end one by one, in packs as they come and in packs padded to a few sizes.
- reference: the reference's pipeline, eager and compiled, in the same run (needs diffusers).

Writes `benchmarks/results/gpu.json` (in fp16 `gpu_fp16.json`) and a plot. Without a CUDA device it says so and exits
with 2; with 1 where it is wrong.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from json import dumps, loads
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks import gpu_model, gpu_packs, gpu_stages, plots
from benchmarks.goals import as_json, at_least
from benchmarks.gpu_model import Setup
from benchmarks.gpu_stages import Figure, Stage
from benchmarks.report import result_file, write
from sd_engine.devices import DTYPES

GOALS: Final = (11.0, 13.0)  # pictures per second on an H200
DATASHEET: Final = 989.5  # TFLOP/s of an H200 or H100, dense, half precision


def _reference(setup: Setup) -> Iterator[Figure]:
    """Its module needs the reference's library, which need not be there."""
    if importlib.util.find_spec("diffusers") is None:
        yield {"left_out": "diffusers is not installed here"}
        return
    yield from importlib.import_module("benchmarks.gpu_reference").reference(setup)


# Each with its limit in seconds: 50 minutes in all.
STAGES: Final[dict[str, tuple[Stage, float]]] = {
    "correct": (gpu_stages.correct, 120),
    "ceilings": (gpu_stages.ceilings, 60),
    "attention": (gpu_stages.attention, 60),
    "norm": (gpu_stages.norm, 60),
    "vae": (gpu_stages.vae, 60),
    "no_wait": (gpu_packs.no_wait, 180),
    "packs": (gpu_packs.packs, 1500),
    "buckets": (gpu_packs.buckets, 420),
    "reference": (_reference, 390),
}


def run(setup: Setup, names: list[str], out: Path, known: dict[str, Any]) -> int:
    """Run the stages, writing after every figure -> exit code. known: what earlier runs wrote."""
    stages = known.setdefault("stages", {})
    for name in names:
        if not all(figure["right"] for figure in stages.get("correct", {}).get("figures", ())):
            print("the results are wrong: no speed is measured", file=sys.stderr)
            break
        stage, limit = STAGES[name]
        kept = _kept(stages.get(name, {}), setup) if name == "packs" else []
        stages[name] = {"figures": kept, "cut": False}
        print(f"--- {name}", flush=True)
        _figures(stage(setup), limit, stages[name], lambda: _write(out, known, setup))
    summarize(known)
    _write(out, known, setup)
    for goal in known["goals"]:
        print(goal)
    _plot(known, out)
    return 0 if all(figure["right"] for figure in stages.get("correct", {}).get("figures", ())) else 1


def _kept(stage: dict[str, Any], setup: Setup) -> list[Figure]:
    """Figures of an earlier run, of ways and sizes that are not asked for now."""
    return [figure for figure in stage.get("figures", ()) if not _asked_again(figure, setup)]


def _asked_again(figure: Figure, setup: Setup) -> bool:
    way = not setup.ways or figure.get("way") in (None, *setup.ways)
    return way and figure.get("pictures") in (None, *setup.sizes)  # None: of no way, of no size


def _figures(figures: Iterator[Figure], limit: float, into: dict[str, Any], save: Any) -> None:
    """Take figures until the limit. One that fails ends its stage, not the run: the machine is lent for minutes."""
    began = time.monotonic()
    try:
        for figure in figures:
            into["figures"].append(figure)
            into["seconds"] = time.monotonic() - began
            print(dumps(figure, default=str)[:400], flush=True)
            save()
            if into["seconds"] > limit:
                into["cut"] = True
                break
    except Exception as error:  # whatever it is: the other stages are still to be measured
        into["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        print(into["failed"], file=sys.stderr, flush=True)
        save()


def summarize(known: dict[str, Any]) -> None:
    """The fastest way, its share of the machine, the ratio to the reference, and the goals."""
    stages = known["stages"]
    best = max(_speeds(stages, "packs"), key=lambda figure: float(figure["images_per_s"]), default=None)
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


def _write(out: Path, known: dict[str, Any], setup: Setup) -> None:
    device = torch.cuda.get_device_name(setup.device) if setup.cuda else "cpu"
    # What one kernel gave as "not a number" would be no JSON.
    write(out, loads(dumps(known, default=str)), device=device, beside=("diffusers",))


def _plot(known: dict[str, Any], out: Path) -> None:
    lines: dict[str, list[tuple[float, float]]] = {}
    for name, who in (("packs", "ours"), ("reference", "reference")):
        for figure in _speeds(known["stages"], name):
            lines.setdefault(f"{who}, {figure['way']}", []).append((figure["pictures"], figure["images_per_s"]))
    if lines:
        plots.curves(out.with_suffix(".png"), "SD 1.5's size on a GPU", ("pictures of a pack", "pictures/s"), lines)


def _stages(text: str) -> list[str]:
    asked = text.split(",")
    unknown = [name for name in asked if name not in STAGES]
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is not allowed: {', '.join(STAGES)}")
    return [name for name in STAGES if name in asked]


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
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu.json, in fp16 gpu_fp16.json")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(
            "there is no CUDA device on this machine: run it where one is, or --quick --device cpu to try the script",
            file=sys.stderr,
        )
        return 2
    dtype = DTYPES[args.dtype or ("bf16" if device.type == "cuda" else "fp32")]
    name = "gpu.json" if dtype != torch.float16 else "gpu_fp16.json"
    args.out = args.out or result_file(name, quick=args.quick)
    setup = replace((gpu_model.quick if args.quick else gpu_model.full)(device, dtype), ways=args.ways)
    setup = replace(setup, sizes=args.sizes or setup.sizes)
    known = loads(args.out.read_text("utf-8")) if args.out.exists() else {}
    asked = {"quick": args.quick, "dtype": str(dtype), "side": setup.side, "steps": setup.steps}
    if any(known.get(key) != value for key, value in asked.items()):
        known = {}  # figures of something else are not to stand beside these
    return run(setup, args.stages, args.out, known | asked)


if __name__ == "__main__":
    sys.exit(main())
