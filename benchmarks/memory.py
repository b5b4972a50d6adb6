"""How much memory a U-Net row takes, ours and the reference's, and a guided picture in each mode of offload.

    python -m benchmarks.memory              (three minutes on two cores)
    python -m benchmarks.memory --quick      (the smallest size, counted alone; seconds)

Prints two tables, writes `benchmarks/results/memory.json` and a plot.

- Rows: what one more row of a U-Net call, or one more decoded picture, adds to the peak, at each size, float32, ours
  and the reference's by the same account. At one size each the account is held against real calls, whose resident
  memory is measured in fresh processes: the difference is what the kernels take for themselves.
- Offload: one guided picture, in each mode of offload and each dtype.

What is counted is not computed: the code runs at full size (SD 1.5, random shapes' worth of weights) on PyTorch's
`meta` device while the living tensors are added up. Not in these numbers: the CUDA context (some hundred MB), the
kernels' own workspaces, and what the allocator keeps.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks import plots
from benchmarks.accounting import META, FusedAttention, LiveBytes, Phases
from benchmarks.memory_rows import PARTS, REAL, WHO, counted, resident
from benchmarks.report import result_file, write
from sd_engine import Engine, Model, Request, shipped_model
from sd_engine.clip import ClipTextEncoder
from sd_engine.devices import DTYPES
from sd_engine.model import SD1, Configs
from sd_engine.offload import OFFLOADS, Offload, Place
from sd_engine.tokenizer import Tokenizer
from sd_engine.unet import UNet
from sd_engine.vae import Vae

MB = 1024 * 1024
SIDES = (256, 512, 768)
PHASES = {"prepare": "texts", "denoise": "U-Net step", "decode": "decode"}


def empty_model(configs: Configs, dtype: torch.dtype, offload: Offload) -> Model:
    """A model that computes on `meta`; what waits at home has storages on the CPU that nobody ever touches."""
    words = Tokenizer.from_folder(shipped_model() / "tokenizer", max_tokens=configs.text.max_tokens)
    with META:
        text_encoder, unet, vae = ClipTextEncoder(configs.text), UNet(configs.unet), Vae(configs.vae)
    model = Model("empty", words, text_encoder, unet, vae, configs.schedule, META, dtype, offload)
    place = Place(META, dtype, offload)
    for component, module in model.modules.items():
        module.to(dtype).to_empty(device=place.at_rest(component)[0]).requires_grad_(False)
    return model


def measure(
    configs: Configs, dtype: torch.dtype, offload: Offload, *, side: int, pictures: int = 1, fused: bool = True
) -> dict[str, int]:
    """Draw pictures of side x side with guidance, one step -> bytes on the device: at rest, and the peak of each phase.

    fused: attention without the matrix of scores. Raises the error that a picture ended with.
    """
    model = empty_model(configs, dtype, offload)
    meter = LiveBytes()
    for module in model.modules.values():
        for parameter in module.parameters():
            meter.see(parameter.data)
    at_rest = meter.live
    # The limit of a pack is about speed here: all pictures are to share it.
    engine = Engine(model, max_units=2 * pictures * side * side)
    engine.runner = Phases(engine.runner, meter)
    with ExitStack() as stack:
        stack.enter_context(meter)
        if fused:
            stack.enter_context(FusedAttention())
        requests = [Request("a red star", steps=1, width=side, height=side)] * pictures
        engine.render(requests)
    peaks = {PHASES[name]: peak for name, peak in meter.peaks.items()}
    return {"at rest": at_rest, **peaks, "peak": meter.peak}


def table(*, side: int, pictures: int, fused: bool) -> list[dict[str, Any]]:
    """One line for each dtype and mode."""
    return [
        {"dtype": name, "offload": offload}
        | measure(SD1, DTYPES[name], offload, side=side, pictures=pictures, fused=fused)
        for name in ("fp16", "fp32")
        for offload in OFFLOADS
    ]


def show(lines: list[dict[str, Any]]) -> None:
    """Print the table, in MB."""
    columns = ["at rest", *PHASES.values(), "peak"]
    print(f"{'dtype':6}{'offload':12}" + "".join(f"{column + ', MB':>16}" for column in columns))
    for line in lines:
        print(f"{line['dtype']:6}{line['offload']:12}" + "".join(f"{line[column] / MB:16.0f}" for column in columns))


def rows(sides: Sequence[int], *, real: bool) -> list[dict[str, Any]]:
    """One line for each part and size, bytes: of ours and of the reference's. real: some also measured."""
    lines = []
    for part in PARTS:
        for side in sides:
            line: dict[str, Any] = {"part": part, "side": side}
            line |= {f"{who} counted": counted(who, part, side) for who in WHO}
            if real and side == REAL[part]:
                line |= {f"{who} resident": resident(who, part, side) for who in WHO}
            lines.append(line | {"ratio": round(line["ours counted"] / line["reference counted"], 3)})
    return lines


def show_rows(lines: Sequence[Mapping[str, Any]]) -> None:
    """Print the table, in MB."""
    columns = [f"{who} {how}" for how in ("counted", "resident") for who in WHO]
    print(f"{'of one more':17}{'side':>5}" + "".join(f"{column + ', MB':>25}" for column in columns) + f"{'ratio':>7}")
    for line in lines:
        cells = (f"{line[column] / MB:25.1f}" if column in line else f"{'':25}" for column in columns)
        print(f"{line['part']:17}{line['side']:5}" + "".join(cells) + f"{line['ratio']:7.2f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=512, help="pixels")
    parser.add_argument("--pictures", type=int, default=1, help="pictures of one pack")
    parser.add_argument("--plain-attention", action="store_true", help="count the matrix of scores, too")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/memory.json")
    parser.add_argument("--quick", action="store_true", help="rows of the smallest size, counted alone")
    args = parser.parse_args()
    args.out = args.out or result_file("memory.json", quick=args.quick)
    of_rows = rows(SIDES[:1] if args.quick else SIDES, real=not args.quick and sys.platform.startswith("linux"))
    show_rows(of_rows)
    lines = table(side=args.side, pictures=args.pictures, fused=not args.plain_attention)
    show(lines)
    asked = {
        "model": "SD 1.5",
        "side": args.side,
        "pictures": args.pictures,
        "guided": True,
        "attention": "plain" if args.plain_attention else "fused",
    }
    write(args.out, asked | {"quick": args.quick, "rows": of_rows, "bytes": lines}, beside=("diffusers",))
    bars = {f"{line['part']}, {line['side']}: {who}": line[f"{who} counted"] / MB for line in of_rows for who in WHO}
    plots.bars(args.out.with_suffix(".png"), "What one more adds to the peak, SD 1.5, float32", "MB", bars)
    return 0


if __name__ == "__main__":
    sys.exit(main())
