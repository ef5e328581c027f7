"""The training loop that every stage shares."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from skills import IGNORED, Batch
from torch.nn.functional import cross_entropy


@dataclass(frozen=True)
class Stage:
    """How long and how fast one stage trains, and what it is checked for on the way."""

    steps: int
    learning_rate: float
    decay: bool = True
    batch: int = 64
    warmup: int = 50
    log_every: int = 250

    def rate(self, step: int) -> float:
        """The learning rate at a step: a linear warm-up, then constant or half a cosine."""
        rising = min(1.0, (step + 1) / self.warmup)
        falling = 0.5 * (1 + math.cos(math.pi * step / self.steps)) if self.decay else 1.0
        return self.learning_rate * rising * falling


@dataclass
class History:
    """What a stage leaves in the log."""

    points: list[dict[str, float]] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0


def answer_loss(model: Any, batch: Batch) -> torch.Tensor:
    """The mean cross-entropy over the answers' tokens."""
    pictures = {} if batch.pixels is None else {"pixel_values": batch.pixels}
    logits = model(input_ids=batch.ids, use_cache=False, **pictures).logits
    return cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED)


def train(
    weights: Iterable[torch.nn.Parameter],
    stage: Stage,
    next_loss: Callable[[], torch.Tensor],
    *,
    check: Callable[[], float] | None = None,
    enough: float = math.inf,
) -> History:
    """Train weights in place.

    Parameters
    ----------
    weights : iterable of Parameter
        What may move.
    stage : Stage
        Steps and rates.
    next_loss : callable
        Draws a batch and returns its loss.
    check : callable, optional
        Measures an accuracy every ``stage.log_every`` steps, for the log.
    enough : float, optional
        The stage ends early once the check reaches this.
    """
    moving = list(weights)
    optimizer = torch.optim.AdamW(
        moving, lr=stage.learning_rate, weight_decay=0.01, betas=(0.9, 0.98)
    )
    history = History()
    began = time.perf_counter()
    recent: list[float] = []
    for step in range(stage.steps):
        for group in optimizer.param_groups:
            group["lr"] = stage.rate(step)
        loss = next_loss()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(moving, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        if (step + 1) % stage.log_every and step + 1 < stage.steps:
            continue
        point = {"step": step + 1, "loss": sum(recent) / len(recent)}
        recent.clear()
        if check is not None:
            point["accuracy_on_train"] = check()
        history.points.append(point)
        print("  " + "  ".join(f"{k} {v:.4g}" for k, v in point.items()), flush=True)
        if point.get("accuracy_on_train", -math.inf) >= enough:
            break
    history.steps = int(history.points[-1]["step"])
    history.seconds = time.perf_counter() - began
    return history
