"""The output: the very bytes that save_file writes, and a folder that never lies about itself."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lean_merge.checkpoints import (
    ITEM_BITS,
    as_bytes,
    open_checkpoint,
    safetensors_dtype,
    torch_dtype,
)
from lean_merge.errors import BudgetError, CheckpointError, OutputError
from lean_merge.store import (
    OutputFolder,
    OutputTensor,
    find_complete,
    index_json,
    plan_shards,
)
from lean_merge.store.workplace import recover

DTYPES = [torch_dtype(name) for name in ITEM_BITS if name not in {"F4", "F6_E2M3", "F6_E3M2"}]
TENSORS = st.dictionaries(
    st.text(st.characters(codec="utf-8"), max_size=8).filter(lambda n: n != "__metadata__"),
    st.tuples(st.lists(st.integers(0, 4), max_size=3).map(tuple), st.sampled_from(DTYPES)),
    max_size=8,
)


def described(values: dict[str, torch.Tensor]) -> list[OutputTensor]:
    return [
        OutputTensor(name, safetensors_dtype(v.dtype), tuple(v.shape), v.numel() * v.element_size())
        for name, v in values.items()
    ]


def some_tensors(count: int = 5) -> dict[str, torch.Tensor]:
    return {f"t{n}": torch.full((4,), float(n)) for n in range(count)}


def fill(folder: OutputFolder, values: dict[str, torch.Tensor]) -> None:
    for shard in folder.shards:
        for name in shard.offsets:
            folder.writer(shard, name)(0, as_bytes(values[name]))


def create(out: Path, values: dict[str, torch.Tensor], **options: Any) -> OutputFolder:
    shards = plan_shards(described(values), shard_size=options.pop("shard_size", 10**9))
    options = {"inputs": (), "overwrite": False} | options
    return OutputFolder.create(out, shards, **options)


def write_model(out: Path, values: dict[str, torch.Tensor], **options: Any) -> None:
    with create(out, values, **options) as folder:
        fill(folder, values)
        folder.seal()


JOURNAL = "lean_merge_journal.jsonl"
UNFINISHED = [f"{JOURNAL}.partial", "model.safetensors.partial"]


def names_in(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(tensors=TENSORS, shard_size=st.integers(1, 400))
def test_every_file_is_what_save_file_writes(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Any], shard_size: int
):
    folder = tmp_path_factory.mktemp("same")
    values = {}
    for name, (shape, dtype) in tensors.items():
        values[name] = torch.zeros(shape, dtype=dtype)
        view = values[name].reshape(-1).view(torch.uint8)
        view.copy_(torch.randint(0, 2 if dtype == torch.bool else 256, view.shape))
    write_model(folder / "out", values, shard_size=shard_size)
    for shard in plan_shards(described(values), shard_size=shard_size):
        part = {name: values[name] for name in shard.offsets}
        save_file(part, folder / "expected", metadata={"format": "pt"})
        assert (folder / "out" / shard.file_name).read_bytes() == (folder / "expected").read_bytes()
        assert shard.size == (folder / "expected").stat().st_size


@settings(deadline=None, max_examples=200)
@given(sizes=st.lists(st.integers(0, 20), max_size=15), shard_size=st.integers(1, 30))
def test_shards_partition_the_tensors(sizes: list[int], shard_size: int):
    tensors = [OutputTensor(f"t{n:02d}", "U8", (size,), size) for n, size in enumerate(sizes)]
    shards = plan_shards(tensors, shard_size=shard_size)
    placed = [name for shard in shards for name in shard.offsets]
    assert sorted(placed) == sorted(each.name for each in tensors)
    length = {each.name: each.nbytes for each in tensors}
    for number, shard in enumerate(shards, start=1):
        data = shard.size - len(shard.header)
        assert data == sum(length[name] for name in shard.offsets)
        assert data <= shard_size or len(shard.offsets) == 1
        assert list(shard.offsets) == sorted(shard.offsets)
        assert len(shard.header) % 8 == 0
        if len(shards) == 1:
            assert shard.file_name == "model.safetensors"
        else:
            assert shard.file_name == f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            assert shard.offsets


@settings(deadline=None, max_examples=60)
@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=15), shard_size=st.integers(1, 30))
def test_shards_are_cut_as_the_hub_library_cuts_them(sizes: list[int], shard_size: int):
    from huggingface_hub import split_torch_state_dict_into_shards

    values = {f"t{n}": torch.zeros(size, dtype=torch.uint8) for n, size in enumerate(sizes)}
    split = split_torch_state_dict_into_shards(
        values, max_shard_size=shard_size, filename_pattern="model{suffix}.safetensors"
    )
    ours = {
        shard.file_name: set(shard.offsets)
        for shard in plan_shards(described(values), shard_size=shard_size)
    }
    assert ours == {name: set(names) for name, names in split.filename_to_tensors.items()}


def test_the_index_is_what_transformers_writes(tmp_path: Path):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=32,
            pad_token_id=0,
        )
    )
    model.save_pretrained(tmp_path / "theirs", max_shard_size="5KB")
    shards = plan_shards(described(dict(model.state_dict())), shard_size=5000)
    theirs = json.loads((tmp_path / "theirs" / "model.safetensors.index.json").read_text())
    theirs["metadata"].pop("total_parameters", None)
    assert index_json(shards) == (json.dumps(theirs, indent=2, sort_keys=True) + "\n").encode()
    write_model(tmp_path / "ours", dict(model.state_dict()), shard_size=5000)
    for shard in shards:
        ours = (tmp_path / "ours" / shard.file_name).read_bytes()
        assert ours == (tmp_path / "theirs" / shard.file_name).read_bytes()


@pytest.mark.parametrize("name", ["__metadata__", "\ud800"])
def test_names_that_cannot_be_stored_are_refused(name: str):
    with pytest.raises(OutputError, match="rename it in the MLLM"):
        plan_shards([OutputTensor(name, "U8", (1,), 1)], shard_size=10)


@pytest.mark.parametrize(
    "tensors",
    [
        [OutputTensor("a", "U8", (1,), 1)] * 2,
        [OutputTensor("a", "F32", (1,), 1)],
        [OutputTensor("a", "F99", (1,), 1)],
    ],
)
def test_contradictory_tensors_are_refused(tensors: list[OutputTensor]):
    with pytest.raises(ValueError):
        plan_shards(tensors, shard_size=10)


@pytest.mark.parametrize("shard_size", [40, 10**6])
def test_an_output_is_sealed_with_its_commit_mark_last(
    tmp_path: Path, shard_size: int, monkeypatch: pytest.MonkeyPatch
):
    values = some_tensors()
    folder = create(tmp_path / "out", values, shard_size=shard_size)
    assert folder.path == folder.final == tmp_path / "out"
    assert all(name.endswith(".partial") for name in names_in(folder.path))
    for file in folder.path.glob("*.safetensors.partial"):
        assert file.read_bytes()[:8] == bytes(8)
        with pytest.raises(CheckpointError, match="unfinished"):
            open_checkpoint(folder.path)
    with folder:
        fill(folder, values)
        folder.write_file("README.md", b"card")
        folder.flush()
        renamed: list[str] = []
        replace = os.replace

        def spy(source: Any, target: Any) -> None:
            if len(folder.shards) > 1 and Path(target).name.endswith(".safetensors"):
                with pytest.raises(CheckpointError, match="unfinished"):
                    open_checkpoint(folder.path)
            renamed.append(Path(target).name)
            replace(source, target)

        monkeypatch.setattr(os, "replace", spy)
        folder.seal()
    assert renamed[-1] == (
        "model.safetensors" if shard_size == 10**6 else "model.safetensors.index.json"
    )
    assert folder.sealed
    assert not any(name.endswith(".partial") for name in names_in(folder.path))
    checkpoint = open_checkpoint(tmp_path / "out")
    assert set(checkpoint.tensors) == set(values)
    for file in checkpoint.files:
        for name, value in load_file(file).items():
            assert torch.equal(value, values[name])


def test_a_run_that_fails_leaves_a_visibly_unfinished_folder(tmp_path: Path):
    values = some_tensors()
    with pytest.raises(RuntimeError), create(tmp_path / "out", values) as folder:
        fill(folder, values)
        raise RuntimeError("boom")
    assert names_in(tmp_path / "out") == UNFINISHED
    with pytest.raises(CheckpointError, match="unfinished lean-merge output"):
        open_checkpoint(tmp_path / "out")
    with pytest.raises(OutputError, match=r"cannot be resumed, because .* laid out differently"):
        create(tmp_path / "out", some_tensors(2))
    write_model(tmp_path / "out", values)
    assert set(open_checkpoint(tmp_path / "out").tensors) == set(values)


def test_leaving_without_seal_aborts(tmp_path: Path):
    with create(tmp_path / "out", some_tensors()) as folder:
        pass
    folder.abort()
    assert names_in(tmp_path / "out") == UNFINISHED
    with pytest.raises(ValueError, match="closed"):
        folder.seal()
    with pytest.raises(ValueError, match="closed"):
        folder.write_file("x", b"")


def test_a_shard_that_changed_length_is_not_sealed(tmp_path: Path):
    with pytest.raises(OutputError, match="something else wrote"):
        with create(tmp_path / "out", some_tensors()) as folder:
            fill(folder, some_tensors())
            os.truncate(folder.path / "model.safetensors.partial", 500)
            folder.seal()
    assert names_in(tmp_path / "out") == UNFINISHED


@pytest.mark.parametrize("fault", ["missing", "twice"])
def test_an_output_that_was_not_written_once_is_not_sealed(tmp_path: Path, fault: str):
    values = some_tensors()
    with create(tmp_path / "out", values) as folder:
        shard = folder.shards[0]
        for name in shard.offsets:
            if fault == "twice" or name != "t2":
                folder.writer(shard, name)(0, as_bytes(values[name]))
        if fault == "twice":
            folder.writer(shard, "t2")(4, memoryview(b"1234"))
        with pytest.raises(ValueError, match="not written once"):
            folder.seal()
    assert names_in(tmp_path / "out") == UNFINISHED


@pytest.mark.parametrize("relation", ["same", "inside", "around", "link", "file"])
def test_an_input_is_never_written_over(tmp_path: Path, relation: str):
    source = tmp_path / "models" / "mllm"
    write_model(source, some_tensors())
    (tmp_path / "link").symlink_to(source)
    out = {
        "same": source,
        "inside": source / "deep" / "out",
        "around": tmp_path / "models",
        "link": tmp_path / "link",
        "file": source,
    }[relation]
    inputs = [source / "model.safetensors" if relation == "file" else source]
    before = names_in(source)
    with pytest.raises(OutputError, match="must not change"):
        create(out, some_tensors(), inputs=inputs, overwrite=True)
    assert names_in(source) == before


def test_a_neighbour_of_an_input_may_be_written(tmp_path: Path):
    write_model(tmp_path / "mllm", some_tensors())
    write_model(tmp_path / "mllm2", some_tensors(), inputs=[tmp_path / "mllm"])


def test_a_file_is_refused(tmp_path: Path):
    (tmp_path / "out").touch()
    with pytest.raises(OutputError, match="is a file"):
        create(tmp_path / "out", some_tensors(), overwrite=True)


def test_a_folder_that_is_not_empty_needs_overwrite(tmp_path: Path):
    write_model(tmp_path / "out", some_tensors())
    with pytest.raises(OutputError, match=r"is not empty .*--overwrite"):
        create(tmp_path / "out", some_tensors())
    (tmp_path / "empty").mkdir()
    write_model(tmp_path / "empty", some_tensors())


def test_overwriting_keeps_the_old_model_whole_until_the_new_one_is(tmp_path: Path):
    out = tmp_path / "out"
    write_model(out, some_tensors(2), shard_size=20)
    (out / "stale.json").write_text("old")
    values = some_tensors(5)
    with create(out, values, overwrite=True) as folder:
        fill(folder, values)
        assert folder.path == tmp_path / ".out.lean-merge-new"
        assert folder.final == out
        assert set(open_checkpoint(out).tensors) == {"t0", "t1"}
        folder.seal()
        assert folder.path == out
    assert names_in(out) == [JOURNAL, "model.safetensors"]
    assert names_in(tmp_path) == ["out"]
    assert set(open_checkpoint(out).tensors) == set(values)


def test_an_overwrite_that_fails_leaves_the_old_model_and_can_go_on(tmp_path: Path):
    out = tmp_path / "out"
    write_model(out, some_tensors(2))
    values = some_tensors()
    with pytest.raises(RuntimeError), create(out, values, overwrite=True) as folder:
        fill(folder, values)
        folder.finish_tensor(folder.shards[0], "t3", "note")
        raise RuntimeError("boom")
    assert names_in(tmp_path) == [".out.lean-merge-new", "out"]
    assert set(open_checkpoint(out).tensors) == {"t0", "t1"}
    with create(out, values, overwrite=True) as folder:
        assert folder.finished == {"t3": "note"}


def test_a_failed_switch_puts_the_old_model_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "out"
    write_model(out, some_tensors(2))
    replace = os.replace

    def fail(source: Any, target: Any) -> None:
        if Path(source).name == ".out.lean-merge-new":
            raise OSError(errno.EACCES, "no")
        replace(source, target)

    with pytest.raises(OutputError), create(out, some_tensors(), overwrite=True) as folder:
        fill(folder, some_tensors())
        monkeypatch.setattr(os, "replace", fail)
        folder.seal()
    assert set(open_checkpoint(out).tensors) == {"t0", "t1"}
    monkeypatch.undo()
    # The new one is whole, and the next run puts it in its place.
    shards = plan_shards(described(some_tensors()), shard_size=10**9)
    assert find_complete(out, shards, inputs=(), run={}) == out
    assert names_in(tmp_path) == ["out"]
    assert set(open_checkpoint(out).tensors) == set(some_tensors())


class Crash(BaseException):
    """The power fails."""


@pytest.mark.skipif(os.name == "nt", reason="an open file cannot be removed on Windows")
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_crash_at_any_step_of_sealing_loses_nothing(
    tmp_path: Path, overwrite: bool, monkeypatch: pytest.MonkeyPatch
):
    out, old, new = tmp_path / "out", some_tensors(2), some_tensors(4)
    for step in range(100):
        shutil.rmtree(out, ignore_errors=True)
        if overwrite:
            write_model(out, old)
        folder = create(out, new, shard_size=20, overwrite=overwrite)
        fill(folder, new)
        left = [step]

        def counted(call: Any, left: list[int] = left) -> Any:
            def counting(*args: Any) -> Any:
                left[0] -= 1
                if left[0] < 0:
                    raise Crash
                return call(*args)

            return counting

        with monkeypatch.context() as patch:
            for name in ("replace", "fsync", "fdatasync", "pwrite"):
                patch.setattr(os, name, counted(getattr(os, name)))
            # The rollback that an exception gets is denied to a crash.
            patch.setattr(OutputFolder, "abort", lambda self: None)
            try:
                folder.seal()
            except Crash:
                pass
        folder._close()  # what the end of a process does
        if folder.sealed:
            break
        recover(out)
        try:
            found = open_checkpoint(out)
        except CheckpointError as error:
            assert not overwrite
            assert "unfinished" in str(error)
        else:
            whole = {frozenset(new), frozenset(old)} if overwrite else {frozenset(new)}
            assert frozenset(found.tensors) in whole
            for file in found.files:
                for name, value in load_file(file).items():
                    assert torch.equal(value, new[name])
    assert 15 < step < 99
    assert set(open_checkpoint(out).tensors) == set(new)
    assert names_in(tmp_path) == ["out"]


@pytest.mark.parametrize("new_is_whole", [False, True])
def test_a_crash_between_the_renames_is_recovered(tmp_path: Path, new_is_whole: bool):
    old, new = tmp_path / ".out.lean-merge-old", tmp_path / ".out.lean-merge-new"
    write_model(old, some_tensors(2))
    if new_is_whole:
        write_model(new, some_tensors(3))
    else:
        with create(new, some_tensors(3)):
            pass
    with pytest.raises(OutputError, match="is not empty"):
        create(tmp_path / "out", some_tensors(1))
    assert len(open_checkpoint(tmp_path / "out").tensors) == (3 if new_is_whole else 2)
    write_model(tmp_path / "out", some_tensors(), overwrite=True)
    assert names_in(tmp_path) == ["out"]


def test_leftovers_of_a_crash_are_cleaned_up(tmp_path: Path):
    write_model(tmp_path / "out", some_tensors(2))
    write_model(tmp_path / ".out.lean-merge-old", some_tensors(2))
    with create(tmp_path / ".out.lean-merge-new", some_tensors(2)):
        pass
    write_model(tmp_path / "out", some_tensors(), overwrite=True)
    assert names_in(tmp_path) == ["out"]


@pytest.mark.skipif(os.name == "nt", reason="locks of folders are POSIX")
@pytest.mark.parametrize("second", [False, True])
def test_two_writers_cannot_share_an_output(tmp_path: Path, second: bool):
    if second:
        write_model(tmp_path / "out", some_tensors())
    with create(tmp_path / "out", some_tensors(), overwrite=True):
        with pytest.raises(OutputError, match="another lean-merge"):
            create(tmp_path / "out", some_tensors(), overwrite=True)


def test_overwriting_refuses_what_is_no_model(tmp_path: Path):
    out = tmp_path / "home"
    out.mkdir()
    (out / "thesis.tex").write_text("work of years")
    with pytest.raises(OutputError, match="holds no model"):
        create(out, some_tensors(), overwrite=True)
    (out / "x.safetensors").touch()
    (out / "photos").mkdir()
    with pytest.raises(OutputError, match="folder photos"):
        create(out, some_tensors(), overwrite=True)
    assert names_in(out) == ["photos", "thesis.tex", "x.safetensors"]


def test_the_disk_must_hold_the_output_before_anything_is_made(tmp_path: Path):
    huge = OutputTensor("a", "U8", (2**60,), 2**60)
    shards = plan_shards([huge], shard_size=2**61)
    with pytest.raises(BudgetError, match=r"needs 1048576\.0 TiB and the disk has .* free"):
        OutputFolder.create(tmp_path / "a" / "b", shards, inputs=(), overwrite=False)
    assert names_in(tmp_path) == []


def test_a_disk_that_fills_up_meanwhile_is_a_budget_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    values = some_tensors()
    with create(tmp_path / "late", values) as folder:
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(BudgetError, match="disk is full"):
            fill(folder, values)
        monkeypatch.undo()
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(BudgetError, match="disk is full"):
        create(tmp_path / "early", values)
    assert names_in(tmp_path) == ["late"]


@pytest.mark.parametrize("lacking", [["posix_fallocate", "fdatasync"], ["pwrite"]])
def test_systems_without_some_calls_write_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacking: list[str]
):
    values = some_tensors()
    write_model(tmp_path / "a", values)
    for name in lacking:
        monkeypatch.delattr(os, name, raising=False)
    write_model(tmp_path / "b", values)
    a, b = (tmp_path / each / "model.safetensors" for each in "ab")
    assert a.read_bytes() == b.read_bytes()


def test_a_file_system_without_fallocate_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def unsupported(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported, raising=False)
    write_model(tmp_path / "out", some_tensors())
    assert set(open_checkpoint(tmp_path / "out").tensors) == set(some_tensors())


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = os.pwrite
    values = {"a": torch.arange(100, dtype=torch.uint8)}
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: whole(fd, data[:7], at))
    write_model(tmp_path / "out", values)
    monkeypatch.undo()
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["a"], values["a"])


def test_bytes_outside_a_tensor_are_refused(tmp_path: Path):
    with create(tmp_path / "out", some_tensors()) as folder:
        write = folder.writer(folder.shards[0], "t2")
        for offset, spans in ((-1, None), (15, None), (0, [(0, 1), (16, 1)])):
            with pytest.raises(ValueError, match="t2 has no data"):
                write(offset, memoryview(b"12"), spans)
        write(16, memoryview(b""))


def test_threads_share_an_output_of_more_shards_than_open_files(tmp_path: Path):
    values = {f"t{n:03d}": torch.full((64,), n, dtype=torch.uint8) for n in range(100)}
    with create(tmp_path / "out", values, shard_size=64) as folder:

        def write(first: int) -> None:
            for shard in folder.shards[first::4]:
                for name in shard.offsets:
                    for start in range(0, 64, 16):
                        part = as_bytes(values[name])[start : start + 16]
                        folder.writer(shard, name)(start, part)
                folder.flush()

        threads = [threading.Thread(target=write, args=(first,)) for first in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        folder.seal()
    checkpoint = open_checkpoint(tmp_path / "out")
    assert len(checkpoint.files) == 100
    for file in checkpoint.files:
        for name, value in load_file(file).items():
            assert torch.equal(value, values[name])


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "a/b",
        "/etc/x",
        "",
        "..",
        "model.safetensors",
        "model.safetensors.index.json",
        "a\\b",
    ],
)
def test_side_files_stay_in_the_folder(tmp_path: Path, name: str):
    with create(tmp_path / "out", some_tensors()) as folder:
        with pytest.raises(OutputError, match="side file"):
            folder.write_file(name, b"")
