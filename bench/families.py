"""Merge a tiny model of every multimodal class that the installed transformers has.

    python bench/families.py [--only TYPE ...] [--check]

Each class is built from its own default configuration, whose sizes are cut by one set of rules. Its
language model, a base and an expert are given related weights, and all are saved as transformers
saves them. Then, for each class:

- the triple is merged whole, and the class loads the result;
- the merge is written as an adapter, or refused by name; what the refusal says to leave out is left
  out of both;
- PEFT loads the adapter over the unchanged model. Its modules are counted, and every weight of the
  model with the adapter is compared with that of the whole merge, so that nothing can be missing;
- the logits of a fixed text are compared, where the class computes any from text alone.

The results are written into `bench/families.json`, of which docs/families.md is made by
`LEAN_MERGE_WRITE_DOCS=1 pytest tests/mapping/test_families.py -k page`. With --check nothing is
written, and the exit code tells whether the results are those of the file. With --only, the other
rows of the file stay.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "families.json"
BAR = 1e-3
"""Largest relative difference of a weight's change, and of that of the logits."""
MOST = 50_000_000
"""The most parameters that a class may have and still count as tiny."""
HIDDEN, HEADS, PAIRS, SIZE, VOCABULARY = 64, 4, 2, 16, 160
TEXT_SIZES: Mapping[str, Any] = {
    "hidden_size": HIDDEN,
    "d_model": HIDDEN,
    "n_embd": HIDDEN,
    "intermediate_size": 96,
    "dense_intermediate_size": 96,
    "shared_intermediate_size": 48,
    "intermediate_size_mlp": 96,
    "ffn_dim": 96,
    "d_ff": 96,
    "moe_intermediate_size": 32,
    "expert_ffn_hidden_size": 32,
    "ffn_hidden_size": 96,
    "shared_expert_intermediate_size": 48,
    "moe_shared_expert_intermediate_size": 48,
    "num_attention_heads": HEADS,
    "num_heads": HEADS,
    "num_key_value_heads": PAIRS,
    "num_kv_heads": PAIRS,
    "global_num_key_value_heads": PAIRS,
    "num_global_key_value_heads": PAIRS,
    "head_dim": SIZE,
    "global_head_dim": SIZE,
    "d_kv": SIZE,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "top_k_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "mamba_d_state": 16,
    "ssm_state_size": 16,
    "n_groups": 2,
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 16,
    "max_position_embeddings": 256,
    "sliding_window": 64,
    "laurel_rank": 8,
    "num_kv_shared_layers": 0,
}
"""The sizes of language models."""
TOWER_SIZES: Mapping[str, Any] = {
    "hidden_size": 32,
    "embed_dim": 32,
    "d_model": 32,
    "dim": 32,
    "intermediate_size": 48,
    "mlp_dim": 48,
    "ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "encoder_layers": 2,
    "num_global_layers": 1,
    "depth": 2,
    "num_attention_heads": 4,
    "num_heads": 4,
    "attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "image_size": 32,
    "patch_size": 8,
    "out_hidden_size": HIDDEN,
    "output_dim": HIDDEN,
    "projection_dim": HIDDEN,
    "text_hidden_size": HIDDEN,
    "vocab_size": VOCABULARY,
}
"""The sizes of what sees and hears."""
OUTSIDE: Mapping[str, Any] = {
    "projector_hidden_size": HIDDEN,
    "text_hidden_size": HIDDEN,
    "hidden_size": HIDDEN,
    "vocab_size": VOCABULARY,
}
"""The sizes that stand outside of both."""
SECTIONS = [2, 3, 3]
"""Positions of time, height and width, which make up half a head."""
# What the rules above do not say, by model type: {path: value}.
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SPECIAL: Mapping[str, Mapping[str, Any]] = {
    "chameleon": {"vocabulary_map": {"<image>": VOCABULARY - 10}},
    "cohere_compass": {
        "text_config.rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}
    },
    "deepseek_ocr2": {"text_config.mlp_layer_types": ["dense", "sparse", "sparse"]},
    "dots3_note": {"text_config.num_key_value_heads": HEADS},
    "emu3": {"vocabulary_map": {"<image>": VOCABULARY - 10}},
    "ernie4_5_vl_moe": {"text_config.rope_parameters": ROPE | {"mrope_section": [3, 3, 2]}},
    "fun_asr_nano": {
        "adaptor_config.hidden_size": HIDDEN,
        "adaptor_config.intermediate_size": HIDDEN // 4,
    },
    "glm5_next": {
        "text_config.num_key_value_heads": HEADS,
        "text_config.qk_rope_head_dim": 0,
        "text_config.qk_nope_head_dim": SIZE,
        "text_config.head_dim": 0,
    },
    "hunyuan_vl": {"text_config.head_dim": SIZE},
    "minimax_m3_vl": {"text_config.mlp_layer_types": ["dense", "sparse", "sparse"]},
    "molmo2": {"adapter_config.vision_feature_layer": [1, 0]},
    "qwen2_5_omni": {"enable_audio_output": False},
    "qwen3_omni_moe": {"enable_audio_output": False},
}


