"""The pull on models of torch alone, against the formula in float64."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.priors import Toy, differences, give_gradients, gradients, noise, pulled, write_prior
from torch import Tensor, nn

from lean_merge import CheckpointError, CoverageError, DataError, RecipeError
from lean_merge.drift import Drift, Prior, pieces

MODES = ("absolute", "grad-norm", "adaptive")
LEAVES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def language(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of the language model."""
    return {name: each for name, each in found.items() if name.startswith("model.")}


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A prior of the toy whose weights are split, and its differences."""
    found = language(differences(Toy()))
    return write_prior(tmp_path_factory.mktemp("prior") / "p", found), found


def assert_pulled(
    model: nn.Module, before: dict[str, Tensor], found: dict[str, Tensor], mode: str, alpha: float
) -> None:
    """Weights in scope by the formula, and all others as they were."""
    for name, gradient in gradients(model).items():
        wanted = before[name].double()
        if name in found:
            wanted = pulled(before[name], found[name], mode, alpha)
        error = (gradient.double() - wanted).norm() / wanted.norm()
        assert error < 1e-6, name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_each_mode_is_the_formula(split, mode, dtype):
    model = Toy().to(dtype)
    before = give_gradients(model)
    drift = Drift(model, split[0], alpha=0.7, mode=mode)
    drift.apply()
    if dtype != torch.bfloat16:
        assert_pulled(model, before, split[1], mode, 0.7)
    for name, d in split[1].items():
        wanted = pulled(before[name], d, mode, 0.7)
        found = gradients(model)[name].double()
        assert (found - wanted).norm() <= (
            4e-3 if dtype == torch.bfloat16 else 1e-6
        ) * wanted.norm()
    told = drift.report()["weights"]["layers.1.mlp.down_proj"]
    name = "model.layers.1.mlp.down_proj.weight"
    g, d = before[name].double(), split[1][name].double()
    assert told["cosine"] == pytest.approx(float((g * d).sum() / g.norm() / d.norm()), rel=1e-5)
    assert told["gradient"] == pytest.approx(float(g.norm()), rel=1e-5)
    assert told["pull"] == pytest.approx(float((g - pulled(g, d, mode, 0.7)).norm()), rel=1e-5)
    assert told["ratio"] == pytest.approx(told["pull"] / told["gradient"])


def test_two_steps_of_sgd_are_those_by_hand(tmp_path):
    """W = [[1, 2]], loss = W . x, so g = x = [3, 4], ||g|| = 5; D = [4, 3], cos = 24/25.

    f = (1 + 24/25) / 2 * 5 * D / 5 = .98 D. Each step takes .1 (g - .5 f) = .1 [1.04, 2.53].
    """
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Module()])
    model.layers[0].q_proj = nn.Linear(2, 2, bias=False)
    weight = model.layers[0].q_proj.weight
    weight.data = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    d = torch.tensor([[4.0, 3.0], [0.0, 0.0]])
    prior = write_prior(tmp_path / "p", {"layers.0.q_proj.weight": d})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Drift(model, prior, alpha=0.5).attach(optimizer)
    for wanted in ([[0.896, 1.747], [0, 0]], [[0.792, 1.494], [0, 0]]):
        optimizer.zero_grad()
        (weight[0] @ torch.tensor([3.0, 4.0])).backward()
        optimizer.step()
        torch.testing.assert_close(weight.data, torch.tensor(wanted))


PARTS = {
    "fused": ("self_attn.qkv_proj", {"q_proj": [*range(8)], "k_proj": [*range(8, 12)]}),
    "interleaved": (
        "self_attn.wqkv",
        # Two groups of two query heads, a key and a value, of two rows each.
        {"q_proj": [0, 1, 2, 3, 8, 9, 10, 11], "k_proj": [4, 5, 12, 13]},
    ),
}


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("kind", PARTS)
def test_norm_and_cosine_are_those_of_every_part_of_a_fused_weight(tmp_path, kind, rank):
    model = Toy(kind).double()
    found = language(differences(model))
    prior = write_prior(tmp_path / "p", found, rank=rank)
    before = give_gradients(model)
    drift = Drift(model, prior)
    drift.apply()
    leaf, parts = PARTS[kind]
    name = f"model.layers.1.{leaf}.weight"
    d = found[name].double()
    if rank is not None:
        factors = Prior.open(prior).load(name)
        d = factors.left.double() @ factors.right.double()
    for part, rows in parts.items():
        wanted = pulled(before[name][rows], d[rows], "adaptive", 1.0)
        assert torch.allclose(gradients(model)[name][rows], wanted, rtol=1e-6)
        assert f"layers.1.self_attn.{part}" in drift.report()["weights"]


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("kind", ["stacked", "turned"])
def test_every_expert_of_a_stack_is_a_weight_of_its_own(tmp_path, kind, rank):
    model = Toy(kind).double()
    found = language(differences(model))
    found = {name: each for name, each in found.items() if not name.endswith("gate.weight")}
    prior = write_prior(tmp_path / "p", found, rank=rank)
    before = give_gradients(model)
    Drift(model, prior).apply()
    name = "model.layers.0.mlp.experts.gate_up_proj"
    d = found[name].double()
    if rank is not None:
        factors = Prior.open(prior).load(name)
        d = factors.left.double() @ factors.right.double()
    for expert in range(3):
        for half in (slice(0, 6), slice(6, 12)):
            at = (expert, half) if kind == "stacked" else (expert, slice(None), half)
            wanted = pulled(before[name][at], d[at], "adaptive", 1.0)
            assert torch.allclose(gradients(model)[name][at], wanted, rtol=1e-6)


def test_a_fused_weight_is_pulled_by_a_prior_of_split_ones_and_the_other_way_round(tmp_path, split):
    fused = Toy("fused").double()
    before = give_gradients(fused)
    Drift(fused, split[0]).apply()
    for start, stop, leaf in ((0, 8, "q_proj"), (8, 12, "k_proj"), (12, 16, "v_proj")):
        name = "model.layers.1.self_attn.qkv_proj.weight"
        d = split[1][f"model.layers.1.self_attn.{leaf}.weight"]
        wanted = pulled(before[name][start:stop], d, "adaptive", 1.0)
        assert torch.allclose(gradients(fused)[name][start:stop], wanted)
    found = language(differences(fused))
    model = Toy().double()
    before = give_gradients(model)
    Drift(model, write_prior(tmp_path / "p", found)).apply()
    name = "model.layers.0.mlp.up_proj.weight"
    wanted = pulled(
        before[name], found["model.layers.0.mlp.gate_up_proj.weight"][6:], "adaptive", 1
    )
    assert torch.allclose(gradients(model)[name], wanted)


class Wrapped(nn.Module):
    """A module under a name that a wrapper gives it."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        setattr(self, name, module)


