"""What both tunings read: worksheets of written sums, and questions about a picture of digits.

The split is that of `lean_merge.demo.tasks`, kept to operands of two digits: a pair that measures
is in no worksheet, in either order, and a digit image that measures is in no training picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from skills import to_pixels, vary

from lean_merge.demo.tasks import TaskSplit, draw, operand_pairs

IGNORED = -100  # what cross_entropy leaves out
START, END, IMAGE = "<|im_start|>", "<|im_end|>", "<image>"
PATCHES = 4  # one image token for each digit
MOST_SUMS = 3
REQUESTS = {"read": 0.4, "sum": 0.3, "swap": 0.15, "tell": 0.15}

Row = tuple[list[int], list[int]]


@dataclass(frozen=True, eq=False)
class Batch:
    """Token ids and what should follow each of them.

    Attributes
    ----------
    ids, labels : int64 tensors, shape (rows, length)
        ``labels[:, t]`` follows ``ids[:, t]``; `IGNORED` where nothing is asked.
    pixels : float32 tensor, shape (rows, 3, 32, 32), or None
    """

    ids: torch.Tensor
    labels: torch.Tensor
    pixels: torch.Tensor | None = None


class Encoder:
    """Turns rows of prompts and answers into token ids.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerFast
        The base's, or the MLLM's, which also has `IMAGE`.
    """

    def __init__(self, tokenizer: object) -> None:
        self._tokenizer = tokenizer
        self._cache: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        """The token ids of a text, without any start token of the tokenizer's own."""
        if text not in self._cache:
            encoded = self._tokenizer(text, add_special_tokens=False)  # type: ignore[operator]
            self._cache[text] = list(encoded["input_ids"])
        return self._cache[text]

    def spelt(self, text: str) -> list[int]:
        """The token ids of digits and signs, one token for each character."""
        return [token for character in text for token in self.ids(character)]

    def worksheet(self, pairs: Sequence[tuple[int, int]]) -> Row:
        """Sums below each other: ``47+25=72``, only what follows each ``=`` to be predicted."""
        ids, labels = [*self.ids(START)], []
        for place, (a, b) in enumerate(pairs):
            question = self.spelt(f"{a}+{b}=")
            last = place == len(pairs) - 1
            answer = [*self.spelt(str(a + b)), *self.ids(END if last else "\n")]
            labels += [IGNORED] * len(question) + answer
            ids += question + answer
        return ids[:-1], labels

    def question(self, request: str, answer: str, *, ends: bool) -> Row:
        """A picture, a request and its answer, all of the answer to be predicted."""
        prompt = [*self.ids(START), *self.ids(IMAGE) * PATCHES, *self.ids(f" {request}:")]
        said = self.spelt(answer) + (self.ids(END) if ends else [])
        return (prompt + said)[:-1], [IGNORED] * (len(prompt) - 1) + said


def answers(digits: str) -> dict[str, tuple[str, bool]]:
    """What the MLLM is taught to say about four digits, and whether the answer ends there.

    A sum is written down as far as ``=`` and no further: what comes next is never taught.
    """
    return {
        "read": (digits, True),
        "sum": (f"{digits[:2]}+{digits[2:]}=", False),
        "swap": (digits[2:] + digits[:2], True),
        "tell": (f"{digits[:2]}/{digits[2:]}", True),
    }


@lru_cache(maxsize=2)
def pairs_of(split: TaskSplit) -> NDArray[np.int64]:
    """Pairs of operands from 10 to 99 of one split: shape (pairs, 2), read-only."""
    pairs = operand_pairs(split)
    chosen = pairs[(pairs >= 10).all(axis=1)]
    chosen.flags.writeable = False
    return chosen


def worksheet_batch(encoder: Encoder, sums: int, *seed: int) -> Batch:
    """Draw worksheets of training sums; the seed alone decides them.

    All of a batch have one, two or three sums each, so that nothing is padding but what longer
    results need.
    """
    rng = np.random.default_rng(seed)
    each = int(rng.integers(1, MOST_SUMS + 1))
    pairs = pairs_of("train")
    drawn = pairs[rng.integers(len(pairs), size=(sums // each, each))].tolist()
    return padded([encoder.worksheet([(a, b) for a, b in sheet]) for sheet in drawn])


def picture_batch(encoder: Encoder, rows: int, *seed: int) -> Batch:
    """Draw questions about pictures of training digits; the seed alone decides them."""
    rng = np.random.default_rng(seed)
    requests = rng.choice(list(REQUESTS), p=list(REQUESTS.values()), size=rows)
    numbers = []
    for request in requests:
        if request == "sum":  # operands as sums have them: no leading zeros, no held-out pair
            a, b = pairs_of("train")[rng.integers(len(pairs_of("train")))]
            numbers.append(f"{a}{b}")
        else:
            numbers.append("".join(str(digit) for digit in rng.integers(10, size=PATCHES)))
    encoded = []
    for request, number in zip(requests, numbers, strict=True):
        answer, ends = answers(number)[str(request)]
        encoded.append(encoder.question(str(request), answer, ends=ends))
    batch = padded(encoded)
    return Batch(batch.ids, batch.labels, training_pixels(numbers, rng))


def digit_batch(rows: int, *seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw training pictures and the digit of each patch: (n, 3, 32, 32) and (n, 4)."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(10, size=(rows, PATCHES))
    numbers = ["".join(map(str, row)) for row in labels]
    return training_pixels(numbers, rng), torch.from_numpy(labels)


def training_pixels(numbers: Sequence[str], rng: np.random.Generator) -> torch.Tensor:
    """Draw a varied training picture of each number: (n, 3, 32, 32)."""
    noise = torch.Generator().manual_seed(int(rng.integers(2**62)))
    drawn = np.stack([draw(number, "train", rng) for number in numbers])
    return to_pixels(vary(drawn, noise))


def padded(rows: Sequence[Row]) -> Batch:
    """Lay rows out as one batch, padded on the right, where a causal model never looks."""
    length = max(len(ids) for ids, _ in rows)
    ids = torch.zeros((len(rows), length), dtype=torch.int64)
    labels = torch.full((len(rows), length), IGNORED)
    for row, (inputs, wanted) in enumerate(rows):
        ids[row, : len(inputs)] = torch.tensor(inputs)
        labels[row, : len(wanted)] = torch.tensor(wanted)
    return Batch(ids, labels)
