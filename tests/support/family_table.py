"""Every family that is tested, from base to reloaded merge: one entry a layout on the disk.

Models are tiny instances of transformers' own classes. It writes the layout of its version 4 or
that of its version 5; layouts that it cannot write are made by hand from public names.
"""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from support.families import INDEX, Slot, Triple, load, save_tokenizer, tune
from support.family_models import (
    AYA,
    DEEPSTACK,
    GEMMA3,
    HEAD,
    IDEFICS2,
    IDEFICS3,
    IMAGE,
    INTERN_VISION,
    LLAMA4_VISION,
    LLAVA,
    QWEN_VISION,
    SPARSE,
    VISION,
    joined,
    mllama,
    phi4_multimodal,
    qwen,
    text_model,
)
from support.layouts import INNER, Layout, Tensors, moved, stored_as

ORIGINAL_LLAVA = (
    ("model.language_model.", "model."),
    ("model.multi_modal_projector.linear_1", "model.mm_projector.0"),
    ("model.multi_modal_projector.linear_2", "model.mm_projector.2"),
    ("model.vision_tower.", "model.vision_tower.vision_tower.vision_model."),
)
BACK_TO_LLAVA = (
    ("model.vision_tower.vision_tower.vision_model.", "model.vision_tower."),
    ("model.mm_projector.0", "model.multi_modal_projector.linear_1"),
    ("model.mm_projector.2", "model.multi_modal_projector.linear_2"),
    ("model.", "model.language_model."),
)
ORIGINAL_INTERNVL = (
    ("model.language_model.embed_tokens", "language_model.model.tok_embeddings"),
    ("lm_head", "language_model.output"),
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.encoder.layer.", "vision_model.encoder.layers."),
    ("model.vision_tower.", "vision_model."),
    ("model.multi_modal_projector.layer_norm", "mlp1.0"),
    ("model.multi_modal_projector.linear_1", "mlp1.1"),
    ("model.multi_modal_projector.linear_2", "mlp1.3"),
)
BACK_TO_INTERNVL = tuple((new, old) for old, new in ORIGINAL_INTERNVL)
INTERNLM2 = Layout(
    prefix="language_model.model.layers.",
    qkv="interleaved",
    attention="attention",
    feed_forward="feed_forward",
    leaves=(("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2"), ("o_proj", "wo")),
)


