"""What users get wrong, at the command line: one clear line, the right exit code, nothing lost."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoint_files import entry, raw_file, write_index
from support.families import SKETCHED, SMALL, Triple, contents, load, save_tokenizer, write_triple

from lean_merge import CheckpointError, cli, merge, open_checkpoint
from lean_merge.engine import scheduler
from lean_merge.store import storage

showing = importlib.import_module("lean_merge.cli.progress")

FAILED, USAGE, BUDGET, INTERRUPTED = 1, 2, 4, 5
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
GATE = "model.layers.0.mlp.gate_proj.weight"
ROLES = ("base", "mllm", "expert1")


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def roles(small: Triple, tmp_path: Path) -> Triple:
    """The small triple where a test may damage it."""
    root = tmp_path / "in"
    shutil.copytree(small.base.parent, root)
    return Triple(root / "base", root / "mllm", (root / "expert1",), small.slots)


Run = Callable[..., str]


@pytest.fixture
def fails(roles: Triple, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run `merge` on the roles with more flags; assert how it fails; return its message."""

    def run(*flags: object, code: int, out: Path | None = None, lines: int = 2) -> str:
        into = tmp_path / "out" if out is None else out
        inputs = contents(roles.base.parent)
        command = arguments(roles, into, *flags)
        with pytest.raises(SystemExit) as left:
            cli.main(command)
        printed = capsys.readouterr()
        assert left.value.code == code, printed.err
        assert printed.out == ""
        assert "Traceback" not in printed.err
        assert printed.err.startswith("lean-merge: ")
        assert 1 <= len(printed.err.splitlines()) <= lines, printed.err
        assert contents(roles.base.parent) == inputs
        return printed.err.removeprefix("lean-merge: ").strip()

    return run


@pytest.fixture
def refused(fails: Run, tmp_path: Path) -> Run:
    """As `fails`, and nothing was written."""

    def run(*flags: object, code: int, **options: Any) -> str:
        before = sorted(tmp_path.iterdir())
        message = fails(*flags, code=code, **options)
        assert sorted(tmp_path.iterdir()) == before
        return message

    return run


def arguments(roles: Triple, out: Path, *flags: object) -> list[str]:
    """A merge's command line; `flags` come last and win."""
    command: list[object] = ["merge", "--base", roles.base, "--mllm", roles.mllm]
    command += ["--expert", roles.experts[0], "--out", out, "--device", "cpu", "--threads", 1]
    return [str(word) for word in [*command, *flags]]


def weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def resave(folder: Path, **changes: torch.Tensor | None) -> None:
    """Change some tensors of a checkpoint, whose names have _ for a dot here."""
    tensors = load_file(weights(folder))
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, weights(folder), metadata={"format": "pt"})


# --- seen in headers ----------------------------------------------------------------------


def _missing(folder: Path) -> None:
    shutil.rmtree(folder)


def _empty(folder: Path) -> None:
    weights(folder).unlink()


def _pickled(folder: Path) -> None:
    weights(folder).rename(folder / "pytorch_model.bin")


def _absent_shard(folder: Path) -> None:
    write_index(folder, {Q_PROJ: "model-00001-of-00001.safetensors"})
    weights(folder).unlink()


def _shard_outside(folder: Path) -> None:
    write_index(folder, {Q_PROJ: "../base/model.safetensors"})


def _truncated(folder: Path) -> None:
    data = weights(folder).read_bytes()
    weights(folder).write_bytes(data[:-100])


def _corrupt_header(folder: Path) -> None:
    data = bytearray(weights(folder).read_bytes())
    data[12:16] = b"\0\xff{{"
    weights(folder).write_bytes(data)


def _oversized_header(folder: Path) -> None:
    raw_file(weights(folder), b"{}", length=2**62)


def _overlap(folder: Path) -> None:
    header = {Q_PROJ: entry("F32", [2, 2], 0, 16), GATE: entry("F32", [2, 2], 8, 24)}
    raw_file(weights(folder), header, bytes(24))


def _out_of_range(folder: Path) -> None:
    raw_file(weights(folder), {Q_PROJ: entry("F32", [2, 2], 16, 32)}, bytes(16))


def _duplicate(folder: Path) -> None:
    one = json.dumps(entry("F32", [2, 2], 0, 16))
    raw_file(weights(folder), f'{{"{Q_PROJ}": {one}, "{Q_PROJ}": {one}}}'.encode(), bytes(16))


