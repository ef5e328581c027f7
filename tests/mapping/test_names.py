"""Finding the language model in each role, and refusing roles that do not share one foundation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.checkpoint_files import decoder_shapes, save_checkpoint, tower_shapes

from lean_merge.checkpoints import Checkpoint, open_checkpoint
from lean_merge.checkpoints.rows import row_block
from lean_merge.errors import CoverageError
from lean_merge.mapping import language_layout, map_roles

EXTRA = {"model.embed_tokens.weight": (32, 16), "lm_head.weight": (32, 16)}
FAMILIES: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {
    "LLaVA": ("language_model.model.", tower_shapes("vision_tower.vision_model.encoder.")),
    "LLaVA, newer": ("model.language_model.", tower_shapes("model.vision_tower.encoder.")),
    "LLaVA, original": (
        "model.",
        tower_shapes("model.vision_tower.vision_tower.vision_model.encoder."),
    ),
    "Qwen2-VL": (
        "model.",
        {f"visual.blocks.{n}.mlp.gate_proj.weight": (24, 16) for n in range(2)},
    ),
    "Qwen3-VL": ("model.language_model.", {"model.visual.blocks.0.attn.qkv.weight": (48, 16)}),
    "SmolVLM": ("model.text_model.", tower_shapes("model.vision_model.encoder.", layers=3)),
    "InternVL": (
        "language_model.model.",
        {"vision_model.encoder.layers.0.attn.qkv.weight": (48, 16), "mlp1.1.weight": (16, 16)},
    ),
    "Pixtral": (
        "language_model.model.",
        {
            f"vision_tower.transformer.layers.{n}.{rest}.weight": (16, 16)
            for n in range(4)
            for rest in ("attention.q_proj", "attention.o_proj", "feed_forward.gate_proj")
        },
    ),
}
Build = Callable[..., Checkpoint]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    def make(name: str, shapes: dict[str, tuple[int, ...]], **options: Any) -> Checkpoint:
        return open_checkpoint(save_checkpoint(tmp_path / name, shapes, **options))

    return make


def config(**changes: Any) -> dict[str, Any]:
    return {
        "hidden_size": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
    } | changes


@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    layers=st.integers(1, 12),
    shards=st.integers(1, 3),
    experts=st.integers(1, 2),
    order=st.randoms(use_true_random=False),
)
def test_every_family_is_mapped_whole(
    tmp_path_factory: pytest.TempPathFactory,
    family: str,
    layers: int,
    shards: int,
    experts: int,
    order: Any,
):
    folder = tmp_path_factory.mktemp("family")
    prefix, rest = FAMILIES[family]
    text = decoder_shapes(layers=layers) | EXTRA
    both = list((decoder_shapes(prefix, layers=layers) | rest).items())
    order.shuffle(both)
    base = open_checkpoint(save_checkpoint(folder / "base", text))
    mllm = open_checkpoint(save_checkpoint(folder / "mllm", dict(both), shards=shards))
    tuned = [open_checkpoint(save_checkpoint(folder / f"e{n}", text)) for n in range(experts)]
    coverage = map_roles(base, mllm, tuned)
    assert coverage.prefixes["mllm"] == f"{prefix}layers."
    assert coverage.prefixes["base"] == coverage.prefixes[f"expert {experts}"] == "model.layers."
    assert coverage.left_out == ()
    assert len(coverage.weights) == 7 * layers
    for weight in coverage.weights:
        (whole,) = weight.slices
        assert weight.mllm.name == f"{prefix}{whole.canonical}.weight"
        assert {each.name for each in (whole.base, *whole.experts)} == {
            f"model.{whole.canonical}.weight"
        }
        assert len(whole.experts) == experts
        assert whole.place == row_block(weight.mllm)
    places = [list(mllm.tensors).index(weight.mllm.name) for weight in coverage.weights]
    assert places == sorted(places)


TEXT = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=64,
    pad_token_id=0,
)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """Tiny models of transformers' own classes, as its save_pretrained writes them."""
    import transformers as tf

    folder = tmp_path_factory.mktemp("saved")
    vision = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
        projection_dim=16,
    )
    qwen_text = TEXT | {"rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}}
    qwen_vision = dict(
        depth=2,
        hidden_size=32,
        intermediate_size=48,
        num_heads=4,
        out_hidden_size=32,
        patch_size=8,
        spatial_merge_size=2,
    )
    moe = dict(
        num_experts=3,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
        num_experts_per_tok=2,
    )
    makers: dict[str, Callable[[], Any]] = {
        "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT)),
        "llava": lambda: tf.LlavaForConditionalGeneration(
            tf.LlavaConfig(
                text_config=tf.LlamaConfig(**TEXT),
                vision_config=tf.CLIPVisionConfig(**vision),
                image_token_index=63,
            )
        ),
        "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**TEXT)),
        "qwen2_5_vl": lambda: tf.Qwen2_5_VLForConditionalGeneration(
            tf.Qwen2_5_VLConfig(text_config=qwen_text, vision_config=qwen_vision)
        ),
        "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**TEXT)),
        "moe": lambda: tf.Qwen2MoeForCausalLM(tf.Qwen2MoeConfig(**TEXT, **moe)),
    }

    def get(name: str) -> Checkpoint:
        if not (folder / name).exists():
            with torch.device("cpu"):
                makers[name]().save_pretrained(folder / name)
        return open_checkpoint(folder / name)

    return get


@pytest.mark.parametrize(
    ("base", "mllm", "count"),
    [
        ("llama", "llava", 14),
        ("qwen2", "qwen2_5_vl", 14),
        ("phi3", "phi3", 8),
        ("moe", "moe", 2 * (4 + 3 * 3 + 3)),
    ],
)
def test_models_of_transformers_are_mapped_whole(saved: Any, base: str, mllm: str, count: int):
    coverage = map_roles(saved(base), saved(mllm), [saved(base)])
    assert len(coverage.weights) == count
    names = {weight.mllm.name for weight in coverage.weights}
    assert not any("vision" in name or "visual" in name for name in names)
    assert not any(name.endswith(("gate.weight", "norm.weight")) for name in names)


def test_the_configs_of_transformers_5_are_understood(saved: Any):
    coverage = map_roles(saved("qwen2"), saved("qwen2_5_vl"), [saved("llama")])
    text = " ".join(coverage.warnings)
    assert "rope_theta is 10000 in the base and 1e+06 in the MLLM" in text
    assert "expert 1" not in text


def test_fused_weights_are_split_by_the_config(saved: Any):
    coverage = map_roles(saved("phi3"), saved("phi3"), [saved("phi3")])
    places = {each.canonical: each.place for w in coverage.weights for each in w.slices}
    rows = {name: (each.first // 32, each.shape[0]) for name, each in places.items()}
    assert rows["layers.1.self_attn.q_proj"] == (0, 32)
    assert rows["layers.1.self_attn.k_proj"] == (32, 16)
    assert rows["layers.1.self_attn.v_proj"] == (48, 16)
    assert rows["layers.1.mlp.gate_proj"] == (0, 48)
    assert rows["layers.1.mlp.up_proj"] == (48, 48)
    assert all(each.run == each.shape[0] and not each.width for each in places.values())
    assert coverage.warnings == ()


@pytest.mark.parametrize("stated", [None, {"num_attention_heads": 5, "hidden_size": 16}])
def test_a_fused_weight_without_usable_config_is_whole_and_warned_of(build: Build, stated: Any):
    shapes = {
        f"model.layers.{n}.self_attn.{leaf}.weight": (32, 16)
        for n in range(2)
        for leaf in ("qkv_proj", "wqkv")
    }
    roles = [build(name, shapes, config=stated) for name in "bme"]
    coverage = map_roles(roles[0], roles[1], roles[2:])
    assert all(len(weight.slices) == 1 for weight in coverage.weights)
    assert {w.slices[0].canonical for w in coverage.weights} >= {"layers.0.self_attn.qkv_proj"}
    assert len(coverage.warnings) == 2
    assert all(each.startswith("2 fused") for each in coverage.warnings)


def test_internlm2_and_mixtral_names_are_in_scope(build: Build):
    shapes = {
        f"model.layers.0.{rest}.weight": (16, 16)
        for rest in (
            "attention.wqkv",
            "attention.wo",
            "feed_forward.w1",
            "block_sparse_moe.experts.0.w2",
            "mlp.shared_experts.down_proj",
        )
    }
    out = {"model.layers.0.block_sparse_moe.gate.weight": (4, 16)}
    roles = [build(name, shapes | out) for name in "bme"]
    coverage = map_roles(roles[0], roles[1], roles[2:])
    assert {weight.mllm.name for weight in coverage.weights} == set(shapes)


def test_a_tower_with_equal_names_and_shapes_is_ambiguous(build: Build):
    base = build("b", decoder_shapes())
    twin = decoder_shapes("first.model.") | decoder_shapes("second.")
    with pytest.raises(CoverageError) as caught:
        map_roles(base, build("m", twin), [base])
    assert "'first.model.layers.', 'second.layers.'" in str(caught.value)
    named = decoder_shapes("language_model.model.") | decoder_shapes("vision_tower.")
    assert map_roles(base, build("n", named), [base]).prefixes["mllm"] == (
        "language_model.model.layers."
    )


def test_shapes_tell_a_tower_from_the_language_model(build: Build):
    base = build("b", decoder_shapes())
    mllm = build("m", decoder_shapes("text.") | decoder_shapes("tower.", inner=40, layers=2))
    assert map_roles(base, mllm, [base]).prefixes["mllm"] == "text.layers."


def test_a_tower_never_stands_in_for_a_language_model(build: Build):
    base = build("b", decoder_shapes())
    mllm = build("m", tower_shapes("vision.encoder.") | {"model.h.0.c_attn.weight": (48, 16)})
    for allow in (False, True):
        with pytest.raises(CoverageError, match=r"'model\.h\.', but they lack mlp"):
            map_roles(base, mllm, [base], allow_partial=allow)


def test_a_multimodal_base_is_read_by_its_language_model(build: Build):
    prefix, rest = FAMILIES["LLaVA"]
    both = build("b", decoder_shapes(prefix) | rest)
    coverage = map_roles(both, both, [build("e", decoder_shapes())])
    assert coverage.prefixes["base"] == f"{prefix}layers."
    assert len(coverage.weights) == 14


@pytest.mark.parametrize("role", ["base", "mllm", "expert"])
def test_a_role_without_layers_is_refused(build: Build, role: str):
    good, bad = build("g", decoder_shapes()), build("x", EXTRA)
    roles = {"base": good, "mllm": good, "expert": good} | {role: bad}
    with pytest.raises(CoverageError, match=r"/x: the (base|MLLM|expert 1) has no"):
        map_roles(roles["base"], roles["mllm"], [roles["expert"]])


def without(shapes: dict[str, tuple[int, ...]], *names: str) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in shapes.items() if name not in names}


@pytest.mark.parametrize("role", ["MLLM", "expert 1"])
def test_the_gate_names_what_a_role_lacks(build: Build, role: str):
    base = build("b", decoder_shapes())
    lacking = build("l", without(decoder_shapes(), "model.layers.1.mlp.up_proj.weight"))
    roles = (lacking, [base]) if role == "MLLM" else (base, [lacking])
    line = f"layers.1.mlp.up_proj: the {role} lacks it"
    with pytest.raises(CoverageError) as caught:
        map_roles(base, *roles)
    assert line in str(caught.value)
    assert "at 1 places" in str(caught.value)
    assert "--allow-partial" in str(caught.value)
    coverage = map_roles(base, *roles, allow_partial=True)
    assert coverage.left_out == (line,)
    assert len(coverage.weights) == 13


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden": 32}, "hidden size 16 in the base, 32 in the MLLM"),
        ({"inner": 40}, "intermediate size 24 in the base, 40 in the MLLM"),
        ({"pairs": 4}, "key/value width 8 in the base, 4 in the MLLM"),
        ({"layers": 1}, "number of layers 2 in the base, 1 in the MLLM"),
        ({"layers": 3}, "number of layers 2 in the base, 3 in the MLLM"),
    ],
)
def test_the_gate_says_in_words_which_sizes_differ(build: Build, changes: Any, words: str):
    base = build("b", decoder_shapes())
    with pytest.raises(CoverageError) as caught:
        map_roles(base, build("m", decoder_shapes("text.", **changes)), [base])
    assert words in str(caught.value)


