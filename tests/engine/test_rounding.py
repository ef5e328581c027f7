"""Nearest and stochastic rounding, over every 16-bit number and between."""

from __future__ import annotations

import pytest
import torch

from lean_merge.engine.rounding import round_stochastic, rounding_generator

DTYPES = [torch.bfloat16, torch.float16]


def every_finite(dtype: torch.dtype) -> torch.Tensor:
    """All finite numbers of a 16-bit dtype, ascending, as float32."""
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()
    return numbers[torch.isfinite(numbers)].unique()


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_of_the_dtype_stay_what_they_are(dtype: torch.dtype) -> None:
    numbers = every_finite(dtype)
    generator = rounding_generator(0, "w", 0)
    assert torch.equal(round_stochastic(numbers, dtype, generator).float(), numbers)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_number_between_two_goes_to_either_and_is_right_in_the_mean(dtype: torch.dtype) -> None:
    """Over the whole range, zero and subnormals included: 4000 draws of each of a few points."""
    numbers = every_finite(dtype)
    picks = torch.linspace(1, len(numbers) - 3, 41).long()
    picks = torch.cat([picks, torch.searchsorted(numbers, torch.tensor([-1e-9, 0.0, 1e-9])) - 1])
    low, high = numbers[picks], numbers[picks + 1]
    for share in (0.1, 0.5, 0.85):
        # In float32 the point itself may be rounded; its own share is what must come out.
        point = low + (high - low) * share
        expected = ((point - low) / (high - low)).double()
        draws = point.repeat(4000, 1)
        rounded = round_stochastic(draws, dtype, rounding_generator(1, "w", 2)).float()
        assert bool(((rounded == low) | (rounded == high)).all())
        taken = (rounded == high).double().mean(0)
        inside = (point > low) & (point < high)
        assert float((taken - expected)[inside].abs().max()) < 0.04


def test_the_generator_depends_on_seed_name_and_tile() -> None:
    def draw(seed: int, name: str, index: int) -> float:
        return float(torch.rand(1, generator=rounding_generator(seed, name, index)))

    assert draw(0, "w", 0) == draw(0, "w", 0)
    assert len({draw(0, "w", 0), draw(1, "w", 0), draw(0, "v", 0), draw(0, "w", 1)}) == 4
