"""The pull on models of transformers, by priors with the names that it writes on the disk."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.family_models import LLAVA, QWEN_VISION, joined, qwen, text_model
from support.layouts import HEADS, INNER, PAIRS, SIZE
from support.priors import give_gradients, gradients, noise, pulled, write_prior

from lean_merge.drift import Drift

MATRIX = re.compile(r"layers\.(\d+)\.(self_attn|mlp)\.(\w+_proj)\.weight$")
QKV = (HEADS * SIZE, PAIRS * SIZE, PAIRS * SIZE)
PARTS = {"qkv_proj": QKV, "gate_up_proj": (INNER, INNER)}
MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "llava": (lambda: joined("Llava", "Llama", **LLAVA), r"language_model\.model\.layers"),
    "qwen2.5-vl": (lambda: qwen("Qwen2_5_VL", QWEN_VISION), r"model\.layers"),
    "phi3": (lambda: text_model("Phi3"), r"model\.layers"),
}


def at(name: str) -> tuple[str, ...] | None:
    """A matrix's layer, module and leaf, of the language model alone."""
    found = MATRIX.search(name)
    return None if found is None or "vision" in name or "visual" in name else found.groups()


@pytest.mark.parametrize("kind", MODELS)
def test_each_mode_is_the_formula_on_models_of_transformers(tmp_path: Path, kind: str):
    build, prefix = MODELS[kind]
    torch.manual_seed(0)
    model = build()
    model.save_pretrained(tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    differences = {
        name: noise(*each.shape, seed=n)
        for n, (name, each) in enumerate(stored.items())
        if at(name)
    }
    assert all(re.match(prefix, name) for name in differences)
    by_place = {at(name): each for name, each in differences.items()}
    model = model.double()
    prior = write_prior(tmp_path / "prior", differences)
    for mode in ("absolute", "grad-norm", "adaptive"):
        before, left = give_gradients(model), dict(by_place)
        drift = Drift(model, prior, mode=mode, alpha=0.4)
        drift.apply()
        for name, gradient in gradients(model).items():
            wanted = before[name]
            if (place := at(name)) is not None:
                parts = PARTS.get(place[-1], (len(wanted),))
                pairs = zip(wanted.split(parts), left.pop(place).split(parts), strict=True)
                wanted = torch.cat([pulled(g, d, mode, 0.4) for g, d in pairs])
            torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=1e-9)
        assert not left
        assert len(drift.report()["weights"]) == 2 * 7
