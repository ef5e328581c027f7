"""DRIFT itself: pull the gradients of a model that is fine-tuned along a prior."""

from __future__ import annotations

import itertools
import math
import warnings
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from lean_merge.drift.live import Match, match
from lean_merge.drift.pieces import WeightDifference, ahead
from lean_merge.drift.prior import Prior
from lean_merge.drift.shards import is_spread
from lean_merge.drift.targets import (
    PULL_MODES,
    PairTarget,
    Pulling,
    PullMode,
    Target,
    WholeTarget,
    working_dtype,
)
from lean_merge.errors import DataError, RecipeError, shown

_PER = ("step", "backward")


class Drift:
    """Pulls the gradients of a model's language weights along a prior, in place.

    Make it once the model is as it is trained: wrapped, sharded, with its adapters. Then do one of

        drift.attach(optimizer)     # acts whenever that optimizer makes a step
        with drift: ...             # acts whenever an optimizer with its weights makes a step
        drift.apply()               # acts now, between backward() and step()

    Every step reads the whole prior once, a weight at a time, from the disk or from the system's
    page cache. No memory is held in between but the differences' norms.

    Parameters
    ----------
    model : Module
        The model, also as torch.compile, DDP, `fully_shard` or PEFT return it.
    prior : path or Prior
        What `lean-merge prior` wrote for this model.
    alpha : float
        The strength of the pull, above 0. It may be changed while training.
    mode : {"adaptive", "grad-norm", "absolute"}
        See `lean_merge.drift.targets` for the formulas. Only "absolute" depends on how large the
        gradients are, and with it on the loss and on the batch.
    per : {"step", "backward"}
        "step" pulls the gradient that the optimizer sees, accumulated, reduced and unscaled.
        "backward" pulls that of every backward pass, of one process and of one micro-batch, as the
        authors' code does. It takes `attach` or `with`, and neither LoRA nor sharded weights.
    allow_partial : bool
        Whether to go on if some of the model's weights have no counterpart in the prior, or the
        other way round; `report` lists them. Otherwise that is an error.
    keep_factors : bool
        Whether the factors of a prior of low rank stay on the device once they were read.
    ahead : int, optional
        How many differences are brought to the device before their turn. By default it is 1 on
        CUDA, by way of pinned memory, and 0 on the CPU, where nothing has to be brought.

    Attributes
    ----------
    prior : Prior
        The prior.
    mode, per
        As above.

    Raises
    ------
    RecipeError
        An argument makes no sense, or the model is trained by what cannot be pulled: DoRA,
        DeepSpeed ZeRO-3, FSDP1, weights on the meta device.
    CheckpointError
        The prior is damaged or unfinished.
    CoverageError
        The weights of model and prior are not the same, or all of them are frozen.
    DataError
        D is zero: the expert equals the MLLM.
    """

    def __init__(
        self,
        model: nn.Module,
        prior: str | Path | Prior,
        *,
        alpha: float = 1.0,
        mode: PullMode = "adaptive",
        per: Literal["step", "backward"] = "step",
        allow_partial: bool = False,
        keep_factors: bool = False,
        ahead: int | None = None,
    ) -> None:
        for name, value, known in (("mode", mode, PULL_MODES), ("per", per, _PER)):
            if value not in known:
                raise RecipeError(f"{name} is {shown(value)}, not one of {', '.join(known)}.")
        if ahead is not None and (type(ahead) is not int or not 0 <= ahead <= 16):
            raise RecipeError(f"ahead is {shown(ahead)}; pass a whole number from 0 to 16.")
        self.mode, self.per = mode, per
        self.alpha = alpha
        self.prior = prior if isinstance(prior, Prior) else Prior.open(prior)
        matches = match(model, self.prior, allow_partial=allow_partial)
        self._left = {reason: [*names] for reason, names in matches.left.items()}
        self._targets = self._made(matches.pulled, keep_factors)
        self._ahead = ahead
        self._figures: dict[str, Tensor] = {}
        self._acts: Counter[str] = Counter()
        self._not_finite: dict[torch.device, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    @property
    def alpha(self) -> float:
        """The strength of the pull. Setting it raises RecipeError unless it is above 0."""
        return self._alpha

    @alpha.setter
    def alpha(self, value: float) -> None:
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise RecipeError(
                f"alpha is {shown(value)}; pass a number above 0. The alpha of -1 in the paper, "
                "which adds the pull to the gradient, is 1 here; without DRIFT, leave Drift out."
            )
        self._alpha = float(value)

    def attach(self, optimizer: Optimizer, *, scaler: Any = None) -> Drift:
        """Act whenever `optimizer` makes a step; it may be called for several optimizers.

        Parameters
        ----------
        optimizer
            One that holds weights of the prior.
        scaler
            The GradScaler, if there is one, `per` is "backward" and `mode` is "absolute". Otherwise
            the gradients' scale is known.

        Raises
        ------
        RecipeError
            The optimizer holds none of the weights that are pulled.
        """
        while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
            optimizer = inner
        if not self._held_by(optimizer):
            raise RecipeError(
                "The optimizer holds none of the weights that the prior tells of; make Drift from "
                "the model as it is trained, after it was wrapped, and attach its optimizer."
            )
        if self.per == "step":
            self._handles.append(optimizer.register_step_pre_hook(self._before_step))
        elif not self._handles:
            self._hook_gradients(scaler)
        return self

    def detach(self) -> None:
        """Act no more; undo `attach`."""
        while self._handles:
            self._handles.pop().remove()

    def __enter__(self) -> Drift:
        if self._handles:
            raise RecipeError("This Drift acts already; call detach() before `with`.")
        if self.per == "step":
            self._handles.append(register_optimizer_step_pre_hook(self._before_step))
        else:
            self._hook_gradients(None)
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()
        if not any(error) and not self._acts:
            warnings.warn("DRIFT pulled no gradient inside `with`.", stacklevel=2)

    def apply(self) -> None:
        """Pull the gradients that the model's parameters have now, once; they must be unscaled.

        Raises
        ------
        RecipeError
            No weight of the prior has a gradient, or `per` is "backward".
        DataError, CheckpointError
            The prior holds NaN, or cannot be read any more.
        """
        if self.per == "backward":
            raise RecipeError(
                'apply() is for per="step"; with per="backward" use attach() or with.'
            )
        self._act(self._targets, 1.0)

    def report(self) -> dict[str, Any]:
        """Return what was done, as JSON can hold it.

        Returns
        -------
        dict
            "acts" is how often gradients were pulled. "not_finite" is how often the gradient of a
            weight was left as it was, because it held NaN or infinity. "weights" has, for every
            weight and the last time that it was pulled, the "cosine" of gradient and D, the norm of
            the "gradient", the norm of the "pull", and the "ratio" of the two; None is no number.
            "left" has the weights that are not pulled, by the reason.
        """
        names, rows = [*self._figures], [each.tolist() for each in self._figures.values()]
        return {
            "difference": self.prior.difference,
            "mode": self.mode,
            "alpha": self.alpha,
            "per": self.per,
            "acts": max(self._acts.values(), default=0),
            "not_finite": sum(int(each) for each in self._not_finite.values()),
            "weights": {
                name: {
                    "cosine": _plain(cosine),
                    "gradient": _plain(gradient),
                    "pull": _plain(pull),
                    "ratio": _plain(pull / gradient) if gradient else None,
                }
                for name, (cosine, gradient, pull) in zip(names, rows, strict=True)
            },
            "left": {reason: [*found] for reason, found in self._left.items()},
        }

    def _made(self, pulled: Sequence[Match], keep_factors: bool) -> list[Target]:
        """Return what is pulled, and note the weights whose D is zero."""
        zero = [each for each in pulled if _norm(self.prior, each) == 0]
        if len(zero) == len(pulled):
            raise DataError(
                f"{self.prior.path}: D is zero in all {len(zero)} weights that are trained, so "
                "there is nothing to pull along; the expert equals the MLLM."
            )
        if zero:
            self._left["D is zero"] = [each.name for each in zero]
        groups: dict[str, list[Match]] = {}
        for each in pulled:
            if each not in zero:
                groups.setdefault(each.live.name, []).append(each)
        targets: list[Target] = []
        for group in groups.values():
            live = group[0].live
            for pair in live.pairs or (None,):
                parts = [
                    (
                        each,
                        WeightDifference(
                            self.prior, each.source, each.stored, each.blocks, keep_factors
                        ),
                    )
                    for each in group
                ]
                whole = WholeTarget(live.parameter, parts)
                targets.append(whole if pair is None else PairTarget(pair, parts))
        if self.per == "backward":
            for target in targets:
                if isinstance(target, PairTarget) or is_spread(target.trained[0]):
                    raise RecipeError(
                        f'per="backward" cannot pull {target.names[0]}, which LoRA trains or which '
                        'is sharded: its gradient is never there by itself; use per="step".'
                    )
        return targets

    def _held_by(self, optimizer: Optimizer) -> list[Target]:
        held = {id(each) for group in optimizer.param_groups for each in group["params"]}
        return [each for each in self._targets if any(id(one) in held for one in each.trained)]

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Act on the gradients that an optimizer is about to use."""
        if targets := self._held_by(optimizer):
            # A GradScaler tells fused optimizers the scale, which they divide by themselves.
            scale = getattr(optimizer, "grad_scale", None)
            self._act(targets, 1.0 if scale is None else scale)

    def _hook_gradients(self, scaler: Any) -> None:
        for target in self._targets:
            hook = partial(self._in_backward, target, scaler)
            parameter: Any = target.trained[0]
            self._handles.append(parameter.register_hook(hook))

    def _in_backward(self, target: Target, scaler: Any, gradient: Tensor) -> Tensor:
        pulled = gradient.clone()
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        with torch.no_grad():
            self._pull([(target, [pulled])], scale)
        return pulled

    @torch.no_grad()
    def _act(self, targets: Sequence[Target], scale: float | Tensor) -> None:
        ready = []
        for target in targets:
            gradients = [each.grad for each in target.trained if each.grad is not None]
            if len(gradients) == len(target.trained):
                ready.append((target, gradients))
        if not ready:
            raise RecipeError(
                "None of the weights that the prior tells of has a gradient, so DRIFT would do "
                "nothing: call backward() before, and make Drift from the model as it is trained, "
                "after it was wrapped."
            )
        self._pull(ready, scale)

    def _pull(self, ready: Sequence[tuple[Target, list[Tensor]]], scale: float | Tensor) -> None:
        pulling = Pulling(self.alpha, self.mode, scale)
        for device, group in itertools.groupby(ready, lambda each: each[1][0].device):
            together = [*group]
            self._not_finite.setdefault(device, torch.zeros((), dtype=torch.int64, device=device))
            loads = [
                partial(each.bring, device, working_dtype(gradients[0]))
                for target, gradients in together
                for each in target.differences
            ]
            count = int(device.type == "cuda") if self._ahead is None else self._ahead
            brought = ahead(loads, device, count)
            for target, gradients in together:
                figures = [*target.pull(brought, pulling, gradients)]
                for name, found in zip(target.names, figures, strict=True):
                    self._figures[name] = found
                    self._acts[name] += 1
                    self._not_finite[device] += ~found[1].isfinite()


def _norm(prior: Prior, found: Match) -> float:
    """Return ||D|| of a logical weight, or of the tensor that holds it if no part is its own."""
    weight = prior.weights[found.source]
    return next((each.norm for each in weight.parts if each.name == found.name), weight.norm)


def _plain(number: float) -> float | None:
    return number if math.isfinite(number) else None
