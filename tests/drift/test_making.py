"""Priors that are made, against whole differences and their decompositions in float64."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.families import contents
from support.layouts import HEADS, INNER, PAIRS, SIZE, Layout, Where, stored_as
from support.scenes import Stop, stopping
from torch import Tensor

from lean_merge import (
    CheckpointError,
    CoverageError,
    DataError,
    RecipeError,
    Resources,
    cli,
    verify,
)
from lean_merge.drift import Prior, PriorMatrix
from lean_merge.outputs import approximating, priornumbers
from lean_merge.outputs.priornumbers import Span
from lean_merge.outputs.priorsettings import AUTO_SHARE, PriorSettings
from lean_merge.studies.prior import PriorResult, make_prior, prior_recipe

HIDDEN = HEADS * SIZE
ONE_LAYER: dict[str, Any] = {"numbers": (0,)}
MLLM = "model.language_model.layers."
LAYOUTS = {
    "fused": (
        Layout(**ONE_LAYER),
        Layout(MLLM, qkv="fused", mlp="fused", **ONE_LAYER),
    ),
    "interleaved": (
        Layout(**ONE_LAYER),
        Layout(MLLM, qkv="interleaved", attention="attention", **ONE_LAYER),
    ),
    "stacked columns": (
        Layout(mlp="each", experts=2, **ONE_LAYER),
        Layout(MLLM, mlp="columns", experts=2, **ONE_LAYER),
    ),
}
CONFIG = {
    "model_type": "llama",
    "num_attention_heads": HEADS,
    "num_key_value_heads": PAIRS,
    "head_dim": SIZE,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 1,
}


def shape_of(canonical: str) -> tuple[int, int]:
    inner = 48 if "experts" in canonical else INNER
    shapes = {
        "q_proj": (HIDDEN, HIDDEN),
        "k_proj": (PAIRS * SIZE, HIDDEN),
        "v_proj": (PAIRS * SIZE, HIDDEN),
        "o_proj": (HIDDEN, HIDDEN),
        "down_proj": (HIDDEN, inner),
    }
    return shapes.get(canonical.rpartition(".")[2], (inner, HIDDEN))


def save(folder: Path, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@dataclass(frozen=True)
class Models:
    """A base, an MLLM in a layout of its own, and two experts, with the MLLM's places."""

    base: Path
    mllm: Path
    experts: tuple[Path, Path]
    places: dict[str, Where]
    own: dict[str, Where]

    def weight(self, role: Path, canonical: str) -> Tensor:
        place = (self.places if role == self.mllm else self.own)[canonical]
        return place.get(load_file(role / "model.safetensors")).double()

    def difference(self, canonical: str, *factors: float) -> Tensor:
        mllm = self.weight(self.mllm, canonical)
        parts = zip(factors, self.experts, strict=False)
        return sum((f * (self.weight(e, canonical) - mllm) for f, e in parts), torch.zeros(()))

    def make(self, out: Path, settings: PriorSettings, **options: Any) -> PriorResult:
        run = {n: options.pop(n) for n in ("resume", "on_event", "overwrite") if n in options}
        resources = Resources(device="cpu", threads=options.pop("threads", 2))
        if "memory" in options:
            resources = Resources(device="cpu", threads=1, memory=options.pop("memory"))
        experts = options.pop("experts", [str(self.experts[0])])
        recipe = prior_recipe(str(self.mllm), experts, **options)
        return make_prior(recipe, out, settings, resources=resources, **run)


def make_models(folder: Path, source: Layout, target: Layout) -> Models:
    generator = torch.Generator().manual_seed(1)
    own = source.weights()
    base = {
        where.name: 0.02 * torch.randn(shape_of(name), generator=generator)
        for name, where in own.items()
    }

    def tuned(tensors: dict[str, Tensor], size: float) -> dict[str, Tensor]:
        found = {}
        for name, tensor in tensors.items():
            left = torch.randn(tensor.shape[0], 3, generator=generator)
            right = torch.randn(3, tensor.shape[1], generator=generator)
            noise = torch.randn(tensor.shape, generator=generator)
            found[name] = (tensor + size * (left @ right + 0.3 * noise)).bfloat16()
        return found

    mllm = tuned(base, 5e-4)
    return Models(
        save(folder / "base", {name: each.bfloat16() for name, each in base.items()}),
        save(folder / "mllm", stored_as(source, target)(mllm)),
        (
            save(folder / "expert1", tuned(base, 1e-3)),
            save(folder / "expert2", tuned(base, 1e-3)),
        ),
        target.weights(),
        own,
    )