def _twice(folder: Path) -> None:
    tensors = load_file(weights(folder))
    weights(folder).unlink()
    for number in (1, 2):
        save_file(tensors, folder / f"model-{number:05d}-of-00002.safetensors")


def _unknown_dtype(folder: Path) -> None:
    raw_file(weights(folder), {Q_PROJ: entry("F33", [2, 2], 0, 16)}, bytes(16))


def _unfinished(folder: Path) -> None:
    weights(folder).rename(folder / "model.safetensors.partial")


def _quantised(folder: Path) -> None:
    config = {"quantization_config": {"quant_method": "gptq"}}
    (folder / "config.json").write_text(json.dumps(config))


DAMAGES: list[tuple[Callable[[Path], None], list[str]]] = [
    (_missing, ["no such folder or file"]),
    (_empty, ["holds no .safetensors weights"]),
    (_pickled, ["pytorch_model.bin", "no PyTorch archive"]),
    (_absent_shard, ["model-00001-of-00001.safetensors"]),
    (_shard_outside, ["model.safetensors.index.json", "../base/model.safetensors"]),
    (_truncated, ["model.safetensors: ", "truncated"]),
    (_corrupt_header, ["model.safetensors: "]),
    (_oversized_header, ["model.safetensors: ", str(2**62)]),
    (_overlap, [GATE, "overlaps"]),
    (_out_of_range, [Q_PROJ, "truncated"]),
    (_duplicate, [Q_PROJ]),
    (_twice, ["model-00002-of-00002.safetensors", "and so does"]),
    (_unknown_dtype, [Q_PROJ, "unknown dtype 'F33'"]),
    (_unfinished, ["unfinished lean-merge output"]),
    (_quantised, ["quantised with GPTQ"]),
]


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(("damage", "words"), DAMAGES, ids=[d.__name__[1:] for d, _ in DAMAGES])
def test_a_damaged_checkpoint_is_refused_before_anything_is_written(
    roles: Triple, refused: Run, role: str, damage: Callable[[Path], None], words: list[str]
):
    folder = roles.base.parent / role
    damage(folder)
    message = refused(code=FAILED)
    assert message.startswith(str(folder))
    for word in words:
        assert word in message


@pytest.mark.parametrize("flag", ["--base", "--mllm", "--expert"])
def test_a_missing_file_is_refused(roles: Triple, refused: Run, tmp_path: Path, flag: str):
    file = tmp_path / "nowhere" / "model.safetensors"
    message = refused(flag, file, code=FAILED)
    assert message.startswith(f"{file}: there is no such folder or file")


def test_a_file_that_is_no_checkpoint_is_refused(roles: Triple, refused: Run):
    note = roles.base.parent / "note.txt"
    note.write_text("hello")
    assert f"{note}: is not a .safetensors file" in refused("--mllm", note, code=FAILED)


# --- different foundations ----------------------------------------------------------------


@pytest.mark.parametrize(("role", "title"), [("mllm", "MLLM"), ("expert1", "expert 1")])
def test_other_shapes_are_refused_and_the_sizes_named(
    roles: Triple, refused: Run, role: str, title: str
):
    resave(roles.base.parent / role, **{Q_PROJ: torch.zeros(96, 72)})
    message = refused(code=FAILED, lines=4)
    assert f"hidden size 64 in the base, 72 in the {title}" in message
    assert "layers.0.self_attn.q_proj" in message
    assert "[96, 72]" in message and "[96, 64]" in message
    assert "tuned from one base" in message
    assert "--allow-partial" in message


@pytest.mark.parametrize(("role", "title"), [("mllm", "MLLM"), ("expert1", "expert 1")])
def test_another_depth_is_refused(roles: Triple, refused: Run, role: str, title: str):
    layer = {
        name.replace("layers.0", "layers.1"): torch.zeros_like(tensor)
        for name, tensor in load(roles.base).items()
        if "layers.0" in name
    }
    resave(roles.base.parent / role, **layer)
    message = refused(code=FAILED, lines=4)
    assert f"number of layers 1 in the base, 2 in the {title}" in message


def test_other_heads_are_refused(roles: Triple, refused: Run):
    for folder, heads in ((roles.base, 4), (roles.mllm, 8)):
        config = {"num_attention_heads": heads, "hidden_size": 64}
        (folder / "config.json").write_text(json.dumps(config))
    message = refused(code=FAILED)
    assert "8 for attention heads" in message and "the base 4" in message


