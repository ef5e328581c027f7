"""The merge as a stream: the checkpoint's bytes, one tensor at a time, and nothing written."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import Triple, load, tune, write_triple
from support.family_models import TEXT
from support.family_table import SAVED_NAMES
from torch import Tensor

from lean_merge import (
    BudgetError,
    DataError,
    MergeResult,
    RecipeError,
    Resources,
    open_checkpoint,
    stream,
)

CPU = Resources(device="cpu", threads=1)
Merged = Callable[..., tuple[Triple, MergeResult]]


def bits(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    """What two tensors of equal bits share."""
    return {
        name: (t.dtype, t.shape, t.reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, t in tensors.items()
    }


@pytest.mark.parametrize("name", SAVED_NAMES)
def test_the_stream_is_the_checkpoint_bit_for_bit_in_the_mllms_order(merged: Merged, name: str):
    triple, result = merged(name)
    streamed = list(stream(triple.recipe(), resources=CPU))
    assert [name for name, _ in streamed] == list(open_checkpoint(triple.mllm).tensors)
    assert bits(dict(streamed)) == bits(load(result.path))


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.bfloat16, "max_shard_size": "60KB"},
        {"dtype": torch.bfloat16, "out_dtype": "float32"},
        {"dtype": torch.bfloat16, "rounding": "stochastic"},
        {"exclude": ("q_proj", "layers: 1")},
        {"merge_method": "task_arithmetic", "scale": 0.3},
    ],
    ids=str,
)
def test_the_stream_follows_the_recipe(
    family: Callable[..., Triple], tmp_path: Path, options: dict[str, Any]
):
    made = {n: options[n] for n in ("dtype", "max_shard_size") if n in options}
    recipe = {n: v for n, v in options.items() if n not in made}
    triple = family("phi3", **made)
    result = triple.merge(tmp_path / "out", **recipe)
    streamed = dict(stream(triple.recipe(**recipe), resources=CPU))
    assert bits(streamed) == bits(load(result.path))


def test_a_transformers_model_is_loaded_from_a_stream(merged: Merged):
    import transformers

    for name in ("llava-old", "qwen2-vl"):
        triple, result = merged(name)
        kind = getattr(transformers, triple.loader)
        transformers.utils.logging.disable_progress_bar()
        wanted = kind.from_pretrained(result.path, dtype=torch.float32).eval()
        found = kind.from_pretrained(
            None,
            config=wanted.config,
            state_dict=dict(stream(triple.recipe(), resources=CPU)),
            dtype=torch.float32,
        ).eval()
        assert bits(dict(found.state_dict())) == bits(dict(wanted.state_dict()))
        words = torch.arange(3, 12).unsqueeze(0)
        with torch.no_grad():
            assert torch.equal(found(input_ids=words).logits, wanted(input_ids=words).logits)


def test_a_tensor_belongs_to_the_caller(small: Triple):
    recipe = small.recipe()
    untouched = bits(dict(stream(recipe, resources=CPU)))
    kept = {}
    for name, tensor in stream(recipe, resources=CPU):
        assert tensor.storage_offset() == 0 and tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        kept[name] = tensor.clone()
        tensor.zero_()
    assert bits(kept) == untouched


def test_the_callers_settings_are_its_own_while_it_holds_a_tensor(small: Triple):
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    try:
        torch.set_num_threads(2)
        torch.set_float32_matmul_precision("medium")
        for _ in stream(small.recipe(), resources=CPU):
            assert torch.get_num_threads() == 2
            assert torch.get_float32_matmul_precision() == "medium"
        assert torch.get_num_threads() == 2
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_num_threads(before[0])
        torch.set_float32_matmul_precision(before[1])


def test_leaving_early_ends_the_merge(small: Triple):
    running = threading.active_count()
    tensors = stream(small.recipe(), resources=CPU)
    next(tensors)
    assert threading.active_count() > running
    tensors.close()
    assert threading.active_count() == running


def test_errors_come_at_once_or_with_their_tensor(small: Triple, tmp_path: Path):
    with pytest.raises(RecipeError, match="output lora"):
        stream(small.recipe(output="lora"))
    with pytest.raises(BudgetError, match="--memory"):
        stream(small.recipe(), resources=Resources(device="cpu", memory=1 << 20))

    def spoil(role: str, tensors: dict[str, Tensor]) -> None:
        if role == "expert1":
            tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] = torch.nan

    triple = write_triple(tmp_path, {"layers.0.self_attn.q_proj": (64, 64)}, edit=spoil)
    with pytest.raises(DataError, match="q_proj"):
        list(stream(triple.recipe(), resources=CPU))


# --- memory -------------------------------------------------------------------------------

SIZES = TEXT | {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "vocab_size": 48_000,
    "num_key_value_heads": 4,
}
PROBE = """
import json, re, sys
import torch
from lean_merge import BudgetError, Expert, MergeRecipe, Resources, stream
from lean_merge.memory import PeakSampler, release_free_memory