@pytest.fixture(scope="module", params=LAYOUTS)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Models:
    return make_models(tmp_path_factory.mktemp("models"), *LAYOUTS[request.param])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return make_models(tmp_path_factory.mktemp("plain"), *LAYOUTS["fused"])


def loaded(folder: Path) -> dict[str, Tensor]:
    """Every difference of a prior as the MLLM lays its tensor out, in float32."""
    prior = Prior.open(folder)
    found = {}
    for name in prior.weights:
        each = prior.load(name)
        found[name] = each.matrix if isinstance(each, PriorMatrix) else each.left @ each.right
    return found


def best(matrix: Tensor, rank: int) -> Tensor:
    left, sigma, right = np.linalg.svd(matrix.numpy(), full_matrices=False)
    return torch.from_numpy((left[:, :rank] * sigma[:rank]) @ right[:rank])


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def parts_of(folder: Path) -> Iterator[tuple[str, Any, float]]:
    """The canonical name, place and kept share of every part that prior.json lists."""
    for name, weight in Prior.open(folder).weights.items():
        for part in weight.parts:
            yield name, part, part.kept


@pytest.fixture(scope="module")
def whole(models: Models, tmp_path_factory: pytest.TempPathFactory) -> PriorResult:
    folder = tmp_path_factory.mktemp("prior") / "whole"
    return models.make(folder, PriorSettings(rank="full", dtype="float32"))


def test_a_whole_prior_is_the_difference_in_every_layout(models: Models, whole: PriorResult):
    report, found = whole.report, loaded(whole.path)
    for canonical, place in models.places.items():
        wanted = models.difference(canonical, 1.0)
        assert torch.equal(place.get(found).double(), wanted.float().double()), canonical
    kept = {row["weight"]: row["prior_kept"] for row in report["weights"]}
    norms = {row["weight"]: row["prior_norm"] for row in report["weights"]}
    assert kept == dict.fromkeys(models.places, 1.0)
    for canonical, norm in norms.items():
        assert norm == pytest.approx(float(models.difference(canonical, 1.0).norm()), rel=1e-6)
    assert report["bytes"]["read"] == report["bytes"]["read_predicted"]
    assert report["bytes"]["written"] == report["bytes"]["written_predicted"]


def test_float8_errs_by_no_more_than_a_sixteenth_of_each_number(tmp_path: Path, models: Models):
    models.make(tmp_path / "p", PriorSettings(rank="full", dtype="float8_e4m3fn"))
    found, told = loaded(tmp_path / "p"), Prior.open(tmp_path / "p").weights
    for canonical, place in models.places.items():
        wanted, got = models.difference(canonical, 1.0), place.get(found).double()
        # Below the smallest normal number, 2^-6 of 448, steps are equal.
        step = torch.maximum(wanted.abs() / 16, wanted.abs().amax(1, keepdim=True) / 448 / 1024)
        assert bool(((got - wanted).abs() <= step * 1.0001).all()), canonical
        if not told[place.name].parts:
            lost = 1 - told[place.name].kept
            assert lost == pytest.approx(distance(got, wanted) ** 2, rel=1e-3)


def test_factors_are_the_best_of_their_rank_in_every_layout(tmp_path: Path, models: Models):
    models.make(tmp_path / "p", PriorSettings(rank=2, dtype="float32"))
    found, told = loaded(tmp_path / "p"), Prior.open(tmp_path / "p").weights
    names = {part.name: kept for _, part, kept in parts_of(tmp_path / "p")}
    for canonical, place in models.places.items():
        wanted = models.difference(canonical, 1.0)
        got = place.get(found)
        assert distance(got, best(wanted, 2)) < 1e-4, canonical
        kept = names.get(canonical, told[place.name].kept)
        assert kept == pytest.approx(1 - distance(got, wanted) ** 2, abs=1e-5)


