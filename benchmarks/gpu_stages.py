"""The stages of `benchmarks.gpu`: each yields its figures one by one, so that a run that is cut leaves some."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import conv2d, scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from benchmarks import gpu_model as gm
from benchmarks.gpu_model import Setup
from sd_engine import Engine, Model, load_model, shipped_model
from sd_engine.latents import decode_latents

Figure = dict[str, Any]
Stage = Callable[[Setup], Iterator[Figure]]

# Of a half-precision result to the same in float32: what rounding alone does, several times over; a wrong layout, mask
# or kernel is off by a tenth at least. Pictures in decibels: the shipped model's, in float32 on the CPU.
RELATIVE: Final = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
DECIBELS: Final = {torch.float32: 50.0, torch.float16: 40.0, torch.bfloat16: 28.0}
# Compiled or in another layout, but of one dtype: rounded in another order.
SAME: Final = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_BACKENDS: Final = {
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
        yield _checked("U-Net, fp32 on the CPU", gm.relative(expected, home), RELATIVE[torch.float32])
        del wide
        shipped = Engine(load_model(shipped_model(), "cpu", "fp32")).render(_pictures(setup))
    for dtype in (torch.float16, torch.bfloat16):
        model = gm.random_model(setup, torch.float32)
        model.unet.to(dtype)
        with torch.inference_mode():
            found = model.unet(*gm.inputs(setup, 2, dtype))
        yield _checked(f"U-Net, {_name(dtype)} beside fp32", gm.relative(found, expected), RELATIVE[dtype])
        del model
        drawn = Engine(load_model(shipped_model(), setup.device, dtype)).render(_pictures(setup))
        decibels = gm.psnr(drawn, shipped)
        yield {"what": f"picture of the shipped model, {_name(dtype)}, decibels", "found": round(decibels, 1),
               "bar": DECIBELS[dtype], "right": decibels >= DECIBELS[dtype]}  # fmt: skip


def _pictures(setup: Setup) -> list[Any]:
    return gm.requests(replace(setup, side=96), 2, 20 if setup.cuda else 2)


def _checked(what: str, found: float, bar: float) -> Figure:
    return {"what": what, "found": found, "bar": bar, "right": found <= bar}


def ceilings(setup: Setup) -> Iterator[Figure]:
    """What the machine reaches in a plain matrix product, and in the convolutions that the U-Net has."""
    side = 8192 if setup.cuda else 512
    for dtype in dict.fromkeys((setup.dtype, torch.float16, torch.bfloat16)) if setup.cuda else (torch.float32,):
        a, b = (torch.randn(side, side, device=setup.device, dtype=dtype) for _ in range(2))
        took = gm.seconds(setup, partial(torch.matmul, a, b), 20)
        yield {"what": f"matmul {side}, {_name(dtype)}", "tflops": 2 * side**3 / took / 1e12}
    rows, channels = (32, setup.configs.unet.channels) if setup.cuda else (2, setup.configs.unet.channels)
    for level, width in enumerate(channels):
        cells = max(setup.cells >> level, 1)
        for name, layout in _LAYOUTS.items():
            x = torch.randn(rows, width, cells, cells, device=setup.device, dtype=setup.dtype).to(memory_format=layout)
            w = torch.randn(width, width, 3, 3, device=setup.device, dtype=setup.dtype).to(memory_format=layout)
            took = gm.seconds(setup, partial(conv2d, x, w, padding=1), 20)
            work = 2 * rows * cells**2 * width**2 * 9
            yield {"what": f"convolution {width} at {cells}, {name}", "tflops": work / took / 1e12}


_LAYOUTS: Final = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


def attention(setup: Setup) -> Iterator[Figure]:
    """Each backend at each level, of a row to itself and to its text: microseconds; None where it has no kernel."""
    unet, rows = setup.configs.unet, 16 if setup.cuda else 2
    for level, (width, heads) in enumerate(zip(unet.channels, unet.heads, strict=True)):
        positions = max(setup.cells >> level, 1) ** 2
        for kind, others in (("self", positions), ("text", setup.configs.text.max_tokens)):
            made = (torch.randn(rows, heads, n, width // heads, device=setup.device, dtype=setup.dtype)
                    for n in (positions, others, others))  # fmt: skip
            q, k, v = made
            found = {name: _attended(setup, q, k, v, backend) for name, backend in _BACKENDS.items()}
            there = {name: took for name, took in found.items() if took is not None}
            yield {"level": level, "kind": kind, "rows": rows, "positions": positions, "head": width // heads,
                   "best": min(there, key=lambda name: there[name]) if there else None,
                   "chosen_us": _attended(setup, q, k, v, None), **{f"{name}_us": took for name, took in found.items()},
                   "flop": 4 * rows * heads * positions * others * (width // heads)}  # fmt: skip


def _attended(setup: Setup, q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend | None) -> float | None:
    """Microseconds of one call; None: no kernel for it, or no room. No backend: the one that PyTorch takes."""
    if backend == SDPBackend.MATH and q.shape[:3].numel() * k.shape[2] > _MATH_SCORES:
        return None
    try:
        with sdpa_kernel(list(_BACKENDS.values()) if backend is None else backend), torch.inference_mode():
            return 1e6 * gm.seconds(setup, lambda: scaled_dot_product_attention(q, k, v), 10)
    except RuntimeError:
        return None


def no_wait(setup: Setup) -> Iterator[Figure]:
    """Does a step ever wait for the device: PyTorch, told to make that an error, says so; and a profile of a step."""
    model = gm.random_model(setup, setup.dtype)
    few = min(4, setup.sizes[-1])
    drawing = gm.engine(setup, model, few)
    for request in gm.requests(setup, few, 4):
        drawing.add(request)
    drawing.step()  # prompts, noise and kernels are there from here on
    said = ""
    if setup.cuda:
        gm.wait(setup)
        torch.cuda.set_sync_debug_mode("error")
        try:
            drawing.runner.denoise(drawing.packer.pack(), drawing.packer.too_large)
        except RuntimeError as error:
            said = " ".join(str(error).split())[:300]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    yield {"what": "a step never waits", "right": not said, "said": said, "asked": setup.cuda}
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * setup.cuda]
    with profile(activities=activities) as seen:
        drawing.runner.denoise(drawing.packer.pack(), drawing.packer.too_large)
        gm.wait(setup)
    counted = Counter(event.name for event in seen.events())
    calls = {name: n for name, n in counted.items() if name.startswith(("cudaLaunch", "cudaMemcpy", "cudaStreamSync"))}
    clock = "self_device_time_total" if setup.cuda else "self_cpu_time_total"
    averages = sorted(seen.key_averages(), key=lambda each: -getattr(each, clock))
    top = [{"kernel": each.key[:80], "us": round(getattr(each, clock)), "calls": each.count} for each in averages[:20]]
    yield {"what": "profile of a step", "pictures": few, "calls": calls, "top": top}


def packs(setup: Setup, ways: Mapping[str, Mapping[str, Any]] | None = None) -> Iterator[Figure]:
    """Whole pictures per second, by pictures of a pack: as it is, channels-last, compiled, compiled and channels-last.

    A way whose prediction is not that of the first is not timed.
    """
    flop = gm.row_flops(setup)
    yield {"what": "operations of a U-Net row", "tflop": flop / 1e12}
    with torch.inference_mode():
        plain = gm.random_model(setup, setup.dtype)
        expected = gm.predicted(setup, plain.unet)
        del plain
    for name, way in (ways or WAYS).items():
        if not setup.ways or name in setup.ways:
            yield from _figures_of(setup, name, way, expected, flop)


def _figures_of(setup: Setup, name: str, way: Mapping[str, Any], expected: Tensor, flop: int) -> Iterator[Figure]:
    """Of one way. What fails (a kernel that does not compile, say) fails by itself: the others are still measured."""
    model = gm.random_model(setup, setup.dtype)
    try:
        _arrange(setup, model, way)
        with torch.inference_mode():
            found = gm.relative(gm.predicted(setup, model.unet), expected)
    except Exception as error:
        yield {"way": name, **failed(error)}
        return
    yield {"way": name, **_checked("U-Net beside the plain one", found, SAME[setup.dtype])}
    for pictures in setup.sizes if found <= SAME[setup.dtype] else ():
        if pictures in way.get("sizes", setup.sizes):
            yield {"way": name, "pictures": pictures, **_drawn(setup, model, pictures, flop)}


def failed(error: Exception) -> Figure:
    """A figure that is none, and why."""
    if isinstance(error, torch.OutOfMemoryError):
        return {"out_of_memory": True}
    return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}


# Compiling a pack size takes a minute: the sizes that matter, and last what is hardly the fastest. CUDA graphs pay
# where launches cost more than kernels.
_SOME: Final = (1, 4, 16, 32)
WAYS: Final[Mapping[str, Mapping[str, Any]]] = {
    "eager": {},
    "eager, channels-last": {"layout": torch.channels_last},
    "compiled, channels-last": {"layout": torch.channels_last, "compile": {}, "sizes": _SOME},
    "compiled, graphs": {"layout": torch.channels_last, "compile": {"mode": "reduce-overhead"}, "sizes": (1, 2, 4)},
    "compiled": {"compile": {}, "sizes": _SOME},
}


def _arrange(setup: Setup, model: Model, way: Mapping[str, Any]) -> None:
    if "layout" in way:
        model.unet.to(memory_format=way["layout"])  # type: ignore[call-overload]
        model.unet.conv_in.register_forward_pre_hook(lambda _, args: (args[0].contiguous(memory_format=way["layout"]),))
    if "compile" in way:
        gm.compile_unet(setup, model.unet, **(way["compile"] if setup.compiler == "inductor" else {}))


def _drawn(setup: Setup, model: Model, pictures: int, flop: int) -> Figure:
    """One pack from its prompts, which were encoded before, to its pictures; after one that warmed up."""
    drawing = gm.engine(setup, model, pictures)
    try:
        began = time.perf_counter()
        drawing.render(gm.requests(setup, pictures, 2))
        first = time.perf_counter() - began
        _forget_peak(setup)
        whole = gm.seconds(setup, lambda: drawing.render(gm.requests(setup, pictures)), 1)
    except Exception as error:
        return failed(error)
    work = 2 * pictures * setup.steps * flop
    return {"images_per_s": pictures / whole, "seconds": whole, "tflops": work / whole / 1e12, "first_s": first,
            "peak_gb": _peak_gb(setup)}  # fmt: skip


def vae(setup: Setup) -> Iterator[Figure]:
    """Decoding alone, by pictures of a call."""
    model = gm.random_model(setup, setup.dtype)
    for pictures in (size for size in setup.sizes if size <= 16):
        latents = torch.randn(pictures, model.latent_channels, setup.cells, setup.cells, device=setup.device)
        _forget_peak(setup)
        with torch.inference_mode():
            took = gm.seconds(setup, partial(decode_latents, model, latents))
        yield {"pictures": pictures, "ms_per_picture": 1e3 * took / pictures, "peak_gb": _peak_gb(setup)}


def _forget_peak(setup: Setup) -> None:
    if setup.cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(setup.device)


def _peak_gb(setup: Setup) -> float | None:
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


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
