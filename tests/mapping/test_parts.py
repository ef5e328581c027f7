"""Which part of a model is its language model, what the roles look like, and what must map."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.checkpoint_files import decoder_shapes, save_checkpoint, tower_shapes

from lean_merge.checkpoints import Checkpoint, open_checkpoint
from lean_merge.errors import CoverageError
from lean_merge.mapping import map_roles
from lean_merge.mapping.structure import Parts, modalities, nature

Build = Callable[..., Checkpoint]
VISION = tower_shapes("vision_tower.encoder.")


@pytest.fixture
def build(tmp_path: Path) -> Build:
    def make(name: str, shapes: dict[str, tuple[int, ...]], **options: Any) -> Checkpoint:
        return open_checkpoint(save_checkpoint(tmp_path / name, shapes, **options))

    return make


# --- parts ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefix", "kind"),
    [
        ("model.layers.", ""),
        ("transformer.h.", ""),
        ("language_model.model.layers.", "language"),
        ("thinker.model.layers.", "language"),
        ("model.language_model.layers.", "language"),
        ("thinker.visual.blocks.", "vision"),
        ("language_model.vision_tower.encoder.layers.", "vision"),
        ("git.image_encoder.vision_model.encoder.layers.", "vision"),
        ("model.embed_tokens_extend.audio_embed.encoder.encoders.", "audio"),
        ("talker.model.layers.", "audio"),
        ("code2wav.pre_transformer.layers.", "audio"),
        ("mtp.layers.", "other"),
        ("paligemma_with_expert.gemma_expert.model.layers.", "other"),
        ("paligemma_with_expert.paligemma.model.language_model.layers.", "language"),
        ("ears.layers.", "other"),
        ("decoder.layers.", ""),
    ],
)
def test_the_last_telling_module_decides(prefix: str, kind: str):
    config = {"ears_config": {"model_type": "x"}, "text_config": {"model_type": "y"}}
    config |= {"decoder_config": {"model_type": "z"}, "quantization_config": {"model_type": "q"}}
    assert Parts(config).kind(prefix) == kind


def test_what_is_beside_text_is_told_by_tensors(build: Build):
    text = build("t", decoder_shapes(), config={"vision_config": {}})
    assert modalities(text) == {}
    assert nature(text) == "text alone, though its config.json has a vision_config"
    both = build("b", decoder_shapes() | VISION | {"model.audio_projection.weight": (4, 4)})
    found = {"vision": "vision_tower.encoder.layers", "audio": "model.audio_projection"}
    assert modalities(both) == found
    assert nature(both) == "text and vision ({vision}) and audio ({audio})".format(**found)


# --- roles ----------------------------------------------------------------------------------


@pytest.mark.parametrize("with_vision", ["base", "expert 1"])
def test_an_mllm_of_text_alone_beside_one_with_vision_is_refused(build: Build, with_vision: str):
    text, more = build("t", decoder_shapes()), build("v", decoder_shapes() | VISION)
    base, expert = (more, text) if with_vision == "base" else (build("b", decoder_shapes()), more)
    with pytest.raises(CoverageError, match="the MLLM has text alone") as caught:
        map_roles(base, text, [expert])
    assert f"{with_vision}: text and vision (vision_tower" in str(caught.value)
    assert "--allow-text-mllm" in str(caught.value)
    coverage = map_roles(base, text, [expert], allow_text_mllm=True)
    assert coverage.natures["mllm"] == "text alone"
    assert len(coverage.weights) == 14


def test_roles_that_are_all_text_or_an_mllm_with_more_are_taken(build: Build):
    text, more = build("t", decoder_shapes()), build("v", decoder_shapes() | VISION)
    for mllm, base in ((text, text), (more, text), (more, more)):
        assert len(map_roles(base, mllm, [text]).weights) == 14


# --- the language model ---------------------------------------------------------------------

OMNI = {"thinker_config": {"text_config": {"num_hidden_layers": 2, "hidden_size": 16}}}


@pytest.mark.parametrize(
    ("other", "config"),
    [
        # Fuller layers, and more of them, than those of the language model.
        (decoder_shapes("talker.model.", layers=4, hidden=32), {}),
        (decoder_shapes("model.audio_embed.encoder.", layers=4, hidden=32), {}),
        # A name that only the config explains.
        (decoder_shapes("ears.", layers=4, hidden=32), {"ears_config": {"model_type": "e"}}),
        # A name that nothing explains: the sizes of the config do.
        (decoder_shapes("model.stack.", layers=4, hidden=32), OMNI),
    ],
)
def test_a_multimodal_base_is_read_by_its_language_model(build: Build, other: Any, config: Any):
    fuller = {f"{n.rsplit('.', 2)[0]}.more.weight": (32, 32) for n in other if "mlp.up" in n}
    shapes = decoder_shapes("thinker.") | other | fuller
    roles = [build(name, shapes, config=config) for name in "bme"]
    coverage = map_roles(roles[0], roles[1], roles[2:])
    assert set(coverage.prefixes.values()) == {"thinker.layers."}
    assert len(coverage.weights) == 14


def test_candidates_that_nothing_tells_apart_are_an_error(build: Build):
    shapes = decoder_shapes("first.") | decoder_shapes("second.", hidden=24, layers=3)
    roles = [build(name, shapes) for name in "bme"]
    with pytest.raises(CoverageError, match=r"under 'first\.layers\.', 'second\.layers\.'"):
        map_roles(roles[0], roles[1], roles[2:])


# --- coverage -------------------------------------------------------------------------------

LEAVES = {
    "LFM2": ["self_attn.out_proj", "conv.in_proj", "conv.out_proj", "feed_forward.w1"],
    "Phi-2": ["self_attn.q_proj", "self_attn.dense", "mlp.fc1", "mlp.fc2"],
    "Mistral": ["attention.wq", "attention.wk", "attention.wv", "attention.wo"],
    "Qwen-VL": ["attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj"],
    "MPT": ["attn.Wqkv", "attn.out_proj", "ffn.up_proj", "ffn.down_proj"],
    "MLA": [f"self_attn.{n}" for n in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")],
    "Qwen3-Next": [f"linear_attn.{n}" for n in ("in_proj_qkvz", "in_proj_ba", "out_proj")],
    "Kimi": [f"self_attn.{n}" for n in ("f_a_proj", "f_b_proj", "b_proj", "g_a_proj", "g_b_proj")],
    "Mamba": [f"mixer.{n}" for n in ("in_proj", "out_proj", "x_proj", "dt_proj")],
}
NOT_MERGED: dict[str, tuple[int, ...]] = {
    "input_layernorm.weight": (16,),
    "self_attn.q_norm.weight": (4, 4),
    "ln_1.weight": (4, 4),
    "mlp.gate.weight": (4, 16),
    "mlp.shared_expert_gate.weight": (1, 16),
    "block_sparse_moe.router.layer.weight": (4, 16),
    "mixer.conv1d.weight": (16, 1, 4),
    "self_attn.q_conv1d.weight": (16, 4),
    "mixer.A_log": (16, 4),
    "mixer.D": (16, 2),
    "attention.relative_attention_bias.weight": (32, 4),
    "self_attn.qkv_proj.lora_A.speech.weight": (4, 16),
    "mlp.experts.gate_up_proj_bias": (4, 16),
}


@pytest.mark.parametrize("end", [".weight", ""])
@pytest.mark.parametrize("family", LEAVES)
def test_matrices_merge_whatever_they_are_called(build: Build, family: str, end: str):
    wanted = {f"layers.{n}.{leaf}{end}" for n in range(2) for leaf in LEAVES[family]}
    rest = {f"layers.{n}.{leaf}": shape for n in range(2) for leaf, shape in NOT_MERGED.items()}
    roles = [
        build(
            str(n),
            {f"{prefix}{name}": (16, 16) for name in wanted}
            | {f"{prefix}{name}": shape for name, shape in rest.items()},
        )
        for n, prefix in enumerate(("model.", "language_model.model.", "model."))
    ]
    coverage = map_roles(roles[0], roles[1], roles[2:])
    assert {w.mllm.name.removeprefix("language_model.model.") for w in coverage.weights} == wanted
    assert coverage.left_out == ()


def test_both_halves_of_an_encoder_decoder_merge(build: Build):
    text = decoder_shapes("encoder.") | decoder_shapes("decoder.", layers=3)
    more = {f"language_model.{name}": shape for name, shape in text.items()}
    base, mllm = build("b", text), build("m", more | tower_shapes("vision_model.encoder."))
    coverage = map_roles(base, mllm, [base])
    assert len(coverage.weights) == 7 * 5
    names = {part.canonical for weight in coverage.weights for part in weight.slices}
    assert {"layers.1.encoder.mlp.up_proj", "layers.2.mlp.up_proj"} <= names
    half = {n: s for n, s in more.items() if "encoder" not in n}
    with pytest.raises(
        CoverageError, match=r"layers\.\*\.encoder\.mlp\.up_proj: the MLLM lacks it"
    ):
        map_roles(base, build("h", half), [base])


@pytest.mark.parametrize("role", [1, 2])
def test_a_matrix_that_only_one_role_has_stops_the_run(build: Build, role: int):
    more = {f"model.layers.{n}.mlp.extra_proj.weight": (8, 16) for n in range(2)}
    roles = [build(str(n), decoder_shapes() | (more if n == role else {})) for n in range(3)]
    title = ("MLLM", "expert 1")[role - 1]
    line = rf"layers\.\*\.mlp\.extra_proj: the {title} has it, but the base lacks it \(2 times\)"
    with pytest.raises(CoverageError, match=line):
        map_roles(roles[0], roles[1], roles[2:])
    coverage = map_roles(roles[0], roles[1], roles[2:], allow_partial=True)
    assert len(coverage.weights) == 14
    assert len(coverage.left_out) == 2


def test_a_wq_is_not_a_q_proj(build: Build):
    """Their rows are in another order, so the names must not be taken for one another."""
    meta = {
        n.replace("q_proj", "wq").replace("k_proj", "wk"): s for n, s in decoder_shapes().items()
    }
    base, mllm = build("b", meta), build("m", decoder_shapes())
    with pytest.raises(CoverageError, match=r"layers\.\*\.self_attn\.wq: the MLLM lacks it"):
        map_roles(base, mllm, [base])


@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    leaves=st.lists(
        st.from_regex(r"[pqz]{1,3}\.[pqz]{1,4}_proj", fullmatch=True),
        min_size=1,
        max_size=5,
        unique=True,
    ),
    left=st.integers(0, 2),
    role=st.integers(0, 2),
)
def test_every_matrix_is_merged_or_named(
    tmp_path_factory: pytest.TempPathFactory, leaves: set[str], left: int, role: int
):
    """Whatever the names: what one role lacks of the layers is said, and all else is merged."""
    folder = tmp_path_factory.mktemp("gate")
    names = [f"model.layers.{n}.{leaf}.weight" for n in range(3) for leaf in sorted(leaves)]
    always = [f"model.layers.{n}.a.b_proj.weight" for n in range(3)]
    roles = []
    for number in range(3):
        shapes = dict.fromkeys([*names, *always], (4, 6))
        if number == role:
            del shapes[names[left]]
        roles.append(open_checkpoint(save_checkpoint(folder / str(number), shapes)))
    coverage = map_roles(roles[0], roles[1], roles[2:], allow_partial=True)
    merged = {weight.mllm.name for weight in coverage.weights}
    assert merged == {name for name in roles[1].tensors if name != names[left]}
    said = names[left].removeprefix("model.").removesuffix(".weight")
    assert coverage.left_out and all(said in line for line in coverage.left_out)