def wrapped_inside(name: str) -> nn.Module:
    """The toy with every part of its layers wrapped."""
    model = Toy()
    for layer in model.model.layers:
        layer.self_attn, layer.mlp = Wrapped(name, layer.self_attn), Wrapped(name, layer.mlp)
    return model


LIVE: dict[str, Callable[[], nn.Module]] = {
    "transformers 5": lambda: Wrapped("model", Wrapped("language_model", Toy().model)),
    "transformers 4": lambda: Wrapped("language_model", Toy()),
    "torch.compile": lambda: Wrapped("_orig_mod", Toy()),
    "DDP of it": lambda: Wrapped("module", Wrapped("_orig_mod", Toy())),
    "PEFT": lambda: Wrapped("base_model", Wrapped("model", Toy())),
    "layers compiled": lambda: wrapped_inside("_orig_mod"),
    "checkpointing": lambda: wrapped_inside("_checkpoint_wrapped_module"),
}


@pytest.mark.parametrize("kind", LIVE)
def test_weights_are_found_under_the_names_of_wrappers_and_versions(split, kind):
    model = LIVE[kind]()
    before = give_gradients(model)
    Drift(model, split[0]).apply()
    after = gradients(model)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert len(changed) == len(split[1]) == 14
    assert all(name.split(".")[-2] in LEAVES for name in changed)
    assert not any("vision_tower" in name for name in changed)


