"""Train the family, measure it, and write the three folders and ``training_log.json``.

Run it as ``python bench/family/train.py --seed 0 --out lean_merge/demo/family``.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the package, when not installed

import torch
from fairness import judge
from models import make_llm, make_mllm, make_processor, make_tokenizer, save
from settings import Settings, default_settings
from skills import Sampler
from torch.nn.functional import cross_entropy
from training import History, answer_loss, train
from transformers.utils import logging

from lean_merge.demo.evaluate import answer, load
from lean_merge.demo.tasks import problems

LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "scikit-learn")


def train_base(settings: Settings, seed: int, folder: Path) -> History:
    """Pre-train the base on text, up to the accuracy at which it is to stop."""
    model, tokenizer = make_llm(), make_tokenizer(with_image=False)
    sampler = Sampler(tokenizer.get_vocab(), seed, 0)
    stage = settings.base

    def check() -> float:
        asked = problems("text_sums", 500, seed=seed, split="train")
        texts = answer(model, tokenizer, asked)
        return sum(t == p.answer for t, p in zip(texts, asked, strict=True)) / len(asked)

    history = train(
        model.parameters(),
        stage,
        lambda: answer_loss(model, sampler.text(settings.base_mix, stage.batch)),
        check=check,
        enough=settings.base_enough,
    )
    save(model, folder)
    return history


def train_expert(settings: Settings, seed: int, base: Path, folder: Path) -> History:
    """Tune the released base, bf16 rounding included, on sums."""
    model, tokenizer = load(base)
    sampler = Sampler(tokenizer.get_vocab(), seed, 1)
    stage = settings.expert
    history = train(
        model.parameters(),
        stage,
        lambda: answer_loss(model, sampler.text(settings.expert_mix, stage.batch)),
    )
    save(model, folder)
    return history


def train_mllm(settings: Settings, seed: int, base: Path, folder: Path) -> dict[str, History]:
    """Give the released base sight: tower, then projector with the base frozen, then all."""
    model = make_mllm(load(base)[0])
    sampler = Sampler(make_processor().tokenizer.get_vocab(), seed, 2)
    tower = model.model.vision_tower
    head = torch.nn.Linear(tower.config.hidden_size, 10)

    def digit_loss() -> torch.Tensor:
        pixels, labels = sampler.digits(settings.tower.batch)
        patches = tower(pixels).last_hidden_state[:, 1:]
        return cross_entropy(head(patches).flatten(0, 1), labels.flatten())

    def picture_loss(mix: Any, size: int) -> Callable[[], torch.Tensor]:
        return lambda: answer_loss(model, sampler.pictures(mix, size))

    histories = {}
    print("tower")
    telling = [*tower.parameters(), *head.parameters()]
    histories["tower"] = train(telling, settings.tower, digit_loss)
    print("align")
    seeing = [*tower.parameters(), *model.model.multi_modal_projector.parameters()]
    frozen = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    for weight in frozen:
        weight.requires_grad_(False)
    histories["align"] = train(
        seeing, settings.align, picture_loss(settings.align_mix, settings.align.batch)
    )
    print("tune")
    for weight in frozen:
        weight.requires_grad_(True)
    histories["tune"] = train(
        model.parameters(), settings.tune, picture_loss(settings.tune_mix, settings.tune.batch)
    )
    save(model, folder)
    return histories


def main() -> None:
    """Train all three and write the log."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1, help="part of what a seed reproduces")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    logging.disable_progress_bar()

    settings = default_settings()
    folders = {name: options.out / name for name in ("base", "expert", "mllm")}
    began = time.perf_counter()
    print("base")
    histories = {"base": train_base(settings, options.seed, folders["base"])}
    print("expert")
    histories["expert"] = train_expert(settings, options.seed, folders["base"], folders["expert"])
    histories |= train_mllm(settings, options.seed, folders["base"], folders["mllm"])
    trained = time.perf_counter() - began
    print("measuring")
    log = {
        "seed": options.seed,
        "threads": options.threads,
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in LIBRARIES},
        "training_seconds": trained,
        **judge(folders),
        "settings": asdict(settings),
        "stages": {name: asdict(history) for name, history in histories.items()},
    }
    text = json.dumps(_rounded(log), indent=1) + "\n"
    (options.out / "training_log.json").write_text(text, encoding="utf-8")


def _rounded(value: Any) -> Any:
    """Keep five significant digits: the rest is noise in a diff."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value


if __name__ == "__main__":
    main()
