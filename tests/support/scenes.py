"""Tiny merges to be interrupted, and what must be true of the disk whatever became of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError, safe_open

from lean_merge import Event, MergeResult, analyze, open_checkpoint
from lean_merge.checkpoints import open_expert
from lean_merge.engine import background
from lean_merge.errors import CheckpointError
from lean_merge.outputs.factors import FACTORS
from lean_merge.store import JOURNAL
from lean_merge.store.check import check_folder
from lean_merge.store.state import DISCARDED, OWN_ANALYSIS
from support.families import Triple, contents, write_triple
from support.faults import Tree, flat, write_tree

SHAPES = {
    "layers.0.self_attn.q_proj": (24, 16),
    "layers.0.mlp.gate_proj": (32, 16),
    "layers.0.mlp.down_proj": (16, 32),
    "layers.1.self_attn.q_proj": (24, 16),
    "layers.1.mlp.gate_proj": (32, 16),
}
OPTIONS: dict[str, Any] = {"shard_size": 2000, "rounding": "stochastic", "out_dtype": "bfloat16"}
LORA: dict[str, Any] = {"output": "lora", "lora_rank": 3}
AUTO: dict[str, Any] = {**OPTIONS, "threshold": "auto"}
SCENES = {"checkpoint": OPTIONS, "adapter": LORA, "own analysis": AUTO}
REPORT = "lean_merge_report.json"
RECIPE = "lean_merge_recipe.yml"
TIMED = ("seconds", "memory", "threads", "workers")
"""Fields of a report that tell of the run and not of its result."""


class Scene:
    """A merge of several shards, what it writes, what another merge wrote, and where it is tried.

    And the factors of the analysis that it makes itself, if it makes one.

    No dataclass, so that a failing property test does not print all these bytes.
    """

    def __init__(
        self,
        triple: Triple,
        options: Mapping[str, Any],
        expected: Mapping[str, bytes],
        old: Mapping[str, bytes],
        folder: Path,
        factors: bytes | None,
    ) -> None:
        self.triple = triple
        self.options = options
        self.expected = expected
        self.old = old
        self.folder = folder
        self.factors = factors

    def merge(self, out: Path, **options: Any) -> MergeResult:
        """The merge; `options` may say otherwise."""
        return self.triple.merge(out, **{**self.options, **options})

    @property
    def is_adapter(self) -> bool:
        """Whether what is written is an adapter."""
        return self.options.get("output") == "lora"


def make_scene(folder: Path, options: Mapping[str, Any] = OPTIONS) -> Scene:
    """Checkpoints, an output of the merge, and one of another merge to be replaced."""
    triple = write_triple(folder / "in", SHAPES)
    templates = triple.mllm / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool.jinja").write_text("{{ messages }}")
    expected = contents(triple.merge(folder / "expected" / "out", **options).path)
    weights = [name for name in expected if name.endswith(".safetensors")]
    assert len(weights) == (1 if options is LORA else 3)
    others = {"output": "lora"} if options is LORA else {}
    old = contents(triple.merge(folder / "old" / "out", scale=0.25, **others).path)
    factors = None
    if options is AUTO:
        analysis = analyze(triple.recipe(**options), folder / "analysis").path
        factors = (analysis / FACTORS).read_bytes()
    return Scene(triple, options, expected, old, folder, factors)


def steady(files: Mapping[str, bytes]) -> dict[str, Any]:
    """What must not vary between runs: all files, report and journal without times."""
    fixed: dict[str, Any] = dict(files)
    report = json.loads(fixed[REPORT])
    fixed[REPORT] = {name: value for name, value in report.items() if name not in TIMED}
    lines = map(json.loads, fixed[JOURNAL].splitlines()[:-1])
    # The last line is the digest of the others, and one is that of the report.
    fixed[JOURNAL] = [each for each in lines if each.get("name") != REPORT]
    return fixed


def assert_same(found: Mapping[str, bytes], wanted: Mapping[str, bytes]) -> None:
    """Two outputs are the same but for times."""
    assert found.keys() == wanted.keys()
    one, other = steady(found), steady(wanted)
    assert [name for name in one if one[name] != other[name]] == []


def assert_never_half_done(folder: Path, scene: Scene) -> str:
    """Whatever `folder` holds, nobody is deceived; what its `out` is, in a word."""
    for file in folder.rglob("*.safetensors*"):
        name = file.name.removesuffix(".partial")
        try:
            with safe_open(file, "pt") as opened:
                assert list(opened.keys()) is not None
        except SafetensorError:
            continue
        # What can be opened at all is whole and right.
        if name == FACTORS and file.parent.name in (OWN_ANALYSIS, DISCARDED):
            assert file.read_bytes() == scene.factors
            continue
        assert file.read_bytes() in (scene.expected.get(name), scene.old.get(name)), file
    out = folder / "out"
    try:
        open_expert(str(out)) if scene.is_adapter else open_checkpoint(out)
    except CheckpointError:
        (_assert_peft_refuses if scene.is_adapter else _assert_transformers_refuses)(out)
        return "unfinished" if out.exists() else "absent"
    found = contents(out)
    if found.get(RECIPE) == scene.old[RECIPE]:
        assert_same(found, scene.old)
        return "old"
    assert_same(found, scene.expected)
    assert check_folder(out, lambda count: None).differences == []
    return "complete"


def _assert_transformers_refuses(out: Path) -> None:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=8,
        pad_token_id=0,
    )
    with pytest.raises(OSError):
        transformers.LlamaForCausalLM.from_pretrained(out, config=config, local_files_only=True)


def _assert_peft_refuses(out: Path) -> None:
    from peft import load_peft_weights

    with pytest.raises((OSError, ValueError)):
        load_peft_weights(str(out), device="cpu", local_files_only=True)


def try_disk(tree: Tree, scene: Scene, *, overwrite: bool) -> str:
    """Put a disk together, look at it, go on, and compare the end; what `out` was before."""
    folder = scene.folder / "disk"
    write_tree(tree, folder)
    try:
        state = assert_never_half_done(folder, scene)
        assert state in ({"old", "complete", "absent"} if overwrite else {*STATES} - {"old"})
        if overwrite and state == "absent":
            beside = flat(tree)
            assert ".out.lean-merge-old" in beside and ".out.lean-merge-new" in beside
        scene.merge(folder / "out", overwrite=overwrite)
        assert_same(contents(folder / "out"), scene.expected)
        assert [each.name for each in folder.iterdir()] == ["out"]
    finally:
        shutil.rmtree(folder)
    return state


STATES = ("absent", "unfinished", "complete", "old")


class Stop(BaseException):
    """As Ctrl-C is: no Exception."""


def stopping(after: int, *, of: str = "") -> Callable[[Event], None]:
    """Stops the merge once so many tensors were computed, of one kind of output if it is given."""
    left = [after]

    def on_event(event: Event) -> None:
        if of and event.output != of:
            return
        left[0] -= not event.reused
        if left[0] <= 0:
            raise Stop

    return on_event


def often() -> Any:
    """A context in which every written byte is followed by a sync and a line in the journal."""
    context = pytest.MonkeyPatch.context()

    class Often:
        def __enter__(self) -> None:
            context.__enter__().setattr(background, "FLUSH_EVERY", 1)

        def __exit__(self, *error: Any) -> None:
            context.__exit__(*error)

    return Often()