# --- tiny configurations --------------------------------------------------------------------------


def is_text(name: str, config: Mapping[str, Any]) -> bool:
    """Tell whether a part of a configuration is that of a language model."""
    if any(word in name for word in ("vision", "audio", "speech", "sound", "image", "visual")):
        return False
    return "vocab_size" in config and ("hidden_size" in config or "d_model" in config)


def shrink(config: dict[str, Any], name: str = "") -> dict[str, Any]:
    """Cut the sizes of a configuration and of all its parts."""
    sizes = TEXT_SIZES if is_text(name, config) else TOWER_SIZES if name else OUTSIDE
    nested = {key: value for key, value in config.items() if is_part(key, value)}
    if nested and not is_text(name, config):
        sizes = OUTSIDE
    small = config | {k: v for k, v in sizes.items() if isinstance(config.get(k), int | list)}
    for key, value in sizes.items():
        if isinstance(config.get(key), list) and not isinstance(value, list):
            small[key] = [value] * len(config[key])
    cut_layers(small, 2 if sizes is TOWER_SIZES else 3)
    for key, value in small.items():
        if key.endswith(("token_id", "token_index", "_token_ids", "_token_idx", "_start_id")):
            small[key] = token(key, value)
        elif key in ("rope_parameters", "rope_scaling") and isinstance(value, dict):
            small[key] = with_sections(value)
        elif key == "mrope_section":
            small[key] = SECTIONS
    return small | {key: shrink(value, key) for key, value in nested.items()}


def is_part(key: str, value: Any) -> bool:
    """Tell whether a value is a configuration of its own."""
    if not isinstance(value, dict) or key == "per_layer_config":
        return False
    return key.endswith("config") or "model_type" in value


def with_sections(rope: dict[str, Any]) -> dict[str, Any]:
    """Give positions of several dimensions the size of the tiny heads."""
    return {
        key: with_sections(value)
        if isinstance(value, dict)
        else SECTIONS
        if key == "mrope_section"
        else value
        for key, value in rope.items()
    }


def token(key: str, value: Any) -> Any:
    """Give a special token a place in the tiny vocabulary."""
    if isinstance(value, list):
        return [token(key, each) for each in value]
    if not isinstance(value, int) or 0 <= value < 3:
        return value
    return VOCABULARY - 1 - sum(map(ord, key)) % 20