def with_phi3_vision(tensors: Tensors) -> Tensors:
    """The tower and the projection of Phi-3-vision, beside its text model."""
    at = "model.vision_embed_tokens"
    shapes = {f"{at}.glb_GN": (1, 1, 64), f"{at}.sub_GN": (1, 1, 1, 64)}
    shapes |= {f"{at}.img_projection.{n}.weight": (64, 64) for n in (0, 2)}
    for layer in range(2):
        tower = f"{at}.img_processor.vision_model.encoder.layers.{layer}"
        for leaf in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes[f"{tower}.self_attn.{leaf}.weight"] = (32, 32)
        shapes |= {f"{tower}.mlp.fc1.weight": (48, 32), f"{tower}.mlp.fc2.weight": (32, 48)}
    dtype = next(iter(tensors.values())).dtype
    return tensors | {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def without_vision(tensors: Tensors) -> Tensors:
    """The text model alone."""
    return {name: tensor for name, tensor in tensors.items() if "vision" not in name}


@dataclass(frozen=True)
class Family:
    """One family in one layout.

    Attributes
    ----------
    name
        As people call it.
    base
        The text model of transformers that it was made from.
    make
        Makes the MLLM; None where it is the text model again.
    layout, base_layout
        Where the MLLM and the text models keep their weights.
    version
        Of transformers, 4 or 5, whose layout is written; `base_version` is the text models'.
    convert, base_convert
        From what transformers wrote to what lies on the disk.
    back
        From the disk to names and shapes that `make`'s class holds, where transformers cannot load
        the layout itself.
    config
        The layout's own config.json, made of that of `make`'s class.
    text
        What the text models are called, if not as their class.
    note
        What is special.
    """

    name: str
    base: str
    make: Callable[[], Any] | None
    layout: Layout
    base_layout: Layout = Layout()  # noqa: RUF009
    version: int = 4
    base_version: int = 4
    convert: Callable[[Tensors], Tensors] = dict
    base_convert: Callable[[Tensors], Tensors] = dict
    back: Callable[[Tensors], Tensors] | None = None
    config: Callable[[dict[str, Any]], dict[str, Any]] = dict
    text: str = ""
    note: str = ""

    @property
    def key(self) -> str:
        """A short name of its own."""
        words = [self.name, self.version, self.base, self.layout.mlp, self.base_layout.mlp]
        words += ["by hand"] if self.convert is not dict else []
        return re.sub(r"[^a-z0-9.]+", "-", " ".join(map(str, words)).lower())

    def model(self) -> Any:
        """A new MLLM with random weights."""
        return text_model(self.base) if self.make is None else self.make()


OLD = Layout("language_model.model.layers.")
NEW = Layout("model.language_model.layers.")
TEXT_MODEL = Layout("model.text_model.layers.")
PLAIN = Layout()
FUSED = Layout(qkv="fused", mlp="fused")
EACH = Layout(mlp="each")
MIXTRAL = Layout(
    mlp="each",
    feed_forward="block_sparse_moe",
    leaves=(("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")),
    inner=INNER,
)
LLAMA4 = Layout(mlp="columns", feed_forward="feed_forward", shared="shared_expert", inner=INNER)


def under(layout: Layout, prefix: str) -> Layout:
    """The same layout under another prefix."""
    return replace(layout, prefix=prefix)


def both(name: str, base: str, make: Callable[[], Any], **options: Any) -> list[Family]:
    """A family in the layouts of transformers 4 and 5, where these are LLaVA's."""
    return [
        Family(name, base, make, OLD, **options),
        Family(name, base, make, NEW, version=5, **options),
    ]


QWEN2 = partial(
    qwen,
    "Qwen2VL",
    dict(depth=2, embed_dim=32, hidden_size=64, num_heads=4, mlp_ratio=2, patch_size=8),
)
QWEN25 = partial(qwen, "Qwen2_5_VL", QWEN_VISION | {"fullatt_block_indexes": [1]})
QWEN3 = partial(qwen, "Qwen3VL", DEEPSTACK, **HEAD)
QWEN3_MOE = partial(qwen, "Qwen3VLMoe", DEEPSTACK, **HEAD, **SPARSE)
MIXTRAL_LLAVA = partial(joined, "Llava", "Mixtral", **LLAVA)
QWEN2_MOE_LLAVA = partial(joined, "Llava", "Qwen2Moe", **LLAVA)
QWEN3_MOE_LLAVA = partial(joined, "Llava", "Qwen3Moe", **LLAVA)
ROWS = Layout(mlp="rows")
STACKED_VL = under(ROWS, NEW.prefix)
TURNED_VL = replace(STACKED_VL, mlp="columns")
CROSSED = replace(OLD, numbers=(0, 2))
CROSS_ATTENTION = "cross-attention layers stand between, and are copied"

FAMILIES: tuple[Family, ...] = (
    *both("LLaVA", "Llama", partial(joined, "Llava", "Llama", **LLAVA)),
    Family(
        "LLaVA",
        "Llama",
        partial(joined, "Llava", "Llama", **LLAVA),
        OLD,
        convert=moved(("vision_tower.", "vision_tower.vision_model.")),
        note="as on the Hub, the tower too",
    ),
    Family(
        "LLaVA (original)",
        "Llama",
        partial(joined, "Llava", "Llama", **LLAVA),
        PLAIN,
        version=5,
        convert=moved(*ORIGINAL_LLAVA),
        back=moved(*BACK_TO_LLAVA),
        config=lambda own: (
            own["text_config"]
            | {"model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"]}
        ),
    ),
    *both("LLaVA-NeXT", "Llama", partial(joined, "LlavaNext", "Llama", **LLAVA)),
    *both(
        "LLaVA-OneVision",
        "Qwen2",
        partial(joined, "LlavaOnevision", "Qwen2", "siglip", **LLAVA, video_token_index=91),
    ),
    *both(
        "VipLLaVA",
        "Llama",
        partial(joined, "VipLlava", "Llama", **LLAVA, vision_feature_layers=[-1, -2]),
    ),
    Family("Qwen2-VL", "Qwen2", QWEN2, PLAIN),
    Family("Qwen2-VL", "Qwen2", QWEN2, NEW, version=5),
    Family("Qwen2.5-VL", "Qwen2", QWEN25, PLAIN),
    Family("Qwen2.5-VL", "Qwen2", QWEN25, NEW, version=5),
    Family("Qwen3-VL", "Qwen3", QWEN3, NEW, version=5),
    *(
        Family(name, base, partial(joined, name, base, VISION, **more), TEXT_MODEL)
        for name, base, more in (
            ("Idefics2", "Mistral", IDEFICS2),
            ("Idefics3", "Llama", IDEFICS3),
            ("SmolVLM", "Llama", IDEFICS3),
        )
    ),
    *both(
        "InternVL",
        "Qwen2",
        partial(joined, "InternVL", "Qwen2", INTERN_VISION, image_token_id=IMAGE),
    ),
    Family(
        "InternVL (original)",
        "Llama",
        partial(joined, "InternVL", "Llama", INTERN_VISION, image_token_id=IMAGE),
        INTERNLM2,
        under(INTERNLM2, "model.layers."),
        version=5,
        convert=stored_as(NEW, INTERNLM2, moved(*ORIGINAL_INTERNVL)),
        base_convert=stored_as(PLAIN, under(INTERNLM2, "model.layers.")),
        back=stored_as(INTERNLM2, NEW, moved(*BACK_TO_INTERNVL)),
        config=lambda own: {
            "model_type": "internvl_chat",
            "architectures": ["InternVLChatModel"],
            "llm_config": own["text_config"] | {"model_type": "internlm2"},
            "vision_config": own["vision_config"],
        },
        text="InternLM2",
    ),
    *both("Mistral3", "Mistral", partial(joined, "Mistral3", "Mistral", "pixtral", **LLAVA)),
    *both("Pixtral", "Mistral", partial(joined, "Llava", "Mistral", "pixtral", **LLAVA)),
    *both("Gemma3", "Gemma3Text", partial(joined, "Gemma3", "Gemma3Text", VISION, **GEMMA3)),
    *both(
        "PaliGemma",
        "Gemma",
        partial(joined, "PaliGemma", "Gemma", "siglip", projection_dim=64, **LLAVA),
    ),
    Family("Mllama", "Llama", mllama, CROSSED, note=CROSS_ATTENTION),
    Family("Mllama", "Llama", mllama, under(CROSSED, NEW.prefix), version=5, note=CROSS_ATTENTION),
    Family(
        "Phi-3-vision (original)",
        "Phi3",
        None,
        FUSED,
        FUSED,
        convert=with_phi3_vision,
        back=without_vision,
        config=lambda own: own | {"model_type": "phi3_v", "architectures": ["Phi3VForCausalLM"]},
        note="text part alone",
    ),
    Family("Phi-4-multimodal", "Phi3", phi4_multimodal, FUSED, FUSED),
    Family("Mixture of experts", "Mixtral", MIXTRAL_LLAVA, under(MIXTRAL, OLD.prefix), MIXTRAL),
    Family(
        "Mixture of experts",
        "Mixtral",
        MIXTRAL_LLAVA,
        replace(STACKED_VL, inner=INNER),
        MIXTRAL,
        version=5,
    ),
    Family("Mixture of experts", "Qwen3Moe", QWEN3_MOE_LLAVA, under(EACH, OLD.prefix), EACH),
    Family(
        "Mixture of experts",
        "Qwen3Moe",
        QWEN3_MOE_LLAVA,
        under(EACH, OLD.prefix),
        ROWS,
        base_version=5,
    ),
    Family(
        "Mixture of experts",
        "Qwen2Moe",
        QWEN2_MOE_LLAVA,
        replace(EACH, prefix=OLD.prefix, shared="shared_expert"),
        replace(EACH, shared="shared_expert"),
    ),
    Family(
        "Mixture of experts",
        "Qwen2Moe",
        QWEN2_MOE_LLAVA,
        replace(STACKED_VL, shared="shared_expert"),
        replace(ROWS, shared="shared_expert"),
        version=5,
        base_version=5,
    ),
    Family(
        "Qwen3-VL-MoE",
        "Qwen3Moe",
        QWEN3_MOE,
        TURNED_VL,
        EACH,
        convert=stored_as(STACKED_VL, TURNED_VL),
    ),
    Family("Qwen3-VL-MoE", "Qwen3Moe", QWEN3_MOE, STACKED_VL, EACH, version=5),
    Family(
        "Llama 4",
        "Llama4Text",
        partial(joined, "Llama4", "Llama4Text", LLAMA4_VISION, image_token_index=IMAGE),
        under(LLAMA4, OLD.prefix),
        LLAMA4,
    ),
    Family("Text models", "Llama", None, PLAIN),
    Family("Text models", "Phi3", None, FUSED, FUSED),
    Family(
        "Text models",
        "Llama",
        None,
        FUSED,
        PLAIN,
        convert=stored_as(PLAIN, FUSED),
        back=stored_as(FUSED, PLAIN),
    ),
    *both("Aya Vision", "Cohere2", partial(joined, "AyaVision", "Cohere2", "siglip", **AYA)),
)

