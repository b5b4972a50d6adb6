"""What a U-Net row and a decoded picture take while they are computed, ours and the reference's, by one account.

Both networks have random numbers of SD 1.5's shapes (on `meta`: none at all), and get the same inputs. A row's share is
what the peak grows by from three rows to five; weights and what does not grow with the rows are not in it. `counted` is
exact but sees results alone; `resident` is the memory of a fresh process on the CPU, its kernels' workspaces included.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from benchmarks.accounting import META, FusedAttention, LiveBytes
from benchmarks.cold_process import status
from benchmarks.parity_models import SD1_UNET, VAE
from sd_engine.config import UNetConfig, VaeConfig
from sd_engine.filling import Uninitialized
from sd_engine.unet import UNet
from sd_engine.vae import Vae

WHO: Final = ("ours", "reference")
PARTS: Final = ("U-Net row", "decoded picture")
_TOKENS, _FACTOR = 77, 8
# With fewer rows, what a convolution lays out of its weights alone (118 MB) is the peak, whatever the rows are.
_FEW, _MANY = 3, 5
# Where real calls are made, too: where rows take more than what is the same for any number of them.
REAL: Final[Mapping[str, int]] = {"U-Net row": 512, "decoded picture": 256}
_LIMIT_S = 600

Call = Callable[[int], Tensor]


def call(who: str, part: str, side: int, device: torch.device) -> Call:
    """How `n` rows (or pictures) of side x side are computed in float32 by networks on a device; cheap on `meta`."""
    with torch.device(device), Uninitialized():
        network = _NETWORKS[who, part]().eval().requires_grad_(False)
    if device != META:
        for parameter in network.parameters():
            parameter.normal_(std=0.02)  # what memory happens to hold may be slow numbers, or none
    cells = side // _FACTOR

    def unet(rows: int) -> Tensor:
        latents = torch.zeros(rows, 4, cells, cells, device=device)
        texts, times = torch.zeros(rows, _TOKENS, 768, device=device), torch.full((rows,), 500.0, device=device)
        result: Any = network(latents, times, texts)
        return result if who == "ours" else result.sample  # type: ignore[no-any-return]

    def decode(pictures: int) -> Tensor:
        decoder: Any = network
        result: Any = decoder.decode(torch.zeros(pictures, 4, cells, cells, device=device))
        return result if who == "ours" else result.sample  # type: ignore[no-any-return]

    return unet if part == "U-Net row" else decode


_NETWORKS: Mapping[tuple[str, str], Callable[[], Any]] = {
    ("ours", "U-Net row"): lambda: UNet(UNetConfig()),
    ("ours", "decoded picture"): lambda: Vae(VaeConfig()),
    ("reference", "U-Net row"): lambda: UNet2DConditionModel(**SD1_UNET),
    ("reference", "decoded picture"): lambda: AutoencoderKL(**VAE),
}


def counted(who: str, part: str, side: int) -> int:
    """Bytes that the peak grows by for each row (or picture) more, on `meta`."""
    run = call(who, part, side, META)
    with torch.inference_mode():
        return (_peak(run, _MANY) - _peak(run, _FEW)) // (_MANY - _FEW)


def _peak(run: Call, rows: int) -> int:
    meter = LiveBytes()
    with meter, FusedAttention(), meter.phase("call"):
        run(rows)
    return meter.peak


def resident(who: str, part: str, side: int) -> int:
    """The same, of fresh processes on the CPU. Raises CalledProcessError for one that fails. Linux only."""
    few, many = (_process(who, part, side, rows) for rows in (_FEW, _MANY))
    return (many - few) // (_MANY - _FEW)


# What is freed goes back at once, so that no call is paid from what another one left.
_GIVES_BACK: Final = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def _process(who: str, part: str, side: int, rows: int) -> int:
    command = [sys.executable, "-m", "benchmarks.memory_rows", json.dumps([who, part, side, rows])]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=_LIMIT_S, env=os.environ | _GIVES_BACK
    )
    return int(done.stdout.splitlines()[-1])


def child(asked: Sequence[Any]) -> int:
    """The peak of one call over what was resident before it, bytes; in a process that does nothing else."""
    who, part, side, rows = asked
    run = call(who, part, side, torch.device("cpu"))
    with torch.inference_mode():
        run(1)  # weights that are kept in another form from the first call on are no row's
        Path("/proc/self/clear_refs").write_text("5", "ascii")  # the peak starts anew
        before = status("VmRSS")
        run(int(rows))
    return status("VmHWM") - before


if __name__ == "__main__":
    print(child(json.loads(sys.argv[1])))