def cut_layers(config: dict[str, Any], count: int) -> None:
    """Keep one layer of each kind, and `count` at least, in all lists that go by layers."""
    key = next((k for k in ("num_hidden_layers", "num_layers", "n_layer") if k in config), None)
    lists = [k for k, v in config.items() if isinstance(v, list) and len(v) > count]
    kinds = next((k for k in ("layer_types", "layers_block_type") if config.get(k)), None)
    total = len(config[kinds]) if kinds else config.get(key) if key else None
    if not isinstance(total, int) or total <= count:
        return
    lists = [k for k in lists if len(config[k]) == total]
    repeating = [config[k] for k in lists if len(set(map(str, config[k]))) < total]
    rows = list(zip(*(map(str, each) for each in repeating), strict=True)) or [()] * total
    chosen = sorted({rows.index(row) for row in dict.fromkeys(rows)})[: 2 * count]
    others = [n for n in range(total) if n not in chosen]
    chosen = sorted([*chosen, *others[: max(0, count - len(chosen))]])
    for each in lists:
        config[each] = [config[each][n] for n in chosen]
    own = config.get("per_layer_config") or {}
    if own:
        own = {int(number): value for number, value in own.items()}
        config["per_layer_config"] = {
            place: {k: TEXT_SIZES.get(k, v) for k, v in own[number].items()}
            for place, number in enumerate(chosen)
            if number in own
        }
    if key and config.get(key) is not None:
        config[key] = len(chosen)


def tiny(kind: str) -> Any:
    """Give the tiny configuration of a model type."""
    from transformers import CONFIG_MAPPING

    own = CONFIG_MAPPING[kind]
    config = shrink(own().to_dict())
    for path, value in SPECIAL.get(kind, {}).items():
        *parts, last = path.split(".")
        place = config
        for part in parts:
            place = place[part]
        place[last] = value
    return own.from_dict(config)


def classes() -> dict[str, str]:
    """Give the class of every multimodal model type."""
    from transformers.models.auto import modeling_auto as auto

    found = {}
    for table in ("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM"):
        for kind, names in getattr(auto, f"MODEL_FOR_{table}_MAPPING_NAMES").items():
            found.setdefault(kind, names if isinstance(names, str) else names[0])
    return dict(sorted(found.items()))


# --- related weights ------------------------------------------------------------------------------


def randomise(module: nn.Module, seed: int) -> None:
    """Fill all matrices with random numbers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.06)


def tuned(state: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Change every matrix in one direction that all roles share, and a little at random."""
    result = {}
    generator = torch.Generator().manual_seed(seed)
    for number, (name, tensor) in enumerate(state.items()):
        result[name] = tensor
        if tensor.dim() < 2 or not tensor.is_floating_point():
            continue
        shared = torch.Generator().manual_seed(7000 + number)
        *front, rows, columns = tensor.shape
        left = torch.randn(*front, rows, 1, generator=shared)
        right = torch.randn(*front, 1, columns, generator=shared)
        product = (
            left / left.norm(dim=-2, keepdim=True) @ (right / right.norm(dim=-1, keepdim=True))
        )
        noise = torch.randn(tensor.shape, generator=generator)
        result[name] = tensor + 0.06 * (0.3 * (rows * columns) ** 0.5 * product + 0.01 * noise)
    return result


def language_model(model: Any) -> tuple[str, Any]:
    """Find the language model inside a class: its name and the module."""
    from transformers import PreTrainedModel

    found = []
    for name, module in model.named_modules():
        if not name or not isinstance(module, PreTrainedModel) or not hasattr(module, "layers"):
            continue
        embedding = getattr(module, "embed_tokens", None) or getattr(module, "embeddings", None)
        if isinstance(embedding, nn.Embedding) and embedding.weight.shape[0] >= VOCABULARY:
            found.append((name, module))
    if not found:
        raise ValueError("it holds no language model of layers that a text model could be")
    thinking = [each for each in found if "thinker" in each[0]]
    return (thinking or found)[0]


def text_model(decoder: Any) -> Any:
    """Make transformers' own text model of the kind of `decoder`; None if there is none."""
    from transformers import AutoModelForCausalLM

    try:
        text = AutoModelForCausalLM.from_config(copy.deepcopy(decoder.config)).float()
    except (ValueError, KeyError, AttributeError):
        return None
    inner = text.base_model
    same = inner.state_dict().keys() == decoder.state_dict().keys() and inner is not text
    return text if same else None


