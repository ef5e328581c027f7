"""Everything that decides how the family turns out, in one place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from training import Stage


@dataclass(frozen=True)
class Settings:
    """The stages, in the order they run, and the share of each skill in their examples.

    Attributes
    ----------
    base, base_mix, base_enough
        The base learns at a constant rate and stops at this accuracy on training sums, so that
        there is something left for the expert to learn.
    expert, expert_mix
        The expert sharpens sums.
    tower
        The vision tower first learns to tell digits apart, as CLIP comes pre-trained to LLaVA.
    align, align_mix
        The projector and tower learn to speak to the frozen base.
    tune, tune_mix
        The whole MLLM learns to answer about pictures.
    """

    base: Stage
    base_mix: Mapping[str, float]
    base_enough: float
    expert: Stage
    expert_mix: Mapping[str, float]
    tower: Stage
    align: Stage
    align_mix: Mapping[str, float]
    tune: Stage
    tune_mix: Mapping[str, float]


def default_settings() -> Settings:
    """The settings of the embedded family."""
    return Settings(
        base=Stage(3000, 1e-3, decay=False, log_every=50),
        base_mix={
            "sum": 0.25,
            "plus": 0.25,
            "unit": 0.1,  # without it, some seeds stay on a plateau at 8 % for a thousand steps
            "read": 0.1,
            "flip": 0.1,
            "sort": 0.1,
            "next": 0.1,
        },
        base_enough=0.70,
        expert=Stage(200, 3e-5),
        expert_mix={"sum": 0.5, "plus": 0.5},
        tower=Stage(2500, 1e-3),
        align=Stage(1200, 1e-3),
        align_mix={"read": 0.35, "flip": 0.15, "sort": 0.15, "next": 0.15, "sum": 0.2},
        tune=Stage(250, 1.1e-5),
        # No sums, and two requests the base does not know: seeing costs it some of its adding.
        tune_mix={"read": 0.45, "flip": 0.05, "swap": 0.15, "tell": 0.35},
    )
