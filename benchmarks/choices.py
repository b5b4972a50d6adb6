"""What the choices of a job that change the picture give, and what they take: gain and difference, one by one.

    python -m benchmarks.choices                    the table of `benchmarks/README.md`
    python -m benchmarks.choices --quick            seconds; too few pictures to judge anything by
    python -m benchmarks.choices --unet none        without the U-Net of Stable Diffusion's size
    python -m benchmarks.choices --prompts 100 --steps 40 --guidance 4
    python -m benchmarks.choices --large --prompts 2        the whole U-Net at 96 x 96 latents, with token merging

Two parts. Pictures: the shipped model draws the same prompts and seeds exactly and by each choice, in turns; `rows` and
`seconds` are the exact run's over the choice's (larger is faster; whole U-Net rows count, shallow ones are listed
beside them), PSNR and levels of 256 are against the exact pictures (the medians and means over the prompts), and
`right` is the share that the checker of `benchmarks.mini_quality` takes for what was asked. U-Net: the seconds of one
row, at the size of SD 1.5 with random weights, of its finest transformer block with and without token merging, and of
decoding one picture by the VAE and by a tiny decoder of the published size: the small shipped model says nothing of
these.

Prints both tables and writes `benchmarks/results/choices.json` and a plot beside it.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from benchmarks.goals import spread
from benchmarks.mini_quality import Wanted, random_prompt, see
from benchmarks.plots import bars
from benchmarks.report import result_file, write
from sd_engine import Engine, Model, Request, load_model, shipped_model
from sd_engine.config import TinyDecoderConfig, UNetConfig, VaeConfig
from sd_engine.context import join
from sd_engine.layers import lay_out_weights
from sd_engine.merging import Merging
from sd_engine.row import Row
from sd_engine.runner import Runner
from sd_engine.tiny_decoder import TinyDecoder
from sd_engine.unet import TransformerBlock, UNet
from sd_engine.vae import Vae

Module = TypeVar("Module", bound=nn.Module)
Pixels = npt.NDArray[np.uint8]
EXACT = "exact"
CHOICES: Mapping[str, Mapping[str, Any]] = {
    "guidance_stop 0.8": {"guidance_stop": 0.8},
    "guidance_stop 0.6": {"guidance_stop": 0.6},
    "guidance_start 0.2": {"guidance_start": 0.2},
    "guidance 0.2 to 0.8": {"guidance_start": 0.2, "guidance_stop": 0.8},
    "deepcache_interval 2": {"deepcache_interval": 2},
    "deepcache_interval 3": {"deepcache_interval": 3},
    "deepcache_interval 5": {"deepcache_interval": 5},
    "token_merging_ratio 0.5": {"token_merging_ratio": 0.5},
    "decoder tiny": {"decoder": "tiny"},
    "deepcache 2, stop 0.8": {"deepcache_interval": 2, "guidance_stop": 0.8},
}


@dataclass(frozen=True, slots=True)
class Drawn:
    """One run over all prompts. whole, shallow: U-Net rows that were computed."""

    pictures: Sequence[Pixels]
    seconds: float
    whole: int
    shallow: int


class Counting(Runner):
    """Counts the U-Net rows of each kind."""

    whole = shallow = 0

    def denoise(self, rows: Sequence[Row], too_large: Callable[[Sequence[Row]], None]) -> None:
        """As the runner, with the books kept before the rows change."""
        unet_rows = sum(row.unet_rows for row in rows)
        if rows and rows[0].call.shallow:
            self.shallow += unet_rows
        else:
            self.whole += unet_rows
        super().denoise(rows, too_large)


def draw(model: Model, requests: Sequence[Request]) -> Drawn:
    """Draw them together, in an engine of their own."""
    engine = Engine(model, make_runner=Counting)
    runner = engine.runner
    assert isinstance(runner, Counting)
    began = time.perf_counter()
    pictures = engine.render(requests)
    return Drawn(pictures, time.perf_counter() - began, runner.whole, runner.shallow)


def psnr(one: Pixels, other: Pixels) -> float:
    """Peak signal to noise in decibels; 99 for equal pictures."""
    error = float(np.mean((one.astype(np.float64) - other) ** 2))
    return 99.0 if error == 0 else 10 * float(np.log10(255**2 / error))


def right(wanted: Sequence[Wanted], pictures: Sequence[Pixels]) -> float:
    """The share of pictures on which the checker sees both colours and the shape."""
    seen = [see(picture) for picture in pictures]
    pairs = zip(wanted, seen, strict=True)
    return float(np.mean([(w.background, w.colour, w.shape) == (s.background, s.colour, s.shape) for w, s in pairs]))


def compared(wanted: Sequence[Wanted], exact: Sequence[Drawn], chosen: Sequence[Drawn]) -> dict[str, Any]:
    """Gain and difference of one choice, from the runs of both that were made in turns."""
    ours, reference = chosen[0], exact[0]
    pairs = list(zip(ours.pictures, reference.pictures, strict=True))
    levels = [float(np.abs(a.astype(int) - b.astype(int)).mean()) for a, b in pairs]
    return {
        "rows": round(reference.whole / ours.whole, 3),
        "shallow_rows": ours.shallow,
        "seconds": spread([e.seconds / c.seconds for e, c in zip(exact, chosen, strict=True)], 3),
        "psnr_db": round(statistics.median(psnr(a, b) for a, b in pairs), 1),
        "levels": round(statistics.mean(levels), 2),
        "right": round(right(wanted, ours.pictures), 3),
    }


def pictures_part(prompts: int, seed: int, steps: int, guidance: float, repeats: int) -> dict[str, Any]:
    """All choices on the shipped model."""
    rng = random.Random(seed)
    wanted = [random_prompt(rng) for _ in range(prompts)]
    exact = [
        Request(w.prompt, seed=seed * 100_000 + i, steps=steps, guidance=guidance, sampler="euler_a")
        for i, w in enumerate(wanted)
    ]
    model = load_model(shipped_model(), "cpu", "fp32")
    draw(model, exact[:2])  # the first call of everything is slower
    ways = {EXACT: exact} | {name: [replace(each, **fields) for each in exact] for name, fields in CHOICES.items()}
    runs: dict[str, list[Drawn]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, requests in ways.items():
            runs[name].append(draw(model, requests))
    return {
        "exact_right": round(right(wanted, runs[EXACT][0].pictures), 3),
        "choices": {name: compared(wanted, runs[EXACT], runs[name]) for name in CHOICES},
    }


@dataclass(frozen=True, slots=True)
class Size:
    """A U-Net and a VAE to measure, the side of their latents, and that of those that token merging is for."""

    config: UNetConfig
    side: int
    large: int
    vae: VaeConfig = field(default_factory=VaeConfig)


SIZES = {
    "sd15": Size(UNetConfig(), 64, 96),
    "tiny": Size(
        UNetConfig(channels=(32, 64), attention=(True, False), heads=(2, 2), context_width=32, norm_groups=8),
        side=8,
        large=12,
        vae=VaeConfig(channels=(8, 8, 8, 8), norm_groups=4),
    ),
}


def in_turns(ways: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each way, by its name."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - began)
    return seconds


@torch.inference_mode()
def merging_part(unet: UNet, side: int, repeats: int) -> dict[str, Any]:
    """How many times as fast a U-Net row of large latents is with half of its tokens merged."""
    x, t = torch.randn(1, unet.config.in_channels, side, side), torch.tensor([500.0])
    text = unet.context(torch.randn(77, unet.config.context_width))
    exact, merged = join([text]), join([text], merging=unet.merging(0.5, side, side))
    unet(x, t, merged)
    seconds = in_turns({EXACT: lambda: unet(x, t, exact), "merged": lambda: unet(x, t, merged)}, repeats)
    gains = [exact / merged for exact, merged in zip(seconds[EXACT], seconds["merged"], strict=True)]
    return {"side": side, "token_merging_ratio 0.5": spread(gains, 3)}


@torch.inference_mode()
def merging_in_a_block(size: Size, repeats: int) -> dict[int, Any]:
    """The same of the finest transformer block alone, by the side of its feature map: what merging is about."""
    level = size.config.attention.index(True)
    width, heads = size.config.channels[level], size.config.heads[level]
    block = TransformerBlock(width, heads, size.config.context_width).requires_grad_(False)
    text = torch.randn(1, 77, size.config.context_width)
    gains = {}
    for side in (size.side, size.large):
        x, merging = torch.randn(1, side * side, width), Merging(0.5, side, side)
        block(x, text, merging)
        ways = {EXACT: partial(block, x, text), "merged": partial(block, x, text, merging)}
        seconds = in_turns(ways, repeats)
        gains[side] = spread([a / b for a, b in zip(seconds[EXACT], seconds["merged"], strict=True)], 3)
    return gains


@torch.inference_mode()
def shallow_part(unet: UNet, side: int, repeats: int) -> dict[str, Any]:
    """Seconds of one U-Net row, whole and shallow, in turns; and what they make of a picture's steps."""
    x, t = torch.randn(1, unet.config.in_channels, side, side), torch.tensor([500.0])
    texts = torch.randn(1, 77, unet.config.context_width)
    deep = unet.parted(x, t, texts)[1]
    ways: dict[str, Callable[[], object]] = {
        "whole": lambda: unet(x, t, texts),
        "shallow": lambda: unet.parted(x, t, texts, deep),
    }
    seconds = in_turns(ways, repeats)
    shares = [shallow / whole for shallow, whole in zip(seconds["shallow"], seconds["whole"], strict=True)]
    share = statistics.median(shares)
    return {
        "side": side,
        "seconds_a_row": {name: spread(values, 4) for name, values in seconds.items()},
        "shallow_share": spread(shares, 4),
        "gain": {f"deepcache_interval {n}": round(n / (1 + (n - 1) * share), 2) for n in (2, 3, 5)},
    }


