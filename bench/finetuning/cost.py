"""Memory and time that DRIFT adds to a training step at the size of SmolLM2-135M, on the CPU.

The models have SmolLM2-135M's shapes and random numbers, on which neither memory nor time depends.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # the modules beside this folder
sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # the package, when not installed

import torch
from measure import machine

from lean_merge import PriorSettings, make_prior, prior_recipe
from lean_merge.drift import Drift
from lean_merge.memory import PeakSampler

BATCH, LENGTH, REPEATS, THREADS = 8, 256, 3, 2
SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
PRIORS: dict[str, int | str] = {"none": 0, "full": "full", "rank 16": 16}
MIB = 1 << 20


def measure_cost(folder: Path) -> dict[str, Any]:
    """Train a step without a prior and with each, in a process of its own."""
    make_models(folder)
    found: dict[str, Any] = {"batch": BATCH, "length": LENGTH}
    found |= {"threads": THREADS, "machine": machine()}
    for name in PRIORS:
        command = [sys.executable, __file__, str(folder), name]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
        print(name, found[name], flush=True)
    return found


def make_models(folder: Path) -> None:
    """Save an MLLM's language model, an expert that differs a little, and their priors."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if not (folder / "smol-mllm").exists():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(torch.bfloat16)
        model.save_pretrained(folder / "smol-mllm")
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.001 * torch.randn(weight.shape, dtype=weight.dtype))
        model.save_pretrained(folder / "smol-expert")
    recipe = prior_recipe(str(folder / "smol-mllm"), [str(folder / "smol-expert")])
    for name, rank in PRIORS.items():
        if rank:
            made = make_prior(recipe, folder / f"smol-{name}", PriorSettings(rank=rank))
            print(name, made.report["bytes"]["written"] // MIB, "MiB", flush=True)


def one_step(folder: Path, prior: str) -> dict[str, float]:
    """Make one step, and then repeat what DRIFT does in it; seconds, and peaks in MiB."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder / "smol-mllm", dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    drift = Drift(model, folder / f"smol-{prior}") if PRIORS[prior] else None
    ids = torch.randint(SHAPE["vocab_size"], (BATCH, LENGTH))
    told: dict[str, float] = {}
    with PeakSampler() as sampler:
        began = time.perf_counter()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        sampler.sample()
        told["before the pull, MiB"] = sampler.peak.anonymous / MIB
        told["forward and backward, s"] = time.perf_counter() - began
        if drift is not None:
            pulls = []
            with PeakSampler() as pulling:
                for _ in range(REPEATS):
                    began = time.perf_counter()
                    drift.apply()
                    pulls.append(time.perf_counter() - began)
            told["pull, s"] = median(pulls)
            told["held by the pull, MiB"] = (pulling.peak.anonymous - pulling.start.anonymous) / MIB
        began = time.perf_counter()
        optimizer.step()
        told["step, s"] = time.perf_counter() - began
        sampler.sample()
        told["peak, MiB"] = sampler.peak.anonymous / MIB
    return {name: round(value, 3) for name, value in told.items()}


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    print(json.dumps(one_step(Path(sys.argv[1]), sys.argv[2])))
