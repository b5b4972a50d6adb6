"""What the engine's own code does on a device that is not there: every tensor of it counted, none of it computed.

The device is PyTorch's `meta`: its tensors have shapes, dtypes and storages, but no memory. So the engine runs whole,
at full size and in a second, and whatever would have been on the device at a moment can be added up.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

META = torch.device("meta")


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that live on `meta` (or on another device), and notes the dtypes seen there.

    What a kernel takes for itself (workspaces of convolutions, upcasts) is invisible: only its results are counted.
    """

    def __init__(self, device: torch.device = META) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.live = self._peak = 0
        self.peaks: dict[str, int] = {}
        self.dtypes: set[torch.dtype] = set()
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    @property
    def peak(self) -> int:
        """The most bytes that lived at once in any phase."""
        return max(self.peaks.values())

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Inside, the peak is noted under this name."""
        self._peak = self.live
        yield
        self.peaks[name] = max(self.peaks.get(name, 0), self._peak)

    def see(self, tensor: Tensor) -> None:
        """Count a tensor's storage, once, until nothing holds it any more."""
        if tensor.device != self.device:
            return
        self.dtypes.add(tensor.dtype)
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key not in self._storages:
            self._storages[key] = weakref.ref(storage, lambda _: self._gone(key, size))
            self.live += size
            self._peak = max(self._peak, self.live)

    def _gone(self, key: int, size: int) -> None:
        del self._storages[key]
        self.live -= size

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Compute, and see what came out."""
        kwargs = kwargs or {}
        with self:  # in inference mode, operations come whole: their parts are what takes memory
            result = func.decompose(*args, **kwargs)
        if result is NotImplemented:
            result = _answer(func, args, kwargs)
        tree_map_only(Tensor, self.see, result)
        return result


def _answer(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What the operation gives; where the host asks `meta` for values, which it has not: all is well, and zeros."""
    if func is torch.ops.aten._local_scalar_dense.default and args[0].device == META:
        return True if args[0].dtype == torch.bool else 0
    if func is torch.ops.aten._to_copy.default and args[0].device == META:
        wanted = torch.device(kwargs.get("device") or META)
        if wanted != META:
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device=wanted)
    if func is torch.ops.aten.copy_.default and args[1].device == META:
        return args[0]
    return func(*args, **kwargs)


class FusedAttention(TorchFunctionMode):
    """Attention without the matrix of scores, as CUDA's flash and memory-efficient kernels compute it.

    On `meta`, PyTorch would take its plain path, which holds all scores (twice, before and after the softmax).
    """

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Let everything but attention through."""
        if func is nn.functional.scaled_dot_product_attention:
            q, _, v = args[:3]
            return q.new_empty(*q.shape[:-1], v.shape[-1])
        return func(*args, **(kwargs or {}))


class Phases:
    """Stands before an object and notes the peak of each of its methods under the method's name."""

    def __init__(self, inner: object, meter: LiveBytes) -> None:
        self._inner, self._meter = inner, meter

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        return self._phased(name, value) if callable(value) else value

    def _phased(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self._meter.phase(name):
                return method(*args, **kwargs)

        return call
