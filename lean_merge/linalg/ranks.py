"""Rank the magnitudes of a matrix within each of its rows."""

from __future__ import annotations

import torch
from torch import Tensor


def fill_row_ranks(values: Tensor, out: Tensor) -> Tensor:
    """Fill `out` with the rank of each magnitude in its row, and return it.

    The smallest has rank 0; of equal magnitudes, the one that stands further left has the smaller
    rank. The memory for three more matrices of this size is used on the way.

    Parameters
    ----------
    values : Tensor [t, in], float32
        The numbers whose magnitudes are ranked.
    out : Tensor [t, in], float32
        Ranks are exact in float32 up to 2^24 columns.
    """
    columns = values.shape[1]
    width = max(1, (columns - 1).bit_length())
    # Without the sign, the bits of float32 are in the order of magnitudes. With the column below
    # them, all keys of a row differ, so that any way of sorting gives the same order.
    keys = (values.view(torch.int32) & 0x7FFFFFFF).long()
    keys.bitwise_left_shift_(width).bitwise_or_(torch.arange(columns))
    keys.numpy().sort(axis=1)
    keys.bitwise_and_((1 << width) - 1)
    ranks = torch.arange(columns, dtype=torch.float32).expand_as(out)
    return out.scatter_(1, keys, ranks)


__all__ = ["fill_row_ranks"]
