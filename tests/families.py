"""Small related checkpoints with planted directions, as transformers writes them or by hand.

The right leading singular direction of an expert's task vector lies at cosine `ALIGNED` to the
MLLM's on the weights that `Triple.is_aligned` names, and at a right angle, but for noise, on the
others. Where each role keeps a weight is spelt out here and not taken from the package.
"""

from __future__ import annotations

import copy
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from oracle import Matrix, Oracle, ip_merging
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lean_merge import Event, Expert, MergeRecipe, MergeResult, Resources, merge

ALIGNED = 0.8
"""Cosine of the leading right directions of aligned task vectors."""
LEAVES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
INDEX = "model.safetensors.index.json"
TEXT = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=96,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
VISION = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=16,
    patch_size=8,
    projection_dim=16,
)


@dataclass(frozen=True)
class Slot:
    """Rows `rows` of the tensors that hold one logical weight."""

    canonical: str
    base: str
    mllm: str
    rows: slice = field(default_factory=lambda: slice(None))


@dataclass(frozen=True)
class Triple:
    """A base, an MLLM and experts of one foundation on the disk, and where their weights are."""

    base: Path
    mllm: Path
    experts: tuple[Path, ...]
    slots: tuple[Slot, ...]
    loader: str = ""

    def is_aligned(self, canonical: str, expert: int = 0) -> bool:
        """Whether the leading directions were planted together; by turns over the experts."""
        return _planted(canonical, expert)

    def recipe(self, *, own: Sequence[Mapping[str, Any]] = (), **options: Any) -> MergeRecipe:
        """A recipe of this triple; what no field of the recipe takes is a parameter."""
        fields = MergeRecipe.__dataclass_fields__
        parameters = {name: options.pop(name) for name in list(options) if name not in fields}
        per_expert = [*own, *[{}] * (len(self.experts) - len(own))]
        return MergeRecipe(
            str(self.base),
            str(self.mllm),
            tuple(
                Expert(str(path), tuple(given.items()))
                for path, given in zip(self.experts, per_expert, strict=True)
            ),
            parameters=tuple(parameters.items()),
            **options,
        )

    def merge(
        self,
        out: Path,
        *,
        threads: int = 1,
        memory: int | None = None,
        overwrite: bool = False,
        resume: bool = True,
        on_event: Callable[[Event], None] | None = None,
        **options: Any,
    ) -> MergeResult:
        """Merge on the CPU."""
        return merge(
            self.recipe(**options),
            out,
            resources=Resources(device="cpu", threads=threads, memory=memory),
            overwrite=overwrite,
            resume=resume,
            on_event=on_event,
        )


@dataclass(frozen=True)
class Case:
    """One logical weight before and after a merge, in float64."""

    slot: Slot
    base: Matrix
    mllm: Matrix
    experts: tuple[Matrix, ...]
    stored: Tensor

    @property
    def update(self) -> Matrix:
        """What was added, as far as the output's dtype tells."""
        return as_matrix(self.stored) - self.mllm

    def oracle(self, expert: int = 0, **options: Any) -> Oracle:
        """What the method says of it by the book."""
        return ip_merging(self.base, self.mllm, self.experts[expert], **options)


def as_matrix(tensor: Tensor) -> Matrix:
    """A tensor's numbers in float64."""
    return tensor.to(torch.float64).numpy()