def test_the_parts_of_a_tensor_are_where_the_mllm_has_them(models: Models, whole: PriorResult):
    found = loaded(whole.path)
    for name, part, _ in parts_of(whole.path):
        matrix = found[name] if part.matrix is None else found[name][part.matrix]
        rows = torch.cat([matrix.narrow(part.dim, a, b - a) for a, b in part.runs], dim=part.dim)
        wanted = models.places[part.name].get(found)
        assert torch.equal(rows.T if part.dim else rows, wanted)
        assert part.norm == pytest.approx(float(wanted.double().norm()), rel=1e-6)


def test_auto_keeps_the_stated_share_and_no_more(tmp_path: Path, plain: Models):
    report = plain.make(tmp_path / "p", PriorSettings(dtype="float32")).report
    rows = {row["weight"]: row for row in report["weights"]}
    for canonical in plain.places:
        sigma = torch.linalg.svdvals(plain.difference(canonical, 1.0))
        shares = (sigma**2).cumsum(0) / (sigma**2).sum()
        rank = int((shares < AUTO_SHARE).sum()) + 1
        assert rows[canonical]["prior_rank"] == rank
        assert rows[canonical]["prior_kept"] == pytest.approx(float(shares[rank - 1]), abs=1e-5)
    assert report["prior"]["largest_rank"] == max(row["prior_rank"] for row in rows.values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_the_kept_share_counts_the_rounding_of_factors(tmp_path: Path, plain: Models, dtype: str):
    plain.make(tmp_path / "p", PriorSettings(rank=4, dtype=dtype))
    found = loaded(tmp_path / "p")
    for name, part, kept in parts_of(tmp_path / "p"):
        wanted = plain.difference(part.name, 1.0)
        lost = distance(plain.places[part.name].get(found), wanted) ** 2
        assert 1 - kept == pytest.approx(lost, rel=0.02), name


def test_large_weights_are_sketched(tmp_path: Path, plain: Models, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(approximating, "WHOLE_UP_TO", 8)
    report = plain.make(tmp_path / "p", PriorSettings(rank=3, dtype="float32")).report
    found = loaded(tmp_path / "p")
    assert max(row["passes"] for row in report["weights"]) == approximating.DEPTH
    for canonical, place in plain.places.items():
        wanted = plain.difference(canonical, 1.0)
        least = distance(best(wanted, 3), wanted)
        assert distance(place.get(found), wanted) < 1.01 * least


def test_several_experts_are_a_weighted_sum(tmp_path: Path, plain: Models):
    both = [str(each) for each in plain.experts]
    settings = PriorSettings(rank="full", dtype="float32")
    plain.make(tmp_path / "p", settings, experts=both, weights=(0.75, -0.5))
    found = loaded(tmp_path / "p")
    for canonical, place in plain.places.items():
        wanted = plain.difference(canonical, 0.75, -0.5)
        torch.testing.assert_close(place.get(found).double(), wanted, rtol=1e-6, atol=1e-9)
    models = json.loads((tmp_path / "p" / "prior.json").read_text())["models"]
    assert [each["weight"] for each in models["experts"]] == [0.75, -0.5]


def test_the_difference_may_be_taken_from_the_base(tmp_path: Path, plain: Models):
    settings = PriorSettings("expert-base", "full", "float32")
    options = {"base": str(plain.base), "difference": "expert-base"}
    plain.make(tmp_path / "p", settings, **options)
    found = loaded(tmp_path / "p")
    assert {*found} == {where.name for where in plain.places.values()}
    for canonical, place in plain.places.items():
        expert, base = (plain.weight(m, canonical) for m in (plain.experts[0], plain.base))
        assert torch.equal(place.get(found).double(), (expert - base).float().double())


EVERY = {
    "whole": PriorSettings(rank="full", dtype="float8_e4m3fn"),
    "factors": PriorSettings(rank=4, dtype="bfloat16"),
}


@pytest.mark.parametrize("kind", EVERY)
def test_neither_interruption_nor_memory_nor_threads_change_a_byte(
    tmp_path: Path, plain: Models, kind: str
):
    plain.make(tmp_path / "whole", EVERY[kind])
    wanted = weights_and_facts(tmp_path / "whole")
    with pytest.raises(Stop):
        plain.make(tmp_path / "p", EVERY[kind], on_event=stopping(3))
    with pytest.raises(CheckpointError, match="unfinished"):
        Prior.open(tmp_path / "p")
    result = plain.make(tmp_path / "p", EVERY[kind])
    assert result.reused > 0 and weights_and_facts(tmp_path / "p") == wanted
    assert plain.make(tmp_path / "p", EVERY[kind]).was_complete
    plain.make(tmp_path / "q", EVERY[kind], memory=1 << 31)
    assert weights_and_facts(tmp_path / "q") == wanted


def weights_and_facts(folder: Path) -> dict[str, bytes]:
    files = contents(folder)
    return {n: data for n, data in files.items() if n.startswith(("model", "prior"))}


def test_shards_have_an_index(tmp_path: Path, plain: Models):
    plain.make(tmp_path / "p", EVERY["factors"], shard_size=4_000)
    plain.make(tmp_path / "one", EVERY["factors"])
    assert (tmp_path / "p" / "model.safetensors.index.json").exists()
    one, many = loaded(tmp_path / "one"), loaded(tmp_path / "p")
    assert one.keys() == many.keys() and all(torch.equal(one[n], many[n]) for n in one)


def verified(folder: Path) -> list[str]:
    """The faults that verify finds where it forms every difference again."""
    found = verify(folder, full=True, resources=Resources(device="cpu", threads=2))
    assert len(found.recomputed) == found.in_scope > 0 and found.exact
    return [each.fault for each in found.differences]


@pytest.mark.parametrize("kind", EVERY)
def test_a_prior_of_other_numbers_is_not_what_the_models_give(
    tmp_path: Path, models: Models, kind: str, monkeypatch: pytest.MonkeyPatch
):
    models.make(tmp_path / "p", EVERY[kind])
    assert verified(tmp_path / "p") == []
    form = priornumbers.Encoded.of.__func__
    monkeypatch.setattr(
        priornumbers.Encoded,
        "of",
        classmethod(lambda cls, values, *words: form(cls, 2 * values, *words)),
    )
    faults = verified(tmp_path / "p")
    assert faults and all("bytes are not what the models give" in each for each in faults)


def test_verify_finds_a_changed_byte_and_tells_the_command_that_repairs(
    tmp_path: Path, plain: Models
):
    experts = [str(each) for each in plain.experts]
    plain.make(
        tmp_path / "p", EVERY["whole"], experts=experts, weights=(0.5, 0.25), exclude=("k_proj",)
    )
    assert verified(tmp_path / "p") == []
    file = tmp_path / "p" / "model.safetensors"
    right = file.read_bytes()
    file.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    found = verify(tmp_path / "p")
    assert not found.ok and found.repair is not None
    program, *words = shlex.split(found.repair)
    assert program == "lean-merge"
    cli.main([*words, "--quiet"])
    assert file.read_bytes() == right and verify(tmp_path / "p").ok


def test_an_expert_that_equals_the_mllm_is_told(tmp_path: Path, plain: Models):
    for kind in EVERY.values():
        with pytest.raises(DataError, match="D is zero in all 7 weights"):
            plain.make(tmp_path / "p", kind, experts=[str(plain.mllm)], resume=False)
    assert not (tmp_path / "p" / "prior.json").exists()


@pytest.mark.parametrize("kind", EVERY)
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, plain: Models, kind: str):
    tensors = load_file(plain.experts[0] / "model.safetensors")
    tensors[plain.own["layers.0.mlp.up_proj"].name][90, 3] = torch.nan
    save(tmp_path / "bad", tensors)
    with pytest.raises(DataError, match="NaN"):
        plain.make(tmp_path / "p", EVERY[kind], experts=[str(tmp_path / "bad")])


def test_models_that_do_not_fit_are_refused_and_the_base_is_explained(
    tmp_path: Path, plain: Models
):
    tensors = load_file(plain.experts[0] / "model.safetensors")
    save(tmp_path / "lacks", {n: t for n, t in tensors.items() if "mlp.up_proj" not in n})
    with pytest.raises(CoverageError, match="the MLLM takes the part of the base"):
        plain.make(tmp_path / "p", EVERY["whole"], experts=[str(tmp_path / "lacks")])
    generator = torch.Generator().manual_seed(9)
    other = {n: 0.02 * torch.randn(t.shape, generator=generator) for n, t in tensors.items()}
    save(tmp_path / "other", other)
    with pytest.raises(CoverageError, match="hardly tuned"):
        plain.make(tmp_path / "p", EVERY["whole"], experts=[str(tmp_path / "other")])


SENSELESS: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"rank": 0}, "rank must be"),
    "dtype": ({"dtype": "int8"}, "dtype must be one of"),
    "difference": ({"difference": "mllm-expert"}, "difference must be one of"),
}


