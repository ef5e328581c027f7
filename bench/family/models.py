"""The three architectures, their tokenizer and their processor, from transformers' own classes."""

from __future__ import annotations

import string
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from lean_merge.demo.tasks import PATCH_SIDE, PICTURE_SIDE

SPECIALS = ("<pad>", "<s>", "</s>", "<unk>")
CHARACTERS = string.digits + "+-*/=:,.?! " + string.ascii_lowercase
IMAGE_TOKEN = "<image>"
LLM_ROWS = len(SPECIALS) + len(CHARACTERS)
MLLM_ROWS = 64  # padded past the image token, as LLaVA pads 32001 to 32064


def make_tokenizer(*, with_image: bool) -> PreTrainedTokenizerFast:
    """Build the character tokenizer; the MLLM's adds ``<image>`` after the shared ids."""
    vocabulary = {token: i for i, token in enumerate((*SPECIALS, *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=64,
    )
    if with_image:
        fast.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    return fast


def make_processor() -> LlavaProcessor:
    """Build the MLLM's processor on the PIL backend, which does without torchvision."""
    image_processor = CLIPImageProcessorPil(
        do_resize=False,
        do_center_crop=False,
        size={"height": PICTURE_SIDE, "width": PICTURE_SIDE},
        crop_size={"height": PICTURE_SIDE, "width": PICTURE_SIDE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=make_tokenizer(with_image=True),
        patch_size=PATCH_SIDE,
        vision_feature_select_strategy="default",
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,  # the tower's class token, which "default" then drops
    )


def make_llm() -> LlamaForCausalLM:
    """Build the untrained base."""
    return LlamaForCausalLM(_llm_config(LLM_ROWS))


def tower_config() -> CLIPVisionConfig:
    """The vision tower of the MLLMs of both families."""
    return CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=PICTURE_SIDE,
        patch_size=PATCH_SIDE,
        projection_dim=96,
    )


def make_mllm(base: LlamaForCausalLM) -> LlavaForConditionalGeneration:
    """Build an MLLM whose language model is the base; tower and projector are untrained."""
    config = LlavaConfig(
        vision_config=tower_config(),
        text_config=_llm_config(MLLM_ROWS),
        image_token_index=LLM_ROWS,
        image_seq_length=(PICTURE_SIDE // PATCH_SIDE) ** 2,
        vision_feature_layer=-1,
    )
    config.pad_token_id, config.bos_token_id, config.eos_token_id = 0, 1, 2
    mllm = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for name, weight in base.model.named_parameters():
            target = mllm.model.language_model.get_parameter(name)
            target[: len(weight)].copy_(weight)
        mllm.lm_head.weight[:LLM_ROWS].copy_(base.lm_head.weight)
    return mllm


def save(model: LlamaForCausalLM | LlavaForConditionalGeneration, folder: Path) -> None:
    """Save a model in bf16 with everything it needs to load from this folder alone."""
    model.to(torch.bfloat16)
    model.save_pretrained(folder)
    if isinstance(model, LlavaForConditionalGeneration):
        make_processor().save_pretrained(folder)
    else:
        make_tokenizer(with_image=False).save_pretrained(folder)


def _llm_config(rows: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=rows,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
