"""DRIFT in the trainers of transformers and TRL, on the embedded MLLM and on the toy."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.priors import Toy, differences, gradients, noise, pulled, write_prior
from torch import Tensor

from lean_merge import RecipeError
from lean_merge.demo.run import FAMILY

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "drift_sft.py"


@pytest.fixture(scope="module")
def toy_prior(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A prior of the toy, and its differences."""
    found = {n: d for n, d in differences(Toy()).items() if n.startswith("model.")}
    return write_prior(tmp_path_factory.mktemp("prior") / "p", found), found


class Lossy(Toy):
    """The toy as a trainer calls it."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the loss alone."""
        return {"loss": super().forward(x).square().mean()}


def toy_trainer(out: Path, callback: Any, *, rate: float = 0.1, **options: Any) -> Any:
    """A Trainer of the toy by SGD, with eight examples in their order."""
    from transformers import Trainer, TrainingArguments

    model = Lossy()
    options = (
        dict(max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2) | options
    )
    return Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(out),
            learning_rate=rate,
            lr_scheduler_type="constant",
            optim="sgd",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            train_sampling_strategy="sequential",
            **options,
        ),
        train_dataset=[{"x": row} for row in noise(8, 8)],
        callbacks=[callback],
    )


@pytest.mark.parametrize("clipping", ["before", "after"])
def test_a_step_of_the_trainer_is_the_one_by_hand(tmp_path, toy_prior, clipping):
    """Two micro-batches, gradients of which the mean is clipped to .01 before or after the pull."""
    from lean_merge.drift import DriftCallback

    callback = DriftCallback(toy_prior[0], mode="absolute", alpha=0.5, clipping=clipping)
    trainer = toy_trainer(tmp_path, callback, max_grad_norm=0.01)
    start = {name: each.detach().clone() for name, each in trainer.model.named_parameters()}
    trainer.train()
    plain = Lossy()
    for rows in (slice(0, 2), slice(2, 4)):
        (plain(noise(8, 8)[rows])["loss"] / 2).backward()
    g = {name: each.double() for name, each in gradients(plain).items() if each is not None}

    def clipped(found: dict[str, Tensor]) -> dict[str, Tensor]:
        norm = torch.stack([each.norm() for each in found.values()]).norm()
        return {name: each * min(1.0, 0.01 / (norm + 1e-6)) for name, each in found.items()}

    def with_pull(found: dict[str, Tensor]) -> dict[str, Tensor]:
        own = toy_prior[1]
        return found | {n: pulled(found[n], own[n], "absolute", 0.5) for n in own}

    g = clipped(with_pull(g)) if clipping == "before" else with_pull(clipped(g))
    for name, each in trainer.model.named_parameters():
        wanted = start[name].double() - 0.1 * g[name] if name in g else start[name].double()
        torch.testing.assert_close(each.detach().double(), wanted, rtol=1e-5, atol=1e-7)
    assert callback.drift is not None and callback.drift.report()["acts"] == 1


def test_training_that_was_resumed_equals_one_that_was_not(tmp_path, toy_prior):
    from lean_merge.drift import DriftCallback

    def trained(out: Path, **options: Any) -> tuple[Any, DriftCallback]:
        callback = DriftCallback(toy_prior[0])
        trainer = toy_trainer(out, callback, max_steps=4, save_strategy="steps", save_steps=2)
        trainer.train(**options)
        return trainer.model, callback

    whole, callback = trained(tmp_path)
    resumed, again = trained(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert callback.drift is not None and callback.drift.report()["acts"] == 4
    assert again.drift is not None and again.drift.report()["acts"] == 2
    assert callback.drift.report()["weights"] == again.drift.report()["weights"]
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_accelerator_is_as_it_was_afterwards(tmp_path, toy_prior):
    from accelerate import Accelerator

    from lean_merge.drift import DriftCallback

    original, callback = Accelerator.clip_grad_norm_, DriftCallback(toy_prior[0])
    toy_trainer(tmp_path, callback).train()
    assert Accelerator.clip_grad_norm_ is original
    backwards = DriftCallback(toy_prior[0], per="backward")
    toy_trainer(tmp_path, backwards).train()
    assert backwards.drift is not None and backwards.drift.report()["acts"] == 2


def test_a_trainer_with_deepspeed_and_clipping_that_is_none_are_refused(toy_prior):
    from lean_merge.drift import DriftCallback

    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=3))
    optimizer = SimpleNamespace(accelerator_state=state)
    with pytest.raises(RecipeError, match="ZeRO-3"):
        DriftCallback(toy_prior[0]).on_train_begin(
            None, None, None, model=None, optimizer=optimizer
        )
    with pytest.raises(RecipeError, match="clipping"):
        DriftCallback(toy_prior[0], clipping="never")


# TRL itself uses what transformers deprecates.
@pytest.mark.filterwarnings("ignore")
def test_the_example_fine_tunes_the_embedded_mllm_with_trl(tmp_path, monkeypatch):
    """The whole of it, with pictures and LoRA, by SFTTrainer; weights in scope have moved alone."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    spec = importlib.util.spec_from_file_location("drift_sft", EXAMPLE)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *_, **__: None)
    few = ["--examples", "16", "--epochs", "2"]
    report = example.main(["--out", str(tmp_path / "whole"), *few])
    assert report["acts"] == 2 and len(report["weights"]) == 28 and not report["left"]
    assert all(each["ratio"] > 0 for each in report["weights"].values())
    assert (tmp_path / "whole" / "model.safetensors").stat().st_size > 0
    prior = tmp_path / "whole" / "prior"
    given = ["--prior", str(prior), "--lora", "2", "--out", str(tmp_path / "lora"), *few]
    report = example.main(given)
    assert report["acts"] == 2 and len(report["weights"]) == 28
    assert json.loads((tmp_path / "lora" / "drift.json").read_text()) == report
    assert (FAMILY / "mllm").is_dir() and (tmp_path / "lora" / "adapter_config.json").is_file()
