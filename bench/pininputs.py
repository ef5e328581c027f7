"""The small checkpoints that `bench/pins.py` merges, made with torch and safetensors alone.

Nothing of the package and nothing of its tests is used, so that both may move. A triple is a folder
with the roles `base`, `mllm`, `expert1` and, in some, `expert2`. The leading right directions of an
expert and of the MLLM are planted together in two of three weights.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Tensors = dict[str, Tensor]
Change = Callable[[str, Tensors], Tensors]
HIDDEN, INNER, HEADS, PAIRS, SIZE, LAYERS, VOCABULARY = 64, 96, 4, 2, 16, 2, 96
EXPERTS, EXPERT_INNER = 3, 48
ALIGNED = 0.8
"""Cosine of the leading right directions that are planted together."""
BLOCK = (32, 24)
"""Rows and columns that share a scale in fp8."""
TARGETS = ("q_proj", "v_proj", "up_proj", "down_proj")
"""Modules that the adapter has factors of."""
ATTENTION = {"q_proj": (64, 64), "k_proj": (32, 64), "v_proj": (32, 64), "o_proj": (64, 64)}
ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


# --- numbers ---------------------------------------------------------------------------------


def generator(*words: object) -> torch.Generator:
    """Random numbers that depend on the words alone."""
    return torch.Generator().manual_seed(zlib.crc32(repr(words).encode()))


def randn(shape: tuple[int, ...], *words: object) -> Tensor:
    """Normal numbers that depend on the words alone."""
    return torch.randn(shape, generator=generator(*words))


def task_vector(shape: tuple[int, int], name: str, role: int) -> Tensor:
    """Eight decaying directions and noise, of norm one; role 0 is the MLLM, others are experts."""
    rows, columns = shape
    count = min(8, *shape)
    shared = torch.linalg.qr(randn((columns, 2 * count + 1), name, "shared"))[0]
    left = torch.linalg.qr(randn((rows, count), name, role, "left"))[0]
    right = shared[:, :count]
    if role:
        right = shared[:, count : 2 * count].clone()
        parts = name.split(".")
        if (ORDER.index(parts[-1]) + int(parts[1]) + role - 1) % 3 != 2:
            right[:, 0] = ALIGNED * shared[:, 0] + math.sqrt(1 - ALIGNED**2) * shared[:, -1]
    low_rank = (left * 0.6 ** torch.arange(count)) @ right.T
    noise = randn(shape, name, role, "noise")
    vector: Tensor = low_rank / low_rank.norm() + 0.05 * noise / noise.norm()
    return vector


def logical_weights(shapes: Mapping[str, tuple[int, int]], role: int | None) -> Tensors:
    """Every logical weight of a role by its canonical name; None is the base."""
    found: Tensors = {}
    for name, shape in shapes.items():
        weight = 0.02 * randn(shape, name, "base")
        if role is not None:
            size = float(weight.norm()) * (0.15 if role else 0.1)
            weight = weight + size * task_vector(shape, name, role)
        found[name] = weight
    return found


def dense_shapes() -> dict[str, tuple[int, int]]:
    """Shapes of a language model whose layers have one feed-forward part."""
    inner = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
    found: dict[str, tuple[int, int]] = {}
    for layer in range(LAYERS):
        found |= {f"layers.{layer}.self_attn.{leaf}": each for leaf, each in ATTENTION.items()}
        found |= {f"layers.{layer}.mlp.{leaf}": each for leaf, each in inner.items()}
    return found


def sparse_shapes() -> dict[str, tuple[int, int]]:
    """Shapes of a mixture of experts."""
    found = {name: shape for name, shape in dense_shapes().items() if "self_attn" in name}
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            at = f"layers.{layer}.mlp.experts.{expert}"
            found |= {
                f"{at}.gate_proj": (EXPERT_INNER, HIDDEN),
                f"{at}.up_proj": (EXPERT_INNER, HIDDEN),
                f"{at}.down_proj": (HIDDEN, EXPERT_INNER),
            }
    return found


SKETCHED = {
    "layers.0.self_attn.q_proj": (528, 560),
    "layers.0.self_attn.v_proj": (560, 528),
    "layers.0.mlp.up_proj": (544, 520),
}
"""Wider than what is decomposed whole; v_proj is not aligned."""
TILED = {"layers.0.self_attn.q_proj": (800, 4000), "layers.0.mlp.down_proj": (96, 64)}
"""The first has two tiles: a tile is of 2^21 elements, here of 512 rows."""


# --- where they are stored -------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How a checkpoint names and stores the weights of its language model.

    `qkv` is split, fused or interleaved; `mlp` is split, fused, rows or columns, the latter two of
    stacked experts; `numbers` are the numbers that the base's layers have here.
    """

    stem: str = "model."
    qkv: str = "split"
    mlp: str = "split"
    attention: str = "self_attn"
    feed_forward: str = "mlp"
    leaves: tuple[tuple[str, str], ...] = ()
    numbers: tuple[int, ...] = tuple(range(LAYERS))

    def store(self, weights: Tensors) -> Tensors:
        """The stored tensors of logical weights."""
        left = dict(weights)
        found: Tensors = {}
        for layer, number in enumerate(self.numbers):
            own = f"layers.{layer}."
            attention = f"{self.stem}layers.{number}.{self.attention}."
            inner = f"{self.stem}layers.{number}.{self.feed_forward}."
            if self.qkv != "split":
                q, k, v = (left.pop(f"{own}self_attn.{each}_proj") for each in "qkv")
                if self.qkv == "fused":
                    found[f"{attention}qkv_proj.weight"] = torch.cat([q, k, v])
                else:
                    found[f"{attention}wqkv.weight"] = interleaved(q, k, v)
            if self.mlp == "fused":
                parts = [left.pop(f"{own}mlp.{each}_proj") for each in ("gate", "up")]
                found[f"{inner}gate_up_proj.weight"] = torch.cat(parts)
            if self.mlp in ("rows", "columns"):
                gate, up, down = (
                    torch.stack([left.pop(f"{own}mlp.experts.{n}.{each}_proj") for n in range(3)])
                    for each in ("gate", "up", "down")
                )
                stacks = {"gate_up_proj": torch.cat([gate, up], 1), "down_proj": down}
                for leaf, stack in stacks.items():
                    turned = stack.transpose(1, 2) if self.mlp == "columns" else stack
                    found[f"{inner}experts.{leaf}"] = turned.contiguous()
            for name in [name for name in left if name.startswith(own)]:
                *_, leaf = rest = name.removeprefix(own).split(".")
                rest[-1] = dict(self.leaves).get(leaf, leaf)
                at = attention if rest[0] == "self_attn" else inner
                found[f"{at}{'.'.join(rest[1:])}.weight"] = left.pop(name)
        assert not left, sorted(left)
        return found