def test_the_gate_shows_each_kind_with_its_count(build: Build):
    base = build("b", decoder_shapes(layers=4))
    with pytest.raises(CoverageError) as caught:
        map_roles(base, base, [build("e", decoder_shapes(layers=4, hidden=32))])
    message = str(caught.value)
    assert "at 28 places" in message
    assert message.count("\n  layers.*.") == message.count(" (4 times)") == 7
    assert "has the shape [32, 32], the base [16, 16]" in message
    assert "--allow-partial" not in message


def test_nothing_in_common_is_an_error_even_when_partial_is_allowed(build: Build):
    base = build("b", decoder_shapes())
    with pytest.raises(CoverageError):
        map_roles(base, build("m", decoder_shapes(hidden=32)), [base], allow_partial=True)


def test_a_deeper_role_is_refused_and_reported_when_partial_is_allowed(build: Build):
    base = build("b", decoder_shapes())
    deep = build("m", decoder_shapes(layers=3))
    with pytest.raises(CoverageError, match="has 3 layers, the base only 2"):
        map_roles(base, base, [deep])
    coverage = map_roles(base, deep, [base], allow_partial=True)
    assert len(coverage.weights) == 14
    assert len(coverage.left_out) == 1


STACK = "model.layers.0.mlp.experts."


