"""Attention by plain matrix products, on CPUs where these are faster than PyTorch's kernel for it.

That one was not seen to compute faster in bfloat16 than in float32 on a CPU with AVX-512's products of bfloat16 (two
cores of AMD's Zen 5): it reached a sixth of what plain products do. Here a block of scores stays in the caches, and
becomes weights in one pass: powers of two, not yet divided by their sums. The largest score of a row is not taken off
first, for a float holds any power as exactly as another. A head whose sums are too large or too small, where weights
would leave the range of the exponent, goes by PyTorch's kernel after all.

Legend of the shape suffixes: B batch, G attention heads, N queries, T keys, K width of a head, H heads of all rows,
P a little more than K: the values, and ones that give the sum of their weights.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sd_engine import prepacking

# Scores that a thread makes before it goes on: with less the products are too small, with more they leave the caches.
_SCORES_A_THREAD = 2**20
# Numbers that an instruction of AVX-512 adds up at once.
_LANES = 16
# Fewer scores of a head are not worth the operations around them; in float32 each head has its own.
_LEAST_SCORES = {torch.float32: 2**17, torch.bfloat16: 2**13}
# Sums of weights between these came of weights that neither overflowed nor lost digits. (In bfloat16 a score beyond 32
# is rounded by an eighth, and its weight by 9 %, but what it is made of is as coarse: the shipped model's pictures,
# whose scores reach 110, were 46.1 dB from those in float32 with all heads by products, 45.2 dB by PyTorch's kernel.)
_LEAST_SUM, _LARGEST_SUM = 2.0**-100, 2.0**100


def attend(q_BGNK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor) -> Tensor:
    """softmax(q k' / sqrt(K)) v (Vaswani et al. 2017, equation 1): -> [B, G, N, K]."""
    if _products_pay(q_BGNK, k_BGTK):
        return by_products(q_BGNK, k_BGTK, v_BGTK)
    return F.scaled_dot_product_attention(q_BGNK, k_BGTK, v_BGTK)


def _products_pay(q_BGNK: Tensor, k_BGTK: Tensor) -> bool:
    # Where there are matrix units PyTorch's kernel uses them; blocks of products were seen to take twice its time.
    if not prepacking.serves(q_BGNK, q_BGNK.dtype) or torch.cpu._is_amx_tile_supported():
        return False
    return q_BGNK.shape[2] * k_BGTK.shape[2] >= _LEAST_SCORES[q_BGNK.dtype]


def by_products(q_BGNK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor) -> Tensor:
    """The same; scores and weights are rounded to bfloat16 where the queries and keys were that they are made of."""
    width = q_BGNK.shape[3]
    q_HNK = (q_BGNK * (math.log2(math.e) * width**-0.5)).flatten(0, 1)
    k_HTK, v_HTP = k_BGTK.flatten(0, 1).contiguous(), _with_ones(v_BGTK).flatten(0, 1)
    out_HNP = q_HNK.new_empty(*q_HNK.shape[:2], v_HTP.shape[2])
    heads, rows = _block(q_BGNK, k_BGTK.shape[2])
    for q, k, v, out in zip(*(each.split(heads) for each in (q_HNK, k_HTK, v_HTP, out_HNP)), strict=True):
        for q_rows, out_rows in zip(q.split(rows, 1), out.split(rows, 1), strict=True):
            _sum_values(q_rows, k, v, out_rows)
    out_BGNP = out_HNP.unflatten(0, q_BGNK.shape[:2])
    # Laid out as tokens, which is what the next layer reads: it would be copied for that.
    mixed_BGNK = torch.empty_like(q_BGNK.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    torch.div(out_BGNP[..., :width], out_BGNP[..., width : width + 1], out=mixed_BGNK)
    for head in _out_of_range(out_BGNP[..., width]):  # four dimensions, else PyTorch would hold all scores
        mixed_BGNK[head] = F.scaled_dot_product_attention(q_BGNK[head], k_BGTK[head], v_BGTK[head])
    return mixed_BGNK


def _with_ones(v_BGTK: Tensor) -> Tensor:
    """The values, and as many ones as make their number a multiple of what an instruction adds up: [B, G, T, P]."""
    width = v_BGTK.shape[3]
    v_BGTP = v_BGTK.new_empty(*v_BGTK.shape[:3], (width // _LANES + 1) * _LANES)
    v_BGTP[..., :width] = v_BGTK
    v_BGTP[..., width:] = 1.0
    return v_BGTP


def _block(q_BGNK: Tensor, keys: int) -> tuple[int, int]:
    """How many heads, and how many queries of each, make a block of scores."""
    (_, of_a_row, queries, _), threads = q_BGNK.shape, torch.get_num_threads()
    most = threads * _SCORES_A_THREAD // keys
    heads = 1 if q_BGNK.dtype == torch.float32 else max(threads, most // queries)
    if threads == 1:  # for the sake of bits (`one_thread`): no block is shared by rows, and each is cut alike
        heads = max(divisor for divisor in range(1, of_a_row + 1) if of_a_row % divisor == 0 and divisor <= heads)
    return heads, max(1, min(queries, most // heads))


def _sum_values(q_HNK: Tensor, k_HTK: Tensor, v_HTP: Tensor, out_HNP: Tensor) -> None:
    """Write the values and ones, each times its weight and added up. In float32 of a single head."""
    if q_HNK.dtype == torch.float32:  # PyTorch's batched product is MKL's
        weights_NT = prepacking.linear(q_HNK[0], k_HTK[0], None).exp2_()
        out_HNP[0] = prepacking.linear(weights_NT, v_HTP[0].t(), None)
    else:
        torch.bmm(torch.bmm(q_HNK, k_HTK.transpose(1, 2)).exp2_(), v_HTP, out=out_HNP)


def _out_of_range(sums_BGN: Tensor) -> list[tuple[slice, slice]]:
    """The heads in which a sum, or what it is of, may have lost digits."""
    least, most = sums_BGN.aminmax(dim=-1)
    safe_BG = (least >= _LEAST_SUM) & (most <= _LARGEST_SUM)  # neither is true of what is not a number
    return [(slice(b, b + 1), slice(g, g + 1)) for b, g in (~safe_BG).nonzero().tolist()]
