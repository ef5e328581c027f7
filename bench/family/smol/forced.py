"""Right answers without generating them.

Greedy decoding gives an answer exactly if every token of it is the likeliest after the right ones
before it. One pass over prompt and answer together shows that, so nothing needs to be generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from skills import to_pixels
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


def score(model: Any, encoder: Encoder, asked: Sequence[Problem]) -> dict[str, Accuracy]:
    """Count the answers that greedy decoding would give, to the last character.

    An answer ends where the model says anything but another digit.

    Returns
    -------
    dict
        ``right``; for picture sums also ``seen``, where the question is written down right but
        for its ``=``, and ``added``, where the result is right once the question stands there.
    """
    digits = torch.tensor([token for digit in "0123456789" for token in encoder.ids(digit)])
    right = seen = added = 0
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
            said = model.lm_head(states).argmax(dim=-1)
        place = 0
        for problem, row in zip(part, wanted, strict=True):
            end = place + int(row.sum())
            answer, last = said[place : end - 1], said[end - 1]
            labels = torch.tensor([label for label in problem.row[1] if label != IGNORED])[:-1]
            same = answer == labels
            ended = not bool((digits == last).any())
            right += bool(same.all()) and ended
            seen += bool(same[: problem.written - 1].all())
            added += bool(same[problem.written :].all()) and ended
            place = end
    scores = {"right": Accuracy.of(right, len(asked))}
    if asked[0].written:
        scores["seen"] = Accuracy.of(seen, len(asked))
        scores["added"] = Accuracy.of(added, len(asked))
    return scores
