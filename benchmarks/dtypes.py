"""How far the shipped model's pictures in bf16 and fp16 are from those in fp32: same seeds, same device.

    python -m benchmarks.dtypes --device cpu

They are computed in their dtype as on a GPU, by a CPU without units for it too, if slowly. Prints a table and writes
`benchmarks/results/dtypes.json`. Differences are in levels of 0 to 255.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.report import RESULTS, write
from sd_engine import Engine, Request, load_model, shipped_model
from sd_engine.devices import DTYPES, pick_device
from tests.engine.half import cpu_with_units

PROMPTS = (
    "a red star on a white background",
    "a blue circle on a yellow background",
    "a small green heart on a black background",
    "a large purple cross on a orange background",
)
SAMPLERS = ("dpmpp_2m_karras", "euler_a")


def requests(steps: int) -> list[Request]:
    """Every prompt with every sampler, each with its own seed."""
    pairs = [(prompt, sampler) for prompt in PROMPTS for sampler in SAMPLERS]
    return [Request(prompt, seed=i, steps=steps, sampler=sampler) for i, (prompt, sampler) in enumerate(pairs)]


def draw(dtype: str, device: str, steps: int) -> list[npt.NDArray[np.uint8]]:
    """The pictures in one dtype."""
    with cpu_with_units():
        model = load_model(shipped_model(), device, dtype)
    return Engine(model).render(requests(steps))


def differences(
    pictures: Sequence[npt.NDArray[np.uint8]], expected: Sequence[npt.NDArray[np.uint8]]
) -> Mapping[str, float]:
    """Over all pictures: the mean difference, the 99th percentile, the largest; and the mean of the worst picture."""
    levels = np.abs(np.stack(pictures).astype(int) - np.stack(expected).astype(int))
    return {
        "mean": float(levels.mean()),
        "p99": float(np.quantile(levels, 0.99)),
        "max": float(levels.max()),
        "worst picture's mean": float(levels.reshape(len(pictures), -1).mean(axis=1).max()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="auto, cpu, mps, cuda or cuda:N")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULTS / "dtypes.json")
    args = parser.parse_args()
    expected = draw("fp32", args.device, args.steps)
    found = {dtype: differences(draw(dtype, args.device, args.steps), expected) for dtype in DTYPES if dtype != "fp32"}
    columns = list(found["bf16"])
    print("      " + "".join(f"{column:>22}" for column in columns))
    for dtype, line in found.items():
        print(f"{dtype:6}" + "".join(f"{line[column]:22.2f}" for column in columns))
    what = {"pictures": len(expected), "steps": args.steps, "samplers": SAMPLERS, "levels from fp32": found}
    write(args.out, what, device=str(pick_device(args.device)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
