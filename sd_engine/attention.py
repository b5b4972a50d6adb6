"""Attention by plain matrix products, on CPUs where these are faster than PyTorch's kernel, which needs none of its own.

That kernel never holds the scores, and computes in bfloat16 no faster than in float32 unless the CPU has matrix units
(AMX): with AVX-512's dot products of bfloat16 a sixth of what the CPU's products reach. Here a block of scores stays in
the caches, and becomes weights in one pass: powers of two, not yet divided by their sums. The largest score of a row is
not taken off first, for a float holds a power as exactly as any other; where sums leave the range of its exponent, which
takes scores beyond some hundred, PyTorch's kernel computes that head.

Legend of the shape suffixes: B batch, G attention heads, N queries, T keys, K width of a head, H heads of all rows,
P one more than K: the values and their weights' sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from sd_engine import prepacking

# Scores that a thread makes before it goes on: with less the products are too small, with more they leave the caches.
_SCORES_A_THREAD = 2**20
# In float32 each head is computed by itself, which few scores are not worth.
_LEAST_SCORES_FP32 = 2**17
# Sums of weights between these came of weights that neither overflowed nor lost digits, in bfloat16 as in float32.
_LEAST_SUM, _LARGEST_SUM = 2.0**-100, 2.0**100


def attend(q_BGNK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor) -> Tensor:
    """softmax(q k' / sqrt(K)) v (Vaswani et al. 2017, equation 1): -> [B, G, N, K]."""
    if _products_pay(q_BGNK, k_BGTK):
        return by_products(q_BGNK, k_BGTK, v_BGTK)
    return F.scaled_dot_product_attention(q_BGNK, k_BGTK, v_BGTK)


def _products_pay(q_BGNK: Tensor, k_BGTK: Tensor) -> bool:
    if not prepacking.serves(q_BGNK.device, q_BGNK.dtype) or torch.cpu._is_amx_tile_supported():
        return False
    return q_BGNK.dtype == torch.bfloat16 or q_BGNK.shape[2] * k_BGTK.shape[2] >= _LEAST_SCORES_FP32


def by_products(q_BGNK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor) -> Tensor:
    """The same; scores and weights are rounded to bfloat16 where the queries and keys were that they are made of."""
    width = q_BGNK.shape[3]
    q_HNK = (q_BGNK * (math.log2(math.e) * width**-0.5)).flatten(0, 1)
    k_HTK = k_BGTK.flatten(0, 1).contiguous()
    v_HPT = F.pad(v_BGTK.flatten(0, 1).transpose(1, 2), (0, 0, 0, 1), value=1.0)
    out_HNP = q_HNK.new_empty(*q_HNK.shape[:2], width + 1)
    for q, k, v, out in _blocks(q_HNK, k_HTK, v_HPT, out_HNP):
        out.copy_(_summed(q, k, v))
    out_BGNP = out_HNP.unflatten(0, q_BGNK.shape[:2])
    mixed_BGNK = out_BGNP[..., :width] / out_BGNP[..., width:]
    for head in _out_of_range(out_BGNP[..., width]):
        mixed_BGNK[head] = F.scaled_dot_product_attention(q_BGNK[head], k_BGTK[head], v_BGTK[head])
    return mixed_BGNK


def _blocks(q_HNK: Tensor, k_HTK: Tensor, v_HPT: Tensor, out_HNP: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some heads, and some queries of these: as many as make a block of scores."""
    (_, queries, _), keys, threads = q_HNK.shape, k_HTK.shape[1], torch.get_num_threads()
    most = threads * _SCORES_A_THREAD // keys
    heads = 1 if q_HNK.dtype == torch.float32 else max(threads, most // queries)
    rows = max(1, min(queries, most // heads))
    for q, k, v, out in zip(*(each.split(heads) for each in (q_HNK, k_HTK, v_HPT, out_HNP)), strict=True):
        for q_rows, out_rows in zip(q.split(rows, 1), out.split(rows, 1), strict=True):
            yield q_rows, k, v, out_rows


def _summed(q_HNK: Tensor, k_HTK: Tensor, v_HPT: Tensor) -> Tensor:
    """The values and ones, each times its weight, added up: [H, N, P]. In float32 of a single head."""
    if q_HNK.dtype == torch.float32:  # PyTorch's batched product is MKL's
        weights_NT = prepacking.linear(q_HNK[0], k_HTK[0], None).exp2_()
        return prepacking.linear(weights_NT, v_HPT[0], None)[None]
    return torch.bmm(torch.bmm(q_HNK, k_HTK.transpose(1, 2)).exp2_(), v_HPT.transpose(1, 2))


def _out_of_range(sums_BGN: Tensor) -> list[tuple[int, int]]:
    """The heads in which a sum, or what it is of, may have lost digits."""
    least, most = sums_BGN.aminmax(dim=-1)
    safe_BG = (least >= _LEAST_SUM) & (most <= _LARGEST_SUM)  # neither is true of what is not a number
    return [(b, g) for b, g in (~safe_BG).nonzero().tolist()]
