"""Tiny models of transformers' own classes, text alone and multimodal, with random weights."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from support.layouts import EXPERT_INNER, EXPERTS, HEADS, INNER, LAYERS, PAIRS, SIZE

TEXT = dict(
    hidden_size=64,
    intermediate_size=INNER,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    num_key_value_heads=PAIRS,
    vocab_size=96,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
HEAD = {"head_dim": SIZE}
SPARSE = dict(num_experts=EXPERTS, num_experts_per_tok=2, moe_intermediate_size=EXPERT_INNER)
VISION = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=16,
    patch_size=8,
)
QWEN_VISION = dict(
    depth=2,
    hidden_size=32,
    intermediate_size=48,
    num_heads=4,
    out_hidden_size=64,
    patch_size=8,
    spatial_merge_size=2,
)
DEEPSTACK = QWEN_VISION | dict(deepstack_visual_indexes=[0], num_position_embeddings=16)
MROPE = dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3])
ROPE = dict(rope_type="default", rope_theta=1e4)
IMAGE = 90
"""Any token of the vocabulary may stand for the image."""


def text_config(kind: str, **changes: Any) -> Any:
    """The configuration of a text model."""
    import transformers as tf

    own: dict[str, dict[str, Any]] = {
        "Gemma": HEAD,
        "Gemma3Text": HEAD,
        "Llama4Text": HEAD
        | dict(intermediate_size_mlp=80, num_local_experts=EXPERTS, num_experts_per_tok=1)
        | dict(interleave_moe_layer_step=1),
        "Mixtral": dict(num_local_experts=EXPERTS),
        "Qwen2Moe": SPARSE | dict(shared_expert_intermediate_size=32),
        "Qwen3": HEAD,
        "Qwen3Moe": SPARSE | HEAD,
    }
    return getattr(tf, f"{kind}Config")(**TEXT | own.get(kind, {}) | changes)


def text_model(kind: str) -> Any:
    """A text model with a head."""
    import transformers as tf

    return getattr(tf, f"{kind.removesuffix('Text')}ForCausalLM")(text_config(kind))


def joined(kind: str, text: str, vision: Mapping[str, Any] | str = "clip", **more: Any) -> Any:
    """An MLLM whose configuration joins a vision and a text configuration."""
    import transformers as tf

    towers = {
        "clip": partial(tf.CLIPVisionConfig, **VISION, projection_dim=16),
        "siglip": partial(tf.SiglipVisionConfig, **VISION),
        "pixtral": partial(tf.PixtralVisionConfig, **VISION),
    }
    vision_config = towers[vision]() if isinstance(vision, str) else dict(vision)
    config = getattr(tf, f"{kind}Config")(
        text_config=text_config(text, vocab_size=104), vision_config=vision_config, **more
    )
    return getattr(tf, f"{kind}ForConditionalGeneration")(config)


def qwen(kind: str, vision: Mapping[str, Any], **text: Any) -> Any:
    """A Qwen-VL, whose text configuration is part of its own."""
    import transformers as tf

    config = getattr(tf, f"{kind}Config")(
        text_config=TEXT | {"rope_parameters": MROPE} | text, vision_config=dict(vision)
    )
    return getattr(tf, f"{kind}ForConditionalGeneration")(config)


def mllama() -> Any:
    """Cross-attention stands between the two layers of the base, and after them."""
    import transformers as tf

    text = TEXT | dict(
        num_hidden_layers=LAYERS + 2, cross_attention_layers=[1, 3], rope_parameters=ROPE
    )
    vision = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_global_layers=1,
        attention_heads=4,
        image_size=16,
        patch_size=8,
        max_num_tiles=1,
        supported_aspect_ratios=[[1, 1]],
        intermediate_layers_indices=[0],
        vision_output_dim=64,
    )
    return tf.MllamaForConditionalGeneration(
        tf.MllamaConfig(text_config=text, vision_config=vision, image_token_index=95)
    )


def phi4_multimodal() -> Any:
    """Phi-4-multimodal, with its ears."""
    import transformers as tf

    audio = dict(
        hidden_size=32,
        intermediate_size=48,
        num_blocks=2,
        num_attention_heads=4,
        ext_pw_out_channel=32,
        depthwise_separable_out_channel=32,
        nemo_conv_channels=32,
        input_size=16,
    )
    return tf.Phi4MultimodalForCausalLM(
        tf.Phi4MultimodalConfig(
            **TEXT, vision_config=VISION | {"crop_size": 16}, audio_config=audio
        )
    )


LLAVA = dict(image_token_index=IMAGE)
IDEFICS2 = dict(
    image_token_id=IMAGE,
    perceiver_config=dict(
        hidden_size=64,
        resampler_n_latents=2,
        resampler_depth=1,
        resampler_n_heads=4,
        resampler_head_dim=16,
        num_key_value_heads=2,
    ),
)
IDEFICS3 = dict(image_token_id=IMAGE, pad_token_id=0)
GEMMA3 = dict(
    mm_tokens_per_image=4, image_token_index=IMAGE, boi_token_index=91, eoi_token_index=92
)
AYA = dict(image_token_index=IMAGE, adapter_layer_norm_eps=1e-5, alignment_intermediate_size=64)
INTERN_VISION = VISION | dict(image_size=[16, 16], patch_size=[8, 8])
LLAMA4_VISION = VISION | dict(
    intermediate_size=128, vision_output_dim=32, projector_input_dim=32, projector_output_dim=32
)