def interleaved(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The rows of InternLM2's wqkv: of each key/value head its query heads, its key, its value."""
    parts = [each.view(PAIRS, -1, SIZE, HIDDEN) for each in (q, k, v)]
    return torch.cat(parts, 1).reshape(-1, HIDDEN)


TEXT = Layout()
LLAVA = Layout("language_model.model.")
NESTED = Layout("model.language_model.")
FUSED = Layout(qkv="fused", mlp="fused")
INTERNLM2 = Layout(
    qkv="interleaved",
    attention="attention",
    feed_forward="feed_forward",
    leaves=(("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2"), ("o_proj", "wo")),
)


def others(layout: Layout, role: str) -> Tensors:
    """Tensors out of scope: embeddings, norms and a head, and of an MLLM a tower and projector."""
    rows = VOCABULARY + 8 * (role == "mllm")
    found = {
        f"{layout.stem}embed_tokens.weight": randn((rows, HIDDEN), role, "embed"),
        f"{layout.stem}norm.weight": 1 + randn((HIDDEN,), role, "norm"),
        f"{layout.stem.removesuffix('model.')}lm_head.weight": randn((rows, HIDDEN), role, "head"),
    }
    for layer in layout.numbers:
        name = f"{layout.stem}layers.{layer}.input_layernorm.weight"
        found[name] = 1 + randn((HIDDEN,), role, "norm", layer)
    if role == "mllm":
        tower = "vision_tower.encoder.layers"
        for layer in range(2):
            found[f"{tower}.{layer}.self_attn.q_proj.weight"] = randn((32, 32), "tower", layer)
            found[f"{tower}.{layer}.self_attn.q_proj.bias"] = randn((32,), "bias", layer)
        found["multi_modal_projector.linear_1.weight"] = randn((HIDDEN, 32), "projector")
    return found


# --- files -----------------------------------------------------------------------------------


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Readable JSON."""
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def one_file(folder: Path, tensors: Tensors) -> None:
    """One safetensors file."""
    plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(plain, folder / "model.safetensors", metadata={"format": "pt"})


def shards(folder: Path, tensors: Tensors, *, suffix: str = "safetensors") -> None:
    """Three shards and their index."""
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    index: dict[str, str] = {}
    for number in range(3):
        name = f"{stem}-{number + 1:05d}-of-00003.{suffix}"
        part = {key: tensors[key].contiguous() for key in sorted(tensors)[number::3]}
        if suffix == "bin":
            torch.save(part, folder / name)
        else:
            save_file(part, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(part, name)
    size = sum(tensor.nbytes for tensor in tensors.values())
    content = {"metadata": {"total_size": size}, "weight_map": index}
    write_json(folder / f"{stem}.{suffix}.index.json", content)


def one_bin(folder: Path, tensors: Tensors) -> None:
    """One file as torch.save writes it."""
    torch.save(tensors, folder / "pytorch_model.bin")


def sizes() -> dict[str, Any]:
    """What a configuration says of the small language models."""
    return {
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": PAIRS,
        "vocab_size": VOCABULARY,
        "rope_theta": 10000.0,
    }


def side_files(folder: Path) -> None:
    """What lies beside an MLLM's weights: a card, a tokenizer, templates, and code."""
    card = "---\nlicense: other\nlicense_name: small\nlicense_link: LICENSE\n---\n\n# A model\n"
    (folder / "README.md").write_text(card, encoding="utf-8")
    words = {"<pad>": 0, "<s>": 1, "one": 2, "plus": 3}
    write_json(folder / "tokenizer.json", {"model": {"type": "WordLevel", "vocab": words}})
    write_json(folder / "preprocessor_config.json", {"size": 16})
    (folder / "modeling_small.py").write_text("SMALL = True\n", encoding="utf-8")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")


@dataclass(frozen=True)
class Family:
    """How one triple is made.

    Attributes
    ----------
    text, mllm
        Where the text models and the MLLM keep their weights.
    shapes
        Of the logical weights.
    dtypes
        Of matrices by role; a role that is not named has that of "all", and what is no matrix stays
        float32 where a role is named.
    experts
        How many.
    save
        Writes the tensors of a role by its name; "all" for the others.
    change
        May change a role's tensors before they are written.
    kind
        The MLLM's `model_type`.
    config
        More of every role's config.json.
    beside
        Whether the MLLM has side files.
    """

    text: Layout = TEXT
    mllm: Layout = LLAVA
    shapes: Callable[[], Mapping[str, tuple[int, int]]] = dense_shapes
    dtypes: tuple[tuple[str, torch.dtype], ...] = (("all", torch.float32),)
    experts: int = 1
    save: tuple[tuple[str, Callable[[Path, Tensors], None]], ...] = (("all", one_file),)
    change: Change = lambda role, tensors: tensors
    kind: str = "llava"
    config: tuple[tuple[str, Any], ...] = ()
    beside: bool = False

    def write(self, folder: Path) -> None:
        """Make the triple."""
        roles = ["base", "mllm", *(f"expert{number + 1}" for number in range(self.experts))]
        for number, role in enumerate(roles):
            layout = self.mllm if role == "mllm" else self.text
            weights = logical_weights(self.shapes(), number - 1 if number else None)
            tensors = self.cast(role, layout.store(weights) | others(layout, role))
            place = folder / role
            place.mkdir(parents=True)
            save = dict(self.save)
            save.get(role, save.get("all", one_file))(place, self.change(role, tensors))
            write_json(place / "config.json", self.configuration(role))
            if role == "mllm" and self.beside:
                side_files(place)

    def cast(self, role: str, tensors: Tensors) -> Tensors:
        """The tensors in the role's dtype."""
        dtypes = dict(self.dtypes)
        dtype = dtypes.get(role, dtypes.get("all", torch.float32))
        return {
            name: tensor.to(dtype) if tensor.dim() > 1 or role not in dtypes else tensor
            for name, tensor in tensors.items()
        }

    def configuration(self, role: str) -> dict[str, Any]:
        """The content of config.json."""
        dtypes = dict(self.dtypes)
        dtype = str(dtypes.get(role, dtypes.get("all", torch.float32))).removeprefix("torch.")
        own = dict(self.config)
        if role != "mllm":
            return {"model_type": "llama", "torch_dtype": dtype, **sizes(), **own}
        key = "llm_config" if self.kind == "internvl_chat" else "text_config"
        inner = sizes() | {"vocab_size": VOCABULARY + 8, "torch_dtype": dtype}
        vision = {"hidden_size": 32, "num_hidden_layers": 2}
        about = {"model_type": self.kind, "torch_dtype": dtype, key: inner}
        return {**about, "vision_config": vision, **own}


# --- changes ---------------------------------------------------------------------------------


def quantised(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The fp8 numbers of a matrix, and the float32 scale of each block."""
    rows, columns = weight.shape
    scale = torch.empty(math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            part = weight[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            scale[i, j] = part.abs().max().float().clamp(min=1e-6) / 448
    wide = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:rows, :columns]
    return (weight.float() / wide).to(torch.float8_e4m3fn), scale


def to_fp8(role: str, tensors: Tensors, *, by: str, only: str = "") -> Tensors:
    """Every projection of the language model, and of the projector, in fp8 with its scales."""
    if only and role != only:
        return tensors
    found: Tensors = {}
    for name, tensor in tensors.items():
        if not name.endswith(("proj.weight", "linear_1.weight")):
            found[name] = tensor
            continue
        block = BLOCK if by == "block" else (1, tensor.shape[1])
        numbers, scale = quantised(tensor, block)
        suffix = "_scale_inv" if by == "block" else "_scale"
        found |= {name: numbers, name + suffix: scale}
        found[name.removesuffix("weight") + "input_scale"] = torch.ones(1)
    return found


def tied(role: str, tensors: Tensors) -> Tensors:
    """The head shares the bytes of the embedding."""
    embedding = next(tensors[name] for name in tensors if name.endswith("embed_tokens.weight"))
    return {n: embedding if n.endswith("lm_head.weight") else t for n, t in tensors.items()}


def lacking(role: str, tensors: Tensors) -> Tensors:
    """The expert lacks one weight."""
    lacks = "model.layers.1.mlp.up_proj.weight" if role == "expert1" else ""
    return {name: tensor for name, tensor in tensors.items() if name != lacks}


def renamed(role: str, tensors: Tensors) -> Tensors:
    """The MLLM has names that structure does not explain."""
    if role != "mllm":
        return tensors
    found = {}
    for name, tensor in tensors.items():
        new = name.replace("language_model.model.layers.", "lm.trunk.part.")
        found[new.replace("self_attn.", "attn.").replace("mlp.", "ffn.")] = tensor
    return found


def not_a_number(role: str, tensors: Tensors, *, ending: str, only: str) -> Tensors:
    """One number of one role is none."""
    if role == only:
        name = next(name for name in tensors if name.endswith(ending))
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[3] = float("nan")
    return tensors


def as_gptq(role: str, tensors: Tensors) -> Tensors:
    """The expert has the names of GPTQ's packed weights."""
    if role != "expert1":
        return tensors
    packed = torch.ones((8, 8), dtype=torch.int32)
    return tensors | {"model.layers.0.self_attn.q_proj.qweight": packed}


def crossed(role: str, tensors: Tensors) -> Tensors:
    """The MLLM has a layer of cross-attention between those of the base."""
    if role == "mllm":
        at = "language_model.model.layers.1.cross_attn"
        for leaf in ("q_proj", "k_proj"):
            tensors[f"{at}.{leaf}.weight"] = randn((HIDDEN, HIDDEN), at, leaf)
    return tensors


def adapter(folder: Path) -> None:
    """A LoRA adapter of the plain triple's base, as an expert."""
    place = folder / "expert1"
    place.mkdir(parents=True)
    factors: Tensors = {}
    for name, shape in dense_shapes().items():
        if name.endswith(TARGETS):
            left, values, right = torch.linalg.svd(task_vector(shape, name, 1))
            stem = f"base_model.model.model.{name}"
            factors[f"{stem}.lora_A.weight"] = right[:6].contiguous()
            factors[f"{stem}.lora_B.weight"] = (left[:, :6] * values[:6] * 0.3).contiguous()
    save_file(factors, place / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 6, "lora_alpha": 12, "target_modules": list(TARGETS)}
    write_json(place / "adapter_config.json", config)


FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": list(BLOCK)}}
FBGEMM = {"quantization_config": {"quant_method": "fbgemm_fp8"}}
ALL_BF16 = (("all", torch.bfloat16),)
MIXED = (("base", torch.float16), ("mllm", torch.bfloat16), ("expert1", torch.float32))
BINS = (("mllm", partial(shards, suffix="bin")), ("all", one_bin))
NAN_IN_TOWER = partial(not_a_number, ending="linear_1.weight", only="mllm")
NAN_IN_EXPERT = partial(not_a_number, ending="up_proj.weight", only="expert1")
FAMILIES: Mapping[str, Family] = {
    "plain": Family(experts=2, beside=True),
    "bf16": Family(mllm=NESTED, dtypes=ALL_BF16, save=(("all", shards),)),
    "fp16": Family(mllm=TEXT, dtypes=(("all", torch.float16),), kind="qwen2_5_vl"),
    "mixed": Family(dtypes=MIXED),
    "bin": Family(save=BINS, change=tied, config=(("tie_word_embeddings", True),)),
    "fp8": Family(dtypes=ALL_BF16, change=partial(to_fp8, by="block"), config=tuple(FP8.items())),
    "fp8 rows": Family(
        dtypes=ALL_BF16,
        change=partial(to_fp8, by="row", only="expert1"),
        config=tuple(FBGEMM.items()),
    ),
    "fused": Family(text=FUSED, mllm=FUSED, kind="phi3_v", dtypes=ALL_BF16),
    "fused in the MLLM": Family(mllm=FUSED, kind="phi3_v"),
    "interleaved": Family(
        text=INTERNLM2,
        mllm=replace(INTERNLM2, stem="language_model.model."),
        kind="internvl_chat",
    ),
    "stacked": Family(
        mllm=Layout("model.language_model.", mlp="rows"), shapes=sparse_shapes, kind="qwen3_vl_moe"
    ),
    "stacked columns": Family(
        mllm=Layout("model.language_model.", mlp="columns"),
        shapes=sparse_shapes,
        kind="qwen3_vl_moe",
        dtypes=ALL_BF16,
    ),
    "crossed": Family(mllm=replace(LLAVA, numbers=(0, 2)), change=crossed, kind="mllama"),
    "sketched": Family(mllm=NESTED, shapes=lambda: SKETCHED),
    "sketched bf16": Family(mllm=NESTED, shapes=lambda: SKETCHED, dtypes=ALL_BF16, experts=2),
    "tiled": Family(shapes=lambda: TILED, dtypes=ALL_BF16),
    "lacking": Family(change=lacking),
    "renamed": Family(change=renamed),
    "NaN in the tower": Family(change=NAN_IN_TOWER),
    "NaN in the expert": Family(change=NAN_IN_EXPERT),
    "GPTQ": Family(change=as_gptq),
}


def write_inputs(folder: Path) -> None:
    """Every triple, and the adapter."""
    # Several threads take twenty times as long for matrices that are so small.
    torch.set_num_threads(1)
    for name, family in FAMILIES.items():
        family.write(folder / name)
    adapter(folder / "adapter")
