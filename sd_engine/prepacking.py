"""Matrix products and convolutions by oneDNN, over weights in the layouts that its kernels read ("prepacked").

For CPUs with AVX-512. PyTorch gives products of float32 to MKL, which takes 2 to 2.5 times as long there (measured on
AMD's Zen 5 alone), and oneDNN turns plain weights anew at each call: on small maps that is half of the time.

The operators are those that PyTorch's own compiler (inductor) calls for the same purpose; where a version of PyTorch
has them no more, its usual ones compute.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from sd_engine.devices import computes

_T = TypeVar("_T")
_OPERATORS = (
    "_linear_pointwise", "_reorder_linear_weight", "_convolution_pointwise", "_reorder_convolution_weight",
)  # fmt: skip


class MadeOf:
    """What was made of a weight, at its first use, and is kept until the weight changes, unless memory is spared.

    A change through `.data`, or of a tensor made in inference mode, goes unnoticed: PyTorch counts no versions there.
    sparing: nothing is kept, it is made anew each time.
    """

    def __init__(self, sparing: bool = False) -> None:
        self.sparing = sparing
        self._kept: dict[Hashable, tuple[tuple[int, int], Any, torch.UntypedStorage]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def __reduce__(self) -> tuple[type[MadeOf], tuple[bool]]:
        return MadeOf, (self.sparing,)  # a module that is copied or pickled has weights of its own there

    def get(self, weight: Tensor, what: Hashable, make: Callable[[], _T]) -> _T:
        """What `make` returns, or did when it was last called for `what`."""
        if self.sparing:
            return make()
        # Weights may be loaded or trained anew: then they have another place in memory, or another version.
        made_of = (weight.data_ptr(), -1 if weight.is_inference() else weight._version)
        kept = self._kept.get(what)
        if kept is None or kept[0] != made_of:
            # The storage is held, so that no later weight can get its place in memory.
            kept = self._kept[what] = (made_of, make(), weight.untyped_storage())
        made: _T = kept[1]
        return made


def serves(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether a computation without gradients where this tensor lies, in this dtype, goes by prepacked weights.

    Not within `torch.compile`, which prepacks by itself and would trace what is kept here. Every layer asks at every
    call, so in few steps: in a small model a layer takes some 20 microseconds.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    return tensor.is_cpu and _prepacks(dtype)


@cache
def _prepacks(dtype: torch.dtype) -> bool:
    there = torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in _OPERATORS)
    there = there and "binary" in torch.ops.mkldnn._linear_pointwise.overloads()
    known = dtype in (torch.float32, torch.bfloat16)
    return there and known and torch.backends.cpu.get_cpu_capability() == "AVX512" and computes(dtype)


def prepacked_weight(weight_OI: Tensor) -> Tensor:
    """A weight [out, in] for `linear`, opaque to any other operator."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous(), None)
    return packed


def linear(x: Tensor, weight: Tensor, bias_O: Tensor | None) -> Tensor:
    """[..., in] -> [..., out]. weight: a prepacked one, or as it is."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias_O, "none", [], "")
    return out


def gated(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """[..., in] -> [..., out]: a product times the GELU of a second one, both within oneDNN. weights: prepacked."""
    (value_weight, gate_weight), (value_bias, gate_bias) = weights, biases
    gate = torch.ops.mkldnn._linear_pointwise(x, gate_weight, gate_bias, "gelu", [], "none")
    out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, gate, value_weight, value_bias, "mul")
    return out


def prepacked_convolution(weight_OCyx: Tensor, stride: int, padding: int) -> Callable[[Tensor, Tensor | None], Tensor]:
    """The convolution of maps [B, C, H, W] in the channels-last layout, with a bias [O] or none, by this weight."""
    geometry: tuple[list[int], list[int], list[int], int] = ([padding] * 2, [stride] * 2, [1, 1], 1)
    reorder, convolve = torch.ops.mkldnn._reorder_convolution_weight, torch.ops.mkldnn._convolution_pointwise
    packed = reorder(weight_OCyx.contiguous(), *geometry, None)
    return partial(_convolved, convolve, packed, geometry)


def _convolved(convolve: Any, packed: Tensor, geometry: Any, x_BCHW: Tensor, bias_O: Tensor | None) -> Tensor:
    out_BOHW: Tensor = convolve(x_BCHW, packed, bias_O, *geometry, "none", [], "")
    return out_BOHW