def write_triple(kind: str, name: str, folder: Path) -> Any:
    """Save base, MLLM and expert of a class; give the class."""
    import transformers
    from safetensors.torch import save_file

    torch.manual_seed(0)
    config = tiny(kind)
    model_class = getattr(transformers, name)
    with torch.device("meta"):
        numbers = sum(each.numel() for each in model_class(copy.deepcopy(config)).parameters())
    if numbers > MOST:
        raise ValueError(f"its sizes are not all cut by the rules here: {numbers} parameters")
    model = model_class(config).float()
    randomise(model, 1)
    _, decoder = language_model(model)
    text, state = text_model(decoder), {k: v.clone() for k, v in decoder.state_dict().items()}
    for role, seed in (("base", None), ("expert", 2)):
        own = state if seed is None else tuned(state, seed)
        if text is not None:
            text.base_model.load_state_dict(own)
            text.save_pretrained(folder / role)
            continue
        (folder / role).mkdir(parents=True)
        tensors = {f"model.{key}": value.contiguous().clone() for key, value in own.items()}
        save_file(tensors, folder / role / "model.safetensors", metadata={"format": "pt"})
        decoder.config.save_pretrained(folder / role)
    decoder.load_state_dict(tuned(state, 3))
    model.save_pretrained(folder / "mllm")
    return model_class


# --- one class ------------------------------------------------------------------------------------


def first_sentence(error: Exception) -> str:
    """Give what an error says, without paths."""
    text = re.sub(r"/[\w./-]*/(base|mllm|expert)\b", r"\1", str(error))
    return text.partition("\n")[0]


def merged(folder: Path, out: str, **options: Any) -> Path:
    """Merge the triple in `folder` with every weight selected."""
    from lean_merge import MergeRecipe, Resources, merge

    recipe = MergeRecipe(
        *(str(folder / role) for role in ("base", "mllm")),
        (str(folder / "expert"),),
        parameters=(("threshold", 0.0),),
        **options,
    )
    path = merge(recipe, folder / out, resources=Resources(device="cpu", threads=1)).path
    assert path is not None
    return path


def loaded(model_class: Any, folder: Path) -> Any:
    """Load a model; ValueError if a weight is missing or left over."""
    from transformers import PreTrainedModel

    # Qwen2.5-Omni's own loads a file of voices as well.
    load = PreTrainedModel.from_pretrained.__func__
    model, info = load(model_class, folder, dtype=torch.float32, output_loading_info=True)
    wrong = {key: sorted(map(str, value))[:2] for key, value in info.items() if value}
    if wrong:
        raise ValueError(f"the class loads its files with {wrong}")
    return model.eval()


def logits_of(model: Any) -> Tensor:
    """Compute the logits of a fixed text."""
    words = torch.tensor([[5, 9, 17, 33, 60, 21]])
    with torch.no_grad():
        result: Tensor = model(input_ids=words).logits.double()
    return result


def compared(model_class: Any, folder: Path, whole: Path, adapter: Path) -> dict[str, Any]:
    """Load the adapter through PEFT, and compare the model with the whole merge."""
    import peft
    from peft.tuners.lora import LoraLayer

    base, full = loaded(model_class, folder / "mllm"), loaded(model_class, whole)
    before = {key: value.clone() for key, value in base.state_dict().items()}
    wanted = full.state_dict()
    result: dict[str, Any] = {}
    outcomes = []
    for model in (base, full):
        try:
            outcomes.append(logits_of(model))
        except Exception as error:
            result["logits"] = f"none from text alone ({type(error).__name__})"
            break
    adapted = peft.PeftModel.from_pretrained(base, adapter).eval()
    layers = {n: m for n, m in adapted.base_model.model.named_modules() if isinstance(m, LoraLayer)}
    named = json.loads((adapter / "adapter_config.json").read_text())["target_modules"]
    result |= {"modules": len(named), "applied": len(layers.keys() & set(named))}
    if len(outcomes) == 2:
        change = outcomes[1] - outcomes[0]
        found = logits_of(adapted) - outcomes[0]
        norm = float(change.norm())
        result["logits"] = float((found - change).norm()) / norm if norm else "the merge moves none"
    worst = 0.0
    for key, value in wanted.items():
        change = (value - before[key]).double() if value.is_floating_point() else None
        if change is None or not bool(change.any()):
            continue
        layer = layers.get(key.removesuffix(".weight"))
        made = layer.get_delta_weight("default").double() if layer is not None else 0 * change
        worst = max(worst, float((made - change).norm() / change.norm()))
    result["worst weight"] = worst
    return result


