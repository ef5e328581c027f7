"""Fine-tune an MLLM with TRL and DRIFT.

    pip install 'lean-merge[drift]' scikit-learn
    python docs/examples/drift_sft.py --out ./tuned

Without other arguments it takes the family that comes with the package: it teaches a small MLLM to
add numbers in pictures, and pulls its gradients towards an expert that adds numbers in text. It
takes seconds on a CPU. For your own models, put your data in place of `picture_sums`, one row with
a prompt, a completion and images for each example, and name models and prior:

    lean-merge prior --mllm MLLM --expert EXPERT --rank 64 --out PRIOR
    python docs/examples/drift_sft.py --mllm MLLM --prior PRIOR --lora 16 --out TUNED
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer

from lean_merge import PriorSettings, make_prior, prior_recipe
from lean_merge.demo.run import FAMILY
from lean_merge.demo.tasks import problems
from lean_merge.drift import DriftCallback


def picture_sums(processor: Any, count: int) -> Dataset:
    """Rows for TRL: a prompt with the place of its image, the completion, and the image."""
    of = processor.tokenizer
    return Dataset.from_list(
        [
            {
                "prompt": f"{of.bos_token}{processor.image_token}{each.prompt}",
                "completion": f"{each.answer}{of.eos_token}",
                "images": [Image.fromarray(np.repeat(each.picture[..., None], 3, axis=2))],
            }
            for each in problems("picture_sums", count, seed=1, split="train")
        ]
    )


def main(given: list[str] | None = None) -> dict[str, Any]:
    """Train, save the model, and return what DRIFT did."""
    parser = argparse.ArgumentParser(description="Fine-tune an MLLM with TRL and DRIFT.")
    parser.add_argument("--mllm", default=str(FAMILY / "mllm"))
    parser.add_argument("--prior", help="what lean-merge prior made for the MLLM")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--alpha", type=float, default=1.0)
    parser.add_argument("--mode", default="adaptive")
    parser.add_argument("--lora", type=int, default=0, help="train LoRA of this rank, not weights")
    parser.add_argument("--examples", type=int, default=300)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--rate", type=float, default=1e-4)
    options = parser.parse_args(given)
    prior = options.prior or options.out / "prior"
    if options.prior is None:
        make_prior(prior_recipe(options.mllm, [str(FAMILY / "expert")]), prior, PriorSettings())

    processor = AutoProcessor.from_pretrained(options.mllm)
    model = AutoModelForImageTextToText.from_pretrained(options.mllm, dtype="float32")
    lora = None
    if options.lora:
        from peft import LoraConfig

        layers = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
        lora = LoraConfig(r=options.lora, lora_alpha=2 * options.lora, target_modules=layers)
    drift = DriftCallback(prior, alpha=options.alpha, mode=options.mode)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(options.out),
            num_train_epochs=options.epochs,
            learning_rate=options.rate,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            max_length=None,
            bf16=False,
            save_strategy="no",
            report_to="none",
            seed=0,
        ),
        train_dataset=picture_sums(processor, options.examples),
        processing_class=processor,
        peft_config=lora,
        callbacks=[drift],
    )
    trainer.train()
    trainer.save_model(str(options.out))
    assert drift.drift is not None
    report = drift.drift.report()
    (options.out / "drift.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    return report


if __name__ == "__main__":
    main()
