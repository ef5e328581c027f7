"""A kind of output is one class: whoever defines one can plan it and make it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
from support.families import Triple, write_triple

from lean_merge import RecipeError, Resources, merge, plan
from lean_merge.outputs import Outcome, Output, Sink, all_outputs, base, output_of, register_kind
from lean_merge.outputs.blocks import BlockSink
from lean_merge.outputs.companions import write_report
from lean_merge.store import OutputFolder

CPU = Resources(device="cpu", threads=1)


@pytest.fixture
def listing() -> Iterator[type[Output]]:
    """A kind that names the weights which get an update, as a text file."""

    @register_kind
    class ListOutput(Output):
        name: ClassVar[str] = "list"

        def described(self, *, written: int, disk: int) -> str:
            return "a list of names"

        def sink(self, folder: OutputFolder | None) -> Sink:
            assert folder is not None
            return BlockSink(folder)

        def end(self, folder: OutputFolder, outcome: Outcome) -> None:
            names = [weight.canonical for weight in outcome.weights if weight.merged]
            folder.write_file("names.txt", "\n".join(names).encode())
            write_report(self, folder, outcome)

    yield ListOutput
    del base._KINDS[ListOutput.name]


def test_each_kind_says_what_recipes_call_it():
    kinds = all_outputs()
    assert {name: kind.name for name, kind in kinds.items()} == {name: name for name in kinds}
    asked_for = {name for name, kind in kinds.items() if kind.in_recipes}
    assert asked_for == {"checkpoint", "lora", "none"}
    assert all(output_of(name) is kinds[name] for name in asked_for)


@pytest.mark.parametrize("name", ["stream", "analysis", "lorra", ""])
def test_a_recipe_may_ask_for_no_other(name: str):
    with pytest.raises(RecipeError, match="output must be one of checkpoint, lora, none"):
        output_of(name)


def test_a_new_kind_needs_nothing_but_its_class(listing: type[Output], tmp_path: Path):
    triple: Triple = write_triple(
        tmp_path, {"layers.0.mlp.up_proj": (32, 24), "layers.0.mlp.down_proj": (24, 32)}
    )
    recipe = triple.recipe(output="list", threshold=0.0)
    made = plan(recipe, CPU)
    assert isinstance(made.output, listing) and not made.copies and not made.shards
    result = merge(made, tmp_path / "out")
    assert result.path is not None
    names = (result.path / "names.txt").read_text().split()
    assert len(names) == result.report["counts"]["merged"] > 0
    assert merge(plan(recipe, CPU), tmp_path / "out").was_complete
    with pytest.raises(RecipeError, match="Output list needs a folder"):
        merge(recipe)
