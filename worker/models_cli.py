"""The commands ``nightshift models ...``: what is on this machine's shelf, and what is in a file.

Imported by ``nightshift --help``: what needs torch or the hub's library is imported by the command that needs it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from worker.model_entry import ShelfError, Source, reason, source_at
from worker.told import told_in_a_sentence

if TYPE_CHECKING:
    from jobs.settings import Settings
    from worker.model_shelf import Shelf

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


class _Models(click.Group):
    """Errors meant for people become a sentence and an exit code, as with the worker's other commands."""

    def invoke(self, ctx: click.Context) -> Any:
        with told_in_a_sentence():
            if find_spec("torch") is None:
                raise ModuleNotFoundError("torch is not installed", name="torch")
            try:
                return super().invoke(ctx)
            except OSError as error:  # of a file or folder that cannot be read or written
                raise ShelfError(reason(error)) from error


@click.group(
    cls=_Models,
    invoke_without_command=True,  # so that a machine without torch hears of the extra first
    epilog="""\b
Examples:
  nightshift models pull org/name --variant fp16
  nightshift models add sd15 v1-5-pruned.safetensors --tokenizer openai/clip-vit-large-patch14
  nightshift models list

A worker serves the shipped model and the whole shelf, or what NIGHTSHIFT_MODELS names. Exit codes: 0 done;
1 something is wrong with a model (inspect, verify); 2 refused, the sentence says why; 69 the hub is away.""",
)
@click.pass_context
def models(context: click.Context) -> None:
    """Look after the models on this machine's shelf."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def _loaded_with(*left_out: str) -> Callable[[Decorated], Decorated]:
    """The options that say how a model is loaded, as `load_model` takes them."""
    path = click.Path(exists=True, path_type=Path)
    options = {
        "tokenizer": click.option(
            "--tokenizer", metavar="DIR|ID|NAME", help="a folder, a hub's id, or a model on the shelf that has it"
        ),
        "vae": click.option("--vae", type=path, metavar="FILE", help="another VAE: a file or a folder"),
        "embeddings": click.option(
            "--embeddings", type=click.Path(exists=True, file_okay=False, path_type=Path), metavar="DIR",
            help="textual inversion files; their words can be used in prompts",
        ),
        "tiny_decoder": click.option(
            "--tiny-decoder", type=click.Path(exists=True, file_okay=False, path_type=Path), metavar="DIR",
            help="a TAESD for jobs with decoder tiny: a folder with an AutoencoderTiny, or a model's that has one",
        ),
        "variant": click.option("--variant", metavar="WORD", help="of a folder's weights, for example fp16"),
        "ema": click.option("--ema", is_flag=True, help="the averaged U-Net of a single file"),
        "prediction": click.option(
            "--prediction", type=click.Choice(["epsilon", "v_prediction", "sample"]), help="if the model does not say"
        ),
        "zero_snr": click.option(
            "--zero-snr/--no-zero-snr", default=None, help="whether its noise schedule ends in pure noise"
        ),
    }  # fmt: skip

    def decorate(command: Decorated) -> Decorated:
        for name in reversed([name for name in options if name not in left_out]):
            command = options[name](command)
        return command

    return decorate


_json = click.option("--json", "as_json", is_flag=True, help="print JSON")
_name_or_file = click.argument("what", metavar="NAME|FILE")


@models.command("list", epilog="\b\nExamples:\n  nightshift models list\n  nightshift models list --json")
@_json
def list_models(as_json: bool) -> None:
    """Show the models: their kind, size, state, and whether a worker would serve them."""
    from jobs.settings import Settings
    from worker.model_shelf import Shelf
    from worker.models_show import as_table, lines

    settings = Settings()
    found = lines(settings)
    if as_json:
        click.echo(json.dumps([asdict(line) for line in found]))
        return
    click.echo("\n".join(as_table(found)))
    for folder in Shelf(settings.home).unfinished():
        click.echo(f"unfinished: {folder} (pull again to go on, or delete the folder)", err=True)
    for folder in Shelf(settings.home).left_over():
        click.echo(f"left over: {folder} (delete the folder, unless an add or remove is running)", err=True)


@models.command(
    epilog="""\b