def tried(kind: str, name: str, folder: Path) -> dict[str, Any]:
    """Merge one class, and tell what came of it."""
    from lean_merge import LeanMergeError

    result: dict[str, Any] = {"class": name}
    try:
        model_class = write_triple(kind, name, folder)
        loaded(model_class, folder / "mllm")
    except Exception as error:
        return result | {"built": f"{type(error).__name__}: {first_sentence(error)}"[:160]}
    try:
        whole = merged(folder, "whole")
        loaded(model_class, whole)
        result["merged"] = "whole"
    except LeanMergeError as error:
        return result | {"refused": first_sentence(error)[:400]}
    options: dict[str, Any] = {}
    for attempt in range(4):
        try:
            adapter = merged(folder, f"adapter{attempt}", output="lora", **options)
            break
        except LeanMergeError as error:
            words = re.search(r"--exclude '([^']+)'", str(error))
            result.setdefault("adapter refused", first_sentence(error)[:400])
            if words is None:
                return result
            left_out = (*options.get("exclude", ()), words[1])
            options = {"exclude": left_out}
            result["left out"] = list(left_out)
    else:
        return result
    if options:
        try:
            whole = merged(folder, "rest", **options)
        except LeanMergeError:
            return result
    result |= compared(model_class, folder, whole, adapter)
    return result | {"whole": is_whole(result)}


def carried_out(kinds: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Try every class, each in a folder of its own."""
    for kind, name in kinds.items():
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                yield kind, tried(kind, name, Path(folder))
            except Exception as error:
                words = f"{type(error).__name__}: {first_sentence(error)}"[:300]
                yield kind, {"class": name, "fault": words}


def rounded(found: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Give a class's row without what differs between machines."""
    row: dict[str, Any] = found.get("classes", {}).get(kind, {})
    return {key: value for key, value in row.items() if not isinstance(value, float)}


def is_whole(row: Mapping[str, Any]) -> bool:
    """Tell whether the adapter does all that the merge does."""
    if "modules" not in row or row["applied"] != row["modules"] or row["worst weight"] > BAR:
        return False
    return not isinstance(row["logits"], float) or row["logits"] <= BAR


# --- all of them ----------------------------------------------------------------------------------


def main() -> int:
    """Carry out what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", help="these model types alone")
    parser.add_argument("--check", action="store_true", help="compare with the file, write nothing")
    arguments = parser.parse_args()
    import peft
    import transformers

    transformers.utils.logging.set_verbosity(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    kinds = classes()
    if arguments.only:
        kinds = {kind: kinds[kind] for kind in arguments.only}
    results: dict[str, Any] = {}
    started = time.monotonic()
    for kind, row in carried_out(kinds):
        results[kind] = row
        print(f"{time.monotonic() - started:.0f} s", kind, json.dumps(row), flush=True)
    before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found = {
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "classes": dict(sorted({**before.get("classes", {}), **results}.items())),
    }
    if not arguments.only:
        found["classes"] = results
    faulty = [k for k, row in results.items() if "fault" in row or row.get("whole") is False]
    print(f"{len(results)} classes, {len(faulty)} of them wrong: {', '.join(faulty)}")
    if arguments.check:
        differing = [kind for kind in results if rounded(before, kind) != rounded(found, kind)]
        print(f"{len(differing)} differ from {RESULTS.name}: {', '.join(differing)}")
        return int(bool(faulty or differing))
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    return int(bool(faulty))


if __name__ == "__main__":
    sys.exit(main())
