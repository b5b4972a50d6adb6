"""Which device computes, and in which dtype: names to torch's own words, checked against this machine."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from sd_engine.errors import InvalidDevice

DEVICES = "auto, cpu, mps, cuda or cuda:N"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_X86 = ("x86_64", "AMD64")
_PREFERRED = ("cuda", "mps", "cpu")


def devices_here() -> list[str]:
    """This machine's devices: `cpu`, `mps`, `cuda:0`, ... Makes no CUDA context in this process."""
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return ["cpu", *["mps"] * torch.backends.mps.is_available(), *gpus]


def pick_device(name: str | torch.device = "auto", here: Sequence[str] | None = None) -> torch.device:
    """A device by its name; `auto`: cuda, then mps, then cpu. here: what there is, None for this machine's.

    Raises InvalidDevice for what is no device, and for one that is not here.
    """
    here = devices_here() if here is None else here
    name = str(name)
    if name == "auto":
        name = next(kind for kind in _PREFERRED if any(device.startswith(kind) for device in here))
    if not re.fullmatch(r"cpu|mps|cuda(:[0-9]+)?", name):
        raise InvalidDevice("device", name, DEVICES, f"this machine has {', '.join(here)}")
    if name not in here and f"{name}:0" not in here:
        raise InvalidDevice("device", name, f"this machine has {', '.join(here)}", "choose one of them, or auto")
    return torch.device(name)


def pick_dtype(name: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of weights and, but for `working_dtype`, of activations.

    Latents, step updates, guidance and noise are float32 whatever it is.

    `auto` is fp16 on CUDA, where it is fast and halves the memory. On CPUs it is fp32: most of them compute in that,
    whatever the weights are. On Apple's GPUs it is fp32 too: this engine was never run on one, and a picture that
    overflows in fp16 comes out black, while a slow one is right.
    Raises InvalidDevice for any other name or dtype.
    """
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    dtype = DTYPES.get(name) if isinstance(name, str) else name
    if dtype is None or dtype not in DTYPES.values():
        raise InvalidDevice("dtype", name, "auto, " + ", ".join(DTYPES))
    return dtype


def default_max_units(device: torch.device, *, padded: bool = False) -> int:
    """The limit of one pack on this device where none is given, in U-Net rows x latent cells.

    Two guided pictures of 512 x 512 on a CPU: larger packs bring little (`benchmarks/NOTES.md`), while a job that
    somebody waits for has to wait for the whole pack that is stepped when it comes. Elsewhere eight, what a card of
    8 GB steps comfortably at half precision.

    padded: packs are padded to this limit (`Packer.bucket`). They have one limit everywhere: their size decides the
    bits of a picture, and with a small one a pack could hold an odd row that nobody uses.
    """
    return (4 if device.type == "cpu" and not padded else 16) * 64 * 64


def working_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of activations where weights rest in `dtype`: float32 on a CPU without units for that one.

    Such a CPU computes half precision step by step, eight times as slow as float32 (matrix products and convolutions,
    AVX2). Widening the large weights takes 0.7 s of each call of SD 1.5's U-Net, whatever its rows (computed from one
    layer's time).
    """
    return torch.float32 if device.type == "cpu" and not computes(dtype) else dtype


def computes(dtype: torch.dtype) -> bool:
    """Whether this machine's CPU multiplies matrices of this dtype by itself, and PyTorch lets it."""
    if dtype == torch.float32:
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    # oneDNN's own answer is yes for all of x86 with AVX-512: without units for it, it widens and narrows at each sum.
    units = (
        platform.machine() not in _X86 or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )
    return units and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def sent(values: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device, without waiting for that to be done with all it was given before.

    From pinned memory, which PyTorch keeps until the copy was made; from any other a copy to CUDA waits.
    """
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


@contextmanager
def one_thread() -> Iterator[None]:
    """One CPU thread for the operations within.

    Several share an operation out by its length alone, and the last numbers of each share are rounded by other
    instructions than the rest: which numbers of a row these are depends on the row's place among the others.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