SAVED = {
    "llava": ("LLaVA", 5),
    "llava-old": ("LLaVA", 4),
    "qwen2.5-vl": ("Qwen2.5-VL", 4),
    "qwen2-vl": ("Qwen2-VL", 4),
}
"""Families that other tests use, by their names there."""


SAVED_NAMES = (*SAVED, "llama", "phi3")


def family(name: str) -> Family:
    """A family by its name in other tests: of `SAVED`, or a text model's."""
    if name not in SAVED:
        return next(f for f in FAMILIES if f.name == "Text models" and f.base.lower() == name)
    return next(f for f in FAMILIES if (f.name, f.version) == SAVED[name])


# --- from an entry to checkpoints ------------------------------------------------------------


def build(
    entry: Family,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    experts: int = 1,
    max_shard_size: str = "50GB",
) -> Triple:
    """A base, an MLLM and experts of a family in its layout, with planted directions."""
    import transformers as tf

    tf.utils.logging.disable_progress_bar()
    torch.manual_seed(zlib.crc32(f"{entry.name} {entry.version}".encode()))
    own, theirs = entry.layout.weights(), entry.base_layout.weights()
    assert own.keys() == theirs.keys()
    slots = tuple(Slot(canonical, where, own[canonical]) for canonical, where in theirs.items())
    save = partial(_save, dtype=dtype, max_shard_size=max_shard_size)
    base = save(text_model(entry.base), folder / "base", entry.base_version, entry.base_convert)
    for role in range(experts + 1):
        path = folder / (f"expert{role}" if role else "mllm")
        if role:
            shutil.copytree(folder / "base", path)
            tensors = {name: (tensor + 0.02).to(dtype) for name, tensor in base.items()}
        else:
            model = entry.model()
            loader = type(model).__name__
            tensors = save(model, path, entry.version, entry.convert)
        for slot in slots:
            where = slot.in_base if role else slot.in_mllm
            where.put(tensors, tune(slot.in_base.get(base).float(), slot.canonical, role))
        _write(path, tensors, max_shard_size)
    save_tokenizer(folder / "mllm")
    file = folder / "mllm" / "config.json"
    file.write_text(json.dumps(entry.config(json.loads(file.read_text())), indent=2) + "\n")
    paths = tuple(folder / f"expert{n}" for n in range(1, experts + 1))
    return Triple(folder / "base", folder / "mllm", paths, slots, loader)


