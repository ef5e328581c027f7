"""Two processes under torchrun that pull one tiny model, in three ways, against one process.

    torchrun --nproc-per-node 2 drift_ranks.py PRIOR OUT

Each rank writes the gradients that it has after the pull, whole, and its report.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lean_merge.drift import Drift
from support.priors import Toy, noise

ROWS = 4
"""Rows of a batch; each of two ranks takes half of them."""


class Factors(nn.Module):
    """A linear layer with factors beside it, under the names that PEFT gives them."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.scaling, self.active_adapters = base, {"default": 0.5}, ["default"]
        into, out = base.in_features, base.out_features
        self.lora_A = nn.ModuleDict({"default": nn.Linear(into, 3, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(3, out, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        """The layer and its change."""
        return self.base_layer(x) + 0.5 * self.lora_B["default"](self.lora_A["default"](x))


def model(kind: str) -> nn.Module:
    """The toy in float64, whole or with factors."""
    made = Toy().double()
    if kind == "lora":
        made.requires_grad_(False)
        torch.manual_seed(1)
        for layer in made.model.layers:
            layer.self_attn.q_proj = Factors(layer.self_attn.q_proj).double()
            layer.mlp.down_proj = Factors(layer.mlp.down_proj).double()
            for each in (layer.self_attn.q_proj, layer.mlp.down_proj):
                each.lora_A.requires_grad_(True)
                each.lora_B.requires_grad_(True)
    return made


def run(made: nn.Module, prior: Path, mode: Any, rows: slice) -> tuple[dict[str, Tensor], Any]:
    """The model's gradients after a backward pass on some rows and the pull, and the report."""
    for each in made.parameters():
        each.grad = None
    made(noise(ROWS, 8).double()[rows]).square().mean().backward()
    drift = Drift(made, prior, mode=mode)
    drift.apply()
    return dict(_gradients(made)), drift.report()


def _gradients(made: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, each in made.named_parameters():
        if each.grad is not None:
            gradient: Any = each.grad
            whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
            yield name.removeprefix("module."), whole.clone()


def main(prior: Path, out: Path) -> None:
    """Do all of it on this rank."""
    from torch import distributed
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    rows = slice(ROWS // 2 * rank, ROWS // 2 * (rank + 1))
    found: dict[Any, Any] = {"modules": [*sys.modules]}
    for kind in ("whole", "lora"):
        sharded = model(kind)
        for layer in sharded.model.layers:
            fully_shard(layer)
        copies = DistributedDataParallel(model(kind), find_unused_parameters=True)
        ways = {"ddp": copies, "fsdp2": fully_shard(sharded)}
        for way, made in ways.items():
            for mode in ("absolute", "grad-norm", "adaptive"):
                found[way, kind, mode] = run(made, prior, mode, rows)
    torch.save(found, out / f"{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