@pytest.mark.parametrize("role", ROLES)
def test_an_integer_weight_is_refused(roles: Triple, refused: Run, role: str):
    folder = roles.base.parent / role
    resave(folder, **{Q_PROJ: torch.ones(96, 64, dtype=torch.int8)})
    message = refused(code=FAILED, lines=4)
    assert "layers.0.self_attn.q_proj" in message
    assert "I8, which cannot be merged" in message


def test_a_weight_that_is_lacking_is_refused_or_left(
    roles: Triple, refused: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    layer = {
        name.replace("layers.0", "layers.1"): tensor.clone()
        for name, tensor in load(roles.mllm).items()
        if "layers.0" in name
    }
    for folder in (roles.base, roles.mllm):
        resave(folder, **layer)
    resave(roles.experts[0], **{Q_PROJ.replace("layers.0", "layers.1"): layer.popitem()[1]})
    message = refused(code=FAILED, lines=5)
    assert "layers.1.mlp.gate_proj: the expert 1 lacks it" in message
    assert "--allow-partial" in message
    cli.main(arguments(roles, tmp_path / "out", "--allow-partial", "--json"))
    report = json.loads(capsys.readouterr().out)
    assert report["counts"]["skipped"] == len(report["skipped"]) > 0
    left = "model.layers.1.mlp.gate_proj.weight"
    assert torch.equal(load(tmp_path / "out")[left], load(roles.mllm)[left])


# --- seen in arguments --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--threshold", "1.5"], ["threshold", "0 .. 1", "1.5"]),
        (["--threshold", "-0.1"], ["threshold", "-0.1"]),
        (["--threshold", "nan"], ["threshold", "nan"]),
        (["--scale", "inf"], ["scale", "inf"]),
        (["--scale", "nan"], ["scale", "nan"]),
        (["--temperature", "-1"], ["temperature", "-1"]),
        (["--rank", "0"], ["rank", "'auto'", "0"]),
        (["--rank", "-3"], ["rank", "-3"]),
        (["--rank", "2.5"], ["rank", "2.5"]),
        (["--rank", "many"], ["rank", "many"]),
        (["--set", "rank=true"], ["rank", "True"]),
        (["--stages", "rescale"], ["stages", "rescale", "select,rescale,project"]),
        (["--stages", "select,select"], ["stages", "select,select"]),
        (["--stages", "project,rescale"], ["stages", "not defined"]),
        (["--stages", "select,scale"], ["stages", "scale"]),
        (["--stages", ""], ["stages"]),
        (["--select-by", "second"], ["select_by", "first, max", "second"]),
        (["--nuclear", "half"], ["nuclear", "full, top_q", "half"]),
        (["--svd", "fast"], ["svd", "randomized, exact", "fast"]),
        (["--importance", "equal"], ["importance", "softmax, relative", "equal"]),
        (["--out-dtype", "int8"], ["out_dtype", "bfloat16", "int8"]),
        (["--rounding", "up"], ["rounding", "nearest, stochastic", "up"]),
        (["--shard-size", "0"], ["size", "0"]),
        (["--shard-size", "5XB"], ["5XB", "5GB"]),
        (["--shard-size", "-5GB"], ["-5GB"]),
        (["--memory", "plenty"], ["plenty", "2GiB"]),
        (["--memory", "0"], ["size", "0"]),
        (["--vram", "6 gallons"], ["6 gallons"]),
        (["--threads", "0"], ["threads", "0"]),
        (["--seed", "-1"], ["seed", "-1"]),
        (["--device", "abacus"], ["abacus", "cpu"]),
        (["--method", "ip-mergin"], ["ip_mergin", "nearest known one is 'ip_merging'"]),
        (["--set", "tempratur=3"], ["tempratur", "nearest known one is 'temperature'"]),
        (["--set", "temperature"], ["--set", "NAME=VALUE"]),
        (["--set", "temperature=hot"], ["temperature", "hot"]),
        (["--method", "task-arithmetic", "--threshold", "0.5"], ["threshold", "task_arithmetic"]),
        (["--set", "volume=11"], ["'volume'", "known are threshold, "]),
        (["--parent", "2=x"], ["--parent 2=x", "1 expert"]),
        (["--cuda"], ["--cuda and --device cpu contradict"]),
        (["--lora-rank", "4"], ["--lora-rank has no effect with --output checkpoint"]),
        (["--output", "lora", "--shard-size", "1GB"], ["--shard-size has no effect with --output"]),
        (["--output", "none", "--rounding", "nearest"], ["--rounding has no effect"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_an_argument_that_makes_no_sense_is_refused(
    refused: Run, flags: list[str], words: list[str]
):
    message = refused(*flags, code=USAGE)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("arguments_", "words"),
    [
        (["merge", "--treshold", "0.4", "--out", "o"], ["No such option", "--threshold"]),
        (["merge", "--threshold", "high", "--out", "o"], ["--threshold", "number"]),
        (["merge"], ["--out"]),
        (["plan", "--overwrite"], ["--overwrite has no effect with no output folder"]),
        (["merge", "--output", "none", "--no-resume"], ["--no-resume has no effect"]),
        (["analyze", "--out", "o", "--lora-rank", "2"], ["--lora-rank has no effect with analyze"]),
        (["verify", "o", "--without-inputs", "--full"], ["--full has no effect"]),
        (["inspect"], ["Missing argument"]),
        (["mrege"], ["mrege"]),
    ],
)
def test_a_command_line_that_cannot_be_read_is_refused(
    capsys: pytest.CaptureFixture[str], arguments_: list[str], words: list[str]
):
    with pytest.raises(SystemExit) as left:
        cli.main(arguments_)
    printed = capsys.readouterr()
    assert (left.value.code, printed.out) == (USAGE, "")
    for word in words:
        assert word in printed.err


def test_missing_roles_are_all_named(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    with pytest.raises(SystemExit) as left:
        cli.main(["merge", "--mllm", "x", "--out", str(tmp_path / "out")])
    assert left.value.code == USAGE
    assert "Missing --base, --expert" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base_modle": "x"}, ["base_modle", "nearest known one is 'base_model'"]),
        ({"parameters": {"thresold": 1}}, ["thresold", "nearest known one is 'threshold'"]),
        ({"experts": [{"modl": "x"}]}, ["modl", "nearest known one is 'model'"]),
        (
            {"experts": [{"model": "x", "parameters": {"scal": 1}}]},
            ["scal", "nearest known one is 'scale'"],
        ),
        (
            {"experts": [{"model": "x", "parameters": {"temperature": 1}}]},
            ["temperature", "parameters of an expert"],
        ),
        ({"experts": []}, ["--expert"]),
        ({"experts": "x"}, ["experts", "list"]),
        ({"experts": [3]}, ["expert", "3"]),
        ({"experts": [{"parameters": {}}]}, ["lacks its model"]),
        ({"base_model": 7}, ["base_model", "7"]),
        ({"parameters": [1]}, ["parameters", "mapping"]),
        ({"parameters": {"threshold": "high"}}, ["threshold", "high"]),
        ({"parameters": {"threshold": True}}, ["threshold", "True"]),
        ({"parameters": {"stages": 3}}, ["stages", "3"]),
        ({"parameters": {"stages": [1]}}, ["stages"]),
        ({"parameters": {"rank": None}}, ["rank", "None"]),
        ({"seed": "x"}, ["seed", "x"]),
        ({"shard_size": []}, ["[]", "size"]),
        ({"out_dtype": ["float32"]}, ["out_dtype"]),
        ({"allow_partial": "no"}, ["allow_partial", "no"]),
        ({"merge_method": 5}, ["merge_method", "5"]),
    ],
    ids=str,
)
def test_a_recipe_that_makes_no_sense_is_refused(
    roles: Triple,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    words: list[str],
):
    file = tmp_path / "recipe.yml"
    file.write_text(json.dumps(roles.recipe().to_dict() | changes))
    with pytest.raises(SystemExit) as left:
        cli.main(["merge", str(file), "--out", str(tmp_path / "out")])
    printed = capsys.readouterr()
    assert left.value.code == USAGE, printed.err
    assert "Traceback" not in printed.err
    assert len(printed.err.splitlines()) <= 2
    for word in words:
        assert word in printed.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["[1]", "a: [", "!!python/object:os.system {}", "\t", ""])
