"""What a model's modules are called once transformers has loaded it, where the files differ.

Since 4.52 transformers nests the language model of every multimodal class at
`model.language_model`. Checkpoints of the families below that were saved before, or that are saved
under their published names still, are renamed while they load. Every other class, those with code
of their own included, has modules named as its tensors are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_NESTED = "model.language_model."
_RENAMED: Mapping[str, frozenset[str]] = {
    "language_model.model.": frozenset(
        {
            "aria",
            "aya_vision",
            "fuyu",
            "gemma3",
            "got_ocr2",
            "internvl",
            "llava",
            "llava_next",
            "llava_next_video",
            "llava_onevision",
            "mistral3",
            "mllama",
            "paligemma",
            "video_llava",
            "vipllava",
        }
    ),
    "model.": frozenset({"qwen2_vl", "qwen2_5_vl"}),
}
"""Model types whose language model moves to `model.language_model.`, by the prefix it moves from.

tests/test_adapter.py compares this with the table of the installed transformers.
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
    if (config or {}).get("model_type") in _RENAMED.get(before, frozenset()):
        return _NESTED + name.removeprefix(before)
    return name
