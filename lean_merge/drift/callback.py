"""DRIFT for the Trainer of transformers and the trainers of TRL, which are made from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator
from transformers import TrainerCallback

from lean_merge.drift.prior import Prior
from lean_merge.drift.pull import Drift
from lean_merge.errors import RecipeError, shown

_CLIPPING = ("before", "after")


class DriftCallback(TrainerCallback):  # type: ignore[misc]
    """Lets a trainer fine-tune with DRIFT:

        SFTTrainer(..., callbacks=[DriftCallback("prior/", alpha=1.0)])

    Gradients are pulled once per step of the optimizer, when they are accumulated, reduced and
    unscaled. By default that is before the trainer clips them, for two reasons. The authors' code
    does so, and what the optimizer sees then keeps to `max_grad_norm`, with the pull in it. After
    clipping, the pull lengthens clipped gradients, and in "absolute" mode it may be many times as
    long as they are.

    Parameters
    ----------
    prior : path or Prior
        What `lean-merge prior` wrote for the model that is trained.
    clipping : {"before", "after"}
        Whether to pull before gradients are clipped or afterwards.
    **options
        Those of `Drift`.

    Attributes
    ----------
    drift : Drift or None
        What acts, from the beginning of the training on; its `report` tells what was done.

    Raises
    ------
    RecipeError
        `clipping` is none of the two; when the training begins, also DeepSpeed and what `Drift`
        refuses.
    """

    def __init__(
        self,
        prior: str | Path | Prior,
        *,
        clipping: Literal["before", "after"] = "before",
        **options: Any,
    ) -> None:
        if clipping not in _CLIPPING:
            raise RecipeError(f"clipping is {shown(clipping)}, not one of {', '.join(_CLIPPING)}.")
        self.drift: Drift | None = None
        self._prior, self._clipping, self._options = prior, clipping, options
        self._has_pulled = False
        self._undo: list[Any] = []

    def on_train_begin(
        self, args: Any, state: Any, control: Any, *, model: Any, optimizer: Any, **others: Any
    ) -> None:
        """Find the model's weights, and act from now on."""
        self._end()
        _refuse_deepspeed(args, optimizer)
        self.drift = Drift(model, self._prior, **self._options)
        if self._clipping == "after" or self.drift.per == "backward":
            self.drift.attach(optimizer, scaler=getattr(optimizer, "scaler", None))
        else:
            self._pull_before_clipping(self.drift, optimizer)

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Begin the next step of the optimizer."""
        self._has_pulled = False

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Act no more."""
        self._end()

    def _end(self) -> None:
        if self.drift is not None:
            self.drift.detach()
        while self._undo:
            self._undo.pop()()

    def _pull(self, drift: Drift) -> None:
        if not self._has_pulled:
            drift.apply()
            self._has_pulled = True

    def _pull_before_clipping(self, drift: Drift, optimizer: Any) -> None:
        """Wrap the clipping of the accelerator that has prepared `optimizer`.

        A callback is not told which one that is, so the class's method is wrapped while the
        training lasts. A trainer that clips in another way is met when its optimizer makes a step.
        """
        original = Accelerator.clip_grad_norm_

        def clip(accelerator: Any, *given: Any, **options: Any) -> Any:
            if self.drift is not drift or not any(
                each is optimizer for each in accelerator._optimizers
            ):
                return original(accelerator, *given, **options)
            accelerator.unscale_gradients()
            self._pull(drift)
            # Gradients may be unscaled only once, and the original would do it again.
            accelerator.unscale_gradients = lambda optimizer=None: None
            try:
                return original(accelerator, *given, **options)
            finally:
                del accelerator.unscale_gradients

        def undo() -> None:
            if Accelerator.clip_grad_norm_ is clip:
                Accelerator.clip_grad_norm_ = original

        Accelerator.clip_grad_norm_ = clip
        self._undo.append(undo)
        inner = optimizer
        while hasattr(inner, "optimizer"):
            inner = inner.optimizer
        late = inner.register_step_pre_hook(lambda *_: self._pull(drift))
        self._undo.append(late.remove)


def _refuse_deepspeed(args: Any, optimizer: Any) -> None:
    """Raise RecipeError where DeepSpeed holds the gradients."""
    state = getattr(optimizer, "accelerator_state", None)
    plugin = getattr(state, "deepspeed_plugin", None)
    if plugin is None and not getattr(args, "deepspeed", None):
        return
    stage = getattr(plugin, "zero_stage", None)
    name = "DeepSpeed" if stage is None else f"DeepSpeed ZeRO-{stage}"
    raise RecipeError(
        f"{name} takes gradients away before an optimizer's step, so that DRIFT cannot pull them; "
        "train with FSDP2 (fsdp_version 2) or DDP."
    )