base, mllm, expert, shapes = sys.argv[1:]
recipe = MergeRecipe(base, mllm, (Expert(expert),))
model = torch.nn.Module()
for name, shape in json.loads(shapes).items():
    *path, leaf = name.split(".")
    module = model
    for part in path:
        if part not in module._modules:
            module.add_module(part, torch.nn.Module())
        module = module._modules[part]
    empty = torch.empty(shape, device="meta")
    module.register_parameter(leaf, torch.nn.Parameter(empty, requires_grad=False))

def run(use):
    release_free_memory()
    try:
        stream(recipe, resources=Resources(device="cpu", threads=1, memory=1))
    except BudgetError as error:
        ceiling = int(re.search(r"--memory (\\d+)MiB", str(error))[1]) + 1 << 20
    with PeakSampler() as sampler:
        start = sampler.peak.anonymous
        total = largest = 0
        for name, tensor in stream(
            recipe, resources=Resources(device="cpu", threads=1, memory=ceiling)
        ):
            total, largest = total + tensor.nbytes, max(largest, tensor.nbytes)
            use(name, tensor)
            del tensor
        sampler.sample()
    peak = sampler.peak.anonymous
    return {"ceiling": ceiling, "start": start, "peak": peak, "total": total, "largest": largest}

drop = run(lambda name, tensor: None)
keep = run(lambda name, tensor: model.load_state_dict({name: tensor}, strict=False, assign=True))
whole = {name: float(weight.double().abs().sum()) for name, weight in model.state_dict().items()}
print(json.dumps({"drop": drop, "keep": keep, "sums": whole}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells anonymous memory apart")
def test_a_model_is_loaded_from_a_stream_within_the_ceiling(tmp_path: Path):
    """By a process that need not import transformers: the model's modules without numbers do."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(3)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    original = {name: weight.clone() for name, weight in model.state_dict().items()}
    for role, number in (("base", None), ("mllm", 0), ("expert1", 1)):
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if number is not None and ".layers." in name and weight.dim() == 2:
                    canonical = name.removeprefix("model.").removesuffix(".weight")
                    weight.copy_(tune(original[name], canonical, number))
        model.save_pretrained(tmp_path / role)
    triple = Triple(tmp_path / "base", tmp_path / "mllm", (tmp_path / "expert1",), ())
    wanted = load(triple.merge(tmp_path / "out").path)
    roles = [triple.base, triple.mllm, *triple.experts]
    shapes = {name: list(weight.shape) for name, weight in original.items()}
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *map(str, roles), json.dumps(shapes)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    drop, keep = found["drop"], found["keep"]
    size = sum(weight.nbytes for weight in wanted.values())
    assert drop["total"] == keep["total"] == size
    # What the caller keeps is the caller's; all else lies under the ceiling.
    assert drop["peak"] <= drop["ceiling"]
    assert keep["peak"] <= keep["ceiling"] + size
    # One tensor and the engine's buffers, never two tensors.
    assert drop["peak"] - drop["start"] < 1.75 * drop["largest"]
    assert found["sums"] == {n: float(w.double().abs().sum()) for n, w in wanted.items()}
