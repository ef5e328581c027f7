"""Training examples: text skills, and the same skills asked of a picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import affine_grid, grid_sample

from lean_merge.demo.tasks import PATCH_SIDE, PICTURE_SIDE, draw, operand_pairs, sum_text

Mix = Mapping[str, float]

IGNORED = -100  # what cross_entropy leaves out: the prompt's random digits cannot be learnt
PATCHES = (PICTURE_SIDE // PATCH_SIDE) ** 2


@dataclass(frozen=True)
class Batch:
    """Token ids and the labels they should predict, with one picture per row or none at all.

    Attributes
    ----------
    ids, labels : int64 tensors, shape (batch, length)
        Already shifted: ``labels[:, t]`` follows ``ids[:, t]``.
    pixels : float32 tensor, shape (batch, 3, 32, 32), or None
    """

    ids: torch.Tensor
    labels: torch.Tensor
    pixels: torch.Tensor | None = None


class Sampler:
    """Draws training batches, reproducibly.

    Parameters
    ----------
    ids_of : mapping of str to int
        The tokenizer's vocabulary.
    seed : sequence of int
        Seeds the examples and the pictures' variations.
    """

    def __init__(self, ids_of: Mapping[str, int], *seed: int) -> None:
        self._ids_of = ids_of
        self._rng = np.random.default_rng(seed)
        self._noise = torch.Generator().manual_seed(int(self._rng.integers(2**62)))

    def text(self, mix: Mix, size: int) -> Batch:
        """Draw text examples, the skills in the given proportions."""
        rows = [
            self._row([*digits, *request], answer)
            for digits, request, answer in self._examples(mix, size)
        ]
        return self._padded(rows)

    def pictures(self, mix: Mix, size: int) -> Batch:
        """Draw examples whose digits are shown in a picture and not written."""
        rows, numbers = [], []
        for digits, request, answer in self._examples(mix, size):
            rows.append(self._row([*["<image>"] * PATCHES, *request], answer))
            numbers.append(digits)
        batch = self._padded(rows)
        return Batch(batch.ids, batch.labels, self._pixels(numbers))

    def digits(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw pictures and the digit of each patch: (n, 3, 32, 32) and (n, 4)."""
        labels = self._rng.integers(10, size=(size, PATCHES))
        numbers = ["".join(map(str, row)) for row in labels]
        return self._pixels(numbers), torch.from_numpy(labels)

    def _examples(self, mix: Mix, size: int) -> list[tuple[str, str, str]]:
        chosen = self._rng.choice(list(mix), p=list(mix.values()), size=size)
        return [write_example(str(skill), self._rng) for skill in chosen]

    def _row(self, prompt: list[str], answer: str) -> tuple[list[int], list[int]]:
        of = self._ids_of
        return [of["<s>"], *(of[c] for c in prompt)], [*(of[c] for c in answer), of["</s>"]]

    def _padded(self, rows: list[tuple[list[int], list[int]]]) -> Batch:
        length = max(len(prompt) + len(answer) for prompt, answer in rows)
        ids = torch.full((len(rows), length), self._ids_of["<pad>"])
        labels = torch.full((len(rows), length), IGNORED)
        for row, (prompt, answer) in enumerate(rows):
            ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
        return Batch(ids[:, :-1], labels[:, 1:])

    def _pixels(self, numbers: list[str]) -> torch.Tensor:
        drawn = np.stack([draw(number, "train", self._rng) for number in numbers])
        return to_pixels(vary(drawn, self._noise))


def write_example(skill: str, rng: np.random.Generator) -> tuple[str, str, str]:
    """Draw one example of a skill: the digits asked about, the request, the answer.

    Sums use the training pairs only; the other skills use any four digits, for they add nothing.
    """
    if skill in ("sum", "plus", "unit"):
        pairs = operand_pairs("train")
        if skill == "unit":
            pairs = pairs[(pairs < 10).all(axis=1)]
        a, b = (int(operand) for operand in pairs[rng.integers(len(pairs))])
        if skill == "unit":
            return "", f"{a}+{b}=", f"{a + b:02d}"
        if skill == "plus":
            prompt, _, answer = sum_text(a, b).partition("=")
            return "", prompt + "=", answer
        return f"{a:02d}{b:02d}", "sum:", sum_text(a, b)
    digits = "".join(str(digit) for digit in rng.integers(10, size=4))
    answers = {
        "read": digits,
        "flip": digits[::-1],
        "sort": "".join(sorted(digits)),
        "next": "".join(str((int(digit) + 1) % 10) for digit in digits),
        "swap": digits[2:] + digits[:2],
        "tell": f"{digits[:2]} over {digits[2:]}",
    }
    return digits, f"{skill}:", answers[skill]


def vary(pictures: NDArray[np.uint8], noise: torch.Generator) -> torch.Tensor:
    """Turn, slant, resize, shift and fade each digit of each picture a little.

    The training split holds 1,400 small images: without variation the tower learns them by heart.

    Parameters
    ----------
    pictures : ndarray of uint8, shape (n, 32, 32)
    noise : torch.Generator

    Returns
    -------
    float32 tensor, shape (n, 32, 32), in 0..1
    """
    rows = PICTURE_SIDE // PATCH_SIDE
    light = torch.from_numpy(pictures).float() / 255
    patches = light.reshape(-1, rows, PATCH_SIDE, rows, PATCH_SIDE).transpose(2, 3)
    patches = patches.reshape(-1, 1, PATCH_SIDE, PATCH_SIDE)

    def spread(width: float, *shape: int) -> torch.Tensor:
        return width * (2 * torch.rand(len(patches), *shape, generator=noise) - 1)

    warp = torch.eye(2) + spread(0.15, 2, 2)
    where = torch.cat([warp, spread(0.18, 2, 1)], dim=2)
    grid = affine_grid(where, list(patches.shape), align_corners=False)
    sampled = grid_sample(patches, grid, align_corners=False)
    fade = 0.85 + spread(0.15, 1, 1, 1)
    grain = 0.05 * torch.randn(sampled.shape, generator=noise)
    varied = (sampled * fade + grain).clamp(0, 1)
    varied = varied.reshape(-1, rows, rows, PATCH_SIDE, PATCH_SIDE).transpose(2, 3)
    return varied.reshape(-1, PICTURE_SIDE, PICTURE_SIDE)


def to_pixels(light: torch.Tensor) -> torch.Tensor:
    """Scale pictures in 0..1 as the saved processor does: (n, 32, 32) to (n, 3, 32, 32)."""
    return ((light - 0.5) / 0.5)[:, None].expand(-1, 3, -1, -1).contiguous()