@pytest.mark.parametrize(
    ("shapes", "why"),
    [
        ({"gate_up_proj": (4, 24, 8)}, "gate_up_proj [4, 24, 8]"),
        ({"gate_up_proj": (4, 16, 16)}, "gate_up_proj [4, 16, 16]"),
        ({"gate_proj": (4, 16, 16), "down_proj": (4, 16, 16)}, "down_proj [4, 16, 16]"),
        ({"gate_up_proj": (4, 24, 16), "down_proj": (4, 16, 8)}, "that fit no layout"),
        ({"gate_up_proj": (4, 24, 16), "down_proj": (3, 16, 12)}, "that fit no layout"),
        ({"gate_up_proj": (4, 23, 16)}, "that fit no layout"),
        ({"gate_up_proj": (4, 24, 16), "gate_up_proj_bias": (4, 24)}, "may be interleaved"),
        ({"down_proj": (4, 2, 16, 8)}, "layout that is not known"),
        ({"mlp.w1": (4, 16, 8)}, "layout that is not known"),
    ],
)
def test_a_stack_of_experts_that_cannot_be_told_apart_is_refused_by_name(
    build: Build, shapes: dict[str, tuple[int, ...]], why: str
):
    stack = {f"{STACK}{leaf}": shape for leaf, shape in shapes.items()}
    roles = [build(name, decoder_shapes() | stack) for name in "bme"]
    with pytest.raises(CoverageError) as caught:
        map_roles(roles[0], roles[1], roles[2:])
    assert f"{next(iter(stack))}: the base stores these experts in one tensor" in str(caught.value)
    assert why in str(caught.value)
    coverage = map_roles(roles[0], roles[1], roles[2:], allow_partial=True)
    assert len(coverage.weights) == 14


