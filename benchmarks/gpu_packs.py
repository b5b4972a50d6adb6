"""The stages of `benchmarks.gpu` that draw whole pictures, in every way of calling the U-Net that is of interest."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final
from unittest import mock

import torch
from torch import Tensor
from torch._C._autograd import DeviceType
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

    def sizes_of(self, setup: Setup) -> list[int]:
        """Pictures of a pack, of those asked for."""
        return [pictures for pictures in setup.sizes if self.sizes is None or pictures in self.sizes]

    def checked_rows(self, setup: Setup) -> int:
        """U-Net rows of the call that is compared with the plain one: the first that is timed, and compiled anyway."""
        return 2 * next(iter(self.sizes_of(setup)), 1)


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
# The U-Net rows that packs are padded to where a graph or a program is kept for each.
GRAPHS_OF: Final = (4, 8)
BUCKETS: Final = (2, 4, 8, 16, 32)


def packs(setup: Setup, ways: Mapping[str, Way] | None = None) -> Iterator[Figure]:
    """Whole pictures per second, by ways and by pictures of a pack.

    A way whose prediction is not that of the first is not timed.
    """
    flop = gm.row_flops(setup)
    yield {"what": "operations of a U-Net row", "tflop": flop / 1e12}
    asked = {name: way for name, way in (ways or WAYS).items() if not setup.ways or name in setup.ways}
    expected = _expected(setup, {way.checked_rows(setup) for way in asked.values()})
    for name, way in asked.items():
        about = {"way": name, "dtype": str(way.dtype(setup))}
        yield from (about | figure for figure in _figures_of(setup, way, expected[way.checked_rows(setup)], flop))


def _expected(setup: Setup, calls: Iterable[int]) -> dict[int, Tensor]:
    """What the plain U-Net predicts, by the rows of the call."""
    unet = gm.random_model(setup, setup.dtype).unet
    return {rows: gm.predicted(setup, unet, rows) for rows in calls}


def _figures_of(setup: Setup, way: Way, expected: Tensor, flop: int) -> Iterator[Figure]:
    """Of one way. What fails (a kernel that does not compile, say) fails by itself: the others are still measured."""
    setup, bar = replace(setup, dtype=way.dtype(setup)), max(SAME[setup.dtype], SAME[way.dtype(setup)])
    beside = "U-Net beside the plain one"
    with ExitStack() as while_measured:
        try:
            model = _arranged(setup, way, while_measured)
            found = gm.relative(gm.predicted(setup, model.unet, way.checked_rows(setup)), expected)
        except Exception as error:
            yield {"what": beside, **failed(error)}
            return
        yield checked(beside, found, bar)
        for pictures in way.sizes_of(setup) if found <= bar else ():
            yield {"pictures": pictures, **_drawn(setup, model, pictures, flop)}


def _arranged(setup: Setup, way: Way, while_measured: ExitStack) -> Model:
    """A model in the setup's dtype whose U-Net is called this way, until the stack is closed."""
    model = gm.random_model(setup, setup.dtype)
    while_measured.callback(gm.forget_compiled, model.unet)
    if way.channels_last:
        for module in (model.unet, model.vae):
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        model.unet.conv_in.register_forward_pre_hook(
            lambda _, args: (args[0].contiguous(memory_format=torch.channels_last),)
        )
    if way.best_attention:
        attend = partial(_attended_by, best_backends(setup))
        while_measured.enter_context(mock.patch.object(blocks, "attend", attend))
    if way.compiled is not None:
        gm.compile_unet(setup, model.unet, **(way.compiled if setup.compiler == "inductor" else {}))
    return model


def _attended_by(best: Mapping[tuple[int, int, int], SDPBackend], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention by the backend that was measured for such a head; of others by PyTorch's choice."""
    backend = best.get((q.shape[2], k.shape[2], q.shape[3]))
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
            "first_render_s": first, "peak_gb": peak_gb(setup)}  # fmt: skip


def buckets(setup: Setup) -> Iterator[Figure]:
    """Pictures that end one by one: packs as they come, and padded to the sizes of which a program (a graph) is kept.

    `dummy` is the share of U-Net rows that nobody asked for, `programs` how many were compiled.
    """
    few, many = (max(setup.sizes),) * 2 if not setup.cuda else (4, 16)
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
    """Does a step ever wait for the device: PyTorch, asked to warn of that, says where; and a profile of a step."""
    few = min(4, max(setup.sizes))
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
                yield {"way": name, "what": "a step never waits", **failed(error)}


def _said_of_waiting(setup: Setup, drawing: Engine) -> Figure:
    """Every operation of a step that waited for the device, with its place."""
    said: list[str] = []
    if setup.cuda:
        gm.wait(setup)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                _step(drawing)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        said = [
            f"{each.filename}:{each.lineno}: {each.message}"[:300]
            for each in warned
            if "called a synchronizing" in str(each.message)
        ]
    return {"what": "a step never waits", "right": not said, "said": said, "asked": setup.cuda}


def _profiled(setup: Setup, drawing: Engine) -> Figure:
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * setup.cuda]
    with profile(activities=activities) as seen:
        _step(drawing)
        gm.wait(setup)
    counted = Counter(event.name for event in seen.events())
    calls = {name: n for name, n in counted.items() if name.startswith(_TO_THE_DEVICE)}
    clock, device = (
        ("self_device_time_total", DeviceType.CUDA) if setup.cuda else ("self_cpu_time_total", DeviceType.CPU)
    )
    # Of the device alone: an operation carries the time of its kernels once more.
    here = [each for each in seen.key_averages() if each.device_type == device and not each.is_user_annotation]
    averages = sorted(here, key=lambda each: -getattr(each, clock))
    top = [{"kernel": each.key[:80], "us": round(getattr(each, clock)), "calls": each.count} for each in averages[:20]]
    return {"what": "profile of a step", "calls": calls, "top": top}


_TO_THE_DEVICE: Final = (
    *("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cudaMemcpy", "cudaMemset", "cudaMalloc", "cudaHostAlloc"),
    *("cudaStreamSync", "cudaEventSync"),  # for the whole device waits only who measures
)


def _step(drawing: Engine) -> None:
    """The step of a pack alone: nobody is taken in, and nothing is decoded."""
    rows: Sequence[Any] = drawing.packer.pack()
    drawing.runner.denoise(rows, drawing.packer.too_large)
