"""From the start of a process to its first picture, and how fast and in how much memory a full-size model is loaded.

    python -m benchmarks.cold                    (about six minutes on two cores; 11 GB of temporary disk)
    python -m benchmarks.cold --quick            (the shipped model alone, once; seconds)
    python -m benchmarks.cold --repeats 5 --all  (also fp32 files and pickles, which the reference is not asked for)

Each figure is of a fresh process; ours and the reference's take turns. The reference's pipeline loads as fast as it can
(safetensors, low_cpu_mem_usage, the dtype asked for at once).

- first picture: 20 guided steps, from the start of Python; `imports` and `call` are parts of it. Of the shipped model
  at its own size, and of SD 1.5's size at 256 x 256: there the first step makes what convolutions are fast with, once
  for a worker's life, which is in its time and in `drawn`, its peak.
- start to loaded: SD 1.5's size, from the start of Python until every weight was touched.
- load: the same without imports (a small model was loaded before), until every weight was touched: a file that is only
  mapped into memory is not loaded yet. `call` is when the call to load returned.
- peak: the most resident memory, pages of mapped files with it, over what the process had before (`before`: the
  interpreter and its imports), as a multiple of the weights at the dtype that they are loaded in.
- "cold": the file is dropped from the page cache before, else it is read once; `read` says what came from the disk.

Beside it, the floor of a conversion: how long writing so many bytes into fresh memory takes. Prints a table, writes
`benchmarks/results/cold.json` and a plot. Linux only: it reads /proc.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import plots
from benchmarks.cold_files import TOKENIZER, forget, remember, write_folder, write_single
from benchmarks.cold_process import Answer, Told
from benchmarks.goals import Goal, as_json, at_least, at_most, spread
from benchmarks.report import multiplied_here, result_file, write
from sd_engine import shipped_model
from sd_engine.devices import DTYPES
from sd_engine.finite import is_finite

FASTER = 2.0
PEAK = 1.15
GB = 1e9
_CHILD = {"ours": "benchmarks.cold_ours", "reference": "benchmarks.cold_reference"}
_LIMIT_S = 600
_MOST_MEMORY = 6 * 10**9  # the reference, loading into float32


@dataclass(frozen=True, slots=True)
class Way:
    """One thing that is measured. warm: imports and first uses are done before; cold: the file is not in memory."""

    name: str
    who: str
    task: str
    path: Path
    dtype: str
    warm: bool = True
    cold: bool = False
    side: int | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """One process: seconds from its start, and its memory in bytes. `total` is what its way is measured by."""

    total: float
    imports: float
    call: float
    touch: float
    before: int
    peak: int
    drawn_peak: int
    weights: int
    read: int | None


def start(way: Way) -> Run:
    """Run one process to its end. Raises CalledProcessError for one that fails."""
    _touch_memory()
    (forget if way.cold else remember)(way.path)
    warm = str(shipped_model()) if way.warm else None
    told = Told(way.task, str(way.path), way.dtype, str(TOKENIZER), warm, way.side)
    command = [sys.executable, "-m", _CHILD[way.who], json.dumps(asdict(told))]
    began = time.monotonic()
    done = subprocess.run(command, check=True, capture_output=True, timeout=_LIMIT_S, env=_quiet())
    got = Answer(**json.loads(done.stdout.splitlines()[-1]))
    end = got.ended if way.task == "picture" else got.touched
    return Run(
        end - (got.began if way.warm else began), got.imported - began, got.loaded - got.began,
        got.touched - got.loaded, got.before, got.peak - got.before, got.drawn_peak - got.before, got.weights, got.read,
    )  # fmt: skip


def _touch_memory() -> None:
    """Take as much memory as a process will, and give it back.

    A virtual machine gets its memory from its host page by page, at the first touch, and may lose what lies idle: who
    comes first would pay for all that come after.
    """
    torch.ones(_MOST_MEMORY, dtype=torch.uint8)


def _quiet() -> dict[str, str]:
    """No process asks a network for anything."""
    return os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}


def first_pictures() -> list[Way]:
    """The shipped model, from nothing to a picture."""
    return [Way("first picture", who, "picture", shipped_model(), "fp32", warm=False) for who in _CHILD]


def first_full_picture(folder: Path) -> list[Way]:
    """SD 1.5's size, in the smallest dtype that this CPU multiplies."""
    dtype = multiplied_here()[-1]
    name = f"first picture, SD 1.5, {dtype}"
    return [Way(name, who, "picture", folder, dtype, warm=False, side=256) for who in _CHILD]