@pytest.mark.parametrize("bad", ["base", "mllm"])
def test_a_dtype_that_cannot_be_merged_is_refused(build: Build, bad: str):
    good = build("g", decoder_shapes())
    float8 = build("f", decoder_shapes(), dtype=torch.float8_e4m3fn)
    roles = (float8, good) if bad == "base" else (good, float8)
    with pytest.raises(CoverageError, match="dtype F8_E4M3"):
        map_roles(*roles, [good])


@pytest.mark.parametrize("nested", ["", "text_config", "llm_config"])
@pytest.mark.parametrize(
    "change", [{"num_attention_heads": 8}, {"num_key_value_heads": 1}, {"head_dim": 2}]
)
def test_other_heads_are_refused_in_spite_of_equal_shapes(
    build: Build, nested: str, change: dict[str, int]
):
    base = build("b", decoder_shapes(), config=config(head_dim=4))
    theirs = config(head_dim=4) | change
    mllm = build("m", decoder_shapes(), config={nested: theirs} if nested else theirs)
    with pytest.raises(CoverageError, match=f"/m: .*{next(iter(change))}"):
        map_roles(base, mllm, [base], allow_partial=True)


def test_what_a_config_leaves_to_defaults_is_no_difference(build: Build):
    base = build("b", decoder_shapes(), config=config(rope_theta=10000.0))
    mllm = build("m", decoder_shapes(), config={"text_config": {"model_type": "llama"}})
    assert map_roles(base, mllm, [base]).warnings == ()


