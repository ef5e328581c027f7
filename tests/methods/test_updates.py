"""Updates: their rows, their digests, and what they say of themselves."""

import torch
from support.drive import rows_of

from lean_merge.methods import Combined, Dense, LowRank


def test_rows_are_those_of_the_whole_update():
    generator = torch.Generator().manual_seed(1)
    first, second, left, right = (
        torch.randn(shape, generator=generator) for shape in ((7, 5), (7, 5), (7, 2), (2, 5))
    )
    for update, whole in (
        (Combined((0.0, 2.0)), 2 * second),
        (Combined((-1.0, 0.5)), 0.5 * second - first),
        (LowRank(left, right), left @ right),
        (Dense(first), first),
    ):
        for rows in (slice(0, 7), slice(2, 3), slice(4, 7)):
            torch.testing.assert_close(rows_of(update, [first, second], rows), whole[rows])


def test_digests_tell_updates_apart():
    """By coefficients, by either factor, and by which of them a number is in."""
    one, two = torch.ones(2, 3), torch.ones(3, 2)
    updates = [
        Combined((0.0, 1.0)),
        Combined((1.0, 0.0)),
        Combined((1.0, 0.0, 0.0)),
        LowRank(one, two),
        LowRank(two, one),
        LowRank(2 * one, two),
        LowRank(one, 2 * two),
        Dense(one),
        Dense(two),
    ]
    assert len({update.digest() for update in updates}) == len(updates)
    again = LowRank(torch.ones(3, 2).T, two)
    assert again.digest() == updates[3].digest()


def test_only_factors_are_of_low_rank_and_only_sums_tell_norms():
    one, two = torch.ones(2, 3), torch.ones(3, 2)
    assert LowRank(one, two).factors() == (one, two)
    assert Dense(one).factors() is None and Combined((0.0, 1.0)).factors() is None
    assert Combined((1.0, -3.0, 0.0)).norms([1.0, 4.0, float("nan")]) == (6.0, 0.0)
    assert LowRank(one, two).norms([1.0, 4.0]) == ()
