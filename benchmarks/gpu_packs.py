"""The stages of `benchmarks.gpu` that draw whole pictures, in every way of calling the U-Net that is of interest."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final
from unittest import mock

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from benchmarks import gpu_model as gm
from benchmarks.goals import spread
from benchmarks.gpu_model import Setup
from benchmarks.gpu_stages import SAME, Figure, best_backends, checked, failed, forget_peak, peak_gb
from sd_engine import Engine, Model, blocks
from sd_engine.engine import MakeRunner

_TIMED: Final = 3  # drawings of a pack, after one that warms up
_OTHER_HALF: Final = {torch.bfloat16: torch.float16, torch.float16: torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Way:
    """How the U-Net is called. compiled: options of torch.compile, None for none. sizes: pictures of a pack, None: all.

    best_attention: at each level the backend that was measured to be the fastest, not the one that PyTorch takes.
    other_half: fp16 where bf16 is measured, and the other way around.
    """

    channels_last: bool = False
    compiled: Mapping[str, Any] | None = None
    best_attention: bool = False
    other_half: bool = False
    sizes: tuple[int, ...] | None = None

    def dtype(self, setup: Setup) -> torch.dtype:
        """The dtype that this way is measured in."""
        return _OTHER_HALF.get(setup.dtype, setup.dtype) if self.other_half else setup.dtype


# Compiling a pack size takes a minute: of most ways the sizes that matter, and last what is hardly the fastest. CUDA
# graphs pay where launches cost more than kernels.
_SOME: Final = (16, 32)
_FEW: Final = (1, 2, 3, 4)
_GRAPHS: Final[Mapping[str, Any]] = {"mode": "reduce-overhead"}
WAYS: Final[Mapping[str, Way]] = {
    "eager": Way(),
    "eager, channels-last": Way(channels_last=True),
    "eager, channels-last, best attention": Way(channels_last=True, best_attention=True),
    "eager, channels-last, other half": Way(channels_last=True, other_half=True, sizes=_SOME),
    "compiled, channels-last": Way(channels_last=True, compiled={}),
    "compiled, channels-last, best attention": Way(channels_last=True, compiled={}, best_attention=True, sizes=_SOME),
    "compiled, channels-last, other half": Way(channels_last=True, compiled={}, other_half=True, sizes=_SOME),
    "compiled, graphs": Way(channels_last=True, compiled=_GRAPHS, sizes=_FEW),
    "compiled": Way(compiled={}, sizes=_SOME),
}
# The U-Net rows that packs are padded to where a graph or a program is kept for each: of 1 to 4 pictures, and on.
GRAPHS_OF: Final = tuple(2 * pictures for pictures in _FEW)
BUCKETS: Final = (2, 4, 8, 16, 32)


def packs(setup: Setup, ways: Mapping[str, Way] | None = None) -> Iterator[Figure]:
    """Whole pictures per second, by ways and by pictures of a pack.

    A way whose prediction is not that of the first is not timed.
    """
    flop = gm.row_flops(setup)
    yield {"what": "operations of a U-Net row", "tflop": flop / 1e12}
    expected = _expected(setup)
    for name, way in (ways or WAYS).items():
        if not setup.ways or name in setup.ways:
            yield from ({"way": name, **figure} for figure in _figures_of(setup, way, expected, flop))


def _expected(setup: Setup) -> Tensor:
    with torch.inference_mode():
        return gm.predicted(setup, gm.random_model(setup, setup.dtype).unet)


def _figures_of(setup: Setup, way: Way, expected: Tensor, flop: int) -> Iterator[Figure]:
    """Of one way. What fails (a kernel that does not compile, say) fails by itself: the others are still measured."""
    setup, bar = replace(setup, dtype=way.dtype(setup)), max(SAME[setup.dtype], SAME[way.dtype(setup)])
    with ExitStack() as while_measured:
        try:
            model = _arranged(setup, way, while_measured)
            with torch.inference_mode():
                found = gm.relative(gm.predicted(setup, model.unet), expected)
        except Exception as error:
            yield failed(error)
            return
        yield checked("U-Net beside the plain one", found, bar)
        for pictures in setup.sizes if found <= bar else ():
            if way.sizes is None or pictures in way.sizes:
                yield {"pictures": pictures, **_drawn(setup, model, pictures, flop)}


def _arranged(setup: Setup, way: Way, while_measured: ExitStack) -> Model:
    """A model whose U-Net is called this way, until the stack is closed."""
    model = gm.random_model(setup, way.dtype(setup))
    if way.channels_last:
        model.unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        model.unet.conv_in.register_forward_pre_hook(
            lambda _, args: (args[0].contiguous(memory_format=torch.channels_last),)
        )
    if way.best_attention:
        attend = partial(_attended_by, best_backends(setup))
        while_measured.enter_context(mock.patch.object(blocks, "attend", attend))
    if way.compiled is not None:
        gm.compile_unet(setup, model.unet, **(way.compiled if setup.compiler == "inductor" else {}))
    return model


def _attended_by(best: Mapping[tuple[int, int], SDPBackend], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention by the backend that was measured for so many queries and keys; of others by PyTorch's choice."""
    backend = best.get((q.shape[2], k.shape[2]))
    if backend is None:
        return scaled_dot_product_attention(q, k, v)
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v)


