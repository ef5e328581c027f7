"""Problems for the embedded family: reading digits, adding them, adding them from a picture.

A picture is 32x32 and holds four handwritten digits, one per 16x16 patch, in reading order: the
upper row is the first operand, the lower row the second.  Everything is split once and for all
into train and test: the digit images by a fixed shuffle, the operand pairs by a hash, so that no
picture and no sum that measures a model was ever shown to it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Literal

import numpy as np
from numpy.typing import NDArray

TaskSplit = Literal["train", "test"]
Task = Literal["read", "text_sums", "picture_sums"]

TASKS: tuple[Task, ...] = ("read", "text_sums", "picture_sums")
DIGIT_SIDE = 8
PATCH_SIDE = 16
PICTURE_SIDE = 32

_TEST_SHARE = 0.2
_DIGIT_SPLIT_SEED = 20251014  # the split is part of the task, so no run may choose it
_BRIGHTEST = 16  # scikit-learn's digits hold counts of 0..16


@dataclass(frozen=True, eq=False)
class Problem:
    """One question with one right answer.

    Attributes
    ----------
    task : {"read", "text_sums", "picture_sums"}
        What the question measures.
    prompt : str
        The text to continue; the picture, if there is one, comes before it.
    answer : str
        The whole continuation that counts as correct.
    picture : ndarray of uint8, shape (32, 32), or None
        Four digits, light on dark.
    """

    task: Task
    prompt: str
    answer: str
    picture: NDArray[np.uint8] | None = None


def held_out(a: int, b: int) -> bool:
    """Return whether the sum of ``a`` and ``b`` is kept for tests.

    ``a + b`` and ``b + a`` always fall on the same side, or commutativity would leak answers.
    """
    low, high = sorted((a, b))
    digest = hashlib.sha256(f"{low}+{high}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < _TEST_SHARE * 2**64


@lru_cache(maxsize=2)
def operand_pairs(split: TaskSplit) -> NDArray[np.int64]:
    """Return all pairs of two-digit operands of one split.

    Returns
    -------
    ndarray of int64, shape (pairs, 2)
        Operands in 0..99; the two splits together are the 10,000 pairs.  Read-only.
    """
    wanted = split == "test"
    pairs = [(a, b) for a in range(100) for b in range(100) if held_out(a, b) == wanted]
    array = np.array(pairs, dtype=np.int64)
    array.flags.writeable = False
    return array


@lru_cache(maxsize=2)
def digit_images(split: TaskSplit) -> tuple[tuple[NDArray[np.uint8], ...], ...]:
    """Return the handwritten digits of one split, grouped by the digit they show.

    Returns
    -------
    tuple of 10 tuples of ndarray of uint8, shape (8, 8)
        ``digit_images(split)[d]`` are the images of the digit ``d``, 0 (dark) to 255 (light).
    """
    datasets = import_module("sklearn.datasets")  # slow to import: only pictures need it
    images, labels = datasets.load_digits(return_X_y=True)
    grey = np.round(images * (255 / _BRIGHTEST)).astype(np.uint8)
    grey = grey.reshape(-1, DIGIT_SIDE, DIGIT_SIDE)
    order = np.random.default_rng(_DIGIT_SPLIT_SEED).permutation(len(grey))
    tests = round(_TEST_SHARE * len(grey))
    chosen = order[:tests] if split == "test" else order[tests:]
    return tuple(tuple(grey[i] for i in chosen if labels[i] == digit) for digit in range(10))


def compose(digits: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Lay four digit images out as one picture.

    Parameters
    ----------
    digits : four ndarrays of uint8, shape (8, 8)
        In reading order: upper left, upper right, lower left, lower right.

    Returns
    -------
    ndarray of uint8, shape (32, 32)
    """
    if len(digits) != 4:
        raise ValueError(f"a picture holds four digits, not {len(digits)}")
    scale = PATCH_SIDE // DIGIT_SIDE
    small = np.block([[digits[0], digits[1]], [digits[2], digits[3]]])
    return small.repeat(scale, axis=0).repeat(scale, axis=1)


def draw(number: str, split: TaskSplit, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw four digits with images picked at random from one split.

    Parameters
    ----------
    number : str
        Four decimal digits.
    split : {"train", "test"}
        The split the digit images come from.
    rng : numpy.random.Generator
        Picks the images.

    Returns
    -------
    ndarray of uint8, shape (32, 32)
    """
    images = [digit_images(split)[int(digit)] for digit in number]
    return compose([choices[rng.integers(len(choices))] for choices in images])


def sum_text(a: int, b: int) -> str:
    """Write a sum in full, in the family's fixed width: ``47+25=072``."""
    return f"{a:02d}+{b:02d}={a + b:03d}"


def problems(task: Task, count: int, *, seed: int, split: TaskSplit = "test") -> list[Problem]:
    """Draw problems of one task.

    Parameters
    ----------
    task : {"read", "text_sums", "picture_sums"}
        What to ask.
    count : int
        How many; the operand pairs are drawn without replacement, so at most one per pair.
    seed : int
        Seeds the choice of operands and images.
    split : {"train", "test"}, default "test"
        The split both operands and images come from.

    Returns
    -------
    list of Problem, length ``count``
    """
    rng = np.random.default_rng([seed, TASKS.index(task)])
    pairs = operand_pairs(split)
    if not 0 < count <= len(pairs):
        raise ValueError(f"count must be in 1..{len(pairs)}, not {count}")
    chosen = pairs[rng.permutation(len(pairs))[:count]].tolist()
    return [_problem(task, a, b, split, rng) for a, b in chosen]


def _problem(task: Task, a: int, b: int, split: TaskSplit, rng: np.random.Generator) -> Problem:
    written = sum_text(a, b)
    if task == "text_sums":
        prompt, _, answer = written.partition("=")
        return Problem(task, prompt + "=", answer)
    number = f"{a:02d}{b:02d}"
    picture = draw(number, split, rng)
    if task == "read":
        return Problem(task, "read:", number, picture)
    return Problem(task, "sum:", written, picture)