@pytest.mark.parametrize("what", SENSELESS)
def test_settings_that_make_no_sense_are_refused(what: str):
    given, message = SENSELESS[what]
    with pytest.raises(RecipeError, match=message):
        PriorSettings(**given)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.sets(st.integers(1, 30), max_size=3))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_strips_of_a_tensor_hold_the_rows_of_each_part(lengths: list[int], cut_at: set[int]):
    """Runs of rows with gaps, cut anywhere, give each row of the part once and at its place."""
    runs, at = [], 0
    for gap, length in zip([*lengths[1:], 0], lengths, strict=True):
        runs.append((at + gap, at + gap + length))
        at += gap + length
    rows = [row for start, stop in runs for row in range(start, stop)]
    cuts = sorted(each for each in cut_at if each < at)
    span = Span(None, 0, tuple(runs))
    found = []
    for first, last in zip([0, *cuts], [*cuts, at], strict=True):
        for there, own in span.within(slice(first, last)):
            assert first <= there.start < there.stop <= last
            found += [*zip(range(own.start, own.stop), range(there.start, there.stop), strict=True)]
    assert found == [*enumerate(rows)]


def test_recipes_that_make_no_sense_are_refused():
    with pytest.raises(RecipeError, match="needs the base"):
        prior_recipe("m", ["e"], difference="expert-base")
    with pytest.raises(RecipeError, match="--base has no part"):
        prior_recipe("m", ["e"], base="b")
    with pytest.raises(RecipeError, match="2 weights were given for 1 experts"):
        prior_recipe("m", ["e"], weights=(1.0, 2.0))