def loads(folder: Path, single: Path) -> list[Way]:
    """SD 1.5's size, in each way that the reference is compared in, and the single file, that it has no equal for."""
    ways = [Way("start to loaded, fp16", who, "load", folder, "fp16", warm=False) for who in _CHILD]
    for dtype, cold in (("fp16", False), ("fp32", False), ("fp16", True)):
        name = f"load, fp16 into {dtype}{', cold' if cold else ''}"
        ways += [Way(name, who, "load", folder, dtype, cold=cold) for who in _CHILD]
        ways.append(Way(f"{name}, single file", "ours", "load", single, dtype, cold=cold))
    return ways


def other_files() -> list[tuple[str, str, str]]:
    """What else is loaded with --all: the file's dtype and suffix, and the dtype that it is loaded in."""
    return [
        ("fp16", ".ckpt", "fp16"), ("fp32", ".safetensors", "fp16"), ("fp32", ".safetensors", "bf16"),
        ("fp32", ".safetensors", "fp32"), ("fp32", ".ckpt", "fp16"),
    ]  # fmt: skip


def measured(ways: Sequence[Way], repeats: int) -> dict[Way, list[Run]]:
    """Each way once, then each again: what else the machine does meets all of them."""
    runs: dict[Way, list[Run]] = defaultdict(list)
    for _ in range(repeats):
        for way in ways:
            runs[way].append(start(way))
            print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return runs


