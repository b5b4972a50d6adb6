"""The passes of a request: one, or two where it asks for more than it first draws (`Request.upscale`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sd_engine.errors import InvalidRequest
from sd_engine.request import Request
from sd_engine.row import Lane, Row
from sd_engine.samplers import StepTable, step_table

if TYPE_CHECKING:
    from sd_engine.model import Model


def first_row(id: int, request: Request, model_name: str, model: Model, *, urgent: bool = False) -> Row:
    """The row of a new request, with the row of its second pass at hand, as urgent.

    Raises InvalidRequest for what the model cannot lay out, draw or decode, of either pass.
    """
    if request.decoder == "tiny" and model.tiny_decoder is None:
        remedy = "leave it at vae, or put a TAESD into the model's folder or beside its file, as tiny_decoder/"
        raise InvalidRequest("decoder", request.decoder, f"vae, for {model_name} has no tiny decoder", remedy)
    size = request.size(*model.size)
    strength = None if request.init_image is None else request.strength
    table = _table(request, model, request.steps, strength)
    row = Row(id, request, Lane(model_name, *size), table, urgent=urgent)
    if request.upscale is not None:
        table = _table(request, model, request.upscale_steps or request.steps, request.upscale_strength)
        larger, before = Lane(model_name, *request.larger(*size)), len(row.table)
        row.second = Row(id, request, larger, table, steps_before=before, urgent=urgent)
    return row


def second_row(row: Row) -> Row | None:
    """The row that goes on where this one is through with its first pass; None where it has ended.

    It has the same id, and the same source of noise: its draws go on.
    """
    if row.second is None or not row.done:
        return None
    assert row.latent is not None and row.noise is not None, "a row that is done was prepared"
    row.second.noise, row.second.first_pass = row.noise, row.latent.clone()
    row.second.began = row.noise.state()
    return row.second


def _table(request: Request, model: Model, steps: int, strength: float | None) -> StepTable:
    return step_table(request.sampler, model.schedule, steps, strength, eta=request.eta)
