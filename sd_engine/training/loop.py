"""The loop that every stage is trained by: seeded, averaged, logged, and resumed where it was stopped."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

Batch = TypeVar("Batch")
Notes = Mapping[str, Tensor]  # what else is worth a column of the log

LOG_EVERY, SAVE_EVERY = 50, 250


class Plan(Protocol):
    """The part of a recipe that the loop reads; the learning rate is the peak of a warm-up and cosine decay."""

    @property
    def steps(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def warmup(self) -> int: ...
    @property
    def ema(self) -> float: ...
    @property
    def seed(self) -> int: ...


@dataclass(slots=True, eq=False)
class _State:
    """All that a checkpoint holds."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: dict[str, Tensor]
    step: int = 0

    def save(self, path: Path) -> None:
        """Write beside the old checkpoint and put it in its place: an interruption leaves one of the two whole."""
        part = path.with_suffix(".part")
        content = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(content | {"average": self.average, "step": self.step}, part)
        part.replace(path)

    def resume(self, path: Path) -> None:
        saved = torch.load(path, weights_only=True)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.average, self.step = saved["average"], saved["step"]


def start_convolutions(model: nn.Module) -> None:
    """Let every convolution keep the scale of what it is given (He et al. 2015), and add nothing."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def cosine_rate(step: int, plan: Plan) -> float:
    """Linear warm-up to the peak, then a cosine to a hundredth of it."""
    if step < plan.warmup:
        return plan.learning_rate * (step + 1) / plan.warmup
    progress = (step - plan.warmup) / max(1, plan.steps - plan.warmup)
    return plan.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def train(
    name: str,
    model: nn.Module,
    shares: Mapping[nn.Module, float],
    batches: Callable[[int], Iterator[Batch]],
    loss_of: Callable[[Batch], tuple[Tensor, Notes]],
    plan: Plan,
    folder: Path,
) -> None:
    """Train `model` to its plan's end and leave the average of its weights in it.

    name: of the checkpoint `folder/NAME.pt` and the log `folder/NAME.log.jsonl`.
    shares: modules, and the share of the learning rate that their parameters get.
    batches: endless batches from a seed; a resumed run gets another seed, so that it does not see the same again.
    """
    groups: list[dict[str, Any]] = [{"params": list(part.parameters()), "share": s} for part, s in shares.items()]
    optimizer = torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    average = {key: value.detach().clone() for key, value in model.state_dict().items()}
    state, checkpoint = _State(model, optimizer, average), folder / f"{name}.pt"
    if checkpoint.exists():
        state.resume(checkpoint)
    torch.manual_seed(plan.seed + state.step)
    log, stream = _Log(folder / f"{name}.log.jsonl"), batches(plan.seed + state.step)
    while state.step < plan.steps:
        loss, notes = loss_of(next(stream))
        _update(state, loss, plan)
        last = state.step == plan.steps
        log.note(state.step, loss, notes, last)
        if last or state.step % SAVE_EVERY == 0:
            state.save(checkpoint)
    model.load_state_dict(state.average)
    model.eval()


def _update(state: _State, loss: Tensor, plan: Plan) -> None:
    """One step of the optimizer and of the average."""
    for group in state.optimizer.param_groups:
        group["lr"] = group["share"] * cosine_rate(state.step, plan)
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(state.model.parameters(), 1.0)
    state.optimizer.step()
    # The first average is short, or the random start would stay in it for a thousand steps.
    decay = min(plan.ema, (state.step + 1) / (state.step + 10))
    with torch.no_grad():
        for key, value in state.model.state_dict().items():
            state.average[key].lerp_(value, 1 - decay)
    state.step += 1


class _Log:
    """A JSON line every `LOG_EVERY` steps: the mean loss since the last line, and the notes of the last step."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.started = time.monotonic()
        self.losses: list[float] = []

    def note(self, step: int, loss: Tensor, notes: Notes, last: bool) -> None:
        self.losses.append(loss.item())
        if not last and step % LOG_EVERY:
            return
        line = {"step": step, "loss": sum(self.losses) / len(self.losses)}
        line |= {key: value.item() for key, value in notes.items()}
        line["seconds"] = round(time.monotonic() - self.started, 1)
        self.losses = []
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
