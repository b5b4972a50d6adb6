"""Deep features of one step, reused in the steps that follow it: DeepCache (Ma et al. 2023, arXiv 2312.00858).

A row that asks for it (`Request.deepcache_interval`) keeps what its last whole step made for the last block of the
U-Net, and in the steps between computes that block alone (`UNet.parted`). Whole and shallow steps are different calls,
so they are in different packs (`Row.call`).

Legend of the shape suffixes: U U-Net rows of a pack, R those of a row, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sd_engine.row import Kept, Row


def reused(rows: Sequence[Row], unet_rows: int) -> Tensor | None:
    """What the rows of a shallow pack kept, [U, C, H, W]; None for a pack of whole steps.

    The last U-Net row is repeated until there are `unet_rows`.
    """
    kept = [row.kept for row in rows]
    if not rows[0].call.shallow:
        return None
    # Where guidance has ended meanwhile only the features with the prompt, the last, are of use.
    parts = [each.features[-row.unet_rows :] for row, each in zip(rows, kept, strict=True) if each is not None]
    features_UCHW = torch.cat(parts)
    missing = unet_rows - len(features_UCHW)
    return torch.cat([features_UCHW, features_UCHW[-1:].expand(missing, -1, -1, -1)]) if missing else features_UCHW


def keeping(rows: Sequence[Row]) -> bool:
    """Whether any row will reuse what this step makes."""
    return not rows[0].call.shallow and any(_keeps(row) for row in rows)


def kept(rows: Sequence[Row], deep_UCHW: Tensor | None) -> list[Kept | None]:
    """What each row has kept after this step, which has not changed it yet; deep_UCHW: of the pack's whole step.

    Copied: what one row keeps must not hold the memory of its neighbours. So is the state that a saved row goes back
    to (`Kept.at`), as it is before the step.
    """
    if deep_UCHW is None:
        return [row.kept for row in rows]
    parts = deep_UCHW[: sum(row.unet_rows for row in rows)].split([row.unet_rows for row in rows])
    return [_kept(row, part_RCHW) if _keeps(row) else None for row, part_RCHW in zip(rows, parts, strict=True)]


def _keeps(row: Row) -> bool:
    return row.request.deepcache_interval > 1 and row.step + 1 < len(row.table)


def _kept(row: Row, features_RCHW: Tensor) -> Kept:
    at = row.standing()
    assert at is not None and at.state is not None, "a row is prepared before it is stepped"
    return Kept(replace(at, state=at.state.clone()), row.unet_rows, features_RCHW.clone())