Examples:
  nightshift models add sd15 v1-5-pruned.safetensors --tokenizer openai/clip-vit-large-patch14
  nightshift models add anime anime.ckpt --tokenizer sd15 --vae anime.vae.pt
  nightshift models add big /mnt/models/big-diffusers --link"""
)
@click.argument("name")
@click.argument("file", type=click.Path(exists=True, path_type=Path))
@_loaded_with()
@click.option("--link", is_flag=True, help="leave the model where it is; else it is hard-linked or copied to the shelf")
def add(name: str, file: Path, tokenizer: str | None, link: bool, **options: Any) -> None:
    """Put a file or folder on the shelf as the model NAME, its tokenizer with it. It is loaded once to check it."""
    from jobs.settings import Settings
    from worker.model_shelf import Shelf
    from worker.model_tokenizer import tokenizer_for

    settings = Settings()
    shelf, file = Shelf(settings.home), file.absolute()
    shelf.check_name(name)  # before anything is fetched
    with tokenizer_for(shelf, tokenizer, file) as words:
        _put(settings, name, Source(file, tokenizer=words, **options), origin=str(file), link=link)


def _put(settings: Settings, name: str, source: Source, *, origin: str, link: bool = False) -> None:
    from worker.model_check import check, check_names
    from worker.model_shelf import Shelf, served
    from worker.models_show import progress_bar, size

    if source.path.is_file():
        check_names(source)  # before gigabytes are copied and summed
    with progress_bar("reading") as progress:
        entry = Shelf(settings.home).add(name, source, origin=origin, check=check, link=link, progress=progress)
    click.echo(f"{name}: {size(entry.size)}, in {entry.folder}")
    if name not in served(settings):
        click.echo(f"No worker serves it yet: NIGHTSHIFT_MODELS is set and does not name {name}", err=True)


@models.command(
    epilog="""\b
Examples:
  nightshift models pull org/name --variant fp16
  nightshift models pull org/name --file v1-5-pruned-emaonly.safetensors --name sd15

HF_ENDPOINT is another hub's address; `hf auth login` is for models that are not public."""
)
@click.argument("repository", metavar="ID")
@click.option("--name", help="on the shelf; default: the last part of ID")
@click.option("--revision", metavar="WORD", help="a branch, tag or commit; default: the newest")
@click.option("--file", metavar="FILE", help="this single file of several, instead of a folder's parts")
@_loaded_with()
def pull(
    repository: str, name: str | None, revision: str | None, file: str | None, tokenizer: str | None, **options: Any
) -> None:
    """Fetch a model from a hub and put it on the shelf. A pull that was interrupted goes on where it stopped."""
    from jobs.settings import Settings
    from worker.model_pull import pulled_model
    from worker.model_shelf import Shelf
    from worker.model_tokenizer import tokenizer_for

    settings = Settings()
    shelf, name = Shelf(settings.home), name or repository.rpartition("/")[2]
    shelf.check_name(name)
    wanted = {"variant": options["variant"], "file": file, "tokenizer": tokenizer is None}
    with pulled_model(shelf, repository, revision, **wanted) as (source, commit):
        given = {option: value for option, value in options.items() if value is not None}
        source, origin = replace(source, **given), f"{repository}@{commit}"
        if tokenizer is None:
            _put(settings, name, source, origin=origin)
            return
        with tokenizer_for(shelf, tokenizer, source.path) as words:
            _put(settings, name, replace(source, tokenizer=words), origin=origin)


