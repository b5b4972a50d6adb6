"""Seconds per U-Net row: ours, the reference's best configurations, OpenVINO, and the machine's ceiling.

    python -m benchmarks.unet                              64 x 64 latents, 1, 2, 4 and 8 rows: half an hour, and as
                                                           long again where this CPU multiplies bfloat16
    python -m benchmarks.unet --compiled 0                 without torch.compile, half of that
    python -m benchmarks.unet --dtype bf16 --rows 1 --side 32 --peers ours eager    a CPU that multiplies no bfloat16
    python -m benchmarks.unet --dtype fp32 --peers ours eager --repeats 5

SD 1.5's size, random weights, the same for all. The peers take turns, so that what else the machine does meets all of
them; medians and their spread are told. Prints a table and writes `benchmarks/results/unet.json` (of bfloat16
`unet_bf16.json`) and a plot. The ceiling is that of the dtype that ours computes in: on a CPU without units for
bfloat16 that is float32. Every prediction is compared with the reference's: one that is far off is told, of ours
with exit code 1.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from benchmarks.goals import Goal, as_json, at_least, spread
from benchmarks.gpu_model import full, row_flops
from benchmarks.plots import bars
from benchmarks.report import multiplied_here, result_file, write
from benchmarks.unet_peers import FULL, QUICK, Forward, Inputs, Peers
from sd_engine import prepacking
from sd_engine.devices import DTYPES, working_dtype
from worker.memory import keep_freed_memory

# Largest difference to the reference in deviations of its output: float32 rounds some hundred sums otherwise; bfloat16
# keeps 8 bits.
BARS = {torch.float32: 1e-3, torch.bfloat16: 0.2}
EAGER = ("eager", "channels-last")
REFERENCE = (*EAGER, "compiled")


@torch.inference_mode()
def ceiling(dtype: torch.dtype, quick: bool) -> dict[str, float]:
    """TFLOP/s of a large matrix product, by the better of PyTorch's libraries, and of a U-Net's typical convolution."""
    side, channels, cells = (256, 32, 16) if quick else (2048, 640, 32)
    a, b = torch.randn(side, side).to(dtype), torch.randn(side, side).to(dtype)
    x = torch.randn(2, channels, cells, cells).to(dtype).contiguous(memory_format=torch.channels_last)
    conv = torch.nn.Conv2d(channels, channels, 3, padding=1).to(dtype).requires_grad_(False)
    products: list[Callable[[], object]] = [lambda: a @ b]
    if prepacking.serves(a, dtype):
        products.append(lambda: prepacking.linear(a, b, None))
    return {
        "matmul": 2 * side**3 / min(map(_fastest, products)) / 1e12,
        "convolution": 2 * 9 * 2 * channels**2 * cells**2 / _fastest(lambda: conv(x)) / 1e12,
    }


def _fastest(work: Callable[[], object], times: int = 5) -> float:
    work()
    return min(_seconds(work) for _ in range(times))


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


@torch.inference_mode()
def measure(peers: Peers, names: Sequence[str], inputs: Inputs, repeats: int) -> list[dict[str, Any]]:
    """A line for each peer: seconds per row (median, least, most), and how far its prediction is from the reference."""
    made = {name: peers.make(name, inputs) for name in names}
    forwards = {name: forward for name, forward in made.items() if forward is not None}
    gc.collect()  # what some were traced from is as large as they are
    wanted = peers.make("eager", inputs)
    assert wanted is not None
    expected = wanted(inputs.x_UCHW, inputs.t_U, inputs.text_UTD)
    rows = len(inputs.x_UCHW)
    apart = {name: _apart(_run(forward, inputs), expected) for name, forward in forwards.items()}  # and warm
    seconds: dict[str, list[float]] = {name: [] for name in forwards}
    for _ in range(repeats):
        for name, forward in forwards.items():
            seconds[name].append(_seconds(lambda forward=forward: _run(forward, inputs)) / rows)  # type: ignore[misc]
    return [
        {"rows": rows, "peer": name, "seconds a row": spread(each, 4), "difference": apart[name]}
        for name, each in seconds.items()
    ]


def _run(forward: Forward, inputs: Inputs) -> Tensor:
    return forward(inputs.x_UCHW, inputs.t_U, inputs.text_UTD)


def _apart(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.float() - theirs.float()).abs().max() / theirs.float().std())


def goals(lines: Sequence[dict[str, Any]], dtype: torch.dtype, top: float) -> list[Goal]:
    """The issue's, from the medians; the ratios are the medians over the numbers of rows."""
    eager, openvino, best = (_ratio(lines, "ours", names) for names in (EAGER, ("openvino",), REFERENCE))
    found = []
    if dtype == torch.bfloat16:
        works_in = _named(working_dtype(dtype, torch.device("cpu")))
        how = "" if works_in == "bf16" else f" (ours computes in {works_in}, the reference step by step)"
        if eager:
            found.append(at_least(f"bf16{how}: x the reference's eager best", eager, 1.45))
        found.append(at_least(f"bf16{how}: the plain sum's share of the matmul ceiling", top, 0.6))
    elif best:
        found.append(at_least("fp32: x the reference's best", best, 1.3))
    if openvino:
        found.append(at_least("x OpenVINO, static", openvino, 1.0))
    return found