def relative_error(found: Matrix, wanted: Matrix) -> float:
    """Frobenius norm of the difference over that of `wanted`."""
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def load(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, found without its index."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def shard_names(folder: Path) -> dict[str, list[str]]:
    """The names of the tensors in each weight file."""
    names = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            names[file.name] = sorted(opened.keys())
    return names


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file of a folder."""
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def cases(triple: Triple, result: MergeResult) -> Iterator[Case]:
    """Every logical weight in scope."""
    base, mllm, out = load(triple.base), load(triple.mllm), load(result.path)
    experts = [load(path) for path in triple.experts]
    for slot in triple.slots:
        yield Case(
            slot,
            as_matrix(base[slot.base][slot.rows]),
            as_matrix(mllm[slot.mllm][slot.rows]),
            tuple(as_matrix(expert[slot.base][slot.rows]) for expert in experts),
            out[slot.mllm][slot.rows],
        )


def rows_of(result: MergeResult, expert: Path | None = None) -> dict[str, dict[str, Any]]:
    """The report's rows of one expert by canonical name."""
    rows = [
        row for row in result.report["weights"] if expert is None or row["expert"] == str(expert)
    ]
    found = {row["weight"]: row for row in rows}
    assert len(found) == len(rows)
    return found


def _planted(canonical: str, expert: int) -> bool:
    """By turns, so that in each family some weights are aligned and some are not."""
    parts = canonical.split(".")
    order = [leaf.split(".")[-1] for leaf in LEAVES].index(parts[-1]) + int(parts[1])
    return (order + expert) % 3 != 2


def _seeded(*words: object) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(repr(words).encode()))


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator))[0]


def task_vector(
    shape: tuple[int, int], canonical: str, role: int, *, size: float, noise: float = 0.05
) -> Tensor:
    """A task vector of norm about `size`: decaying directions and noise, the first one planted.

    `role` is 0 for the MLLM and the expert's number for experts, counted from 1.
    """
    out_features, in_features = shape
    count = min(8, *shape)
    shared = _orthonormal(in_features, 2 * count + 1, _seeded(canonical, "shared"))
    left = _orthonormal(out_features, count, _seeded(canonical, role, "left"))
    right = shared[:, :count]
    if role:
        right = shared[:, count : 2 * count].clone()
        if _planted(canonical, role - 1):
            right[:, 0] = ALIGNED * shared[:, 0] + (1 - ALIGNED**2) ** 0.5 * shared[:, -1]
    decay = 0.6 ** torch.arange(count)
    low_rank = (left * decay) @ right.T
    random = torch.randn(shape, generator=_seeded(canonical, role, "noise"))
    return size * (low_rank / low_rank.norm() + noise * random / random.norm())


def tune(weight: Tensor, canonical: str, role: int, *, size: float = 0.1) -> Tensor:
    """`weight` [out, in] after the role's tuning; an expert moves farther than the MLLM."""
    norm = float(weight.norm()) * size * (1.5 if role else 1.0)
    return weight + task_vector(tuple(weight.shape), canonical, role, size=norm)


# --- transformers' own classes ---------------------------------------------------------------


def _tune_layers(layers: Any, source: Any, role: int) -> None:
    """Give `layers` the weights of `source`, those in scope tuned as `role`."""
    with torch.no_grad():
        for name, weight in source.named_parameters():
            number, _, rest = name.partition(".")
            stem = rest.removesuffix(".weight")
            target = layers.get_parameter(name)
            if stem in LEAVES and name.endswith(".weight"):
                target.copy_(tune(weight, f"layers.{number}.{stem}", role))
            elif stem.endswith("_proj") and name.endswith(".weight"):
                target.copy_(weight)
                for canonical, rows in _logical(number, stem, weight):
                    target[rows] = tune(weight[rows], canonical, role)
            else:
                target.copy_(weight + 0.01 * (role + 1))


def _logical(number: str, stem: str, weight: Tensor) -> list[tuple[str, slice]]:
    """The logical matrices of Phi-3's fused weights, by the sizes of `TEXT`."""
    pairs = TEXT["num_key_value_heads"] * TEXT["hidden_size"] // TEXT["num_attention_heads"]
    heights = {
        "self_attn.qkv_proj": {
            "self_attn.q_proj": TEXT["hidden_size"],
            "self_attn.k_proj": pairs,
            "self_attn.v_proj": pairs,
        },
        "mlp.gate_up_proj": {
            "mlp.gate_proj": TEXT["intermediate_size"],
            "mlp.up_proj": TEXT["intermediate_size"],
        },
    }.get(stem, {stem: weight.shape[0]})
    slices, start = [], 0
    for leaf, height in heights.items():
        slices.append((f"layers.{number}.{leaf}", slice(start, start + height)))
        start += height
    assert start == weight.shape[0]
    return slices


