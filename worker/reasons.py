"""Why a claimed job ends in this process without a picture (``worker.tasks`` answers each one differently), and why a
worker cannot start."""

from jobs.errors import NightshiftError


class Interrupted(Exception):
    """The rows of a claim were taken out of the engine for a reason that is not the job's fault."""


class LeaseLost(Interrupted):
    """Somebody else may own the job by now: forget it and delete what was uploaded under our token."""


class CancelAsked(Interrupted):
    """A user asked for it: the job becomes ``cancelled``."""


class Draining(Interrupted):
    """The process leaves: the job goes back to the queue and keeps its attempt.

    ``saved``: its rows as they stand, for whoever goes on with them; None when there is nothing to keep.
    """

    def __init__(self, why: str, saved: bytes | None = None) -> None:
        super().__init__(why)
        self.saved = saved


class StepBroke(Interrupted):
    """A step raised for all of its rows, so any of them may be the reason: the job goes back to be rendered alone.

    ``__cause__`` is what the step raised.
    """


class Unusable(Exception):
    """The job can never succeed (bad image, unknown model, values the engine refuses): it fails at once, no retry."""


class OutcomeUnknown(Exception):
    """The database did not say whether ``finish`` was applied: the uploaded objects may be visible and must stay."""


class BrokerUnavailable(NightshiftError):
    """The broker does not answer."""


class HubUnavailable(NightshiftError):
    """The model hub does not answer, or stopped answering."""
