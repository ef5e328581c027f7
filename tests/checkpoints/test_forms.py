"""Forms of input: loaded where they are needed alone, and added by one file."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.families import SMALL, Triple, load, write_triple

from lean_merge import open_checkpoint
from lean_merge.checkpoints import forms, open_expert
from lean_merge.errors import CheckpointError


@pytest.fixture
def triple(tmp_path: Path) -> Triple:
    return write_triple(tmp_path / "in", SMALL)


def loaded_by_plans(*mllms: Path, base: Path, expert: Path) -> list[set[str]]:
    """The forms that another process has imported after the plan of a merge into each MLLM."""
    code = """
import sys
from lean_merge import MergeRecipe, plan
base, expert, *mllms = sys.argv[1:]
for mllm in mllms:
    plan(MergeRecipe(base, mllm, (expert,)))
    loaded = [name for name in sys.modules if name.startswith("lean_merge.checkpoints.forms.")]
    print(*(name.split(".")[3] for name in loaded))
"""
    command = [sys.executable, "-c", code, *map(str, (base, expert, *mllms))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [set(line.split()) for line in done.stdout.splitlines()]


def test_a_plan_of_plain_safetensors_loads_no_other_form(triple: Triple, tmp_path: Path):
    other = tmp_path / "other"
    shutil.copytree(triple.mllm, other)
    # What lies beside the weights makes them no less plain.
    torch.save({"step": torch.ones(1)}, triple.mllm / "training_args.bin")
    (other / "model.safetensors").unlink()
    torch.save(load(triple.mllm), other / "pytorch_model.bin")
    (expert,) = triple.experts
    found = loaded_by_plans(triple.mllm, other, base=triple.base, expert=expert)
    assert found == [set(), {"fp8", "hub", "lora", "pytorch", "remote", "unsupported"}]


NEW = """
from dataclasses import dataclass
from pathlib import Path

from lean_merge.checkpoints.forms import Encoding, Form, Origin
from lean_merge.checkpoints.header import read_header
from lean_merge.checkpoints.rows import StoredRows


@dataclass(frozen=True)
class NegatedRows(StoredRows):
    def read(self, rows, reader, buffer, name):
        return super().read(rows, reader, buffer, name).neg_()


class Negated(Encoding):
    def rows(self, place):
        return NegatedRows(place)


class New(Form):
    suffixes = (".raw",)

    def fetch(self, source):
        folder = source.removeprefix("near:")
        return Origin(Path(folder), "near", None) if folder != source else None

    def read(self, file):
        return read_header(file)[0]

    def understands(self, settings):
        return settings.get("quant_method") == "negated"

    def decode(self, tensors, settings):
        mine = any(map(self.understands, settings))
        return tensors, {name: Negated() for name in tensors if mine and "layers" in name}


FORM = New()
"""


@pytest.fixture
def new_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One more file in the folder of forms."""
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "new.py").write_text(NEW)
    monkeypatch.setattr(forms, "__path__", [*forms.__path__, str(tmp_path / "more")])
    forms.all_forms.cache_clear()
    yield
    forms.all_forms.cache_clear()
    sys.modules.pop("lean_merge.checkpoints.forms.new")


@pytest.mark.usefixtures("new_form")
def test_a_new_form_is_one_file(triple: Triple, tmp_path: Path):
    expected = load(triple.merge(tmp_path / "expected").path)
    tensors = load(triple.experts[0])
    shutil.rmtree(triple.experts[0])
    triple.experts[0].mkdir()
    negated = {name: -t if "layers" in name else t for name, t in tensors.items()}
    save_file(negated, triple.experts[0] / "model.safetensors")
    config = '{"quantization_config": {"quant_method": "negated"}}'
    (triple.experts[0] / "config.json").write_text(config)
    assert all(
        torch.equal(t, expected[n]) for n, t in load(triple.merge(tmp_path / "a").path).items()
    )
    assert open_checkpoint(f"near:{triple.experts[0]}").path == triple.experts[0]
    file = triple.experts[0] / "model.raw"
    (triple.experts[0] / "model.safetensors").rename(file)
    assert set(open_checkpoint(file).tensors) == set(tensors)


def test_an_adapter_of_no_form_is_refused(tmp_path: Path):
    save_file({"a": torch.zeros(2)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LOHA"}')
    with pytest.raises(CheckpointError, match="type 'LOHA', and only LORA is understood"):
        open_expert(tmp_path)
