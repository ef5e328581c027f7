"""Reading an output again: what was changed is found and named, what was not is not."""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import Triple
from support.scenes import Scene, make_scene

from lean_merge import CheckpointError, Resources, Verification, cli, verify
from lean_merge.outputs.differing import numbers_apart, rank_of
from lean_merge.plan import runfacts
from lean_merge.store import JOURNAL
from lean_merge.store.journal import decode_line, sealed_lines

MODULE = sys.modules["lean_merge.verify"]
"""The module; the package's attribute of that name is the function."""
CPU = Resources(device="cpu", threads=1)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return make_scene(tmp_path_factory.mktemp("verify"))


@pytest.fixture
def out(scene: Scene) -> Path:
    """A copy of the scene's output, to be harmed."""
    folder = scene.folder / "harmed" / "out"
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in scene.expected.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def flip(file: Path, bit: int) -> None:
    """Flips one bit of a file, and back when called again."""
    with open(file, "r+b") as stream:
        stream.seek(bit // 8)
        byte = stream.read(1)[0]
        stream.seek(bit // 8)
        stream.write(bytes([byte ^ 1 << bit % 8]))


def header_bytes(file: Path) -> int:
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


def looked(out: Path, **options: Any) -> Verification:
    return verify(out, resources=CPU, **options)


def test_an_output_as_it_was_written(out: Path):
    result = looked(out)
    assert result.ok and result.exact and not result.notes
    assert (result.tensors, result.copied, result.in_scope) == (6, 1, 5)
    # Below 8 weights in scope all are merged again.
    assert len(result.recomputed) == 5


# --- flipped bits -----------------------------------------------------------------------------


def assert_found(out: Path, file: Path, bit: int) -> None:
    flip(file, bit)
    result = looked(out, with_inputs=False)
    flip(file, bit)
    assert [each.file for each in result.differences] == [file.name], bit


def test_some_flipped_bits_are_found(out: Path):
    seeded = random.Random(0)
    for file in shards(out):
        size, header = file.stat().st_size * 8, header_bytes(file) * 8
        for bit in [*seeded.sample(range(header), 15), *seeded.sample(range(header, size), 25)]:
            assert_found(out, file, bit)
    assert looked(out).ok


@pytest.mark.durability
def test_every_flipped_bit_of_a_header_and_many_of_weights_are_found(
    out: Path, capsys: pytest.CaptureFixture[str]
):
    """And every bit of the index, the journal and the report."""
    counts = {}
    file = shards(out)[0]
    for bit in range(header_bytes(file) * 8):
        assert_found(out, file, bit)
    counts["header"] = header_bytes(file) * 8
    seeded = random.Random(1)
    for file in shards(out):
        first = header_bytes(file) * 8
        bits = seeded.sample(range(first, file.stat().st_size * 8), 1000)
        for bit in bits:
            assert_found(out, file, bit)
        counts["weights"] = counts.get("weights", 0) + len(bits)
    for name in ("model.safetensors.index.json", JOURNAL, "lean_merge_report.json"):
        bits = range(0, (out / name).stat().st_size * 8, 7)
        for bit in bits:
            flip(out / name, bit)
            found = {each.file for each in looked(out, with_inputs=False).differences}
            flip(out / name, bit)
            assert name in found, (name, bit)
        counts[name] = len(bits)
    assert looked(out).ok
    with capsys.disabled():
        print(f"\nflipped bits, all found: {counts}, {sum(counts.values())} in all")


def test_the_tensor_of_a_flipped_bit_is_named(out: Path):
    for file in shards(out):
        names = list(load_file(file))
        for name in names:
            tensors = load_file(file)
            raw = tensors[name].view(torch.uint8).reshape(-1)
            raw[len(raw) // 2] ^= 4
            before = file.read_bytes()
            save_file(tensors, file, metadata={"format": "pt"})
            (difference,) = looked(out).differences
            file.write_bytes(before)
            assert (difference.file, difference.tensor) == (file.name, name)
            assert "bytes have changed" in difference.fault


# --- structure --------------------------------------------------------------------------------


def truncated(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def swapped(file: Path) -> None:
    index = json.loads(file.read_text())
    names = list(index["weight_map"])
    one, other = names[0], names[-1]
    mapped = index["weight_map"]
    mapped[one], mapped[other] = mapped[other], mapped[one]
    file.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("name", "harm", "words"),
    [
        ("model-00002-of-00003.safetensors", Path.unlink, "is missing"),
        ("model-00001-of-00003.safetensors", truncated, "bytes instead of"),
        ("model.safetensors.index.json", Path.unlink, "is missing"),
        ("model.safetensors.index.json", swapped, "instead of 'model-0000"),
        ("model.safetensors.index.json", truncated, "has changed"),
        ("config.json", truncated, "has changed"),
        ("additional_chat_templates/tool.jinja", Path.unlink, "is missing"),
        (JOURNAL, truncated, "is damaged"),
        ("README.md", lambda file: file.write_text("mine"), "has changed"),
        ("model-00004-of-00004.safetensors", Path.touch, "is not part of this output"),
        ("pytorch_model.bin", Path.touch, "is not part of this output"),
        ("tf_model.h5", Path.touch, "is not part of this output"),
        ("weights.NPZ", Path.touch, "is not part of this output"),
        ("adapter_config.json", Path.touch, "is not part of this output"),
    ],
)
def test_what_was_changed_is_named(out: Path, name: str, harm: Callable[[Path], None], words: str):
    harm(out / name)
    result = looked(out, with_inputs=False)
    assert not result.ok
    assert any(each.file == name and words in each.fault for each in result.differences)


def test_files_that_users_add_are_no_difference(out: Path):
    (out / "notes.txt").write_text("mine")
    (out / ".gitattributes").write_text("mine")
    assert looked(out).ok


def test_what_is_no_complete_output_is_refused(scene: Scene, out: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match="is no folder"):
        looked(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="to compare with"):
        looked(scene.triple.mllm)
    (out / JOURNAL).rename(out / f"{JOURNAL}.partial")
    with pytest.raises(CheckpointError, match="unfinished"):
        looked(out)


# --- against the inputs -----------------------------------------------------------------------


def rewrite(scene: Scene, out: Path, name: str, change: Callable[[torch.Tensor], None]) -> None:
    """Changes a tensor so that the journal agrees: only the inputs tell."""
    from lean_merge.store import read_journal

    journal = read_journal(out / JOURNAL)
    assert journal is not None
    import zlib

    file = out / journal.tensors[name]["shard"]
    tensors = load_file(file)
    change(tensors[name])
    save_file(tensors, file, metadata={"format": "pt"})
    raw = tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes()
    journal.tensors[name]["crc32_data"] = zlib.crc32(raw)
    records = [journal.start, *journal.tensors.values(), *journal.files.values()]
    (out / JOURNAL).write_bytes(sealed_lines(records))


WEIGHT = "model.layers.0.mlp.gate_proj.weight"


def one_place_more(tensor: torch.Tensor) -> None:
    tensor.view(torch.int16).reshape(-1)[7] += 1


def test_a_tensor_out_of_scope_that_is_not_the_mllms_is_found(scene: Scene, out: Path):
    def change(tensor: torch.Tensor) -> None:
        tensor[3] += 1

    rewrite(scene, out, "model.norm.weight", change)
    assert looked(out, with_inputs=False).ok
    (difference,) = looked(out).differences
    assert difference.tensor == "model.norm.weight"
    assert "bytes are not the MLLM's" in difference.fault


def test_a_weight_that_the_merge_does_not_give_is_found(scene: Scene, out: Path):
    rewrite(scene, out, WEIGHT, one_place_more)
    assert looked(out, with_inputs=False).ok
    (difference,) = looked(out).differences
    assert difference.tensor == WEIGHT
    assert "1 bytes are not what the merge gives" in difference.fault


def test_elsewhere_last_places_may_differ_and_no_more(
    scene: Scene, out: Path, monkeypatch: pytest.MonkeyPatch
):
    real = runfacts.environment
    monkeypatch.setattr(MODULE, "environment", lambda device: {**real(device), "torch": "9.9"})
    rewrite(scene, out, WEIGHT, one_place_more)
    result = looked(out)
    assert result.ok and not result.exact
    assert f"torch is 9.9, was {torch.__version__}" in result.notes[0]

    def everywhere(places: int) -> Callable[[torch.Tensor], None]:
        def change(tensor: torch.Tensor) -> None:
            tensor.view(torch.int16).add_(places)

        return change

    rewrite(scene, out, WEIGHT, lambda tensor: tensor.view(torch.int16).reshape(-1)[7:8].sub_(1))
    rewrite(scene, out, WEIGHT, everywhere(1))
    assert looked(out).ok
    rewrite(scene, out, WEIGHT, everywhere(1))
    (difference,) = looked(out).differences
    assert "512 of 512 entries differ by more than a last place" in difference.fault


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_places_are_counted_in_the_order_of_numbers(dtype: torch.dtype):
    numbers = torch.tensor([-torch.inf, -2.5, -1.0, -0.0, 0.0, 1.0, 2.5, torch.inf], dtype=dtype)
    ranks = rank_of(numbers)
    assert torch.equal(ranks.sort().values, ranks) and ranks[3] == ranks[4] == 0
    above = torch.nextafter(numbers[1:-1].double().to(dtype), torch.tensor(torch.inf, dtype=dtype))
    assert torch.equal(rank_of(above) - ranks[1:-1], torch.ones(6, dtype=torch.int64))
    assert numbers_apart(numbers[1:-1], above) == 0
    assert numbers_apart(numbers[2:3], numbers[5:6]) == 1


def test_the_sample_is_a_twentieth_but_at_least_eight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from support.families import write_triple

    shapes = {f"layers.{n}.mlp.gate_proj": (16, 16) for n in range(12)}
    triple = write_triple(tmp_path, shapes)
    out = triple.merge(tmp_path / "out").path
    assert out is not None
    first, again = (looked(out, seed=5).recomputed for _ in range(2))
    assert len(first) == 8 and first == again
    assert looked(out, seed=6).recomputed != first
    assert len(looked(out, full=True).recomputed) == 12
    monkeypatch.setattr(MODULE, "LEAST_SAMPLE", 1)
    assert len(looked(out).recomputed) == 1
    monkeypatch.setattr(MODULE, "SAMPLE_SHARE", 0.26)
    assert len(looked(out).recomputed) == 4
    assert looked(out).seed != looked(out).seed


def test_inputs_that_moved_along_are_found_and_changed_ones_refused(tmp_path: Path):
    scene = make_scene(tmp_path / "one")
    out = tmp_path / "one" / "here" / "out"
    scene.merge(out)
    (tmp_path / "one").rename(tmp_path / "two")
    out = tmp_path / "two" / "here" / "out"
    assert len(looked(out).recomputed) == 5
    base = tmp_path / "two" / "in" / "base" / "model.safetensors"
    tensors = load_file(base)
    tensors["model.norm.weight"] = torch.zeros(9)
    save_file(tensors, base, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="is not the base that was merged"):
        looked(out)
    assert looked(out, with_inputs=False).notes == ("the inputs were not read",)
    shutil.rmtree(base.parent)
    with pytest.raises(CheckpointError, match="no such folder"):
        looked(out)
    # What was found in the output itself is not hidden by it.
    flip(shards(out)[0], header_bytes(shards(out)[0]) * 8 + 3)
    result = looked(out)
    assert not result.ok and "inputs could not be compared" in result.notes[0]


def test_verifying_reads_and_never_writes(scene: Scene, out: Path):
    folders = (out, *(scene.folder / "in" / role for role in ("base", "mllm", "expert1")))
    before = {file: file.stat().st_mtime_ns for folder in folders for file in folder.rglob("*")}
    looked(out, full=True)
    after = {file: file.stat().st_mtime_ns for folder in folders for file in folder.rglob("*")}
    assert before == after


def test_an_adapter_and_an_analysis_are_verified_too(small: Triple, tmp_path: Path):
    adapter = small.merge(tmp_path / "adapter", output="lora").path
    assert adapter is not None
    result = looked(adapter)
    assert result.ok and result.tensors == 4
    file = adapter / "adapter_model.safetensors"
    flip(file, file.stat().st_size * 8 - 5)
    (difference,) = looked(adapter).differences
    assert difference.tensor is not None and "lora_" in difference.tensor
    flip(file, 100)
    assert "header has changed" in looked(adapter).differences[0].fault
    analysis = small.merge(tmp_path / "analysis", output="none").path
    assert analysis is not None
    assert looked(analysis).ok
    flip(analysis / "lean_merge_report.json", 77)
    assert not looked(analysis).ok


# --- what a stranger wrote --------------------------------------------------------------------


def forge(out: Path, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    """Let a stranger change the records of the journal, so that its digests agree."""
    lines = (out / JOURNAL).read_bytes().splitlines(keepends=True)[:-1]
    records = [decode_line(line) for line in lines]
    known = [record for record in records if record is not None]
    change(known)
    (out / JOURNAL).write_bytes(sealed_lines(known))


HOSTILE = r"^((m|o|d|e|l|\.|a|y|r|s|0|1|_|p|g|t|j|u|w|h|i)+)+!$"


@pytest.mark.parametrize(
    "recipe",
    [
        {"exclude": [HOSTILE]},
        {"include": ["x" * 5000]},
        {"include": ["mlp"] * 500},
        {"parameters": {"scale": [{"filter": HOSTILE, "value": 0.5}, 1.0]}},
        {"names": {HOSTILE: "model"}},
    ],
)
def test_patterns_that_nobody_has_read_are_bounded_or_refused(
    out: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    """By Python alone, the first would be matched for years."""
    monkeypatch.setitem(sys.modules, "re2", None)
    forge(out, lambda records: records[0]["run"]["recipe"].update(recipe))
    with pytest.raises(CheckpointError, match=r"the pattern .* of the recipe in its journal"):
        looked(out)
    assert looked(out, with_inputs=False).ok


@pytest.mark.parametrize("pattern", ["mlp|q_proj", r"layers\.\d+\.mlp", "^layers.0", "down_proj$"])
def test_patterns_of_a_bounded_time_are_verified(
    scene: Scene, tmp_path: Path, pattern: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "re2", None)
    result = scene.merge(tmp_path / "out", output="none", include=[pattern])
    assert result.path is not None and looked(result.path).ok


@pytest.mark.parametrize(
    "change",
    [
        lambda records: records[0]["run"].update(inputs=7),
        lambda records: records[0]["run"]["inputs"][0].update(files=[{}]),
        lambda records: records[0]["run"]["inputs"][1].pop("path"),
        lambda records: records[0]["run"].update(recipe=[]),
        lambda records: records[0]["run"].update(environment=[1]),
        lambda records: records[0]["run"]["recipe"].update(experts=[{"model": "x" * 400_000}]),
    ],
)
def test_a_journal_that_makes_no_sense_is_refused(out: Path, change: Callable[[Any], Any]):
    forge(out, change)
    with pytest.raises(CheckpointError, match="its journal does not tell recipe and inputs"):
        looked(out)


@pytest.mark.parametrize(
    "change",
    [
        lambda records: records[1].update(crc32_data="0"),
        lambda records: records[1].update(shard="../../elsewhere/model.safetensors"),
        lambda records: records[-1].update(name="/etc/passwd"),
        lambda records: records[-1].pop("sha256"),
        lambda records: records[0].update(shards=[1]),
        lambda records: records.insert(1, {"record": []}),
        lambda records: records.insert(1, {"record": "unheard of"}),
        lambda records: records.insert(1, {"record": "analysis", "found": {"x": [[]] * 6_000_000}}),
    ],
)
def test_a_record_that_makes_no_sense_counts_as_damage(out: Path, change: Callable[[Any], Any]):
    forge(out, change)
    result = looked(out)
    assert [each.file for each in result.differences] == [JOURNAL]


def test_the_command_that_repairs_is_told_and_repairs(scene: Scene, out: Path):
    flip(shards(out)[0], shards(out)[0].stat().st_size * 8 - 3)
    result = looked(out, with_inputs=False)
    assert not result.ok and result.repair is not None
    program, *arguments = shlex.split(result.repair)
    assert program == "lean-merge" and "--overwrite" in arguments
    cli.main([*arguments, "--quiet", "--device", "cpu"])
    assert looked(out).ok and looked(out).repair is None
    assert shards(out)[0].read_bytes() == scene.expected[shards(out)[0].name]
    (out / JOURNAL).write_bytes(b"x")
    assert looked(out).repair is not None


# --- the command line -------------------------------------------------------------------------


def test_the_command_line_leaves_with_0_or_3(out: Path, capsys: pytest.CaptureFixture[str]):
    cli.main(["verify", str(out), "--seed", "7"])
    printed = capsys.readouterr().out
    assert "nothing differs" in printed and "--seed 7" in printed
    cli.main(["verify", str(out), "--json", "--full"])
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is True and found["counts"]["recomputed"] == 5
    file = shards(out)[1]
    flip(file, file.stat().st_size * 8 - 1)
    for flags in ([], ["--json"], ["--quiet"], ["--without-inputs"]):
        with pytest.raises(SystemExit) as left:
            cli.main(["verify", str(out), *flags])
        assert left.value.code == 3
        printed = capsys.readouterr().out
        assert "its bytes have changed" in printed
        if flags == ["--json"]:
            (difference,) = json.loads(printed)["differences"]
            assert difference["file"] == file.name
    with pytest.raises(SystemExit) as left:
        cli.main(["verify", str(out.parent)])
    assert left.value.code == 1
