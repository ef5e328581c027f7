"""Name a model's modules as transformers names them once it has loaded the model.

Since 4.52 transformers nests the language model of every multimodal class inside `model`; models
of audio followed after 5.0. Checkpoints of the families below that were saved earlier, or that are
still saved under their published names, are renamed while they load. In every other class, even in
one that brings its own code, modules have the names that their tensors have.
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
"""The model types whose language model is renamed, by its old and its new prefix.

tests/outputs/test_adapter.py compares this with the tables of the installed transformers.
"""


def module_name(tensor: str, *, prefix: str, config: Mapping[str, Any] | None) -> str:
    """Return the name of the module that holds a weight of the language model.

    Parameters
    ----------
    tensor
        The weight's name on disk, such as "language_model.model.layers.0.self_attn.q_proj.weight".
    prefix
        The names' beginning, up to and including "layers.", as `Coverage.prefixes` has it.
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
