"""The pull of LoRA factors, against the gradient of the whole weight in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.priors import Toy, differences, gradients, noise, pull, write_prior
from torch import Tensor, nn

from lean_merge import CoverageError, RecipeError
from lean_merge.drift import Drift

MODES = ("absolute", "grad-norm", "adaptive")


@pytest.fixture(scope="module", params=[None, 2], ids=["whole", "rank 2"])
def prior(request, tmp_path_factory) -> tuple[Path, dict[str, Tensor]]:
    """A prior of the toy, and the differences that it holds, of rank 2 or whole."""
    found = {n: d for n, d in differences(Toy()).items() if n.startswith("model.")}
    if request.param:
        found = {n: d[:, :1] @ noise(1, d.shape[1]) + d[:, 1:2] for n, d in found.items()}
    return write_prior(tmp_path_factory.mktemp("prior") / "p", found, rank=request.param), found


def adapted(model: nn.Module, **options: Any) -> nn.Module:
    """The model with LoRA by PEFT, in float64."""
    from peft import LoraConfig, inject_adapter_in_model

    targets = options.pop("target_modules", r"model\..*(q_proj|v_proj|down_proj|qkv_proj)")
    config = LoraConfig(r=3, lora_alpha=5, target_modules=targets, **options)
    return inject_adapter_in_model(config, model).double()


def started(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with factors B that are not zero any more."""
    for n, (name, each) in enumerate(model.named_parameters()):
        if "lora_B" in name:
            each.data = noise(*each.shape, seed=seed + n).double()
    return model


def given(module: Any, g: Tensor) -> tuple[Tensor, Tensor]:
    """Give the factors of a module the gradients that follow from that of its weight."""
    a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
    s = module.scaling["default"]
    a.grad = s * b.detach().T @ g if a.requires_grad else None
    b.grad = s * g @ a.detach().T if b.requires_grad else None
    return a.grad, b.grad


def known(module: Any, g: Tensor) -> Tensor:
    """What the two gradients determine of g, by projections."""
    a, b = module.lora_A["default"].weight.detach(), module.lora_B["default"].weight.detach()
    of_a, of_b = torch.linalg.pinv(a) @ a, b @ torch.linalg.pinv(b)
    of_a = of_a if module.lora_B["default"].weight.requires_grad else 0 * of_a
    of_b = of_b if module.lora_A["default"].weight.requires_grad else 0 * of_b
    return of_b @ g + g @ of_a - of_b @ g @ of_a


def modules(model: nn.Module) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("start", ["zero", "random", "A frozen", "B frozen"])
def test_factors_are_pulled_by_the_chain_rule(prior, mode, start):
    model = adapted(Toy())
    if start != "zero":
        started(model)
    for name, each in model.named_parameters():
        if start[0] in "AB" and f"lora_{start[0]}" in name:
            each.requires_grad_(False)
    before = {}
    for n, (name, module) in enumerate(modules(model).items()):
        g = noise(module.out_features, module.in_features, seed=50 + n).double()
        before[name] = g, *(x if x is None else x.clone() for x in given(module, g))
    drift = Drift(model, prior[0], alpha=0.6, mode=mode)
    drift.apply()
    assert len(before) == 6 == len(drift.report()["weights"])
    assert len(drift.report()["left"]["frozen"]) == 8
    for name, module in modules(model).items():
        g, of_a, of_b = before[name]
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        step = (
            0.6
            * module.scaling["default"]
            * pull(known(module, g), prior[1][f"{name}.weight"], mode)
        )
        if of_a is not None:
            wanted = of_a - b.detach().T @ step
            torch.testing.assert_close(a.grad, wanted, rtol=1e-5, atol=1e-6)
        if of_b is not None:
            wanted = of_b - step @ a.detach().T
            torch.testing.assert_close(b.grad, wanted, rtol=1e-5, atol=1e-6)


def test_the_gradients_are_those_of_training(prior):
    """The gradients of autograd, of the product of a merged weight, give the same pull."""
    model = started(adapted(Toy()))
    x = noise(4, 8, seed=9).double()
    model(x).square().mean().backward()
    plain = Toy().double()
    for name, module in modules(model).items():
        plain.get_submodule(name).weight.data += module.get_delta_weight("default").detach()
    plain(x).square().mean().backward()
    Drift(model, prior[0]).apply()
    for name, module in modules(model).items():
        g, a = gradients(plain)[f"{name}.weight"], module.lora_A["default"].weight.detach()
        s, f = (
            module.scaling["default"],
            pull(known(module, g), prior[1][f"{name}.weight"], "adaptive"),
        )
        found = module.lora_B["default"].weight.grad
        torch.testing.assert_close(found, s * (g - f) @ a.T, rtol=1e-5, atol=1e-6)


