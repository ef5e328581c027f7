"""Supervised fine-tuning of an embedded family's MLLM on a few picture sums, with DRIFT or without.

Only the language model's matrices move, so what a picture becomes is computed once. Full
fine-tuning moves them themselves; LoRA moves factors beside them, by PEFT.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from reproduction.exam import Exam, Weights, entering
from reproduction.family import Family, in_scope
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lean_merge import PriorSettings, make_prior, prior_recipe
from lean_merge.demo.tasks import problems
from lean_merge.drift import Drift

STEPS, BATCH, WARMUP = 60, 20, 0.05
"""Every run makes as many steps of as many problems, whatever the number of training problems."""
RATES = {"full": 1e-4, "gentle": 3e-5, "lora": 3e-3}
"""Rates of AdamW. On 300 problems of family 0, plain fine-tuning at 3e-5, 1e-4 and 3e-4 had 93.7,
97.7 and 98.0 % of 300 other training problems right; LoRA at 1e-3 and 3e-3 had 95.7 and 97.0 %."""
LORA_RANK = 8
_TARGETS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"


@dataclass(frozen=True)
class Pull:
    """How DRIFT pulls: its mode, its alpha, and the rank of its prior ("full" or a number)."""

    mode: str
    alpha: float
    rank: int | str = "full"


@dataclass(frozen=True)
class Trained:
    """The weights after fine-tuning, the losses of its steps, and its seconds."""

    weights: Weights
    losses: list[float]
    seconds: float


class Trainee:
    """One family's MLLM, ready to be fine-tuned again and again from any weights.

    Parameters
    ----------
    family : Family
        Its models; the MLLM's weights change while it is trained.
    folder : Path
        Where priors are kept.
    """

    def __init__(self, family: Family, folder: Path) -> None:
        self._family, self._folder = family, folder
        self.model, self._reader = family.loaded("mllm")
        self._papers: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    @property
    def exam(self) -> Exam:
        """The held-out questions."""
        return self._family.exams["mllm"]

    def prior(self, rank: int | str) -> Path:
        """The prior of a rank, which is made if it is not there."""
        folder = self._folder / f"prior-{self._family.seed}-{rank}"
        roles = self._family.folder
        recipe = prior_recipe(str(roles / "mllm"), [str(roles / "expert")])
        return make_prior(recipe, folder, PriorSettings(rank=rank, dtype="float32")).path

    def paper(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """What enters the language model [n, length, width], and the answers' ids [n, a]."""
        if (count, seed) not in self._papers:
            asked = problems("picture_sums", count, seed=seed, split="train")
            inputs, answers = entering(self.model, self._reader, asked)
            self._papers = {(count, seed): (inputs.clone(), answers.clone())}
        return self._papers[count, seed]

    def train(
        self,
        count: int,
        seed: int,
        *,
        start: Weights,
        way: str = "full",
        pull: Pull | None = None,
        rate: float | None = None,
    ) -> Trained:
        """Fine-tune from `start` on `count` picture sums, drawn and shuffled by `seed`.

        `way` is one of `RATES`; all but "lora" move the matrices themselves.
        """
        language_model(self.model).load_state_dict(dict(start), strict=False)
        inputs, answers = self.paper(count, seed)
        torch.manual_seed(seed)
        model = self.model if way != "lora" else with_lora(self.model)
        moving = only_matrices(model, way)
        optimizer = torch.optim.AdamW(moving, lr=RATES[way], weight_decay=0.0)
        if pull is not None:
            Drift(model, self.prior(pull.rank), alpha=pull.alpha, mode=pull.mode).attach(optimizer)
        losses, began = [], time.perf_counter()
        for step, rows in enumerate(batches(count, seed)):
            for group in optimizer.param_groups:
                group["lr"] = (rate or RATES[way]) * schedule(step)
            loss = answer_loss(model, inputs[rows], answers[rows])
            loss.backward()
            nn.utils.clip_grad_norm_(moving, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        seconds = time.perf_counter() - began
        return Trained(trained_weights(model, way), losses, seconds)


def language_model(model: Any) -> nn.Module:
    """The language model inside an MLLM, with PEFT's layers or without."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    found: nn.Module = inner.model.language_model
    return found


def with_lora(model: Any) -> Any:
    """A copy of the MLLM with LoRA factors beside the language model's matrices."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=_TARGETS)
    return get_peft_model(copy.deepcopy(model), config)


def only_matrices(model: Any, way: str) -> list[nn.Parameter]:
    """Freeze all but what is trained, and return that."""
    if way != "lora":
        wanted = {id(each) for each in in_scope_parameters(language_model(model))}
        for each in model.parameters():
            each.requires_grad_(id(each) in wanted)
    return [each for each in model.parameters() if each.requires_grad]


def in_scope_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """The matrices of attention and MLP."""
    names = in_scope((name, each.detach()) for name, each in module.named_parameters())
    return (each for name, each in module.named_parameters() if name in names)


def answer_loss(model: Any, inputs: Tensor, answers: Tensor) -> Tensor:
    """The mean cross-entropy of the answers' tokens."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = inner.model.language_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
    logits = inner.lm_head(hidden[:, -answers.shape[1] :])
    return cross_entropy(logits.flatten(0, 1), answers.flatten())


def batches(count: int, seed: int) -> Iterator[Tensor]:
    """The rows of each step: the problems in a new order in every epoch."""
    generator = torch.Generator().manual_seed(seed)
    waiting = torch.empty(0, dtype=torch.int64)
    for _ in range(STEPS):
        while len(waiting) < BATCH:
            waiting = torch.cat([waiting, torch.randperm(count, generator=generator)])
        rows, waiting = waiting[:BATCH], waiting[BATCH:]
        yield rows


def schedule(step: int) -> float:
    """The share of the rate: a short linear rise, then half a cosine."""
    rising = min(1.0, (step + 1) / (WARMUP * STEPS))
    return rising * 0.5 * (1 + math.cos(math.pi * step / STEPS))


def trained_weights(model: Any, way: str) -> dict[str, Tensor]:
    """The matrices by their names within the language model, LoRA's factors multiplied out."""
    found: dict[str, Tensor] = {}
    if way != "lora":
        state: Mapping[str, Tensor] = language_model(model).state_dict()
        return {name: each.clone() for name, each in in_scope(state.items()).items()}
    for name, module in language_model(model).named_modules():
        if hasattr(module, "get_delta_weight"):
            whole = module.get_base_layer().weight + module.get_delta_weight("default")
            found[f"{name}.weight"] = whole.detach().clone()
    return found