@pytest.mark.parametrize(
    ("ours", "theirs", "warned"),
    [
        ({"rope_theta": 10000.0}, {"rope_theta": 10000}, False),
        ({"rope_theta": 10000.0}, {"rope_parameters": {"rope_theta": 10000.0}}, False),
        ({"rope_theta": 10000.0}, {"rope_parameters": {"rope_theta": 1000000.0}}, True),
        ({"rope_theta": 1e4}, {"text_config": {"rope_theta": 1e6}}, True),
        ({"hidden_act": "silu"}, {"hidden_act": "gelu"}, True),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
            True,
        ),
        ({"rope_theta": "much"}, {"rope_theta": 1}, False),
    ],
)
def test_differing_configs_are_warned_of(build: Build, ours: Any, theirs: Any, warned: bool):
    base = build("b", decoder_shapes(), config=ours)
    coverage = map_roles(base, build("m", decoder_shapes(), config=theirs), [base])
    assert len(coverage.warnings) == warned
    assert all("MLLM" in warning for warning in coverage.warnings)


def tokenizer(folder: Path, vocabulary: Any, added: Any = ()) -> None:
    content = {"model": {"vocab": vocabulary}, "added_tokens": list(added)}
    (folder / "tokenizer.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("theirs", "added", "warning"),
    [
        ({"a": 0, "b": 1}, [], None),
        ({"a": 0, "b": 1, "new": 2}, [], None),
        ({"a": 1, "b": 0}, [], "share 2 tokens, of which 2 have different ids"),
        ({"a": 0}, [{"content": "b", "id": 7}], "share 2 tokens, of which 1 have"),
        ([["b", 0.0], ["a", -1.0]], [], "share 2 tokens, of which 2 have"),
        (7, 7, None),
    ],
)
def test_moved_tokens_are_counted(build: Build, theirs: Any, added: Any, warning: str | None):
    base, mllm = build("b", decoder_shapes()), build("m", decoder_shapes())
    tokenizer(base.path, {"a": 0, "b": 1})
    tokenizer(mllm.path, theirs, added if isinstance(added, list) else [added])
    warnings = map_roles(base, mllm, [base]).warnings
    if warning is None:
        assert warnings == ()
    else:
        assert len(warnings) == 1
        assert warning in warnings[0]


def test_a_damaged_tokenizer_is_passed_over(build: Build):
    base, mllm = build("b", decoder_shapes()), build("m", decoder_shapes())
    tokenizer(base.path, {"a": 0})
    (mllm.path / "tokenizer.json").write_text("{")
    assert map_roles(base, mllm, [base]).warnings == ()


def test_matrices_that_only_the_mllm_has_stop_the_run(build: Build):
    base = build("b", decoder_shapes())
    more = {
        "model.layers.0.mlp.fc1.weight": (8, 16),
        "model.layers.0.mlp.gate.weight": (4, 16),
        "model.layers.0.cross_attn.q_proj.weight": (16, 16),
    }
    mllm = build("m", decoder_shapes() | more)
    with pytest.raises(CoverageError, match="at 2 places"):
        map_roles(base, mllm, [base])
    left = map_roles(base, mllm, [base], allow_partial=True).left_out
    assert sorted(left) == [
        "layers.0.cross_attn.q_proj: the MLLM has it, but the base lacks it",
        "layers.0.mlp.fc1: the MLLM has it, but the base lacks it",
    ]


def test_the_layout_puts_the_language_model_first(build: Build):
    prefix, rest = FAMILIES["SmolVLM"]
    assert dict(language_layout(build("m", rest | decoder_shapes(prefix)))) == {
        f"{prefix}layers.": 2,
        "model.vision_model.encoder.layers.": 3,
    }
    assert (
        next(iter(language_layout(build("n", rest | decoder_shapes(prefix))))) == f"{prefix}layers."
    )
    assert dict(language_layout(build("x", EXTRA))) == {}


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.99999999999999999999.self_attn.q_proj.weight",
        "model.layers.-1.self_attn.q_proj.weight",
        "model.layers.\u0663.self_attn.q_proj.weight",
        "layers",
        "layers.0",
        ".layers.0.",
        "mylayers.0.q_proj.weight",
    ],
)
def test_names_that_only_resemble_layers_are_passed_over(build: Build, name: str):
    base = build("b", decoder_shapes())
    coverage = map_roles(base, build("m", decoder_shapes() | {name: (16, 16)}), [base])
    assert len(coverage.weights) == 14
