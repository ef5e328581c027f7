"""Priors by hand, small models to pull, and the formula of DRIFT in float64."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

HEADS = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=2, hidden_size=8)


def write_prior(
    folder: Path, differences: Mapping[str, Tensor], *, rank: int | None = None
) -> Path:
    """Write a prior in float32, whole or cut to a rank by an exact SVD, and return its folder."""
    tensors, weights = {}, {}
    for name, whole in differences.items():
        kept = whole
        if rank is None:
            tensors[name] = whole.float().contiguous()
        else:
            u, s, v = torch.linalg.svd(whole.double(), full_matrices=False)
            tensors[f"{name}.left"] = (u[..., :rank] * s[..., None, :rank].sqrt()).float()
            right = s[..., :rank, None].sqrt() * v[..., :rank, :]
            tensors[f"{name}.right"] = right.float().contiguous()
            kept = s[..., :rank]
        norm = float(whole.double().nan_to_num().norm())
        share = float(kept.double().norm() / norm) ** 2 if norm else 1.0
        weights[name] = {
            "shape": [*whole.shape],
            "rank": rank,
            "norm": norm,
            "kept": min(1.0, share),
        }
    folder.mkdir(parents=True)
    save_file(
        {name: each.contiguous() for name, each in tensors.items()}, folder / "model.safetensors"
    )
    document = {
        "format": "lean-merge prior",
        "version": 1,
        "difference": "expert-mllm",
        "rank": rank or "full",
        "dtype": "float32",
        "models": {},
        "weights": weights,
    }
    (folder / "prior.json").write_text(json.dumps(document))
    return folder


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Float32 numbers that depend on the seed alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def differences(model: nn.Module, names: Iterable[str] = ()) -> dict[str, Tensor]:
    """A difference for every matrix in a model's layers, by the model's own names."""
    shapes = {
        name: each.shape
        for name, each in model.named_parameters()
        if each.dim() > 1 and "layers." in name
    }
    kept = {name: shape for name, shape in shapes.items() if not names or name in names}
    return {name: noise(*shape, seed=n) for n, (name, shape) in enumerate(kept.items())}


def pulled(
    gradient: Tensor, difference: Tensor, mode: str, alpha: float, known: Tensor | None = None
) -> Tensor:
    """The gradient as the paper has it afterwards, in float64.

    `known` is what norm and cosine are taken from, by default the gradient.
    """
    return gradient.double() - alpha * pull(gradient if known is None else known, difference, mode)


def pull(known: Tensor, difference: Tensor, mode: str) -> Tensor:
    """The f of the formula, in float64."""
    g, d = known.double(), difference.double()
    if mode == "absolute":
        return d
    if not g.norm() or not d.norm():
        return torch.zeros_like(d)
    f = g.norm() * d / d.norm()
    return f if mode == "grad-norm" else (1 + (g * d).sum() / (g.norm() * d.norm())) / 2 * f


class Toy(nn.Module):
    """Two layers with the names of a Llama, or with fused weights, and a tower of like names."""

    def __init__(self, kind: str = "split", *, layers: int = 2, prefix: str = "model") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(to_dict=lambda: dict(HEADS))
        inner = nn.Module()
        inner.layers = nn.ModuleList(_layer(kind) for _ in range(layers))
        inner.embed_tokens = nn.Embedding(5, 8)
        setattr(self, prefix, inner)
        self.vision_tower = nn.Module()
        self.vision_tower.layers = nn.ModuleList(_layer("split") for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """Use all split weights of the language model."""
        for layer in self.model.layers:
            x = layer(x)
        return x


class ToyLayer(nn.Module):
    """Attention to itself, which any batch of vectors can have, and a feed-forward part."""

    def forward(self, x: Tensor) -> Tensor:
        """Use all split weights."""
        a, m = self.self_attn, self.mlp
        x = x + a.o_proj(torch.tanh(a.q_proj(x)) + (a.k_proj(x) * a.v_proj(x)).repeat(1, 2))
        return x + m.down_proj(torch.tanh(m.gate_proj(x)) * m.up_proj(x))


def _layer(kind: str) -> nn.Module:
    layer, attention, mlp = ToyLayer(), nn.Module(), nn.Module()
    layer.self_attn, layer.mlp, layer.input_layernorm = attention, mlp, nn.LayerNorm(8)
    attention.o_proj = nn.Linear(8, 8)
    if kind in ("split", "stacked", "turned"):
        for leaf, out in (("q_proj", 8), ("k_proj", 4), ("v_proj", 4)):
            setattr(attention, leaf, nn.Linear(8, out))
    else:
        setattr(attention, "wqkv" if kind == "interleaved" else "qkv_proj", nn.Linear(8, 16))
    if kind in ("stacked", "turned"):
        mlp.gate, mlp.experts = nn.Linear(8, 3, bias=False), nn.Module()
        shapes = [(3, 12, 8), (3, 8, 6)]
        for leaf, (e, out, into) in zip(("gate_up_proj", "down_proj"), shapes, strict=True):
            shape = (e, out, into) if kind == "stacked" else (e, into, out)
            setattr(mlp.experts, leaf, nn.Parameter(torch.randn(shape)))
    elif kind == "split":
        mlp.gate_proj, mlp.up_proj = nn.Linear(8, 6), nn.Linear(8, 6)
        mlp.down_proj = nn.Linear(6, 8)
    else:
        mlp.gate_up_proj, mlp.down_proj = nn.Linear(8, 12), nn.Linear(6, 8)
    return layer


def give_gradients(model: nn.Module, seed: int = 100) -> dict[str, Tensor]:
    """Give every parameter a gradient, and return copies of them by name."""
    for n, each in enumerate(model.parameters()):
        if each.requires_grad:
            each.grad = noise(*each.shape, seed=seed + n).to(each.dtype)
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def gradients(model: nn.Module) -> dict[str, Any]:
    """The gradients that a model's parameters have, by name."""
    return {name: each.grad for name, each in model.named_parameters()}