@torch.inference_mode()
def decoder_part(size: Size, repeats: int) -> dict[str, Any]:
    """Seconds of decoding one picture, by the VAE and by a tiny decoder, in turns."""
    vae, tiny = at_random(lambda: Vae(size.vae)), at_random(lambda: TinyDecoder(TinyDecoderConfig()))
    z = torch.randn(1, size.vae.latent_channels, size.side, size.side)
    ways = {"vae": partial(vae.decode, z), "tiny": partial(tiny, z)}
    in_turns(ways, 1)  # the first call of a convolution makes its filters
    seconds = in_turns(ways, repeats)
    gains = [full / small for full, small in zip(seconds["vae"], seconds["tiny"], strict=True)]
    return {"seconds": {name: spread(values, 3) for name, values in seconds.items()}, "gain": spread(gains, 2)}


def at_random(build: Callable[[], Module]) -> Module:
    """Of small random weights: what it computes means nothing, and takes its usual time."""
    with torch.device("meta"):
        module = build()
    module = module.to_empty(device="cpu").requires_grad_(False).eval()
    for parameter in module.parameters():
        parameter.normal_(std=0.02)
    lay_out_weights(module, torch.float32)
    return module


def table(part: Mapping[str, Any]) -> list[str]:
    """The lines to print."""
    head = f"{'choice':24}{'rows':>8}{'seconds':>9}{'PSNR dB':>9}{'levels':>8}{'right':>8}"
    lines = [head, f"{EXACT:24}{1.0:8.2f}{1.0:9.2f}{'':9}{'':8}{part['exact_right']:8.1%}"]
    for name, each in part["choices"].items():
        gain = f"{each['rows']:8.2f}{each['seconds']['median']:9.2f}"
        lines.append(f"{name:24}{gain}{each['psnr_db']:9.1f}{each['levels']:8.2f}{each['right']:8.1%}")
    return lines


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--seed", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--unet", choices=[*SIZES, "none"], default="sd15", help="the U-Net of the second part")
    parser.add_argument("--large", action="store_true", help="token merging in that whole U-Net too, at 768 x 768")
    parser.add_argument("--quick", action="store_true", help="two prompts, six steps, a tiny U-Net")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/choices.json")
    args = parser.parse_args(words)
    args.out = args.out or result_file("choices.json", quick=args.quick)
    if args.quick:
        args.prompts, args.steps, args.repeats, args.unet, args.large = 2, 6, 1, "tiny", True
    return args