def floors(weights: int) -> dict[str, float]:
    """Seconds for what any loader must do: touch fresh memory of the size of the weights; look at each number once."""
    began = time.perf_counter()
    numbers = torch.ones(weights // 2, dtype=torch.float16)
    filled = time.perf_counter()
    assert is_finite(numbers)
    looked = time.perf_counter() - filled
    wide = time.perf_counter()
    converted = numbers.float()
    wide = time.perf_counter() - wide
    assert converted.nbytes == 2 * numbers.nbytes
    return {"fill_fp16": filled - began, "look_for_not_finite": looked, "convert_to_fp32": wide}


def line(way: Way, runs: Sequence[Run]) -> dict[str, Any]:
    """A line of the table: medians, with the spread of what it is measured by."""

    def middle(name: str) -> float:
        return float(statistics.median(getattr(run, name) for run in runs))

    read = [run.read for run in runs if run.read is not None]
    return {
        "way": way.name, "who": way.who, "seconds": spread([run.total for run in runs], 3),
        "imports_s": round(middle("imports"), 3), "call_s": round(middle("call"), 3),
        "touch_s": round(middle("touch"), 3), "weights_gb": round(middle("weights") / GB, 3),
        "before_gb": round(middle("before") / GB, 3), "peak_gb": round(max(run.peak for run in runs) / GB, 3),
        "drawn_gb": round(max(run.drawn_peak for run in runs) / GB, 3),
        "peak_ratio": round(max(run.peak / run.weights for run in runs), 3),
        "read_gb": round(statistics.median(read) / GB, 3) if read else None,
    }  # fmt: skip


def goals(lines: Sequence[Mapping[str, Any]], floor: Mapping[str, float]) -> list[Goal]:
    """Twice as fast wherever the reference does the same; the peak wherever a full-size model was loaded by us."""
    at = {(each["way"], each["who"]): each for each in lines}
    found = []
    for way in dict.fromkeys(each["way"] for each in lines if each["who"] == "reference"):
        ours, theirs = at[way, "ours"], at[way, "reference"]
        ratio = theirs["seconds"]["median"] / ours["seconds"]["median"]
        found.append(at_least(f"{way}: times as fast as the reference", ratio, FASTER, _why(ours, floor)))
    full = [each for each in lines if each["who"] == "ours" and each["way"] not in ("first picture", "load, shipped")]
    if full:
        worst = max(full, key=lambda each: float(each["peak_ratio"]))
        found.append(
            at_most("peak of loading over the weights, the worst way", worst["peak_ratio"], PEAK, worst["way"])
        )
    return found


def _why(ours: Mapping[str, Any], floor: Mapping[str, float]) -> str:
    """What was measured of a way that no better code could leave out."""
    seconds = ours["seconds"]["median"]
    if "picture" in ours["way"]:
        drawing = seconds - ours["imports_s"] - ours["call_s"] - ours["touch_s"]
        return f"of {seconds} s, {ours['imports_s']} import, {ours['call_s']} load and {drawing:.1f} draw"
    if not floor:
        return ""
    if "cold" in ours["way"]:
        return f"{ours['read_gb']} GB came from the disk in {seconds} s; both wait for it"
    if "fp32" in ours["way"]:
        return f"converting as many numbers into fresh memory alone takes {floor['convert_to_fp32']:.2f} of {seconds} s"
    return (
        f"of {seconds} s, {floor['look_for_not_finite']:.2f} look for numbers that are not finite, which the reference "
        f"does not do, and {ours['touch_s']} touch the pages"
    )


def show(lines: Sequence[Mapping[str, Any]], found: Sequence[Goal]) -> None:
    """Print the table and the goals."""
    print(f"{'way':38} {'who':10} {'seconds':>8} {'spread':>15} {'imports':>8} {'call':>7} {'touch':>6} "
          f"{'before GB':>10} {'peak GB':>8} {'drawn GB':>8} {'ratio':>6} {'read GB':>8}")  # fmt: skip
    for each in lines:
        s = each["seconds"]
        print(f"{each['way']:38} {each['who']:10} {s['median']:8.2f} {s['least']:7.2f}-{s['most']:<7.2f} "
              f"{each['imports_s']:8.2f} {each['call_s']:7.2f} {each['touch_s']:6.2f} {each['before_gb']:10.2f} "
              f"{each['peak_gb']:8.2f} {each['drawn_gb']:8.2f} {each['peak_ratio']:6.2f} "
              f"{each['read_gb'] or 0:8.2f}")  # fmt: skip
    for goal in found:
        print(goal.line)


def everything(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Write the files, measure, and take the files away again -> lines, floors."""
    if args.quick:
        mini = shipped_model()
        ways = [*first_pictures(), *(Way("load, shipped", who, "load", mini, "fp32") for who in _CHILD)]
        return [line(way, runs) for way, runs in measured(ways, 1).items()], {}
    with tempfile.TemporaryDirectory(dir=args.folder) as made:
        single = write_single(Path(made) / "single.safetensors", "fp16")
        folder = write_folder(single, Path(made) / "folder")
        from benchmarks.parity_models import FAMILIES, write_model  # the reference's libraries take seconds to come

        # Of weights that keep what goes through them about as large as it was: those of the others are one number each.
        drawn = write_model(FAMILIES[0], Path(made) / "drawn", DTYPES["fp16"])
        ways = [*first_pictures(), *first_full_picture(drawn), *loads(folder, single)]
        found = measured(ways, args.repeats)
        lines = [line(way, runs) for way, runs in found.items()]
        for each in (single, *folder.rglob("*.safetensors")) if args.all else ():
            each.unlink()
        for stored, suffix, dtype in other_files() if args.all else ():
            lines.append(_other(Path(made), stored, suffix, dtype))
    return lines, floors(min(run.weights for way, (run, *_) in found.items() if way.path == folder))


def _other(made: Path, stored: str, suffix: str, dtype: str) -> dict[str, Any]:
    """A file that only we are asked for: written, loaded once, and taken away."""
    path = write_single(made / f"{stored}{suffix}", stored)
    way = Way(f"load, {stored}{suffix} into {dtype}", "ours", "load", path, dtype)
    found = line(way, [start(way)])
    path.unlink()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the shipped model alone, once")
    parser.add_argument("--repeats", type=int, default=3, help="processes for each figure")
    parser.add_argument("--all", action="store_true", help="other files too: fp32 and pickles")
    parser.add_argument(
        "--folder", type=Path, help="where the files are written for the time of it; else where /tmp is"
    )
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/cold.json")
    args = parser.parse_args()
    args.out = args.out or result_file("cold.json", quick=args.quick)
    lines, floor = everything(args)
    found = goals(lines, floor)
    show(lines, found)
    result = {"quick": args.quick, "lines": lines, "floor_s": floor, "goals": as_json(found)}
    write(args.out, result, beside=("diffusers", "safetensors", "tokenizers", "transformers"))
    bars = {f"{each['way']}: {each['who']}": each["seconds"]["median"] for each in lines}
    plots.bars(args.out.with_suffix(".png"), "Cold start and loading, SD 1.5's size", "seconds", bars)
    return 0


if __name__ == "__main__":
    sys.exit(main())
