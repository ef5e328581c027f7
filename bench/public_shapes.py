"""Write the shapes of the public models that docs/examples names, without their weights.

    python bench/public_shapes.py

Each model of `MODELS` is built by transformers on the device "meta", from the values of its public
config.json, and the names of its tensors are brought into those of its files on the Hub. What is
written, docs/examples/shapes.json, has for each model its config, its dtype, and the shape of each
tensor, with one entry for all layers that are alike. tests/test_examples.py makes sparse files of
it, and plans every example on them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

SHAPES = Path(__file__).parents[1] / "docs" / "examples" / "shapes.json"
LLAMA_2: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
LLAMA_3 = LLAMA_2 | {
    "vocab_size": 128256,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}
LLAMA_31 = LLAMA_3 | {"max_position_embeddings": 131072}
QWEN2_7B: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
}
QWEN2_MATH = QWEN2_7B | {"max_position_embeddings": 4096, "rope_theta": 10000.0}
QWEN25_3B = QWEN2_7B | {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}
QWEN25_32B = QWEN2_7B | {
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "num_hidden_layers": 64,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
}
QWEN3_4B = QWEN2_7B | {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}
MISTRAL_24B: dict[str, Any] = {
    "model_type": "mistral",
    "vocab_size": 131072,
    "hidden_size": 5120,
    "intermediate_size": 32768,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
}
CLIP: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
QWEN25_EYE: dict[str, Any] = {
    "model_type": "qwen2_5_vl",
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
}


def qwen25(text: dict[str, Any], **eye: Any) -> dict[str, Any]:
    """The config of a Qwen2.5-VL around a text model."""
    inside = text | {"model_type": "qwen2_5_vl_text", "max_position_embeddings": 128000}
    return {
        "model_type": "qwen2_5_vl",
        "tie_word_embeddings": text["tie_word_embeddings"],
        "text_config": inside,
        "vision_config": QWEN25_EYE | {"out_hidden_size": text["hidden_size"]} | eye,
    }


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "meta-llama/Llama-2-7b-hf": ("float16", LLAMA_2),
    "meta-math/MetaMath-7B-V1.0": ("float16", LLAMA_2 | {"vocab_size": 32001}),
    "llava-hf/llava-1.5-7b-hf": (
        "float16",
        {
            "model_type": "llava",
            "tie_word_embeddings": False,
            "text_config": LLAMA_2 | {"vocab_size": 32064},
            "vision_config": CLIP | {"vocab_size": 32000},
        },
    ),
    "meta-llama/Meta-Llama-3-8B": ("bfloat16", LLAMA_3),
    "hkust-nlp/dart-math-llama3-8b-prop2diff": ("bfloat16", LLAMA_3),
    "llava-hf/llama3-llava-next-8b-hf": (
        "float16",
        {
            "model_type": "llava_next",
            "tie_word_embeddings": False,
            "text_config": LLAMA_3 | {"vocab_size": 128320},
            "vision_config": CLIP,
        },
    ),
    "meta-llama/Llama-3.1-8B": ("bfloat16", LLAMA_31),
    "nvidia/OpenMath2-Llama3.1-8B": ("bfloat16", LLAMA_31),
    "HuggingFaceM4/Idefics3-8B-Llama3": (
        "bfloat16",
        {
            "model_type": "idefics3",
            "scale_factor": 2,
            "tie_word_embeddings": False,
            "text_config": LLAMA_31 | {"vocab_size": 128259, "pad_token_id": 128002},
            "vision_config": {
                "model_type": "idefics3_vision",
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_hidden_layers": 27,
                "num_attention_heads": 16,
                "image_size": 364,
                "patch_size": 14,
            },
        },
    ),
    "Qwen/Qwen2-7B": ("bfloat16", QWEN2_7B),
    "Qwen/Qwen2-Math-7B": ("bfloat16", QWEN2_MATH),
    "Qwen/Qwen2-VL-7B-Instruct": (
        "bfloat16",
        {
            "model_type": "qwen2_vl",
            "tie_word_embeddings": False,
            "text_config": QWEN2_7B
            | {"model_type": "qwen2_vl_text", "max_position_embeddings": 32768},
            "vision_config": {
                "model_type": "qwen2_vl",
                "depth": 32,
                "embed_dim": 1280,
                "hidden_size": 3584,
                "mlp_ratio": 4,
                "num_heads": 16,
                "patch_size": 14,
            },
        },
    ),
    "Qwen/Qwen2.5-3B": ("bfloat16", QWEN25_3B),
    "Qwen/Qwen2.5-3B-Instruct": ("bfloat16", QWEN25_3B),
    "Qwen/Qwen2.5-VL-3B-Instruct": ("bfloat16", qwen25(QWEN25_3B)),
    "Qwen/Qwen2.5-7B": ("bfloat16", QWEN2_7B),
    "Qwen/Qwen2.5-Math-7B": ("bfloat16", QWEN2_MATH),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": (
        "bfloat16",
        QWEN2_MATH | {"max_position_embeddings": 131072},
    ),
    "Qwen/Qwen2.5-VL-7B-Instruct": ("bfloat16", qwen25(QWEN2_7B)),
    "Qwen/Qwen2.5-32B": ("bfloat16", QWEN25_32B),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B": ("bfloat16", QWEN25_32B),
    "Qwen/Qwen2.5-VL-32B-Instruct": ("bfloat16", qwen25(QWEN25_32B, intermediate_size=3456)),
    "Qwen/Qwen3-4B-Base": ("bfloat16", QWEN3_4B | {"max_position_embeddings": 32768}),
    "Qwen/Qwen3-4B": ("bfloat16", QWEN3_4B),
    "POLARIS-Project/Polaris-4B-Preview": ("bfloat16", QWEN3_4B),
    "Qwen/Qwen3-VL-4B-Instruct": (
        "bfloat16",
        {
            "model_type": "qwen3_vl",
            "tie_word_embeddings": True,
            "text_config": QWEN3_4B
            | {
                "model_type": "qwen3_vl_text",
                "max_position_embeddings": 262144,
                "rope_theta": 5000000.0,
            },
            "vision_config": {
                "model_type": "qwen3_vl",
                "depth": 24,
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_heads": 16,
                "out_hidden_size": 2560,
                "patch_size": 16,
                "num_position_embeddings": 2304,
                "deepstack_visual_indexes": [5, 11, 17],
            },
        },
    ),
    "hkust-nlp/Qwen-2.5-7B-SimpleRL-Zoo": ("bfloat16", QWEN2_7B),
    "OpenGVLab/InternVL3-8B-hf": (
        "bfloat16",
        {
            "model_type": "internvl",
            "tie_word_embeddings": False,
            "text_config": QWEN2_7B | {"vocab_size": 151674, "max_position_embeddings": 32768},
            "vision_config": {
                "model_type": "internvl_vision",
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "attention_bias": True,
                "image_size": [448, 448],
                "patch_size": [14, 14],
            },
        },
    ),
    "mistralai/Mistral-Small-24B-Base-2501": ("bfloat16", MISTRAL_24B),
    "NousResearch/DeepHermes-3-Mistral-24B-Preview": ("bfloat16", MISTRAL_24B),
    "mistralai/Mistral-Small-3.1-24B-Instruct-2503": (
        "bfloat16",
        {
            "model_type": "mistral3",
            "tie_word_embeddings": False,
            "text_config": MISTRAL_24B
            | {"max_position_embeddings": 131072, "rope_theta": 1000000000.0},
            "vision_config": {
                "model_type": "pixtral",
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "head_dim": 64,
                "image_size": 1540,
                "patch_size": 14,
            },
        },
    ),
}
_RENAMED: dict[str, list[tuple[str, str]]] = {
    "qwen2_vl": [(r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual.")],
    "qwen2_5_vl": [(r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual.")],
    "qwen3_vl": [],
    "idefics3": [],
}
_OLDER = [
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.", ""),
]
"""Names on the Hub of models that older versions of transformers saved."""


def shapes(model: str) -> dict[str, Any]:
    """The config, dtype and tensors of a model; `*` in a name stands for all of `layers`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    dtype, config = MODELS[model]
    kind = AutoConfig.for_model(**config)
    sees = "vision_config" in config
    loader = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    with torch.device("meta"):
        built = loader.from_config(kind)
    tied = {"lm_head.weight"} if config["tie_word_embeddings"] else set()
    rules = _RENAMED.get(config["model_type"], _OLDER) if sees else []
    found: dict[str, dict[str, list[int]]] = {}
    for name, tensor in built.state_dict().items():
        if name in tied:
            continue
        for pattern, place in rules:
            name = re.sub(pattern, place, name)
        found.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", name, count=1), {})[name] = list(
            tensor.shape
        )
    tensors = {}
    for key, group in found.items():
        names = [key.replace("*", str(layer)) for layer in range(len(group))]
        if "*" in key and set(group) == set(names) and len(set(map(tuple, group.values()))) == 1:
            tensors[key] = [len(group), *group[names[0]]]
        else:
            tensors |= {name: [1, *shape] for name, shape in group.items()}
    architecture = type(built).__name__
    return {
        "dtype": dtype,
        "config": config | {"architectures": [architecture]},
        "tensors": tensors,
    }


def main() -> None:
    lines = [f" {json.dumps(model)}: {json.dumps(shapes(model))}" for model in MODELS]
    SHAPES.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print(SHAPES.relative_to(SHAPES.parents[2]))


if __name__ == "__main__":
    main()