def test_a_recipe_file_that_is_no_recipe_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
):
    file = tmp_path / "recipe.yml"
    file.write_text(text)
    with pytest.raises(SystemExit) as left:
        cli.main(["merge", str(file), "--out", str(tmp_path / "out")])
    assert left.value.code == USAGE
    assert "recipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\na: 2", ["twice", "line 2"]),
        ("merge_method: ties\nexperts: [", ["not valid YAML in line 2"]),
        ("base_modle: x\nseed: 3", ["'base_modle'", "line 1", "'base_model'"]),
        ("base_model: x\nexperts: [y]\nzeal: 3", ["'zeal'", "line 3", "known are base_model, "]),
        ("experts:\n  - model: x\n    modle: y\nbase_model: z", ["'modle'", "line 3"]),
        ("base_model: x\nexperts: [y]\nmllm_model: z\nparameters:\n  scal: 1", ["line 5", "scale"]),
    ],
)
def test_what_is_wrong_in_a_recipe_file_is_told_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: list[str]
):
    """An unknown key is told before one that is missing, since it may be that one misspelt."""
    file = tmp_path / "recipe.yml"
    file.write_text(text)
    with pytest.raises(SystemExit) as left:
        cli.main(["merge", str(file), "--out", str(tmp_path / "out")])
    told = capsys.readouterr().err
    assert left.value.code == USAGE
    assert not [word for word in words if word not in told], told


