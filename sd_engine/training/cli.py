"""The command `nightshift train-mini`."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import click


@click.command("train-mini", short_help="Train the shipped model anew.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("train-mini"), show_default=True,
              help="Folder of checkpoints, logs and the finished model.")  # fmt: skip
@click.option("--vae-steps", type=click.IntRange(min=1), default=None, help="Steps of the VAE (default: the recipe's).")
@click.option(
    "--unet-steps", type=click.IntRange(min=1), default=None, help="Steps of the U-Net (default: the recipe's)."
)
@click.option(
    "--tiny-decoder-steps", type=click.IntRange(min=1), default=None, help="Steps of the tiny decoder (the recipe's)."
)
@click.option("--pictures", type=click.IntRange(min=160), default=None, help="Pictures to learn from.")
@click.option("--fresh", is_flag=True, help="Forget what is in --out instead of resuming.")
def train_mini(
    out: Path,
    vae_steps: int | None,
    unet_steps: int | None,
    tiny_decoder_steps: int | None,
    pictures: int | None,
    fresh: bool,
) -> None:
    """Train nightshift-mini on pictures that are drawn on the way. Resumes from --out after an interruption.

    The recipe takes hours on two cores and leaves a diffusers folder in OUT/nightshift-mini.

    \b
    Examples:
      nightshift train-mini
      nightshift train-mini --out /tmp/try --vae-steps 300 --unet-steps 500 --tiny-decoder-steps 100 --pictures 1600
    """
    # Late, because torch takes seconds and `nightshift --help` must not wait for it.
    from sd_engine.training import mini

    if fresh and out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    recipe = mini.MiniRecipe()
    vae = replace(recipe.vae, steps=vae_steps or recipe.vae.steps)
    unet = replace(recipe.unet, steps=unet_steps or recipe.unet.steps, pictures=pictures or recipe.unet.pictures)
    tiny = replace(recipe.tiny_decoder, steps=tiny_decoder_steps or recipe.tiny_decoder.steps)
    recipe = replace(recipe, vae=vae, unet=unet, tiny_decoder=tiny)
    folder = mini.train_mini(out, recipe, lambda line: click.echo(line, err=True))
    click.echo(folder)
