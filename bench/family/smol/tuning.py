"""A training loop that survives being stopped, for models too slow to train in one sitting."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from worksheets import IGNORED, Batch


@dataclass(frozen=True)
class Stage:
    """How long and how fast one stage trains.

    The rate warms up, stays, and falls to nothing over the last share `decay` of the steps.
    """

    steps: int
    rate: float
    batch: int
    warmup: int = 20
    decay: float = 0.3
    log_every: int = 20
    save_seconds: float = 180.0

    def rate_at(self, step: int) -> float:
        """The learning rate at a step, counted from 0."""
        rising = min(1.0, (step + 1) / self.warmup)
        falling = min(1.0, (self.steps - step) / (self.decay * self.steps))
        return self.rate * rising * falling


def answer_loss(model: Any, batch: Batch) -> torch.Tensor:
    """The mean cross-entropy of the labelled tokens; products in bf16, the rest in float32.

    Scores are computed where there are labels only: the vocabulary costs more than a layer.
    """
    asked = batch.labels != IGNORED
    pictures = {} if batch.pixels is None else {"pixel_values": batch.pixels}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states = model.model(input_ids=batch.ids, use_cache=False, **pictures).last_hidden_state
        scores = model.lm_head(states[asked])
    return cross_entropy(scores.float(), batch.labels[asked])


def tune(
    moving: Mapping[str, torch.nn.Parameter],
    stage: Stage,
    loss_at: Callable[[int], torch.Tensor],
    state: Path,
    *,
    resume: bool,
    until: float | None = None,
    on_point: Callable[[dict[str, float]], None] = lambda point: None,
) -> list[dict[str, float]]:
    """Train weights in place.

    Parameters
    ----------
    moving : mapping of str to Parameter
        What may move.
    stage : Stage
        Steps and rates.
    loss_at : callable
        The loss of the examples of a step. The step alone must decide them, so that a resumed
        training sees what an unbroken one would have seen.
    state : Path
        Where weights, moments and log are kept every ``save_seconds`` and at the end.
    resume : bool
        Go on from `state`.
    until : float, optional
        Stop after this many seconds, wherever that is.
    on_point : callable
        Called with each point of the log.

    Returns
    -------
    list of dict
        The log: step, mean loss since the last point, rate, and seconds of training so far.
    """
    optimizer = torch.optim.AdamW(
        list(moving.values()), lr=stage.rate, weight_decay=0.0, betas=(0.9, 0.98), fused=True
    )
    first, points, spent = 0, [], 0.0
    if resume:
        kept = torch.load(state, weights_only=True)
        with torch.no_grad():
            for name, weight in moving.items():
                weight.copy_(kept["weights"][name])
        optimizer.load_state_dict(kept["optimizer"])
        first, points, spent = kept["step"], kept["points"], kept["seconds"]
    began = saved = time.perf_counter()
    recent: list[float] = []

    def keep(step: int) -> None:
        weights = {name: weight.detach() for name, weight in moving.items()}
        everything = {
            "weights": weights,
            "optimizer": optimizer.state_dict(),
            "step": step,
            "points": points,
            "seconds": spent + time.perf_counter() - began,
        }
        partial = state.with_suffix(".partial")
        torch.save(everything, partial)
        os.replace(partial, state)

    for step in range(first, stage.steps):
        for group in optimizer.param_groups:
            group["lr"] = stage.rate_at(step)
        loss = loss_at(step)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(moving.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        now = time.perf_counter()
        late = until is not None and now - began > until
        ending = late or step + 1 == stage.steps
        if ending or (step + 1) % stage.log_every == 0:
            points.append(
                {
                    "step": step + 1,
                    "loss": sum(recent) / len(recent),
                    "rate": stage.rate_at(step),
                    "seconds": spent + now - began,
                }
            )
            recent.clear()
            on_point(points[-1])
        if ending or now - saved > stage.save_seconds:
            keep(step + 1)
            saved = time.perf_counter()
        if late:
            break
    return points