def _ratio(lines: Sequence[dict[str, Any]], ours: str, others: Sequence[str]) -> float:
    """How many times as fast as the fastest of the others; 0 where none was measured."""
    medians = {(line["rows"], line["peer"]): line["seconds a row"]["median"] for line in lines}
    rows = sorted({line["rows"] for line in lines})
    ratios = [
        min(medians[count, other] for other in others if (count, other) in medians) / medians[count, ours]
        for count in rows
        if any((count, other) in medians for other in others)
    ]
    return statistics.median(ratios) if ratios else 0.0


def show(lines: Sequence[dict[str, Any]]) -> None:
    """The table."""
    for line in lines:
        took = line["seconds a row"]
        print(
            f"{line['rows']:3} rows  {line['peer']:26}{took['median']:9.3f} s a row "
            f"({took['least']:.3f} to {took['most']:.3f})   difference {line['difference']:.1e}",
            flush=True,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--dtype", choices=["fp32", "bf16"], help="default: each that this CPU multiplies by itself")
    parser.add_argument("--side", type=int, help="latent cells along a side; default: 64")
    parser.add_argument("--peers", nargs="+", choices=Peers.names, metavar="PEER", help=f"of {', '.join(Peers.names)}")
    parser.add_argument(
        "--compiled", type=int, default=2, metavar="ROWS", help="where --peers names none: compiled peers up to so many"
    )
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a tiny U-Net: seconds, and figures that mean nothing")
    parser.add_argument(
        "--out", type=Path, help="of one --dtype; default: benchmarks/results/unet.json, unet_bf16.json"
    )
    args = parser.parse_args(arguments)
    if args.out and not args.dtype:
        parser.error("--out is the file of one dtype: name it with --dtype")
    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")
    diffusers.utils.logging.set_verbosity_error()
    return max([_measured(args, name) for name in ([args.dtype] if args.dtype else multiplied_here())])


def _measured(args: argparse.Namespace, name: str) -> int:
    dtype, config = DTYPES[name], QUICK if args.quick else FULL
    works_in = _named(working_dtype(dtype, torch.device("cpu")))
    tops = ceiling(DTYPES[works_in], args.quick)
    print(f"ceiling ({works_in}): matmul {tops['matmul']:.3f}, convolution {tops['convolution']:.3f} TFLOP/s")
    peers, lines = Peers(config, dtype), []
    for rows in args.rows:
        inputs = Inputs.of(rows, args.side or config["sample_size"], config["cross_attention_dim"], dtype)
        # Compiling takes minutes for each number of rows, and the more memory the more rows there are.
        names = args.peers or [name for name in Peers.names if rows <= args.compiled or "compiled" not in name]
        found = measure(peers, names, inputs, args.repeats)
        show(found)
        lines += found
        _written(args, lines, dtype, tops)  # a larger call may find too little memory
        _forget_compiled()
    # Twice, and the better: a neighbour of this machine would make the ceiling low, and every share of it high.
    again = ceiling(DTYPES[works_in], args.quick)
    tops = {name: max(top, again[name]) for name, top in tops.items()}
    return _report(args, lines, dtype, tops)


def _forget_compiled() -> None:
    """What was compiled for one number of rows serves no other, and holds weights of its own."""
    torch._dynamo.reset()
    gc.collect()


def _named(dtype: torch.dtype) -> str:
    return next(name for name, named in DTYPES.items() if named == dtype)


def _report(args: argparse.Namespace, lines: list[dict[str, Any]], dtype: torch.dtype, tops: dict[str, float]) -> int:
    """Tell the goals, and what is wrong -> exit code."""
    print("\n".join(goal.line for goal in _written(args, lines, dtype, tops)))
    wrong = [line for line in lines if not line["difference"] <= BARS[dtype]]
    for line in wrong:
        far = f"{line['difference']:.1e} from the reference, the bar is {BARS[dtype]:.0e}"
        print(f"{line['peer']}, {line['rows']} rows: {far}")
    return 1 if any(line["peer"].startswith("ours") for line in wrong) else 0


def _written(
    args: argparse.Namespace, lines: list[dict[str, Any]], dtype: torch.dtype, tops: dict[str, float]
) -> list[Goal]:
    """Write the file and the plot of what was measured so far -> the goals."""
    fastest = min((line["seconds a row"]["median"] for line in lines if line["peer"] == "ours"), default=float("inf"))
    side, name = args.side or (QUICK if args.quick else FULL)["sample_size"], _named(dtype)
    # Of SD 1.5's, multiplications and additions counted one by one (the sum over the layers).
    rate = row_flops(replace(full(torch.device("cpu"), torch.float32), side=8 * side)) / 1e12 / fastest
    reached = goals(lines, dtype, rate / tops["matmul"]) if fastest < float("inf") else []
    result = {
        "dtype": name,
        "side": side,
        "ours computes in": _named(working_dtype(dtype, torch.device("cpu"))),
        "threads": torch.get_num_threads(),
        "ceiling TFLOP/s": tops,
        "share of the matmul ceiling, by the plain sum": rate / tops["matmul"],
        "rows": lines,
        "goals": as_json(reached),
    }
    out = args.out or result_file("unet.json" if name == "fp32" else f"unet_{name}.json", quick=args.quick)
    write(out, result, beside=("diffusers", "openvino"))
    most = max(line["rows"] for line in lines)
    shown = {line["peer"]: line["seconds a row"]["median"] for line in lines if line["rows"] == most}
    bars(out.with_suffix(".png"), f"U-Net of SD 1.5, {name}, {most} rows", "seconds a row", shown)
    return reached


if __name__ == "__main__":
    keep_freed_memory()  # as a worker does; it serves all peers
    sys.exit(main())
