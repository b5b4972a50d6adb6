"""What the stages of `benchmarks.gpu` share: a model of random numbers on a device, a clock, and what a row costs."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sd_engine import Engine, Model, Request, load_model, shipped_model
from sd_engine.blocks import KeysValues
from sd_engine.clip import ClipTextEncoder
from sd_engine.context import PackContext, join
from sd_engine.engine import MakeRunner
from sd_engine.filling import Uninitialized
from sd_engine.model import SD1, Configs
from sd_engine.row import Row
from sd_engine.runner import Runner
from sd_engine.tokenizer import Tokenizer
from sd_engine.unet import UNet
from sd_engine.vae import Vae

META = torch.device("meta")
_CYCLES_TO_QUEUE = 20_000_000  # some ten milliseconds


@dataclass(frozen=True, slots=True)
class Setup:
    """What is measured, and where. side: pixels. sizes: pictures of a pack. compiler: a backend of torch.compile."""

    device: torch.device
    dtype: torch.dtype
    configs: Configs
    side: int
    steps: int
    sizes: tuple[int, ...]
    compiler: str
    repeats: int
    ways: tuple[str, ...] = ()  # of `packs`, by name; none: all

    @property
    def cuda(self) -> bool:
        """Whether it is a CUDA device: what only these have is left out elsewhere."""
        return self.device.type == "cuda"

    @property
    def cells(self) -> int:
        """The side of a latent."""
        return self.side // self.configs.vae.factor


def full(device: torch.device, dtype: torch.dtype) -> Setup:
    """SD 1.5's size, as the goals have it."""
    return Setup(device, dtype, SD1, 512, 20, (1, 2, 3, 4, 8, 16, 32, 64), "inductor", 5)


def quick(device: torch.device, dtype: torch.dtype) -> Setup:
    """The shipped model's size: it shows that the script runs, and nothing about speed."""
    mini = load_model(shipped_model())
    configs = Configs(mini.text_encoder.config, mini.unet.config, mini.vae.config, mini.schedule)
    return Setup(device, dtype, configs, 64, 2, (1, 2), "inductor" if device.type == "cuda" else "eager", 1)


def random_model(setup: Setup, dtype: torch.dtype) -> Model:
    """A model whose numbers keep what goes through it about as large as it was; the same for every dtype."""
    configs = setup.configs
    words = Tokenizer.from_folder(shipped_model() / "tokenizer", max_tokens=configs.text.max_tokens)
    with META, Uninitialized():
        text, unet, vae = ClipTextEncoder(configs.text), UNet(configs.unet), Vae(configs.vae)
    generator = torch.Generator(setup.device).manual_seed(0)
    for module in (text, unet, vae):
        module.to_empty(device=setup.device)
        _randomize(module, generator)
        module.to(dtype).eval().requires_grad_(False)
    return Model("random", words, text, unet, vae, configs.schedule, setup.device, dtype)


def _randomize(module: nn.Module, generator: torch.Generator) -> None:
    for layer in module.modules():
        for name, parameter in layer.named_parameters(recurse=False):
            if parameter.dim() == 1:
                parameter.data.fill_(float(name == "weight"))
            else:
                spread = 1.0 if isinstance(layer, nn.Embedding) else math.sqrt(parameter[0].numel())
                parameter.data.normal_(std=1 / spread, generator=generator)


class WholeRunner(Runner):
    """Steps a pack whole or raises: of its halves, a figure would be of another size than it says."""

    @torch.inference_mode()
    def denoise(self, rows: Sequence[Row], too_large: Callable[[Sequence[Row]], None]) -> None:
        """As `Runner.denoise`."""
        if rows:
            self._denoise(rows)


class PaddedRunner(WholeRunner):
    """Packs of a few sizes only, so that each is compiled once: one between two is padded up to the next."""

    def __init__(self, *args: Any, sizes: Sequence[int]) -> None:
        super().__init__(*args)
        self.sizes = sorted(sizes)  # U-Net rows
        self.asked = self.padded = 0  # U-Net rows in all, without the padding and with it

    def least_unet_rows(self, rows: Sequence[Row]) -> int:
        """The next size, or the pack's own where it is beyond them all."""
        needed = sum(row.unet_rows for row in rows)
        size = next((size for size in self.sizes if size >= needed), needed)
        self.asked, self.padded = self.asked + needed, self.padded + size
        return size


def engine(setup: Setup, model: Model, pictures: int, make_runner: MakeRunner = WholeRunner) -> Engine:
    """An engine whose packs hold so many guided pictures, stepped together or not at all."""
    return Engine(model, max_units=2 * pictures * setup.cells**2, make_runner=make_runner)


def requests(setup: Setup, pictures: int, steps: int | None = None) -> list[Request]:
    """Guided pictures that share nothing but their size and their number of steps; every second draws at each step."""
    size: dict[str, Any] = {"steps": steps or setup.steps, "width": setup.side, "height": setup.side}
    samplers = ("dpmpp_2m_karras", "euler_a")
    return [Request(f"a red star {seed}", seed=seed, sampler=samplers[seed % 2], **size) for seed in range(pictures)]