def test_the_command_tells_what_it_kept(
    tmp_path: Path, plain: Models, capsys: pytest.CaptureFixture[str]
):
    words = ["prior", "--mllm", plain.mllm, "--expert", plain.experts[0], "--out", tmp_path / "p"]
    cli.main([str(each) for each in (*words, "--rank", 2)])
    told = capsys.readouterr()
    assert "7 weights, ranks 2 to 2" in told.out and "of D's energy kept" in told.out
    cli.main([str(each) for each in (*words, "--rank", 2, "--json")])
    report = json.loads(capsys.readouterr().out)
    assert report["prior"]["rank"] == 2 and report["weights"][0]["prior_kept"] < 1
    with pytest.raises(SystemExit) as left:
        cli.main([str(each) for each in (*words, "--rank", "many")])
    assert left.value.code == RecipeError.exit_code
    cli.main(["prior", "--help"])
    assert f"{AUTO_SHARE:.0%}" in " ".join(capsys.readouterr().out.split())


def test_an_adapter_does_not_tell_how_it_differs_from_the_mllm(tmp_path: Path, plain: Models):
    folder = tmp_path / "adapter"
    folder.mkdir()
    name = "base_model.model.model.layers.0.mlp.down_proj.lora_"
    factors = {f"{name}A.weight": torch.ones(2, INNER), f"{name}B.weight": torch.ones(HIDDEN, 2)}
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match="is an adapter"):
        plain.make(tmp_path / "p", EVERY["whole"], experts=[str(folder)])
    assert not (tmp_path / "p").exists()