def renamed(old: str, new: str) -> nn.Module:
    """The toy, a module of whose layers has another name."""
    model = Toy()
    for layer in model.model.layers:
        module = layer.self_attn
        setattr(module, new, getattr(module, old))
        delattr(module, old)
    return model


def frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


def narrowed() -> nn.Module:
    model = Toy()
    model.model.layers[0].mlp.up_proj = nn.Linear(7, 6)
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "renamed": (
        lambda: renamed("q_proj", "query"),
        r"(?s)lacks it.*4 places|4 places.*q_proj: the ",
    ),
    "fewer layers": (lambda: Toy(layers=1), "7 places"),
    "more layers": (lambda: Toy(layers=3), r"layers.2.self_attn.q_proj: the prior lacks it"),
    "another shape": (narrowed, r"\[6, 7\] in the model and \[6, 8\] in the prior"),
    "tower alone": (lambda: Wrapped("vision_tower", Toy().model), "none of the weights"),
    "nothing": (lambda: nn.Linear(2, 2), "none of the weights"),
    "frozen": (lambda: frozen(Toy()), "all 14 weights .* frozen"),
    "two of them": (
        lambda: nn.ModuleDict({"a": Toy().model, "b": Toy().model}),
        "several language models",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_model_that_does_not_fit_is_an_error_and_no_plain_training(split, fault):
    build, told = REFUSED[fault]
    with pytest.raises(CoverageError, match=told):
        Drift(build(), split[0])


def test_partial_scope_goes_on_and_says_so(split):
    model = renamed("q_proj", "query")
    before = give_gradients(model)
    drift = Drift(model, split[0], allow_partial=True)
    drift.apply()
    assert len(drift.report()["left"]["not in both"]) == 4
    assert len(drift.report()["weights"]) == 12
    name = "model.layers.0.self_attn.query.weight"
    assert torch.equal(gradients(model)[name], before[name])
    with pytest.raises(CoverageError, match="none of the weights"):
        Drift(nn.Linear(2, 2), split[0], allow_partial=True)


def test_parameters_that_need_no_gradient_are_skipped(split):
    model = Toy()
    frozen(model.model.layers[0])
    give_gradients(model)
    drift = Drift(model, split[0])
    drift.apply()
    assert len(drift.report()["left"]["frozen"]) == 7 == len(drift.report()["weights"])


def zero3() -> nn.Module:
    model = Toy()
    model.model.layers[0].mlp.up_proj.weight.ds_id = 1
    return model


class FullyShardedDataParallel(Wrapped):
    """Has the name of torch's."""


UNPULLABLE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "zero 3": (zero3, "ZeRO-3"),
    "fsdp 1": (lambda: FullyShardedDataParallel("_fsdp_wrapped_module", Toy()), "FSDP2"),
    "meta": (lambda: Toy().to("meta"), "meta device"),
}


@pytest.mark.parametrize("fault", UNPULLABLE)
def test_models_that_cannot_be_pulled_are_refused_by_name(split, fault):
    build, told = UNPULLABLE[fault]
    with pytest.raises(RecipeError, match=told):
        Drift(build(), split[0])


@pytest.mark.parametrize(
    "arguments",
    [
        {"alpha": 0},
        {"alpha": -1.0},
        {"alpha": float("nan")},
        {"alpha": float("inf")},
        {"alpha": True},
        {"alpha": "1"},
        {"mode": "cosine"},
        {"per": "epoch"},
        {"ahead": -1},
    ],
)
def test_arguments_that_make_no_sense_are_refused(split, arguments):
    with pytest.raises(RecipeError, match=next(iter(arguments))):
        Drift(Toy(), split[0], **arguments)


