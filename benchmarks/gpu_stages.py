"""The stages of `benchmarks.gpu`: each yields its figures one by one, so that a run that is cut leaves some."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import conv2d, group_norm, scaled_dot_product_attention, silu

from benchmarks import gpu_model as gm
from benchmarks.gpu_model import Setup
from sd_engine import Engine, load_model, shipped_model
from sd_engine.latents import decode_latents

Figure = dict[str, Any]
Stage = Callable[[Setup], Iterator[Figure]]

# Of a half-precision result to the same in float32: what rounding alone does, several times over; a wrong layout, mask
# or kernel is off by a tenth at least. Pictures in decibels: the shipped model's, in float32 on the CPU.
RELATIVE: Final = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
DECIBELS: Final = {torch.float32: 50.0, torch.float16: 40.0, torch.bfloat16: 28.0}
# Compiled or in another layout, but of one dtype: rounded in another order.
SAME: Final = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
BACKENDS: Final = {
    "flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH,
}  # fmt: skip
_MATH_SCORES: Final = 2**30  # the plain path holds all scores: no more than so many


def correct(setup: Setup) -> Iterator[Figure]:
    """Is what it computes right: the U-Net beside float32, here and on the CPU, and pictures of the shipped model."""
    with exact_float32():
        wide = gm.random_model(setup, torch.float32)
        with torch.inference_mode():
            expected = wide.unet(*gm.inputs(setup, 2, torch.float32)).float()
            at_home = replace(setup, device=torch.device("cpu"))
            home = wide.unet.to("cpu")(*gm.inputs(at_home, 2, torch.float32))
        yield checked("U-Net, fp32 on the CPU", gm.relative(expected, home), RELATIVE[torch.float32])
        del wide
        shipped = Engine(load_model(shipped_model(), "cpu", "fp32")).render(_pictures(setup))
    for dtype in (torch.float16, torch.bfloat16):
        model = gm.random_model(setup, torch.float32)
        model.unet.to(dtype)
        with torch.inference_mode():
            found = model.unet(*gm.inputs(setup, 2, dtype))
        yield checked(f"U-Net, {name_of(dtype)} beside fp32", gm.relative(found, expected), RELATIVE[dtype])
        del model
        drawn = Engine(load_model(shipped_model(), setup.device, dtype)).render(_pictures(setup))
        decibels = gm.psnr(drawn, shipped)
        yield {"what": f"picture of the shipped model, {name_of(dtype)}, decibels", "found": round(decibels, 1),
               "bar": DECIBELS[dtype], "right": decibels >= DECIBELS[dtype]}  # fmt: skip


def _pictures(setup: Setup) -> list[Any]:
    return gm.requests(replace(setup, side=96), 2, 20 if setup.cuda else 2)


def checked(what: str, found: float, bar: float) -> Figure:
    return {"what": what, "found": found, "bar": bar, "right": found <= bar}


def ceilings(setup: Setup) -> Iterator[Figure]:
    """What the machine reaches in a plain matrix product, and in the convolutions that the U-Net has."""
    side = 8192 if setup.cuda else 512
    for dtype in dict.fromkeys((setup.dtype, torch.float16, torch.bfloat16)) if setup.cuda else (torch.float32,):
        a, b = (torch.randn(side, side, device=setup.device, dtype=dtype) for _ in range(2))
        took = gm.device_seconds(setup, partial(torch.matmul, a, b))
        yield {"what": f"matmul {side}, {name_of(dtype)}", "tflops": 2 * side**3 / took / 1e12}
    rows, channels = (32, setup.configs.unet.channels) if setup.cuda else (2, setup.configs.unet.channels)
    for level, width in enumerate(channels):
        cells = max(setup.cells >> level, 1)
        for name, layout in LAYOUTS.items():
            x = torch.randn(rows, width, cells, cells, device=setup.device, dtype=setup.dtype).to(memory_format=layout)
            w = torch.randn(width, width, 3, 3, device=setup.device, dtype=setup.dtype).to(memory_format=layout)
            took = gm.device_seconds(setup, partial(conv2d, x, w, padding=1))
            work = 2 * rows * cells**2 * width**2 * 9
            yield {"what": f"convolution {width} at {cells}, {name}", "tflops": work / took / 1e12}


LAYOUTS: Final = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


def attention(setup: Setup) -> Iterator[Figure]:
    """Each backend at each level, of a row to itself and to its text: microseconds; None where it has no kernel."""
    unet, rows = setup.configs.unet, 32 if setup.cuda else 2
    for level, (width, heads) in enumerate(zip(unet.channels, unet.heads, strict=True)):
        positions = max(setup.cells >> level, 1) ** 2
        for kind, others in (("self", positions), ("text", setup.configs.text.max_tokens)):
            q, k, v = _as_the_unet_has_them(setup, (rows, heads, positions, others, width // heads), kind)
            found = {name: _attended(setup, q, k, v, backend) for name, backend in BACKENDS.items()}
            there = {name: took for name, took in found.items() if took is not None}
            yield {"level": level, "kind": kind, "rows": rows, "positions": positions, "others": others,
                   "head": width // heads,
                   "best": min(there, key=lambda name: there[name]) if there else None,
                   "chosen_us": _attended(setup, q, k, v, None), **{f"{name}_us": took for name, took in found.items()},
                   "flop": 4 * rows * heads * positions * others * (width // heads)}  # fmt: skip


def _as_the_unet_has_them(setup: Setup, sizes: tuple[int, int, int, int, int], kind: str) -> tuple[Tensor, ...]:
    """Queries, keys and values: heads of tokens, those of texts halves of what a pack has stacked."""
    rows, heads, positions, others, width = sizes

    def of_tokens(tokens: int) -> Tensor:
        made = torch.randn(rows, tokens, heads, width, device=setup.device, dtype=setup.dtype)
        return made.transpose(1, 2)

    if kind == "self":
        return of_tokens(positions), of_tokens(positions), of_tokens(positions)
    stacked = torch.randn(rows, 2, heads, others, width, device=setup.device, dtype=setup.dtype)
    return of_tokens(positions), stacked[:, 0], stacked[:, 1]


def best_backends(setup: Setup) -> dict[tuple[int, int, int], SDPBackend]:
    """The fastest backend by queries, keys and the width of a head, as `attention` measures it.

    By the width too: the VAE has as many positions in a head of 512, for which not every backend has a kernel.
    """
    return {
        (figure["positions"], figure["others"], figure["head"]): BACKENDS[figure["best"]]
        for figure in attention(setup)
        if figure["best"] is not None
    }


def _attended(setup: Setup, q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend | None) -> float | None:
    """Microseconds of one call; None: no kernel for it, or no room. No backend: the one that PyTorch takes."""
    if backend == SDPBackend.MATH and q.shape[:3].numel() * k.shape[2] > _MATH_SCORES:
        return None
    try:
        with sdpa_kernel(list(BACKENDS.values()) if backend is None else backend), torch.inference_mode():
            return 1e6 * gm.device_seconds(setup, lambda: scaled_dot_product_attention(q, k, v), 10)
    except RuntimeError:
        return None


def norm(setup: Setup) -> Iterator[Figure]:
    """GroupNorm and SiLU at each level: as PyTorch does the two, and compiled into one; of a read and a write, GB/s."""
    rows = 32 if setup.cuda else 2
    compiled = torch.compile(_normed, backend=setup.compiler, dynamic=False)
    for level, width in enumerate(setup.configs.unet.channels):
        cells = max(setup.cells >> level, 1)
        for name, layout in LAYOUTS.items():
            x = torch.randn(rows, width, cells, cells, device=setup.device, dtype=setup.dtype).to(memory_format=layout)
            scale = torch.ones(width, device=setup.device, dtype=setup.dtype)
            for how, call in (("eager", _normed), ("compiled", compiled)):
                with torch.inference_mode():
                    kept = call(x, scale).is_contiguous(memory_format=layout)
                    took = gm.device_seconds(setup, partial(call, x, scale))
                yield {"what": f"GroupNorm + SiLU, {width} at {cells}, {name}", "how": how, "us": 1e6 * took,
                       "gb_per_s": 2 * x.nbytes / took / 1e9, "keeps_its_layout": kept}  # fmt: skip


def _normed(x_BCHW: Tensor, scale_C: Tensor) -> Tensor:
    return silu(group_norm(x_BCHW, 32, scale_C, scale_C, 1e-5))


def failed(error: Exception) -> Figure:
    """A figure that is none, and why."""
    if isinstance(error, torch.OutOfMemoryError):
        return {"out_of_memory": True}
    return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}


def vae(setup: Setup) -> Iterator[Figure]:
    """Decoding alone, by pictures of a call, in both layouts."""
    model = gm.random_model(setup, setup.dtype)
    for name, layout in LAYOUTS.items():
        model.vae.to(memory_format=layout)  # type: ignore[call-overload]
        for pictures in (size for size in setup.sizes if size <= 16):
            latents = torch.randn(pictures, model.latent_channels, setup.cells, setup.cells, device=setup.device)
            forget_peak(setup)
            with torch.inference_mode():
                took = gm.seconds(setup, partial(decode_latents, model, latents))
            yield {"what": name, "pictures": pictures, "ms_per_picture": 1e3 * took / pictures,
                   "peak_gb": peak_gb(setup)}  # fmt: skip


def forget_peak(setup: Setup) -> None:
    gc.collect()
    if setup.cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(setup.device)


def peak_gb(setup: Setup) -> float | None:
    return torch.cuda.max_memory_allocated(setup.device) / 1e9 if setup.cuda else None


@contextmanager
def exact_float32() -> Iterator[None]:
    """Convolutions in TF32, PyTorch's default on CUDA, keep 10 bits: that is not the float32 to compare with."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
