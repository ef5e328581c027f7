"""What a model's modules are called once transformers has loaded it, where the files differ.

Since 4.52 transformers nests the language model of every multimodal class inside `model`; models
that hear joined them after 5.0. Checkpoints of the families below that were saved before, or that
are saved under their published names still, are renamed while they load. Every other class, those
with code of their own included, has modules named as its tensors are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_NESTED = "model.language_model."
_RENAMED: Mapping[tuple[str, str], frozenset[str]] = {
    ("language_model.model.", _NESTED): frozenset(
        {
            "aria",
            "audioflamingo3",
            "aya_vision",
            "fuyu",
            "gemma3",
            "glmasr",
            "got_ocr2",
            "granite_speech",
            "granite_speech_plus",
            "internvl",
            "kimi_k25",
            "llava",
            "llava_next",
            "llava_next_video",
            "llava_onevision",
            "minimax_m3_vl",
            "mistral3",
            "mllama",
            "musicflamingo",
            "paligemma",
            "pp_chart2table",
            "qianfan_ocr",
            "qwen2_audio",
            "vibevoice_asr",
            "video_llava",
            "vipllava",
            "voxtral",
            "voxtral_realtime",
        }
    ),
    ("model.", _NESTED): frozenset(
        {
            "deepseek_ocr2",
            "ernie4_5_vl_moe",
            "hunyuan_vl",
            "paddleocr_vl",
            "qwen2_5_omni_thinker",
            "qwen2_5_vl",
            "qwen2_vl",
            "qwen3_omni_moe_thinker",
            "step3p7",
            "unlimited_ocr",
        }
    ),
    ("text_model.model.", "model.text_model."): frozenset({"emu3"}),
}
"""Model types whose language model moves, by the prefixes from which and to which it does.

tests/outputs/test_adapter.py compares this with the tables of the installed transformers.
"""


def module_name(tensor: str, *, prefix: str, config: Mapping[str, Any] | None) -> str:
    """The module that holds a weight of the language model.

    Parameters
    ----------
    tensor
        The weight's name on the disk: "language_model.model.layers.0.self_attn.q_proj.weight".
    prefix
        Up to and with "layers.", as `Coverage.prefixes` has it.
    config
        The content of the model's config.json.
    """
    name = tensor.removesuffix(".weight")
    before = prefix.removesuffix("layers.")
    kind = (config or {}).get("model_type")
    for (stored, nested), kinds in _RENAMED.items():
        if before == stored and isinstance(kind, str) and kind in kinds:
            return nested + name.removeprefix(before)
    return name