def _drawn(setup: Setup, model: Model, pictures: int, flop: int) -> Figure:
    """One pack from its prompts, which were encoded before, to its pictures; after one that warmed up."""
    drawing = gm.engine(setup, model, pictures)
    try:
        began = time.perf_counter()
        drawing.render(gm.requests(setup, pictures, 2))
        first = time.perf_counter() - began
        forget_peak(setup)
        took = gm.times(setup, lambda: drawing.render(gm.requests(setup, pictures)), min(_TIMED, setup.repeats))
    except Exception as error:
        return failed(error)
    whole, work = spread(took, 5), 2 * pictures * setup.steps * flop
    return {"images_per_s": pictures / whole["median"], "seconds": whole, "tflops": work / whole["median"] / 1e12,
            "first_s": first, "peak_gb": peak_gb(setup)}  # fmt: skip


def buckets(setup: Setup) -> Iterator[Figure]:
    """Pictures that end one by one: packs as they come, and padded to the sizes of which a program (a graph) is kept.

    `dummy` is the share of U-Net rows that nobody asked for, `programs` how many were compiled.
    """
    few, many = (setup.sizes[-1],) * 2 if not setup.cuda else (4, 16)
    yield from _leaving(setup, "eager, channels-last", many, gm.WholeRunner)
    yield from _leaving(setup, "compiled, channels-last", many, partial(gm.PaddedRunner, sizes=BUCKETS))
    yield from _leaving(setup, "eager, channels-last", few, gm.WholeRunner)
    yield from _leaving(setup, "compiled, graphs", few, partial(gm.PaddedRunner, sizes=GRAPHS_OF))


def _leaving(setup: Setup, name: str, pictures: int, make_runner: MakeRunner) -> Iterator[Figure]:
    figure: Figure = {"way": name, "pictures": pictures, "buckets": make_runner is not gm.WholeRunner}
    counters.clear()
    with ExitStack() as while_measured:
        try:
            drawing = gm.engine(setup, _arranged(setup, WAYS[name], while_measured), pictures, make_runner)
            requests = gm.leaving_one_by_one(setup, pictures)
            took = gm.times(setup, lambda: drawing.render(requests), min(_TIMED, setup.repeats))
        except Exception as error:
            yield figure | failed(error)
            return
    found = spread(took, 5)
    yield figure | {"leaving_images_per_s": pictures / found["median"], "seconds": found, "dummy": _dummy(drawing),
                    "programs": counters["stats"]["unique_graphs"]}  # fmt: skip


def _dummy(drawing: Engine) -> float:
    runner = drawing.runner
    return 1 - runner.asked / runner.padded if isinstance(runner, gm.PaddedRunner) else 0.0


def no_wait(setup: Setup) -> Iterator[Figure]:
    """Does a step ever wait for the device: PyTorch, told to make that an error, says so; and a profile of a step."""
    few = min(4, setup.sizes[-1])
    for name in ("eager, channels-last", "compiled, channels-last", "compiled, graphs"):
        with ExitStack() as while_measured:
            try:
                drawing = gm.engine(setup, _arranged(setup, WAYS[name], while_measured), few)
                for request in gm.requests(setup, few, 8):
                    drawing.add(request)
                for _ in range(4):  # prompts, noise, kernels and graphs are there from here on
                    drawing.step()
                yield {"way": name, **_said_of_waiting(setup, drawing)}
                yield {"way": name, "pictures": few, **_profiled(setup, drawing)}
            except Exception as error:
                yield {"way": name, **failed(error)}


def _said_of_waiting(setup: Setup, drawing: Engine) -> Figure:
    said = ""
    if setup.cuda:
        gm.wait(setup)
        torch.cuda.set_sync_debug_mode("error")
        try:
            _step(drawing)
        except RuntimeError as error:
            said = " ".join(str(error).split())[:300]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return {"what": "a step never waits", "right": not said, "said": said, "asked": setup.cuda}


def _profiled(setup: Setup, drawing: Engine) -> Figure:
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * setup.cuda]
    with profile(activities=activities) as seen:
        _step(drawing)
        gm.wait(setup)
    counted = Counter(event.name for event in seen.events())
    calls = {name: n for name, n in counted.items() if name.startswith(_TO_THE_DEVICE)}
    clock = "self_device_time_total" if setup.cuda else "self_cpu_time_total"
    averages = sorted(seen.key_averages(), key=lambda each: -getattr(each, clock))
    top = [{"kernel": each.key[:80], "us": round(getattr(each, clock)), "calls": each.count} for each in averages[:20]]
    return {"what": "profile of a step", "calls": calls, "top": top}


_TO_THE_DEVICE: Final = ("cudaLaunch", "cudaGraphLaunch", "cudaMemcpy", "cudaStreamSync")


def _step(drawing: Engine) -> None:
    """The step of a pack alone: nobody is taken in, and nothing is decoded."""
    rows: Sequence[Any] = drawing.packer.pack()
    drawing.runner.denoise(rows, drawing.packer.too_large)
