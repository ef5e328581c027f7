"""Ask a family's models every held-out question, quickly.

Merging leaves the vision tower, the projector, the embeddings and lm_head alone, so what enters
the language model is computed once for each family. And greedy decoding is right to the last
character exactly if, with the right answer as its input, the model's first choice is right at
every place: one pass over the sequence takes the place of a pass for each token. A test compares
this with generation by transformers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from lean_merge.demo.tasks import TASKS, Problem, Task, operand_pairs, problems

Weights = Mapping[str, Tensor]

QUESTION_SEED = 7
"""Every family is asked the same questions, whatever its training seed."""
_BATCH = 64
"""What goes on in a layer stays in the cache; 512 take half as long again."""


@dataclass(frozen=True)
class Marks:
    """For each problem whether it was answered rightly, and the answer's cross-entropy in nats."""

    right: NDArray[np.bool_]
    loss: NDArray[np.float64]


@dataclass(frozen=True)
class _Paper:
    """One task: what enters the language model [n, length, width], and the answers' ids [n, a]."""

    inputs: Tensor
    answers: Tensor


def questions(task: Task, count: int | None = None) -> list[Problem]:
    """`count` held-out problems, or one for each held-out pair of operands."""
    return problems(task, count or len(operand_pairs("test")), seed=QUESTION_SEED)


class Exam:
    """The questions of one model's tasks, ready to be asked of any weights of its language model.

    Parameters
    ----------
    model, reader
        As `lean_merge.demo.evaluate.load` gives them. The model is kept, and its weights change.
    count : int, optional
        Problems for each task; one for each held-out pair of operands without it.
    """

    def __init__(self, model: Any, reader: Any, *, count: int | None = None) -> None:
        self._language_model = getattr(model.model, "language_model", model.model)
        self._head = model.lm_head
        self.tasks: tuple[Task, ...] = (
            TASKS if self._language_model is not model.model else ("text_sums",)
        )
        self._papers = {t: _paper(model, reader, questions(t, count)) for t in self.tasks}

    def take(
        self, weights: Weights, tasks: Iterable[Task] | None = None, *, limit: int | None = None
    ) -> dict[Task, Marks]:
        """Marks of these weights, in some tasks or all, on the first `limit` problems or all.

        `weights` must hold every weight in scope, or those of the last call would stay.
        """
        self._language_model.load_state_dict(dict(weights), strict=False)
        asked = self.tasks if tasks is None else [task for task in tasks if task in self.tasks]
        return {task: self._mark(self._papers[task], limit) for task in asked}

    @torch.inference_mode()
    def _mark(self, paper: _Paper, limit: int | None) -> Marks:
        right, loss = [], []
        inputs, answers = paper.inputs[:limit], paper.answers[:limit]
        for part, wanted in zip(inputs.split(_BATCH), answers.split(_BATCH), strict=True):
            hidden = self._language_model(inputs_embeds=part, use_cache=False).last_hidden_state
            logits = self._head(hidden[:, -wanted.shape[1] :])
            right.append((logits.argmax(-1) == wanted).all(1))
            losses = cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
            loss.append(losses.view(wanted.shape).double().sum(1))
        return Marks(torch.cat(right).numpy(), torch.cat(loss).numpy())


def _paper(model: Any, reader: Any, asked: Sequence[Problem]) -> _Paper:
    """Everything up to the answer's last character is input; the answer and its end are wanted."""
    tokenizer = getattr(reader, "tokenizer", reader)
    answers = [[*_ids(tokenizer, problem.answer)[1:], tokenizer.eos_token_id] for problem in asked]
    wanted = torch.tensor(answers)
    if asked[0].picture is None:
        ids = torch.tensor([_ids(tokenizer, problem.prompt + problem.answer) for problem in asked])
        with torch.inference_mode():
            return _Paper(model.get_input_embeddings()(ids), wanted)
    seen = []
    for start in range(0, len(asked), _BATCH):
        batch = asked[start : start + _BATCH]
        inputs = reader(
            text=[reader.image_token + problem.prompt + problem.answer for problem in batch],
            images=[_coloured(problem) for problem in batch],
            return_tensors="pt",
        )
        seen.append(_entering(model, inputs["input_ids"], inputs["pixel_values"]))
    return _Paper(torch.cat(seen), wanted)


def entering(model: Any, reader: Any, asked: Sequence[Problem]) -> tuple[Tensor, Tensor]:
    """What enters the language model for these problems and their answers, and what it should say.

    They are [n, length, width], and the answers' token ids [n, a], the token that ends them last.
    """
    paper = _paper(model, reader, asked)
    return paper.inputs, paper.answers


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids


def _coloured(problem: Problem) -> NDArray[np.uint8]:
    assert problem.picture is not None
    return np.repeat(problem.picture[..., None], 3, axis=2)


def _entering(model: Any, ids: Tensor, pixels: Tensor) -> Tensor:
    """What the MLLM gives its language model for text with a picture, [n, length, width]."""
    caught: list[Tensor] = []

    def catch(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        caught.append(kwargs["inputs_embeds"])

    hook = model.model.language_model.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        with torch.inference_mode():
            model.model(input_ids=ids, pixel_values=pixels, use_cache=False)
    finally:
        hook.remove()
    return caught[0]