def leaving_one_by_one(setup: Setup, pictures: int) -> list[Request]:
    """As many pictures with steps from half of the usual to all: packs of every size, the smallest at the end."""
    half = setup.steps // 2
    return [
        replace(request, steps=half + round((setup.steps - half) * (index + 1) / pictures))
        for index, request in enumerate(requests(setup, pictures))
    ]


def inputs(setup: Setup, rows: int, dtype: torch.dtype, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timesteps and encoded prompts of U-Net rows; drawn on the CPU, so that every device has the same."""
    generator = torch.Generator().manual_seed(seed)
    unet, text = setup.configs.unet, setup.configs.text
    latents = torch.randn(rows, unet.in_channels, setup.cells, setup.cells, generator=generator)
    texts = torch.randn(rows, text.max_tokens, text.width, generator=generator)
    times = torch.linspace(1, 999, rows).round()
    return latents.to(setup.device, dtype), times.to(setup.device), texts.to(setup.device, dtype)


@torch.inference_mode()
def predicted(setup: Setup, unet: UNet, rows: int) -> Tensor:
    """What the U-Net makes of so many rows, called as the runner calls it: compiled, it is ready for these.

    Of the third call, whose numbers are others: a CUDA graph is recorded by the second, and replayed from there on.
    """
    for seed in (1, 1, 2):
        latents, times, texts = inputs(setup, rows, setup.dtype, seed)
        result: Tensor = unet(latents, times, join([unet.context(text) for text in texts]))
    return result.float()


def seconds(setup: Setup, call: Callable[[], Any], repeats: int | None = None) -> float:
    """The median time of a call, after one to warm up; each is waited for."""
    return statistics.median(times(setup, call, repeats or setup.repeats))


def times(setup: Setup, call: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each call, after one to warm up; each is waited for."""
    found = []
    for _ in range(1 + repeats):
        wait(setup)
        began = time.perf_counter()
        call()
        wait(setup)
        found.append(time.perf_counter() - began)
    return found[1:]


def device_seconds(setup: Setup, call: Callable[[], Any], calls: int = 20) -> float:
    """What the device takes for a call. On CUDA the calls are queued before the first begins: that of a small kernel
    takes longer to ask for than to compute."""
    if not setup.cuda:
        return seconds(setup, call, calls)
    for _ in range(3):
        call()
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_CYCLES_TO_QUEUE)
    began.record()
    for _ in range(calls):
        call()
    ended.record()
    ended.synchronize()
    return float(began.elapsed_time(ended)) / 1e3 / calls


def wait(setup: Setup) -> None:
    """Until the device has done all that it was given."""
    if setup.cuda:
        torch.cuda.synchronize(setup.device)


def row_flops(setup: Setup) -> int:
    """Operations of one U-Net row, a multiplication and an addition counted as two: on `meta`, nothing is computed."""
    with META, Uninitialized():
        unet = UNet(setup.configs.unet)
    at_home = replace(setup, device=torch.device("cpu"))
    latents, times, texts = (each.to(META) for each in inputs(at_home, 1, torch.float32))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(latents, times, texts)
    return int(counter.get_total_flops())


class Stacked(PackContext):
    """A pack's texts with the keys and values of every layer ready: one guard for a layer, not one for a prompt."""

    __slots__ = ("made",)
    made: tuple[list[KeysValues], ...]

    @classmethod
    def of(cls, context: PackContext, layers: int) -> Stacked:
        """The same texts, stacked for all layers at once."""
        stacked = cls((), context.merging)
        object.__setattr__(stacked, "made", tuple(context.layer(index) for index in range(layers)))
        return stacked

    def layer(self, index: int) -> list[KeysValues]:
        """Keys and values of one layer."""
        return self.made[index]


def compile_unet(setup: Setup, unet: UNet, **options: Any) -> None:
    """Let the U-Net be compiled at its next call, anew for each number of rows."""
    torch._dynamo.reset()
    # A pack of another number of rows is another program, and each dimension of 1 to 64 pictures is one.
    torch._dynamo.config.cache_size_limit = 64
    compiled = torch.compile(UNet.forward, backend=setup.compiler, dynamic=False, **options)
    layers = len(unet.blocks)

    def forward(x_UCHW: Tensor, t_U: Tensor, context: Tensor | PackContext) -> Tensor:
        """As `UNet.forward`."""
        texts = Stacked.of(context, layers) if isinstance(context, PackContext) else context
        return compiled(unet, x_UCHW, t_U, texts)

    unet.forward = forward  # type: ignore[method-assign]


def forget_compiled(unet: UNet) -> None:
    """What was compiled of it goes, with its graphs' memory; the U-Net is a plain one again."""
    unet.__dict__.pop("forward", None)
    torch._dynamo.reset()
    gc.collect()


def relative(found: Tensor, expected: Tensor) -> float:
    """How far a tensor is from what was expected of it, as a share of that."""
    found, expected = found.double().cpu(), expected.double().cpu()
    return float((found - expected).norm() / expected.norm())


def psnr(found: Sequence[Any], expected: Sequence[Any]) -> float:
    """Of pictures of 8 bits, in decibels; the worst of them. 99 for equal ones."""
    worst = 99.0
    for one, other in zip(found, expected, strict=True):
        error = float(((one.astype(float) - other.astype(float)) ** 2).mean())
        worst = min(worst, 10 * math.log10(255**2 / error) if error > 0 else 99.0)
    return worst
