"""What the engine raises. Each message says what was wrong, what is allowed and what to do."""

from __future__ import annotations


class InvalidArgument(ValueError):
    """A value that is not allowed: names the field or argument, its value, what is allowed and the remedy."""

    def __init__(self, field: str, value: object, allowed: str, remedy: str = "") -> None:
        # All four go to args: an error whose args do not fit its constructor cannot cross a process boundary.
        super().__init__(field, value, allowed, remedy)
        self.field, self.value, self.allowed, self.remedy = field, value, allowed, remedy

    def __str__(self) -> str:
        return f"{self.field}={self.value!r} is not allowed: {self.allowed}" + (f"; {self.remedy}" * bool(self.remedy))


class InvalidRequest(InvalidArgument):
    """A request that cannot be drawn."""


class InvalidDevice(InvalidArgument):
    """A device, a dtype or a mode of offload that does not exist, or that this machine does not have."""


class WeightsError(ValueError):
    """A model folder or checkpoint that is incomplete, unexpected or not supported."""


class Cancelled(Exception):
    """The row was cancelled before its last step."""


class NonFinite(ArithmeticError):
    """A latent or picture that is not finite (NaN or infinity): the row fails, its neighbours do not."""


class OutOfMemory(RuntimeError):
    """Not even this row alone fits in the device's memory."""


class DeviceLost(RuntimeError):
    """The device answers nothing more in this process, whoever's row it was: only a new process can use it again."""


class SavedRowUnusable(ValueError):
    """Bytes that no row can go on from: damaged, or of another request, model, step table or version."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"the saved row cannot be used: {self.reason}"


class BrokenInvariant(AssertionError):
    """The packer's bookkeeping contradicts itself: a bug in Nightshift, never the caller's fault."""