def _text_model(kind: str) -> Any:
    import transformers as tf

    tf.utils.logging.disable_progress_bar()
    classes = {
        "llama": (tf.LlamaForCausalLM, tf.LlamaConfig),
        "qwen2": (tf.Qwen2ForCausalLM, tf.Qwen2Config),
        "phi3": (tf.Phi3ForCausalLM, tf.Phi3Config),
    }
    model, config = classes[kind]
    return model(config(**TEXT))


def _mllm(kind: str) -> tuple[Any, Any]:
    """A multimodal model and its language layers."""
    import transformers as tf

    mrope = TEXT | {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    if kind == "llava":
        model: Any = tf.LlavaForConditionalGeneration(
            tf.LlavaConfig(
                text_config=tf.LlamaConfig(**TEXT | {"vocab_size": 104}),
                vision_config=tf.CLIPVisionConfig(**VISION),
                image_token_index=100,
            )
        )
    elif kind == "qwen2_5_vl":
        model = tf.Qwen2_5_VLForConditionalGeneration(
            tf.Qwen2_5_VLConfig(
                text_config=mrope,
                vision_config=dict(
                    depth=2,
                    hidden_size=32,
                    intermediate_size=48,
                    num_heads=4,
                    out_hidden_size=64,
                    patch_size=8,
                    spatial_merge_size=2,
                    fullatt_block_indexes=[1],
                ),
            )
        )
    elif kind == "qwen2_vl":
        model = tf.Qwen2VLForConditionalGeneration(
            tf.Qwen2VLConfig(
                text_config=mrope,
                vision_config=dict(
                    depth=2, embed_dim=32, hidden_size=64, num_heads=4, mlp_ratio=2, patch_size=8
                ),
            )
        )
    else:
        raise AssertionError(kind)
    return model, model.model.language_model.layers


@dataclass(frozen=True)
class Family:
    """What a family is made of, and where its MLLM keeps its layers on the disk."""

    text: str
    mllm: str | None
    prefix: str
    loader: str


FAMILIES = {
    "llava": Family("llama", "llava", "model.language_model.", "LlavaForConditionalGeneration"),
    "llava-old": Family("llama", "llava", "language_model.model.", "LlavaForConditionalGeneration"),
    "qwen2.5-vl": Family("qwen2", "qwen2_5_vl", "model.", "Qwen2_5_VLForConditionalGeneration"),
    "qwen2-vl": Family("qwen2", "qwen2_vl", "model.", "Qwen2VLForConditionalGeneration"),
    "llama": Family("llama", None, "model.", "LlamaForCausalLM"),
    "phi3": Family("phi3", None, "model.", "Phi3ForCausalLM"),
}


def save_family(
    folder: Path,
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    experts: int = 1,
    max_shard_size: str = "50GB",
) -> Triple:
    """A family as its own classes save it."""
    family = FAMILIES[name]
    torch.manual_seed(zlib.crc32(name.encode()))
    base = _text_model(family.text)
    if family.mllm is None:
        mllm = copy.deepcopy(base)
        layers = mllm.model.layers
    else:
        mllm, layers = _mllm(family.mllm)
    _tune_layers(layers, base.model.layers, 0)
    tuned = []
    for number in range(1, experts + 1):
        expert = copy.deepcopy(base)
        _tune_layers(expert.model.layers, base.model.layers, number)
        with torch.no_grad():
            expert.lm_head.weight.add_(0.02)
        tuned.append(expert)
    roles = {"base": base, "mllm": mllm} | {f"expert{n}": each for n, each in enumerate(tuned, 1)}
    for role, model in roles.items():
        model.to(dtype).save_pretrained(folder / role, max_shard_size=max_shard_size)
    save_tokenizer(folder / "mllm")
    if family.mllm is not None:
        rename(folder / "mllm", family)
    slots = _slots(load(folder / "base"), family.prefix)
    paths = tuple(folder / f"expert{n}" for n in range(1, experts + 1))
    return Triple(folder / "base", folder / "mllm", paths, slots, family.loader)


def _slots(base: Mapping[str, Tensor], prefix: str) -> tuple[Slot, ...]:
    slots = []
    for name, weight in base.items():
        parts = name.split(".")
        if parts[:2] != ["model", "layers"] or not name.endswith("_proj.weight"):
            continue
        stem = ".".join(parts[3:-1])
        for canonical, rows in _logical(parts[2], stem, weight):
            slots.append(Slot(canonical, name, prefix + name.removeprefix("model."), rows))
    return tuple(slots)


def _layout(name: str, family: Family) -> str:
    """A tensor's name in the family's layout, from either layout that transformers writes."""
    tail = name
    for prefix in ("model.language_model.", "language_model.model."):
        if name.startswith(prefix):
            return family.prefix + name.removeprefix(prefix)
    if family.mllm == "llava":
        tail = tail.removeprefix("model.").removeprefix("language_model.")
        if family.prefix == "language_model.model.":
            return f"language_model.{tail}" if tail.startswith("lm_head") else tail
        return tail if tail.startswith("lm_head") else f"model.{tail}"
    return tail.removeprefix("model.") if tail.startswith("model.visual.") else tail


def rename(folder: Path, family: Family) -> None:
    """Rewrite a checkpoint's names in the family's layout, in place."""
    weight_map = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors = {_layout(name, family): tensor for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file.name)
    if (folder / INDEX).exists():
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"] = weight_map
        (folder / INDEX).write_text(json.dumps(index))


def save_tokenizer(folder: Path) -> None:
    """A word-level tokenizer of eight words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", "one", "plus", "two", "is"]
    model = WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>")
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(model), unk_token="<unk>", pad_token="<pad>"
    ).save_pretrained(folder)


# --- by hand ---------------------------------------------------------------------------------


def write_triple(
    folder: Path,
    shapes: Mapping[str, tuple[int, int]],
    *,
    dtype: torch.dtype = torch.float32,
    experts: int = 1,
    size: float = 0.1,
    edit: Callable[[str, dict[str, Tensor]], None] | None = None,
) -> Triple:
    """A plain triple whose weights have the given shapes by canonical name.

    `edit` may change a role's tensors before they are saved; a norm is out of scope.
    """
    for number in range(experts + 2):
        role = ("base", "mllm")[number] if number < 2 else f"expert{number - 1}"
        tensors = {"model.norm.weight": torch.full((8,), 1.0 + number, dtype=dtype)}
        for canonical, shape in shapes.items():
            weight = 0.02 * torch.randn(shape, generator=_seeded(canonical, "base"))
            if number:
                weight = tune(weight, canonical, number - 1, size=size)
            tensors[f"model.{canonical}.weight"] = weight.to(dtype)
        if edit is not None:
            edit(role, tensors)
        (folder / role).mkdir(parents=True)
        save_file(tensors, folder / role / "model.safetensors", metadata={"format": "pt"})
        config = {"model_type": "llama", "dtype": str(dtype).removeprefix("torch.")}
        (folder / role / "config.json").write_text(json.dumps(config))
    slots = tuple(
        Slot(canonical, f"model.{canonical}.weight", f"model.{canonical}.weight")
        for canonical in shapes
    )
    paths = tuple(folder / f"expert{n}" for n in range(1, experts + 1))
    return Triple(folder / "base", folder / "mllm", paths, slots)


SMALL = {"layers.0.self_attn.q_proj": (96, 64), "layers.0.mlp.gate_proj": (64, 80)}
"""Shapes that are analysed exactly; expert 1 is aligned on both, expert 2 on q_proj alone."""
SKETCHED = {"layers.0.self_attn.q_proj": (528, 560), "layers.0.self_attn.v_proj": (560, 528)}
"""Shapes that take the sketched path; v_proj is not aligned."""

__all__ = [
    "ALIGNED",
    "FAMILIES",
    "SKETCHED",
    "SMALL",
    "Case",
    "Slot",
    "Triple",
    "cases",
    "contents",
    "load",
    "relative_error",
    "replace",
    "rows_of",
    "save_family",
    "shard_names",
    "write_triple",
]
