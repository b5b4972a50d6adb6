"""Do full-size models give what the reference's give? Random weights, one single-file checkpoint, both libraries.

    make parity            (or: python -m benchmarks.parity --family "SD 2.1")

For each family a checkpoint with the original (LDM) names is written, loaded by ours, converted by ours to a diffusers
folder, and that folder is loaded by the reference, strictly. Then every module and a whole picture are compared, at
float32. Prints a table and writes `benchmarks/results/parity.json`; exits with 1 where a difference is above its bar.
It takes about 12 GB of memory and 5 GB of temporary disk.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor

from benchmarks.parity_models import FAMILIES, Family, open_reference, write_checkpoint
from benchmarks.report import RESULTS, write
from sd_engine import Engine, Model, Request, load_model, shipped_model
from sd_engine.convert import convert

# Of the largest module difference in standard deviations of the reference's output. float32 keeps 7 digits; some sixty
# layers, their sums taken in another order, lose at most three of them.
MODULE_BAR = 1e-4
# Of a picture, in levels of 256: the differences of some steps, amplified by guidance, before the rounding.
PICTURE_BAR = 2.0


@dataclass(frozen=True, slots=True)
class Line:
    """One comparison: what, over which output, how far apart at most."""

    family: str
    module: str
    output: str
    difference: float
    bar: float
    unit: str
    seconds: float

    @property
    def passed(self) -> bool:
        return self.difference <= self.bar  # so that NaN has not passed


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest absolute difference, in standard deviations of the reference's output."""
    return float((ours - theirs).abs().max() / theirs.std())


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def compare_text(model: Model, reference: Any) -> tuple[str, float, float, str]:
    tokens = model.text_encoder.config.max_tokens
    ids_BT = torch.randint(0, 400, (2, tokens), generator=torch.Generator().manual_seed(1))
    theirs = reference.text_encoder(ids_BT)[0]
    return (
        f"2 x {tokens} x {theirs.shape[-1]}",
        difference(model.text_encoder(ids_BT), theirs),
        MODULE_BAR,
        "deviations",
    )


def compare_unet(model: Model, reference: Any) -> tuple[str, float, float, str]:
    side, config = 64, model.unet.config
    x_UCHW = noise(2, config.in_channels, side, side)
    t_U, context_UTD = torch.tensor([10.0, 700.0]), noise(2, 77, config.context_width, seed=2)
    ours, theirs = model.unet(x_UCHW, t_U, context_UTD), reference.unet(x_UCHW, t_U, context_UTD).sample
    return f"2 x 4 x {side} x {side}", difference(ours, theirs), MODULE_BAR, "deviations"


def compare_encoder(model: Model, reference: Any) -> tuple[str, float, float, str]:
    pixels_BCHW = noise(1, 3, 512, 512).clamp(-1, 1)
    mean, deviation = model.vae.moments(pixels_BCHW)
    theirs = reference.vae.encode(pixels_BCHW).latent_dist
    worst = max(difference(mean, theirs.mean), float((deviation - theirs.std).abs().max()))
    return "1 x 8 x 64 x 64", worst, MODULE_BAR, "deviations"


def compare_decoder(model: Model, reference: Any) -> tuple[str, float, float, str]:
    z_BCHW = noise(1, 4, 64, 64)
    theirs = reference.vae.decode(z_BCHW / reference.vae.config.scaling_factor).sample
    return "1 x 3 x 512 x 512", difference(model.vae.decode(z_BCHW), theirs), MODULE_BAR, "deviations"


def compare_picture(model: Model, reference: Any) -> tuple[str, float, float, str]:
    """Text to picture, 256 x 256, four guided steps of DDIM, or the same as inpainting where the model is for that."""
    fields: dict[str, Any] = {"negative_prompt": "blue", "width": 256, "height": 256}
    ours, theirs = dict(fields), dict(fields)
    if model.inpainting:
        rng = np.random.default_rng(4)
        image, mask = rng.integers(0, 256, (256, 256, 3), dtype=np.uint8), np.zeros((256, 256), np.uint8)
        mask[64:200, 40:160] = 255
        ours |= {"init_image": image, "mask": mask, "strength": 1.0}
        theirs |= {"image": Image.fromarray(image), "mask_image": Image.fromarray(mask), "strength": 1.0}
    (drawn,) = Engine(model).render([Request("a red star", seed=5, steps=4, guidance=5.0, sampler="ddim", **ours)])
    wanted = reference(
        "a red star",
        num_inference_steps=4,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(5),
        output_type="np",
        **theirs,
    ).images[0]
    return "256 x 256, 4 steps", float(np.abs(drawn - wanted * 255).max()), PICTURE_BAR, "levels"


COMPARISONS: dict[str, Callable[[Model, Any], tuple[str, float, float, str]]] = {
    "text encoder": compare_text,
    "U-Net": compare_unet,
    "VAE encoder": compare_encoder,
    "VAE decoder": compare_decoder,
    "picture": compare_picture,
}


def lines(family: Family, folder: Path) -> Iterator[Line]:
    """Every comparison of one family; everything is made, and left behind, in `folder`."""
    checkpoint = write_checkpoint(family, folder / f"{family.file}.safetensors")
    tokenizer = shipped_model() / "tokenizer"
    model = load_model(checkpoint, tokenizer=tokenizer, **family.overrides)
    convert(checkpoint, folder / family.file, tokenizer=tokenizer, dtype=torch.float16, **family.overrides)
    checkpoint.unlink()
    reference = open_reference(family, folder / family.file)
    for module in family.modules:
        began = time.perf_counter()
        with torch.inference_mode():
            shape, worst, bar, unit = COMPARISONS[module](model, reference)
        yield Line(family.name, module, shape, worst, bar, unit, time.perf_counter() - began)
        gc.collect()


def show(line: Line) -> None:
    verdict = "ok" if line.passed else "ABOVE THE BAR"
    print(
        f"{line.family:20} {line.module:13} {line.output:22} {line.difference:9.2e} {line.unit:11} "
        f"(bar {line.bar:.0e}) {line.seconds:6.1f} s  {verdict}",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=[family.name for family in FAMILIES], help="only this one")
    parser.add_argument("--out", type=Path, default=RESULTS / "parity.json")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")
    for library in (diffusers, transformers):  # their bars would stand between the lines of the table
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    found: list[Line] = []
    for family in FAMILIES:
        if args.family in (None, family.name):
            with tempfile.TemporaryDirectory() as folder:
                for line in lines(family, Path(folder)):
                    show(line)
                    found.append(line)
    write(args.out, {"parity": [asdict(line) for line in found]}, beside=("diffusers", "transformers"))
    return 0 if all(line.passed for line in found) else 1


if __name__ == "__main__":
    sys.exit(main())