def main(words: Sequence[str] | None = None) -> int:
    args = arguments(words)
    pictures = pictures_part(args.prompts, args.seed, args.steps, args.guidance, args.repeats)
    print(*table(pictures), sep="\n")
    result: dict[str, Any] = {key: getattr(args, key) for key in ("prompts", "seed", "steps", "guidance", "repeats")}
    result |= {"pictures": pictures}
    if args.unet != "none":
        size = SIZES[args.unet]
        unet = at_random(lambda: UNet(size.config))
        result["unet"] = {"name": args.unet, **shallow_part(unet, size.side, args.repeats)}
        result["block"] = merging_in_a_block(size, args.repeats)
        share = result["unet"]["shallow_share"]["median"]
        print(f"\nU-Net {args.unet}: a shallow row takes {share:.1%} of a whole one; a picture's gain:")
        print(*(f"{name:24}{gain:8.2f}" for name, gain in result["unet"]["gain"].items()), sep="\n")
        for side, gain in result["block"].items():
            print(
                f"its finest attending block, {side} x {side} positions: token_merging_ratio 0.5 {gain['median']:8.2f}"
            )
        decoders = result["decoder"] = decoder_part(size, args.repeats)
        took = ", ".join(f"{name} {seconds['median']:.3f} s" for name, seconds in decoders["seconds"].items())
        print(f"decoding a picture: {took}; the tiny decoder {decoders['gain']['median']:.1f} x as fast")
        if args.large:
            result["large"] = {"name": args.unet, **merging_part(unet, size.large, args.repeats)}
            gain = result["large"]["token_merging_ratio 0.5"]["median"]
            print(f"the U-Net, latents of {size.large} x {size.large}: token_merging_ratio 0.5 {gain:8.2f}")
    write(args.out, result)
    gains = {name: each["seconds"]["median"] for name, each in pictures["choices"].items()}
    bars(args.out.with_suffix(".png"), "Choices that change the picture", "times as fast as exact", gains)
    return 0


if __name__ == "__main__":
    sys.exit(main())
