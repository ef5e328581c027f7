"""Right answers without generating them.

Greedy decoding gives an answer exactly if every token of it is the likeliest after the right ones
before it. One pass over prompt and answer together shows that, so nothing needs to be generated.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the reproduction's modules

import numpy as np
import torch
from reproduction.exam import Marks
from sight import in_scope
from skills import to_pixels
from torch import Tensor
from torch.nn.functional import cross_entropy
from worksheets import IGNORED, Encoder, Row, padded, pairs_of

from lean_merge.demo.evaluate import Accuracy
from lean_merge.demo.tasks import draw

Task = Literal["read", "text_sums", "picture_sums"]

TASKS: tuple[Task, ...] = ("read", "text_sums", "picture_sums")
ROWS = 125


@dataclass(frozen=True, eq=False)
class Problem:
    """One question with its right answer.

    Attributes
    ----------
    row : (ids, labels)
        Question and answer; the label after the answer is left open.
    written : int
        How many labels come before the result: a transcribed sum up to and with its ``=``.
    picture : ndarray of uint8, shape (32, 32), or None
    """

    row: Row
    written: int = 0
    picture: Any = None


def problems(
    task: Task, encoder: Encoder, count: int, *, seed: int, shots: int = 0
) -> list[Problem]:
    """Draw problems from the held-out pairs and held-out digit images.

    Parameters
    ----------
    task : {"read", "text_sums", "picture_sums"}
    encoder : Encoder
    count : int
        At most one for each held-out pair.
    seed : int
        Chooses pairs and images; the same for every model.
    shots : int, default 0
        For text sums: solved training sums shown before the question.
    """
    rng = np.random.default_rng([seed, TASKS.index(task)])
    pairs = pairs_of("test")
    if not 0 < count <= len(pairs):
        raise ValueError(f"count must be in 1..{len(pairs)}, not {count}")
    asked = []
    for a, b in pairs[rng.permutation(len(pairs))[:count]].tolist():
        if task == "text_sums":
            train = pairs_of("train")
            shown = [tuple(train[rng.integers(len(train))].tolist()) for _ in range(shots)]
            ids, labels = encoder.worksheet([*shown, (a, b)])
            length = len(encoder.spelt(str(a + b))) + 1
            open_labels = [IGNORED] * (len(labels) - length) + labels[-length:]
            asked.append(Problem((ids, open_labels)))
            continue
        number = f"{a}{b}"
        answer = number if task == "read" else f"{a}+{b}={a + b}"
        request = "read" if task == "read" else "sum"
        written = 0 if task == "read" else len(f"{a}+{b}=")
        row = encoder.question(request, answer, ends=True)
        asked.append(Problem(row, written, draw(number, "test", rng)))
    return asked


def marks(model: Any, encoder: Encoder, asked: Sequence[Problem]) -> dict[str, Marks]:
    """Mark the answers that greedy decoding would give, to the last character.

    An answer ends where the model says anything but another digit. The loss is that of the
    answer's own characters, without what ends it.

    Returns
    -------
    dict
        ``right``; for picture sums also ``seen``, where the question is written down right but
        for its ``=``, ``added``, where the result is right once the question stands there, and
        ``given``, both: what comes of it if an ``=`` is put after what the model wrote.
    """
    digits = torch.tensor([token for digit in "0123456789" for token in encoder.ids(digit)])
    found: dict[str, list[bool]] = {"right": [], "seen": [], "added": [], "given": []}
    losses: list[float] = []
    for start in range(0, len(asked), ROWS):
        part = asked[start : start + ROWS]
        batch = padded([problem.row for problem in part])
        inputs: dict[str, Any] = {"input_ids": batch.ids, "use_cache": False}
        if part[0].picture is not None:
            light = torch.from_numpy(np.stack([problem.picture for problem in part])) / 255
            inputs["pixel_values"] = to_pixels(light)
        wanted = batch.labels != IGNORED
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            states = model.model(**inputs).last_hidden_state[wanted]
            scores = model.lm_head(states)
            said = scores.argmax(dim=-1)
            each = cross_entropy(scores.float(), batch.labels[wanted], reduction="none").double()
        place = 0
        for problem, row in zip(part, wanted, strict=True):
            end = place + int(row.sum())
            answer, last = said[place : end - 1], said[end - 1]
            labels = torch.tensor([label for label in problem.row[1] if label != IGNORED])[:-1]
            same = answer == labels
            ended = not bool((digits == last).any())
            seen = bool(same[: max(0, problem.written - 1)].all())
            added = bool(same[problem.written :].all()) and ended
            found["right"].append(bool(same.all()) and ended)
            found["seen"].append(seen)
            found["added"].append(added)
            found["given"].append(seen and added)
            losses.append(float(each[place : end - 1].sum()))
            place = end
    kinds = found if asked[0].written else {"right": found["right"]}
    loss = np.array(losses)
    return {kind: Marks(np.array(values), loss) for kind, values in kinds.items()}


def score(model: Any, encoder: Encoder, asked: Sequence[Problem]) -> dict[str, Accuracy]:
    """The shares of `marks`, with their intervals."""
    return {
        kind: Accuracy.of(int(mark.right.sum()), len(asked))
        for kind, mark in marks(model, encoder, asked).items()
    }


class Exam:
    """The questions of one model, ready to be asked of any weights of its language model.

    Parameters
    ----------
    model, encoder
        The model is kept, and its weights in scope change.
    asked : mapping of str to list of Problem
        By task. Picture sums are counted as ``given``; as ``right``, ``seen`` and ``added`` they
        are the tasks ``picture_sums_alone``, ``picture_sums_seen`` and ``picture_sums_added``.
    """

    def __init__(
        self, model: Any, encoder: Encoder, asked: Mapping[Task, Sequence[Problem]]
    ) -> None:
        self._model, self._encoder, self._asked = model, encoder, asked

    def take(
        self, weights: Mapping[str, Tensor], tasks: object = None, *, limit: int | None = None
    ) -> dict[str, Marks]:
        """Marks of these weights: every task, whatever of them is wanted, at the same price."""
        with torch.no_grad():
            for name, weight in in_scope(self._model).items():
                weight.copy_(weights[name])
        taken = {}
        for task, asked in self._asked.items():
            for kind, mark in marks(self._model, self._encoder, asked[:limit]).items():
                taken[_titled(task, kind)] = mark
        return taken


def _titled(task: Task, kind: str) -> str:
    if task != "picture_sums":
        return task
    return task if kind == "given" else f"{task}_{'alone' if kind == 'right' else kind}"
