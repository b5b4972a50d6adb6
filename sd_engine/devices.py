"""Which device computes, and in which dtype: names to torch's own words, checked against this machine."""

from __future__ import annotations

import re

import torch

from sd_engine.errors import InvalidDevice

DEVICES = "auto, cpu, mps, cuda or cuda:N"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def pick_device(name: str | torch.device = "auto") -> torch.device:
    """A device of this machine by its name; `auto`: cuda, then mps, then cpu.

    Raises InvalidDevice for what is no device, and for one that this machine does not have.
    """
    name = str(name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps(:0)?|cuda(:[0-9]{1,3})?", name):
        raise InvalidDevice("device", name, DEVICES, f"this machine has {_here()}")
    kind, _, number = name.partition(":")
    there = {
        "cpu": True,
        "mps": torch.backends.mps.is_available(),
        "cuda": int(number or 0) < torch.cuda.device_count(),
    }
    if not there[kind]:
        raise InvalidDevice("device", name, f"this machine has {_here()}", "choose one of them, or auto")
    return torch.device(name)


def pick_dtype(name: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of weights and activations; latents, step updates, guidance and noise are float32 whatever it is.

    `auto` is fp16 on CUDA, where it is fast and halves the memory. On CPUs it is fp32: half precision is slower there,
    and the reference pictures were compared in fp32. On Apple's GPUs it is fp32 too: this engine was never run on one,
    and a picture that overflows in fp16 comes out black, while a slow one is right.
    Raises InvalidDevice for any other name or dtype.
    """
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    dtype = DTYPES.get(name) if isinstance(name, str) else name
    if dtype is None or dtype not in DTYPES.values():
        raise InvalidDevice("dtype", name, "auto, " + ", ".join(DTYPES))
    return dtype


def _here() -> str:
    """This machine's devices in words: 'cpu, cuda:0, cuda:1'."""
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return ", ".join(["cpu", *["mps"] * torch.backends.mps.is_available(), *gpus])
