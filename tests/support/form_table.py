"""Every form of checkpoint that is tested on whole families, from base to reloaded merge."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from support.families import INDEX, Triple, load
from support.family_table import FAMILIES, Family
from support.fp8 import expand, quantise

Tensors = dict[str, Tensor]
BLOCK = (32, 24)


@dataclass(frozen=True)
class Form:
    """One form of all roles, or of some.

    Attributes
    ----------
    name
        What docs/families.md calls it.
    store
        Stores a role's folder, of float32 in safetensors, in this form; returns the tensors that
        the form means. Called with the folder and the role: "base", "mllm", "expert1".
    adapter
        Whether the expert is given as an adapter of the base instead.
    options
        Of `build`.
    """

    name: str
    store: Callable[[Path, str], Tensors] = lambda folder, role: load(folder)
    adapter: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


def _clear(folder: Path) -> Tensors:
    """The tensors of a folder, whose files go."""
    tensors = load(folder)
    for file in [*folder.glob("*.safetensors"), folder / INDEX]:
        file.unlink(missing_ok=True)
    return tensors


def _one_bin(folder: Path, role: str) -> Tensors:
    tensors = _clear(folder)
    torch.save(tensors, folder / "pytorch_model.bin")
    return tensors


def _bins(folder: Path, role: str) -> Tensors:
    tensors = _clear(folder)
    weight_map = {}
    for number in range(3):
        name = f"pytorch_model-{number + 1:05d}-of-00003.bin"
        part = dict(list(tensors.items())[number::3])
        torch.save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return tensors


def _mixed(folder: Path, role: str) -> Tensors:
    """Each role in a dtype of its own, and norms and biases in float32 everywhere."""
    dtype = {"base": torch.float16, "mllm": torch.bfloat16}.get(role, torch.float32)
    tensors = {n: t.to(dtype) if t.dim() > 1 else t for n, t in _clear(folder).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def _fp8(folder: Path, role: str) -> Tensors:
    """All matrices but embeddings and heads in fp8, each with the scales of its blocks."""
    stored, meant = {}, {}
    for name, tensor in _clear(folder).items():
        linear = name.endswith(("proj.weight", "gate_up_proj", "down_proj", "fc1.weight"))
        if not linear or tensor.dim() not in (2, 3):
            stored[name] = meant[name] = tensor
            continue
        parts = [quantise(matrix, BLOCK) for matrix in tensor.view(-1, *tensor.shape[-2:])]
        values, scales = (torch.stack(each) for each in zip(*parts, strict=True))
        stored[name] = values.view(tensor.shape)
        stored[f"{name}_scale_inv"] = scales.view(*tensor.shape[:-2], *scales.shape[1:])
        wide = [(v.double() * expand(s, BLOCK, v.shape)).float() for v, s in parts]
        meant[name] = torch.stack(wide).view(tensor.shape)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    file = folder / "config.json"
    quantised = {"quant_method": "fp8", "weight_block_size": list(BLOCK)}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": quantised}))
    return meant


FORMS = (
    Form("safetensors in one file"),
    Form("safetensors in shards", options={"max_shard_size": "100KB"}),
    Form("one `.bin`", _one_bin),
    Form("`.bin` shards", _bins),
    Form("float16", options={"dtype": torch.float16}),
    Form("bfloat16", options={"dtype": torch.bfloat16}),
    Form("base float16, MLLM bfloat16, expert and all norms float32", _mixed),
    Form("fp8 with scales of blocks", _fp8),
    Form("the expert as a LoRA adapter", adapter=True),
)


def entries() -> tuple[Family, ...]:
    """The families that are tested in every form: of plain, renamed and stacked weights."""
    wanted = (("LLaVA", 4), ("Qwen2.5-VL", 4), ("Phi-4-multimodal", 4), ("Qwen3-VL-MoE", 4))
    return tuple(next(f for f in FAMILIES if (f.name, f.version) == each) for each in wanted)


def as_form(form: Form, triple: Triple, work: Path) -> tuple[Triple, Triple]:
    """(the triple in that form, one of safetensors with the numbers that it means)."""
    twins = {}
    for path in (triple.base, triple.mllm, *triple.experts):
        twins[path] = work / path.name
        shutil.copytree(path, twins[path])
        meant = form.store(path, path.name)
        _clear(twins[path])
        save_file(meant, twins[path] / "model.safetensors", metadata={"format": "pt"})
    stored = triple
    if form.adapter:
        expert = triple.experts[0]
        stored = replace(triple, experts=(_adapter(triple, expert, twins[expert], work / "lora"),))
    roles = [twins[path] for path in (triple.base, triple.mllm, *triple.experts)]
    return stored, replace(triple, base=roles[0], mllm=roles[1], experts=tuple(roles[2:]))


def _adapter(triple: Triple, expert: Path, twin: Path, out: Path) -> Path:
    """An adapter of the base near an expert, as PEFT saves it; the twin becomes what it means."""
    rank, alpha = 12, 6
    base, tuned, factors = load(triple.base), load(expert), {}
    meant = {name: tensor.clone() for name, tensor in base.items()}
    for name in sorted({slot.base for slot in triple.slots}):
        left, sizes, right = torch.linalg.svd(tuned[name].double() - base[name].double())
        a = right[:rank].float().contiguous()
        b = (left[:, :rank] * sizes[:rank] * rank / alpha).float().contiguous()
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        factors |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
        meant[name] = (base[name].double() + alpha / rank * (b.double() @ a.double())).float()
    out.mkdir()
    save_file(factors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha}
    (out / "adapter_config.json").write_text(json.dumps(config))
    save_file(meant, twin / "model.safetensors", metadata={"format": "pt"})
    return out


HEADING = """
## Forms

Each line is a test of four of these families:
{families}.
The merge agrees with the naive one on the numbers that the form means, at least one weight of every
projection is merged, all else is the MLLM's, and the class of the table above loads the result with
no missing and no unexpected tensor. [formats.md](formats.md#what-is-read) has the details, and what
is refused.

| form of the checkpoints | merged and reloaded |
|---|---|
"""


def page() -> str:
    """The end of docs/families.md."""
    families = ", ".join(entry.name for entry in entries())
    lines = [f"| {form.name} | {families} |\n" for form in FORMS]
    return HEADING.format(families=families) + "".join(lines)
