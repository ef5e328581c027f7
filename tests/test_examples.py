"""Every example recipe is planned on the public shapes of its models, in files without data."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from lean_merge import MergeRecipe, Resources
from lean_merge.memory import usage
from lean_merge.plan import plan as make_plan

FOLDER = Path(__file__).parents[1] / "docs" / "examples"
EXAMPLES = sorted(FOLDER.glob("*.yml"))
ITEM = {"float16": ("F16", 2), "bfloat16": ("BF16", 2)}
GB = 10**9
IMPORTED = 150 << 20
"""What a process holds that has imported lean-merge (docs/memory.md)."""


@pytest.fixture(scope="module")
def models() -> Any:
    """The configs and shapes that bench/public_shapes.py wrote."""
    return json.loads((FOLDER / "shapes.json").read_text(encoding="utf-8"))


def write_sparse(folder: Path, model: dict[str, Any]) -> int:
    """Write a model whose weight file has a header and a hole, and return the size of the data."""
    folder.mkdir(parents=True)
    dtype, item = ITEM[model["dtype"]]
    header, at = {}, 0
    for key, (layers, *shape) in model["tensors"].items():
        for layer in range(layers):
            size = item * math.prod(shape)
            header[key.replace("*", str(layer))] = {
                "dtype": dtype,
                "shape": shape,
                "data_offsets": [at, at + size],
            }
            at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    config = model["config"] | {"torch_dtype": model["dtype"]}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return at


def stated(text: str) -> dict[str, tuple[float, float, float]]:
    """The table of docs/examples/README.md: GB to download, GB of output, GiB of memory."""
    rows = re.findall(r"^\| \[.*?\]\((.*?)\) .* \| (\S+) \| (\S+) \| (\S+) \|$", text, re.MULTILINE)
    return {name: (float(down), float(out), float(memory)) for name, down, out, memory in rows}


def test_every_example_can_be_planned_and_takes_what_its_page_states(
    models: Any, tmp_path: Path
) -> None:
    table = stated((FOLDER / "README.md").read_text(encoding="utf-8"))
    assert len(EXAMPLES) >= 10 and set(table) == {each.name for each in EXAMPLES}
    sizes: dict[str, int] = {}
    for example in EXAMPLES:
        recipe = MergeRecipe.from_yaml(example.read_text(encoding="utf-8"))
        experts = [name for each in recipe.experts for name in (each.model, each.parent) if name]
        names = [recipe.base_model, recipe.receiver, *experts]
        for name in names:
            if name not in sizes:
                sizes[name] = write_sparse(tmp_path / name, models[name])
        down, out, memory = table[example.name]
        data = recipe.to_dict()
        data["base_model"] = str(tmp_path / recipe.base_model)
        data["mllm_model"] = str(tmp_path / recipe.receiver)
        for entry in data["experts"]:
            entry |= {
                key: str(tmp_path / entry[key]) for key in ("model", "parent") if key in entry
            }
        # What this process holds beside what the program itself does is not a merge's.
        beside = max(0, usage().anonymous - IMPORTED)
        ceiling = int(memory * 2**30) + beside
        resources = Resources(device="cpu", threads=2, memory=ceiling)
        plan = make_plan(MergeRecipe.from_dict(data), resources)
        layers = models[recipe.base_model]["config"]["num_hidden_layers"]
        assert len(plan.weights) == 7 * layers and not plan.coverage.left_out, example.name
        assert sum(sizes[name] for name in names) / GB == pytest.approx(down, abs=0.06)
        assert sizes[recipe.receiver] / GB == pytest.approx(out, abs=0.06)