def _save(
    model: Any,
    folder: Path,
    version: int,
    convert: Callable[[Tensors], Tensors],
    *,
    dtype: torch.dtype,
    max_shard_size: str,
) -> Tensors:
    # Llama 4 holds complex numbers, which no conversion should meet.
    model = model if dtype == torch.float32 else model.to(dtype)
    model.save_pretrained(folder, save_original_format=version == 4)
    tensors = convert(load(folder))
    _write(folder, tensors, max_shard_size)
    return tensors


def _write(folder: Path, tensors: Tensors, max_shard_size: str) -> None:
    from huggingface_hub import save_torch_state_dict

    for file in [*folder.glob("*.safetensors"), folder / INDEX]:
        file.unlink(missing_ok=True)
    save_torch_state_dict(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder,
        max_shard_size=max_shard_size,
    )


def reloaded(entry: Family, folder: Path, work: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What transformers' class holds of a checkpoint, and what it says of loading it."""
    model = entry.model()
    if entry.back is not None:
        model.save_pretrained(work)
        _write(work, entry.back(load(folder)), "50GB")
        folder = work
    loaded, info = type(model).from_pretrained(folder, dtype="auto", output_loading_info=True)
    return loaded.state_dict(), info


# --- docs/families.md ------------------------------------------------------------------------

STORED = {
    "split": "",
    "fused": "gate_up_proj fused",
    "each": "each expert a matrix",
    "rows": "experts stacked, rows as rows",
    "columns": "experts stacked, rows as columns",
}
ATTENTION = {"split": "", "fused": "qkv_proj fused", "interleaved": "wqkv interleaved by heads"}
HEADING = """# Families

<!-- Written by the tests: LEAN_MERGE_WRITE_DOCS=1 pytest tests/mapping/test_families.py; the last
part from bench/families.json, which `python bench/families.py` writes -->

The language model is found inside every checkpoint by the structure of its tensors' names, so
prefixes need no configuration, and a family that is not in this table works too if its layers are
like its base's. Names that structure does not explain are explained by [names](formats.md#names) in
the recipe. Several language models that are equally likely are an error that shows them all.

Each line is a test. It makes a base, an expert and a multimodal model: tiny instances of
transformers' classes, with the weights in the layout of the line, by hand where transformers does
not write it. Some weights of every projection are aligned. The test merges, and shows that

- exactly the aligned weights are selected, and every weight in scope agrees with a naive float64
  implementation;
- every other byte is the multimodal model's;
- the class in the last column loads the result with no missing and no unexpected tensor, and holds
  the merged numbers. "Renamed" are layouts that transformers does not know: their result is loaded
  after it was brought into names and shapes of the class.

The form is one matrix for each projection, but for what the table says; roles may differ in it.

| family | layers on the disk | form | text models, and their form | merged | reloaded by |
|---|---|---|---|---|---|
"""


def page() -> str:
    """docs/families.md."""
    return HEADING + "".join(map(_line, FAMILIES))


def _line(entry: Family) -> str:
    text = entry.text or entry.base.removesuffix("Text")
    form = _form(entry.base_layout)
    parts = {canonical.rpartition(".")[0] for canonical in entry.layout.weights()}
    sparse = any("experts." in part for part in parts)
    shared = any("shared" in part for part in parts)
    loader = [f"`{type(entry.model()).__name__}`"]
    loader += ["renamed"] if entry.back is not None else []
    cells = (
        entry.name,
        f"`{entry.layout.prefix}N`",
        _form(entry.layout),
        text if form == "plain" else f"{text}, {form}",
        "all 7" + " of every expert" * sparse + " and the shared one" * shared,
        ", ".join([*loader, *([entry.note] if entry.note else [])]),
    )
    return f"| {' | '.join(cells)} |\n"


def _form(layout: Layout) -> str:
    parts = [ATTENTION[layout.qkv], STORED[layout.mlp]]
    if layout.leaves:
        parts.append("w1, w2, w3")
    return ", ".join(part for part in parts if part) or "plain"