def test_an_expert_that_equals_the_mllm_is_refused_and_one_equal_weight_is_told(tmp_path, split):
    zeros = {name: torch.zeros_like(each) for name, each in split[1].items()}
    with pytest.raises(DataError, match="equals the MLLM"):
        Drift(Toy(), write_prior(tmp_path / "zeros", zeros))
    first = next(iter(zeros))
    drift = Drift(Toy(), write_prior(tmp_path / "one", split[1] | {first: zeros[first]}))
    assert drift.report()["left"] == {"D is zero": ["layers.0.self_attn.o_proj"]}


def test_a_prior_with_nan_is_refused_before_it_touches_a_gradient(tmp_path, split):
    name = "model.layers.0.self_attn.o_proj.weight"
    harmed = split[1][name].clone()
    harmed[3, 3] = torch.nan
    model = Toy()
    before = give_gradients(model)
    with pytest.raises((DataError, CheckpointError), match="NaN"):
        Drift(model, write_prior(tmp_path / "p", split[1] | {name: harmed})).apply()
    assert torch.equal(gradients(model)[name], before[name])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("harm", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_stays_and_is_counted(split, mode, harm):
    model = Toy()
    name = "model.layers.1.mlp.up_proj.weight"
    give_gradients(model)
    model.get_parameter(name).grad[2, 3] = harm
    before = {each: gradient.clone() for each, gradient in gradients(model).items()}
    drift = Drift(model, split[0], mode=mode)
    drift.apply()
    assert torch.equal(gradients(model)[name].nan_to_num(7), before[name].nan_to_num(7))
    del before[name]
    assert all(gradients(model)[each].isfinite().all() for each in before)
    assert drift.report()["not_finite"] == 1
    assert drift.report()["weights"]["layers.1.mlp.up_proj"]["cosine"] is None


def test_a_gradient_of_zero_is_pulled_in_absolute_mode_alone(split):
    for mode in MODES:
        model = Toy()
        for each in model.parameters():
            each.grad = torch.zeros_like(each)
        Drift(model, split[0], mode=mode).apply()
        name = "model.layers.1.mlp.up_proj.weight"
        wanted = -split[1][name] if mode == "absolute" else torch.zeros(6, 8)
        assert torch.equal(gradients(model)[name], wanted)


def test_a_step_without_any_gradient_is_an_error(split):
    model = Toy()
    with pytest.raises(RecipeError, match="has a gradient"):
        Drift(model, split[0]).apply()
    with pytest.raises(RecipeError, match="holds none"):
        Drift(model, split[0]).attach(torch.optim.SGD(Toy().parameters()))


def trained(
    split: tuple[Path, Any],
    act: Callable[[Drift, Any], Any] | None,
    *,
    micro: int = 1,
    scaler: Any = None,
    optimizer: Callable[..., Any] = torch.optim.SGD,
    **options: Any,
) -> dict[str, Tensor]:
    """The weights after two steps of `micro` backward passes each."""
    model = Toy()
    made = optimizer(model.parameters(), lr=0.1)
    drift = Drift(model, split[0], **options)
    if act is not None:
        act(drift, made)
    for step in range(2):
        made.zero_grad()
        for n in range(micro):
            loss = model(noise(3, 8, seed=10 * step + n)).square().mean()
            (loss if scaler is None else scaler.scale(loss)).backward()
        if act is None:
            drift.apply()
        if scaler is None:
            made.step()
        else:
            scaler.step(made)
            scaler.update()
    drift.detach()
    assert drift.report()["acts"] == (2 * micro if options.get("per") == "backward" else 2)
    return {name: each.detach() for name, each in model.named_parameters()}


def attach(drift: Drift, optimizer: Any) -> None:
    drift.attach(optimizer)


def test_all_ways_to_act_are_one(split):
    """By hand, attached, in a context, and in the only backward pass of each step."""
    wanted = trained(split, None, micro=2)
    once = trained(split, None)
    for way, options, expected in (
        (attach, {"micro": 2}, wanted),
        (lambda drift, _: drift.__enter__(), {"micro": 2}, wanted),
        (attach, {"per": "backward"}, once),
        (lambda drift, _: drift.__enter__(), {"per": "backward"}, once),
    ):
        found = trained(split, way, **options)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_per_backward_pulls_the_gradient_of_every_pass(split):
    model = Toy()
    with Drift(model, split[0], per="backward"):
        for n in range(2):
            model(noise(3, 8, seed=n)).square().mean().backward()
    name = "model.layers.1.mlp.down_proj.weight"
    passes = []
    for n in range(2):
        own = Toy()
        own(noise(3, 8, seed=n)).square().mean().backward()
        passes.append(pulled(gradients(own)[name], split[1][name], "adaptive", 1.0))
    assert torch.allclose(gradients(model)[name].double(), sum(passes), rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fused", [False, True])
def test_a_loss_scaler_changes_nothing(split, mode, fused):
    """A fused optimizer divides by the scale itself, so that the pull meets scaled gradients."""

    def optimizer(*given, **options):
        return torch.optim.SGD(*given, fused=fused, **options)

    wanted = trained(split, attach, mode=mode, optimizer=optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    found = trained(split, attach, mode=mode, optimizer=optimizer, scaler=scaler)
    assert all(torch.allclose(found[n], wanted[n], rtol=1e-5, atol=1e-7) for n in wanted)


def test_a_scaled_pull_per_backward_is_scaled_too(split):
    def scaled(scaler):
        def act(drift, optimizer):
            drift.attach(optimizer, scaler=scaler)

        return trained(split, act, scaler=scaler, per="backward", mode="absolute")

    found = scaled(torch.amp.GradScaler("cpu", init_scale=1024.0))
    wanted = trained(split, None, mode="absolute")
    assert all(torch.allclose(found[n], wanted[n], rtol=1e-5, atol=1e-7) for n in wanted)


def test_a_context_in_which_nothing_was_pulled_is_told(split):
    with pytest.warns(UserWarning, match="pulled no gradient"), Drift(Toy(), split[0]):
        pass
    drift = Drift(Toy(), split[0])
    with pytest.warns(UserWarning), drift, pytest.raises(RecipeError, match="acts already"):
        drift.__enter__()
    with pytest.raises(RecipeError, match="apply"):
        Drift(Toy(), split[0], per="backward").apply()


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_strips_reading_ahead_and_kept_factors_change_nothing(tmp_path, monkeypatch, rank, ahead):
    found = language(differences(Toy("stacked")))
    found = {name: each for name, each in found.items() if not name.endswith("gate.weight")}
    prior = write_prior(tmp_path / "p", found, rank=rank)
    wanted = Toy("stacked")
    give_gradients(wanted)
    Drift(wanted, prior).apply()
    monkeypatch.setattr(pieces, "_STRIP", 24)
    monkeypatch.setattr(pieces, "_HELD", 1 << 30 if ahead else 0)
    model = Toy("stacked")
    drift = Drift(model, prior, ahead=ahead, keep_factors=bool(ahead))
    for _ in range(2):
        give_gradients(model)
        drift.apply()
    for name, gradient in gradients(wanted).items():
        assert torch.allclose(gradients(model)[name], gradient, rtol=1e-5), name


def test_no_more_differences_are_held_than_were_asked_for(split, monkeypatch):
    """One that is used, and one that is brought ahead of it."""
    alive: list[weakref.ref[Tensor]] = []
    most = 0
    bring = pieces.WeightDifference.bring

    def watched(*given):
        nonlocal most
        found = bring(*given)
        alive.extend(weakref.ref(each) for each in found.held)
        most = max(most, sum(each() is not None for each in alive))
        return found

    monkeypatch.setattr(pieces.WeightDifference, "bring", watched)
    model = Toy()
    give_gradients(model)
    Drift(model, split[0], ahead=1).apply()
    assert len(alive) == 14 and most <= 2