def test_a_fused_weight_has_a_norm_and_a_cosine_for_every_part(tmp_path):
    model = started(adapted(Toy("fused")))
    found = {n: d for n, d in differences(Toy("fused")).items() if n.startswith("model.")}
    folder = write_prior(tmp_path / "p", found)
    name = "model.layers.1.self_attn.qkv_proj"
    for each in modules(model).values():
        given(each, noise(each.out_features, each.in_features).double())
    module = modules(model)[name]
    a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
    g, before = noise(16, 8, seed=5).double(), given(module, noise(16, 8, seed=5).double())
    before = tuple(each.clone() for each in before)
    drift = Drift(model, folder)
    drift.apply()
    seen, d = known(module, g), found[f"{name}.weight"]
    parts = (slice(0, 8), slice(8, 12), slice(12, 16))
    f = torch.cat([pull(seen[rows], d[rows], "adaptive") for rows in parts])
    s = module.scaling["default"]
    torch.testing.assert_close(a.grad, before[0] - s * b.detach().T @ f, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(b.grad, before[1] - s * f @ a.detach().T, rtol=1e-5, atol=1e-6)
    assert "layers.1.self_attn.v_proj" in drift.report()["weights"]


def test_variants_that_do_not_train_a_sum_are_refused_by_name(prior):
    with pytest.raises(RecipeError, match="DoRA"):
        Drift(adapted(Toy(), use_dora=True), prior[0])


def test_other_adapters_are_refused(prior):
    from peft import IA3Config, inject_adapter_in_model

    targets = r"model\..*(q_proj|down_proj)"
    config = IA3Config(target_modules=targets, feedforward_modules=r".*down_proj")
    with pytest.raises(RecipeError, match="ia3"):
        Drift(inject_adapter_in_model(config, Toy()), prior[0])
    model = adapted(Toy())
    model.get_submodule("model.layers.0.self_attn.q_proj.base_layer").weight.requires_grad_(True)
    with pytest.raises(RecipeError, match="not both"):
        Drift(model, prior[0])


def test_copies_that_peft_trains_whole_are_pulled(prior):
    model = adapted(Toy(), modules_to_save=["up_proj"])
    for each in model.parameters():
        each.grad = torch.ones_like(each) if each.requires_grad else None
    drift = Drift(model, prior[0])
    drift.apply()
    weights = drift.report()["weights"]
    assert sum(name.endswith("up_proj") for name in weights) == 2 and len(weights) == 8


class Packed(nn.Module):
    """A linear layer of 4 bits, as bitsandbytes stores one: two numbers in each byte."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        codes = torch.randint(256, (in_features * out_features // 2, 1), dtype=torch.uint8)
        self.weight = nn.Parameter(codes, requires_grad=False)

    def values(self) -> Tensor:
        """The weight."""
        halves = torch.cat([self.weight // 16, self.weight % 16], dim=1)
        return (halves.reshape(self.out_features, self.in_features).double() - 7.5) / 15


class Adapted(nn.Module):
    """LoRA beside such a layer, with the attributes that PEFT's layer has."""

    def __init__(self, base: Packed) -> None:
        super().__init__()
        self.base_layer, self.scaling, self.active_adapters = base, {"default": 0.5}, ["default"]
        self.in_features, self.out_features = base.in_features, base.out_features
        a, b = (
            nn.Linear(base.in_features, 3, bias=False),
            nn.Linear(3, base.out_features, bias=False),
        )
        self.lora_A, self.lora_B = nn.ModuleDict({"default": a}), nn.ModuleDict({"default": b})

    def forward(self, x: Tensor) -> Tensor:
        """The layer and its change."""
        change = self.lora_B["default"](self.lora_A["default"](x))
        return x @ self.base_layer.values().T + 0.5 * change


def test_factors_beside_4_bits_are_pulled(prior):
    model = Toy().double()
    for layer in model.model.layers:
        for parent, leaf in ((layer.self_attn, "q_proj"), (layer.mlp, "down_proj")):
            old = getattr(parent, leaf)
            setattr(parent, leaf, Adapted(Packed(old.out_features, old.in_features)).double())
        for leaf in ("k_proj", "o_proj"):
            old = getattr(layer.self_attn, leaf)
            setattr(layer.self_attn, leaf, Packed(old.out_features, old.in_features))
    model.requires_grad_(False)
    for module in modules(model).values():
        for each in (module.lora_A, module.lora_B):
            each.requires_grad_(True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    drift = Drift(model, prior[0], mode="grad-norm").attach(optimizer)
    name = "model.layers.1.mlp.down_proj"
    module = model.get_submodule(name)
    g = noise(8, 6, seed=1).double()
    of_b = given(module, g)[1].clone()
    b, a = module.lora_B["default"].weight, module.lora_A["default"].weight.detach().clone()
    start = b.detach().clone()
    f = pull(known(module, g), prior[1][f"{name}.weight"], "grad-norm")
    optimizer.step()
    torch.testing.assert_close(
        b.detach(), start - 0.1 * (of_b - 0.5 * f @ a.T), rtol=1e-5, atol=1e-6
    )
    assert len(drift.report()["left"]["frozen"]) == 10


def test_adapters_that_are_not_in_use_leave_a_model_frozen(prior):
    model = adapted(Toy())
    for module in modules(model).values():
        module.set_adapter([])
    with pytest.raises(CoverageError, match="frozen"):
        Drift(model, prior[0])
