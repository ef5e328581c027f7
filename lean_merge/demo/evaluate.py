"""Measure what a saved model of the family can do, through transformers' own loading."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from math import sqrt
from os import PathLike
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from lean_merge.demo.tasks import TASKS, Problem, Task
from lean_merge.demo.tasks import problems as draw_problems

_LLM_TASKS: tuple[Task, ...] = ("text_sums",)
_CLASSES = {
    "llava": ("LlavaForConditionalGeneration", "AutoProcessor"),
    "llama": ("LlamaForCausalLM", "AutoTokenizer"),
}
_BATCH = 256
_LONGEST_ANSWER = 10  # "47+25=072" and the token that ends it


@dataclass(frozen=True)
class Accuracy:
    """A share of right answers with its Wilson 95 % interval."""

    correct: int
    total: int
    low: float
    high: float

    @property
    def share(self) -> float:
        """Return the observed share, in 0..1."""
        return self.correct / self.total

    @classmethod
    def of(cls, correct: int, total: int) -> Accuracy:
        """Count ``correct`` right answers out of ``total``."""
        if not 0 <= correct <= total or total == 0:
            raise ValueError(f"cannot have {correct} right answers out of {total}")
        z = NormalDist().inv_cdf(0.975)
        share, spread = correct / total, z * z / total
        centre = (share + spread / 2) / (1 + spread)
        reach = sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
        return cls(correct, total, max(0.0, centre - reach), min(1.0, centre + reach))


def evaluate(
    model_folder: str | PathLike[str], *, problems: int = 500, seed: int = 0
) -> dict[str, Accuracy]:
    """Load a saved model, and measure every task that it can do.

    Parameters
    ----------
    model_folder : path
        A folder with a LlavaForConditionalGeneration and its processor, or a LlamaForCausalLM
        and its tokenizer.
    problems : int, default 500
        Test problems per task.
    seed : int, default 0
        Chooses the problems; the same seed asks every model the same questions.

    Returns
    -------
    dict of str to Accuracy
        ``read``, ``text_sums`` and ``picture_sums`` for an MLLM; ``text_sums`` for an LLM.
    """
    model, reader = load(model_folder)
    return measure_model(model, reader, problems=problems, seed=seed)


def load(model_folder: str | PathLike[str]) -> tuple[Any, Any]:
    """Load a model in float32 with its processor (an MLLM) or its tokenizer (an LLM).

    bf16 is for storage: a CPU computes faster in float32, and the weights are the same.
    """
    folder = Path(model_folder)
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    if kind not in _CLASSES:
        raise ValueError(f"{folder} holds a {kind!r} model; expected one of {sorted(_CLASSES)}")
    # This is an optional extra that is slow to import, and only loading a model needs it.
    transformers = import_module("transformers")
    model_class, reader_class = (getattr(transformers, name) for name in _CLASSES[kind])
    with _quiet_transformers():
        reader = reader_class.from_pretrained(folder, local_files_only=True)
        model = model_class.from_pretrained(folder, local_files_only=True, dtype="float32")
    return model.eval(), reader


def measure_model(
    model: Any, reader: Any, *, problems: int = 500, seed: int = 0
) -> dict[str, Accuracy]:
    """Measure every task that a loaded model can do; see `evaluate`."""
    tasks = TASKS if hasattr(reader, "image_processor") else _LLM_TASKS
    scores = {}
    for task in tasks:
        asked = draw_problems(task, problems, seed=seed)
        given = answer(model, reader, asked)
        right = sum(text == problem.answer for text, problem in zip(given, asked, strict=True))
        scores[str(task)] = Accuracy.of(right, len(asked))
    return scores


def answer(model: Any, reader: Any, asked: Sequence[Problem]) -> list[str]:
    """Continue each problem's prompt greedily, in batches, and return the continuations."""
    torch = import_module("torch")
    tokenizer = getattr(reader, "tokenizer", reader)
    texts: list[str] = []
    for start in range(0, len(asked), _BATCH):
        inputs = _inputs(reader, asked[start : start + _BATCH])
        with torch.inference_mode():
            tokens = model.generate(**inputs, do_sample=False, max_new_tokens=_LONGEST_ANSWER)
        fresh = tokens[:, inputs["input_ids"].shape[1] :]
        texts += tokenizer.batch_decode(fresh, skip_special_tokens=True)
    return texts


def _inputs(reader: Any, asked: Sequence[Problem]) -> dict[str, Any]:
    pictures = [problem.picture for problem in asked if problem.picture is not None]
    options = {"return_tensors": "pt", "padding": True}
    if not pictures:
        encoded = reader(text=[problem.prompt for problem in asked], **options)
    elif len(pictures) == len(asked):
        texts = [reader.image_token + problem.prompt for problem in asked]
        colour = [np.repeat(picture[..., None], 3, axis=2) for picture in pictures]
        encoded = reader(text=texts, images=colour, **options)
    else:
        raise ValueError("a batch asks about pictures or about text, not about both")
    wanted = ("input_ids", "attention_mask", "pixel_values")
    return {name: encoded[name] for name in wanted if name in encoded}


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hide the progress bars of loading, and show them again afterwards if they were shown."""
    logging = import_module("transformers.utils.logging")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