def test_a_recipe_file_that_is_not_there_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as left:
        cli.main(["merge", str(tmp_path / "no.yml"), "--out", str(tmp_path / "out")])
    assert left.value.code == USAGE
    assert "no.yml: the recipe cannot be read" in capsys.readouterr().err


# --- budgets and the output folder --------------------------------------------------------


def test_too_little_memory_is_refused_with_what_suffices(refused: Run):
    message = refused("--memory", "1MiB", code=BUDGET)
    assert "the smallest that works is --memory" in message
    assert "model.layers.0" in message


def test_too_little_disk_is_refused(refused: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    class Full:
        free = 1000

    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: Full)
    message = refused(code=BUDGET)
    assert message.startswith(str(tmp_path / "out"))
    assert "1000 B free" in message


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("inside", ["", "deep/er"])
def test_an_output_in_an_input_is_refused(roles: Triple, refused: Run, role: str, inside: str):
    folder = roles.base.parent / role
    for flags in ((), ("--overwrite",)):
        message = refused(*flags, code=FAILED, out=folder / inside)
        assert f"the input {folder}" in message
        assert "choose an output folder elsewhere" in message


def test_an_output_that_is_a_file_is_refused(roles: Triple, refused: Run, tmp_path: Path):
    (tmp_path / "out").write_text("mine")
    assert "is a file" in refused(code=FAILED)
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.skipif(os.name == "nt", reason="paths of POSIX")
@pytest.mark.parametrize("name", ["~nobody-of-this-name/x", "loop/x", "x" * 300])
def test_an_output_that_is_no_path_is_refused(fails: Run, tmp_path: Path, name: str):
    (tmp_path / "loop").symlink_to("loop")
    out = Path(name) if name.startswith("~") else tmp_path / name
    message = fails(code=FAILED, out=out)
    assert "check" in message and name[:10] in message
    assert not list(tmp_path.glob("x*"))


def folder_of_that_name(file: Path) -> None:
    file.mkdir()


def link_outwards(file: Path) -> None:
    file.symlink_to("/etc/hostname")


def no_unicode(file: Path) -> None:
    os.close(os.open(os.fsencode(file) + b"\xff", os.O_CREAT))


def larger_than_the_disk(file: Path) -> None:
    with open(file, "wb") as stream:
        stream.truncate(1 << 42)


@pytest.mark.skipif(sys.platform != "linux", reason="pipes, links and sparse files")
@pytest.mark.parametrize(
    ("name", "make", "code"),
    [
        ("README.md", folder_of_that_name, FAILED),
        ("README.md", os.mkfifo, FAILED),
        ("README.md", link_outwards, FAILED),
        ("notes.json", os.mkfifo, FAILED),
        ("notes.json", link_outwards, FAILED),
        ("notes.json", no_unicode, FAILED),
        ("notes.npz", larger_than_the_disk, BUDGET),
    ],
)
def test_what_cannot_be_copied_is_refused_before_a_weight_is_read(
    roles: Triple,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    make: Any,
    code: int,
):
    make(roles.mllm / name)
    for command in ("plan", "merge"):
        with pytest.raises(SystemExit) as left:
            cli.main([command, *arguments(roles, tmp_path / "out")[1:]])
        assert left.value.code == code
        assert ("mllm" in capsys.readouterr().err) is (code == FAILED)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device")
