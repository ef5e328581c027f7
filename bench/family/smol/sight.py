"""The MLLM: LLaVA with a small CLIP tower before SmolLM2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from models import tower_config
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from worksheets import IMAGE, PATCHES

from lean_merge.demo.tasks import PATCH_SIDE, PICTURE_SIDE

PADDED_TO = 64  # rows of the vocabulary, past the image token, as LLaVA pads 32001 to 32064


def make_mllm(base: LlamaForCausalLM) -> LlavaForConditionalGeneration:
    """Build an MLLM whose language model is the base; tower and projector are untrained."""
    rows = base.config.vocab_size
    text = type(base.config).from_dict({**base.config.to_dict(), "vocab_size": rows + PADDED_TO})
    config = LlavaConfig(
        vision_config=tower_config(),
        text_config=text,
        image_token_index=rows,
        image_seq_length=PATCHES,
        vision_feature_layer=-1,
        tie_word_embeddings=base.config.tie_word_embeddings,
    )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(base.config, name))
    config._attn_implementation = "eager"
    mllm = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for name, weight in base.model.named_parameters():
            target = mllm.model.language_model.get_parameter(name)
            target[: len(weight)].copy_(weight)
    return mllm


def make_processor(base: Path) -> LlavaProcessor:
    """Build the MLLM's processor: the base's tokenizer with the image token after its own."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    side = {"height": PICTURE_SIDE, "width": PICTURE_SIDE}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            do_resize=False,
            do_center_crop=False,
            size=side,
            crop_size=side,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        ),
        tokenizer=tokenizer,
        patch_size=PATCH_SIDE,
        vision_feature_select_strategy="default",
        image_token=IMAGE,
        num_additional_image_tokens=1,  # the tower's class token, which "default" then drops
    )


def in_scope(model: Any) -> dict[str, torch.nn.Parameter]:
    """The language model's 2-D weights of attention and MLP, by their names within it."""
    language_model = getattr(model.model, "language_model", model.model)
    return {
        name: weight
        for name, weight in language_model.named_parameters()
        if "layers." in name and weight.dim() == 2
    }
