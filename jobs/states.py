"""The life of a job, as data."""

from __future__ import annotations

from enum import StrEnum
from types import MappingProxyType


class State(StrEnum):
    """Where a job is in its life."""

    queued = "queued"
    running = "running"
    succeeded = "succeeded"
    failed = "failed"
    cancelled = "cancelled"


TRANSITIONS = MappingProxyType(
    {
        State.queued: frozenset({State.running, State.cancelled}),
        # Back to queued: released by a draining worker, retried after an error, or the lease expired.
        State.running: frozenset({State.succeeded, State.failed, State.cancelled, State.queued}),
        # Only a person's `repair`, when a picture is missing in the storage: there is nothing left to be shown then.
        State.succeeded: frozenset({State.queued}),
        # failed is the dead-letter state: only a person's `retry` brings a job back.
        State.failed: frozenset({State.queued}),
        State.cancelled: frozenset[State](),
    }
)

#: States that the queue itself never leaves.
TERMINAL = frozenset({State.succeeded, State.failed, State.cancelled})


def sources(target: State) -> tuple[State, ...]:
    """The states from which a job may become `target`."""
    return tuple(state for state, targets in TRANSITIONS.items() if target in targets)