@models.command(
    epilog="\b\nExamples:\n  nightshift models inspect v1-5-pruned.safetensors\n  nightshift models inspect sd15 --json"
)
@_name_or_file
@_json
@click.pass_context
def inspect(context: click.Context, what: str, as_json: bool) -> None:
    """Say what is in a file, a folder or a model on the shelf, from its names and shapes. Exit code 1: not loadable."""
    from jobs.settings import Settings
    from worker.model_check import look
    from worker.model_shelf import Shelf
    from worker.models_show import inspection_as_json, inspection_as_text

    found = look(_source(Shelf(Settings().home), what))
    click.echo(json.dumps(inspection_as_json(found)) if as_json else "\n".join(inspection_as_text(found)))
    context.exit(1 if found.problems else 0)


def _source(shelf: Shelf, what: str) -> Source:
    """A path that is there, else a model by its name."""
    from jobs.settings import SHIPPED
    from sd_engine import shipped_model

    if Path(what).exists():
        return source_at(Path(what).absolute())
    return Source(shipped_model()) if what in SHIPPED else shelf.entry(what).source


@models.command(epilog="\b\nExamples:\n  nightshift models verify\n  nightshift models verify sd15")
@click.argument("what", metavar="[NAME|FILE]...", nargs=-1)
@click.pass_context
def verify(context: click.Context, what: tuple[str, ...]) -> None:
    """Read every byte of models on the shelf (default: all) or of files. Exit code 1: a sentence for each problem."""
    from jobs.settings import Settings
    from worker.model_check import sound, sound_on_shelf
    from worker.model_shelf import Shelf
    from worker.models_show import progress_bar

    shelf, bad = Shelf(Settings().home), False
    for each in what or shelf.names():
        with progress_bar(f"reading {each}") as progress:
            on_shelf = not what or not Path(each).exists()
            problems = sound_on_shelf(shelf, each, progress) if on_shelf else sound(source_at(Path(each)))
        for problem in problems:
            click.echo(f"{each}: {problem}", err=True)
        if not problems:
            click.echo(f"{each}: sound")
        bad = bad or bool(problems)
    context.exit(1 if bad else 0)


@models.command(
    epilog="""\b
Examples:
  nightshift models convert v1-5-pruned.ckpt sd15-diffusers --tokenizer openai/clip-vit-large-patch14 --dtype fp16
  nightshift models convert sd15 /mnt/sd15-diffusers"""
)
@_name_or_file
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--dtype", type=click.Choice(["fp16", "bf16", "fp32"]), help="of the weights; default: as they are")
@click.option("--force", is_flag=True, help="replace the model that is at OUT")
@_loaded_with("embeddings")
def convert(what: str, out: Path, dtype: str | None, force: bool, tokenizer: str | None, **options: Any) -> None:
    """Write a model as a diffusers folder in safetensors, which others read too. OUT appears when it is whole."""
    from jobs.settings import Settings
    from worker.model_check import convert_to
    from worker.model_shelf import Shelf
    from worker.model_tokenizer import tokenizer_for

    shelf = Shelf(Settings().home)
    given = {name: value for name, value in options.items() if value not in (None, False)}
    source = replace(_source(shelf, what), **given)
    if sys.stderr.isatty():
        click.echo(f"converting {source.path} ...", err=True)  # minutes for a large one, and the engine tells no steps
    if tokenizer is None and source.tokenizer is not None:  # one of the shelf
        convert_to(source, out, dtype, force=force)
    else:
        with tokenizer_for(shelf, tokenizer, source.path) as words:
            convert_to(replace(source, tokenizer=words), out, dtype, force=force)
    click.echo(out)


@models.command(epilog="\b\nExample:\n  nightshift models remove sd15")
@click.argument("name")
def remove(name: str) -> None:
    """Take a model off the shelf and delete its files there; what it was added from stays."""
    from jobs.settings import Settings
    from worker.model_shelf import Shelf

    settings = Settings()
    Shelf(settings.home).remove(name)
    click.echo(f"{name} is removed")
    if name in settings.models:
        click.echo(f"NIGHTSHIFT_MODELS still names {name}", err=True)
