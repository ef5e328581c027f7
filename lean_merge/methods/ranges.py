"""Checks that methods share of what their parameters may be."""

from __future__ import annotations

from collections.abc import Sequence

from lean_merge.errors import RecipeError, shown


def check_range(name: str, value: float, least: float, most: float) -> None:
    """Raise RecipeError unless `value` lies from `least` to `most`."""
    if not least <= value <= most:
        raise RecipeError(f"{name} must lie in {least} .. {most}, not {value}.")


def check_word(name: str, value: str, words: Sequence[str]) -> None:
    """Raise RecipeError unless `value` is one of `words`."""
    if value not in words:
        raise RecipeError(f"{name} must be one of {', '.join(words)}, not {shown(value)}.")


def check_share(name: str, value: float) -> None:
    """Raise RecipeError unless `value` is a share of what is kept, and not 0."""
    if not 0 < value <= 1:
        raise RecipeError(f"{name} must lie above 0 and up to 1, not {value}.")


def check_rank(rank: int | str) -> None:
    """Raise RecipeError unless `rank` is "auto" or a whole number from 1."""
    if rank != "auto" and not (type(rank) is int and rank >= 1):
        raise RecipeError(f"rank must be 'auto' or a whole number from 1, not {shown(rank)}.")


__all__ = ["check_range", "check_rank", "check_share", "check_word"]
