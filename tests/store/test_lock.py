"""Of several runs onto one folder, one goes on and the others are refused, whatever is there."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lean_merge.checkpoints import as_bytes
from lean_merge.errors import BudgetError, LeanMergeError, OutputError
from lean_merge.store import OutputFolder, OutputTensor, plan_shards
from lean_merge.store import storage as storage_module
from lean_merge.store.workplace import recover

pytestmark = pytest.mark.skipif(os.name == "nt", reason="locks of folders are POSIX")


def create(out: Path, seed: int, **options: int | bool) -> OutputFolder:
    shards = plan_shards([OutputTensor("t", "F32", (4,), 16)], shard_size=100)
    return OutputFolder.create(
        out, shards, inputs=(), run={"seed": seed}, **{"overwrite": False, **options}
    )


def seal(folder: OutputFolder, value: float) -> None:
    folder.writer(folder.shards[0], "t")(0, as_bytes(torch.full((4,), value, dtype=torch.float32)))
    folder.seal()


@pytest.mark.parametrize("before", ["nothing", "parents", "an output"])
def test_at_one_instant_exactly_one_goes_on(tmp_path: Path, before: str):
    for number in range(40):
        out = tmp_path / str(number) / "a" / "b"
        if before == "an output":
            with create(out, 9) as folder:
                seal(folder, 9.0)
        elif before == "parents":
            out.parent.mkdir(parents=True)
        barrier = threading.Barrier(3)
        made: list[tuple[int, OutputFolder]] = []
        refused: list[str] = []

        def run(
            seed: int,
            out: Path = out,
            barrier: threading.Barrier = barrier,
            made: list[tuple[int, OutputFolder]] = made,
            refused: list[str] = refused,
        ) -> None:
            barrier.wait()
            try:
                made.append((seed, create(out, seed, overwrite=before == "an output")))
            except OutputError as error:
                refused.append(str(error))

        threads = [threading.Thread(target=run, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(made) == 1
        assert all("another lean-merge is writing there" in each for each in refused)
        [(seed, folder)] = made
        seal(folder, float(seed))
        assert load_file(out / "model.safetensors")["t"].tolist() == [float(seed)] * 4
        assert [each.name for each in out.parent.iterdir()] == ["b"]


def test_who_is_refused_removes_nothing_of_who_goes_on(tmp_path: Path):
    out = tmp_path / "a" / "b"
    with create(out, 1) as folder:
        for options in ({}, {"disk": 1 << 62}, {"resume": False}, {"overwrite": True}):
            with pytest.raises(OutputError, match="another lean-merge"):
                create(out, 2, **options)
        seal(folder, 1.0)
    assert load_file(out / "model.safetensors")["t"].tolist() == [1.0] * 4


def test_a_folder_that_was_given_up_meanwhile_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Another run makes it, is refused for want of space, and removes it before this one locks."""
    out, real, left = tmp_path / "a" / "b", storage_module.lock_folder, [3]

    def lock(folder: Path) -> storage_module.FolderLock | None:
        if folder == out and left[0]:
            left[0] -= 1
            out.rmdir()
            out.parent.rmdir()
        return real(folder)

    monkeypatch.setattr(storage_module, "lock_folder", lock)
    with create(out, 1) as folder:
        seal(folder, 1.0)
    assert left == [0] and (out / "model.safetensors").exists()


def test_between_the_renames_of_another_run_nobody_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The old folder is away, and the new one not yet in its place."""
    out = tmp_path / "out"
    with create(out, 1) as folder:
        seal(folder, 1.0)
    real, errors = os.replace, []

    def replace(source: Path, target: Path) -> None:
        if Path(source).name == ".out.lean-merge-new":
            for attempt in (lambda: create(out, 3), lambda: recover(out)):
                with pytest.raises(LeanMergeError, match="another lean-merge") as caught:
                    attempt()
                errors.append(caught.value)
        real(source, target)

    with create(out, 2, overwrite=True) as folder:
        monkeypatch.setattr(os, "replace", replace)
        seal(folder, 2.0)
    assert len(errors) == 2
    assert load_file(out / "model.safetensors")["t"].tolist() == [2.0] * 4


def test_a_mount_point_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "out"
    with create(out, 1) as folder:
        seal(folder, 1.0)
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == out)
    with pytest.raises(OutputError, match=r"a disk is mounted there .* a folder inside it"):
        create(out, 2, overwrite=True)
    with pytest.raises(BudgetError):
        create(out / "inside", 2, disk=1 << 62)
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["~nobody-of-this-name/out", "loop/out", "x" * 300, "a\0b"])
def test_what_no_path_can_be_is_refused_in_a_sentence(tmp_path: Path, name: str):
    (tmp_path / "loop").symlink_to("loop")
    out = Path(name) if name.startswith("~") else tmp_path / name
    with pytest.raises(OutputError):
        create(out, 1)