def test_a_full_standard_output_is_told_apart_from_the_merge(
    roles: Triple,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as left:
            cli.main(arguments(roles, tmp_path / "out"))
    assert left.value.code == FAILED
    assert "The standard output cannot be written (No space left" in capsys.readouterr().err
    assert open_checkpoint(tmp_path / "out").tensors


def test_a_closed_standard_error_is_no_error(
    roles: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "stderr", None)
    cli.main(arguments(roles, tmp_path / "out"))
    with pytest.raises(SystemExit) as left:
        cli.main(arguments(roles, tmp_path / "out", "--seed", 4))
    sys.stderr.close()
    assert left.value.code == FAILED


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't")])
def test_memory_that_the_system_lacks_is_no_bare_error(
    fails: Run, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    empty = scheduler.torch.empty

    def full(*given: Any, **options: Any) -> Any:
        """Refuse the arena, whose size is a number of bytes."""
        if isinstance(given[0], int):
            raise error
        return empty(*given, **options)

    monkeypatch.setattr(scheduler.torch, "empty", full)
    assert "has not" in fails(code=BUDGET) and "--memory" in fails(code=BUDGET)


def test_an_output_that_is_not_empty_is_refused(refused: Run, tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    for flags in ((), ("--overwrite",)):
        message = refused(*flags, code=FAILED)
        assert "holds no model that could be overwritten" in message
        assert "--overwrite" not in message
    assert contents(out) == {"thesis.txt": b"mine"}


def test_overwriting_switches_only_when_the_new_is_whole(roles: Triple, fails: Run, tmp_path: Path):
    out = tmp_path / "out"
    cli.main(arguments(roles, out, "--quiet"))
    (out / "stale.json").write_text("{}")
    old = contents(out)
    good = load(roles.experts[0])[GATE]
    resave(roles.experts[0], **{GATE: torch.full_like(good, torch.nan)})
    assert "NaN" in fails("--overwrite", code=FAILED)
    assert contents(out) == old
    beside = [".out.lean-merge-new", "in", "out"]
    assert sorted(path.name for path in tmp_path.iterdir()) == beside
    resave(roles.experts[0], **{GATE: good})
    cli.main(arguments(roles, out, "--overwrite", "--quiet", "--scale", "0.5"))
    new = contents(out)
    assert "stale.json" not in new
    assert new["model.safetensors"] != old["model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


# --- seen in the data ---------------------------------------------------------------------


def assert_unfinished(out: Path) -> None:
    """Only *.partial files, which nothing opens, and a way to go on."""
    names = sorted(contents(out))
    assert names and all(name.endswith(".partial") for name in names)
    with pytest.raises(CheckpointError, match="unfinished"):
        open_checkpoint(out)
    with pytest.raises(Exception, match=r"(?i)header"):
        load_file(out / next(name for name in names if "safetensors" in name))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("method", ["ip-merging", "task-arithmetic"])
def test_a_number_that_is_none_stops_the_merge(
    roles: Triple, fails: Run, tmp_path: Path, role: str, value: float, method: str
):
    folder = roles.base.parent / role
    weight = load(folder)[GATE].clone()
    weight[-1, -1] = value
    resave(folder, **{GATE: weight})
    message = fails("--method", method, code=FAILED)
    assert message.startswith(f"{weights(folder)}: ")
    assert GATE in message
    assert "NaN or Inf" in message
    assert_unfinished(tmp_path / "out")
    resave(folder, **{GATE: weight.nan_to_num(0, 0, 0)})
    message = fails("--method", method, code=FAILED)
    assert "cannot be resumed, because model.safetensors of the" in message
    assert "--no-resume" in message
    cli.main(arguments(roles, tmp_path / "out", "--no-resume", "--quiet"))
    open_checkpoint(tmp_path / "out")


def test_a_number_that_is_none_out_of_scope_is_copied(roles: Triple, tmp_path: Path):
    resave(roles.mllm, **{"model.norm.weight": torch.full((8,), torch.nan)})
    cli.main(arguments(roles, tmp_path / "out", "--quiet"))
    assert load(tmp_path / "out")["model.norm.weight"].isnan().all()


@pytest.mark.parametrize("threshold", ["0.0", "1.0"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_an_overflow_of_the_output_stops_the_merge(
    roles: Triple, fails: Run, tmp_path: Path, threshold: str, rounding: str
):
    """In a weight that is merged, and in one that is only converted."""
    weight = load(roles.mllm)[GATE].clone()
    weight[3, 5] = 1e6
    resave(roles.mllm, **{GATE: weight})
    message = fails(
        *("--out-dtype", "float16", "--threshold", threshold, "--rounding", rounding), code=FAILED
    )
    assert message.startswith(f"{weights(roles.mllm)}: ")
    assert f"{GATE} overflows float16" in message
    assert "--out-dtype" in message
    assert_unfinished(tmp_path / "out")
    cli.main(
        arguments(roles, tmp_path / "out", "--overwrite", "--quiet", "--out-dtype", "bfloat16")
    )


@pytest.mark.parametrize("method", ["ip-merging", "task-arithmetic"])
def test_a_difference_that_overflows_half_precision_stops_the_merge(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
):
    """Finite float16 numbers whose difference is not."""

    def edit(role: str, tensors: dict[str, torch.Tensor]) -> None:
        tensors[Q_PROJ][0, 0] = -60000.0 if role == "base" else 60000.0

    triple = write_triple(tmp_path / "in", SMALL, dtype=torch.float16, edit=edit)
    with pytest.raises(SystemExit) as left:
        cli.main(arguments(triple, tmp_path / "out", "--method", method, "--force"))
    printed = capsys.readouterr()
    role = triple.mllm if method == "ip-merging" else triple.experts[0]
    assert (left.value.code, printed.out) == (FAILED, "")
    assert f"{weights(role)}: tensor {Q_PROJ} differs" in printed.err
    assert "more than float16 can hold" in printed.err
    assert_unfinished(tmp_path / "out")


def test_numbers_whose_products_overflow_stop_the_merge(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Finite in float32, but not their squares: no silent `not selected`."""

    def edit(role: str, tensors: dict[str, torch.Tensor]) -> None:
        tensors[Q_PROJ][0, 0] = 0.0 if role == "base" else 1e30

    triple = write_triple(tmp_path / "in", SKETCHED, dtype=torch.float32, edit=edit)
    with pytest.raises(SystemExit) as left:
        cli.main(arguments(triple, tmp_path / "out"))
    message = capsys.readouterr().err
    assert left.value.code == FAILED
    assert f"{weights(triple.mllm)}: the task vector of {Q_PROJ} is so large" in message
    assert_unfinished(tmp_path / "out")


# --- warnings -----------------------------------------------------------------------------


def test_another_rope_theta_is_warned_of(
    roles: Triple, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for folder, theta in ((roles.base, 10000.0), (roles.mllm, 1e6)):
        (folder / "config.json").write_text(json.dumps({"rope_theta": theta}))
    cli.main(arguments(roles, tmp_path / "out"))
    printed = capsys.readouterr()
    assert "warning: rope_theta is 10000 in the base and 1e+06 in the MLLM" in printed.err
    report = json.loads((tmp_path / "out" / "lean_merge_report.json").read_text())
    assert any("rope_theta" in line for line in report["warnings"])


def test_another_tokenizer_is_warned_of(
    roles: Triple, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for folder in (roles.base, roles.mllm):
        save_tokenizer(folder)
    file = roles.mllm / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["one"], vocabulary["two"] = vocabulary["two"], vocabulary["one"]
    file.write_text(json.dumps(content))
    cli.main(arguments(roles, tmp_path / "out"))
    assert "of which 2 have different ids" in capsys.readouterr().err


# --- interrupts ---------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["ctrl-c", "sigterm"])
def test_an_interrupt_leaves_a_visibly_unfinished_output(
    roles: Triple, fails: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
):
    def receive(shown: object, event: object) -> None:
        if how == "ctrl-c":
            raise KeyboardInterrupt
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(showing.Progress, "__call__", receive)
    assert "interrupted" in fails(code=INTERRUPTED)
    assert_unfinished(tmp_path / "out")


def test_an_interrupt_of_the_api_is_the_callers(roles: Triple, tmp_path: Path):
    def interrupt(event: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(roles.recipe(), tmp_path / "out", on_event=interrupt)
    assert_unfinished(tmp_path / "out")


def test_debug_shows_where_it_went_wrong(
    roles: Triple, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    _truncated(roles.mllm)
    with pytest.raises(SystemExit):
        cli.main(arguments(roles, tmp_path / "out", "--debug"))
    assert "Traceback" in capsys.readouterr().err
