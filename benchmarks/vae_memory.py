"""How much memory a large picture takes on its way through the VAE of SD 1.x, at once and in tiles.

    python -m benchmarks.vae_memory

Prints a table and writes `benchmarks/results/vae_memory.json`. Nothing is computed (see `benchmarks/accounting.py`), so
the kernels' workspaces are not in the numbers; the weights are. `at home` is what the tiles' maps take on the CPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.accounting import META, FusedAttention, LiveBytes
from benchmarks.report import RESULTS, write
from sd_engine.config import VaeConfig
from sd_engine.devices import DTYPES
from sd_engine.vae import Vae
from sd_engine.vae_tiles import decode_in_tiles, encode_in_tiles

MB = 1024 * 1024
SIDES = (1024, 2048)
_CPU = torch.device("cpu")


def ways(vae: Vae) -> dict[tuple[str, str], Callable[[Tensor], object]]:
    """What is done with a picture or a latent of its size, and how."""
    return {
        ("decode", "at once"): vae.decode,
        ("decode", "in tiles"): partial(vae.decode, through=partial(decode_in_tiles, vae.decoder)),
        ("encode", "at once"): vae.moments,
        ("encode", "in tiles"): partial(vae.moments, through=partial(encode_in_tiles, vae.encoder)),
    }


def peak(config: VaeConfig, dtype: torch.dtype, work: str, way: str, side: int, device: torch.device = META) -> int:
    """The most bytes that live on a device (`meta` computes, the CPU is home) while one picture goes through."""
    with META:
        vae = Vae(config).to(dtype).requires_grad_(False)
        sides = (side // config.factor,) * 2
        x = torch.empty((1, config.latent_channels, *sides) if work == "decode" else (1, 3, side, side), dtype=dtype)
    meter = LiveBytes(device)
    for tensor in (*vae.parameters(), x):
        meter.see(tensor.data)
    with torch.no_grad(), meter, FusedAttention(), meter.phase(work):
        ways(vae)[work, way](x)
    return meter.peak


@dataclass(frozen=True, slots=True)
class Line:
    """One picture's way: the most bytes on the device, and at home."""

    dtype: str
    side: int
    work: str
    way: str
    device: int
    home: int


def lines() -> Iterator[Line]:
    """Every dtype, size, work and way."""
    for name, side, work, way in product(("fp16", "fp32"), SIDES, ("decode", "encode"), ("at once", "in tiles")):
        device, home = (peak(VaeConfig(), DTYPES[name], work, way, side, place) for place in (META, _CPU))
        yield Line(name, side, work, way, device, home)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "vae_memory.json")
    args = parser.parse_args()
    found = list(lines())
    print(f"{'dtype':6}{'pixels':>8}  {'work':8}{'way':10}{'on the device, MB':>18}{'at home, MB':>14}")
    for line in found:
        print(f"{line.dtype:6}{line.side:>8}  {line.work:8}{line.way:10}{line.device / MB:18.0f}{line.home / MB:14.0f}")
    write(
        args.out,
        {"model": "SD 1.5", "attention": "fused", "bytes": [asdict(line) for line in found]},
        device="meta (counted, not run)",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
