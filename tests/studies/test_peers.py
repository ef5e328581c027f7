"""Merges by several processes: the same bytes as by one, whoever dies, and whoever goes on."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Set
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import support.ranks as ranks_support
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.families import contents
from support.faults import Recorder, everything, nothing_more, write_tree
from support.ranks import Ranks, in_ranks, in_turn
from support.scenes import (
    AUTO,
    OPTIONS,
    SCENES,
    TIMED,
    Scene,
    Stop,
    assert_same,
    make_scene,
    often,
    stopping,
    try_disk,
)

from lean_merge import (
    Grid,
    MergeResult,
    OutputError,
    RecipeError,
    Resources,
    analyze,
    merge,
    stream,
    sweep,
    verify,
)
from lean_merge import plan as make_plan
from lean_merge.checkpoints import as_bytes
from lean_merge.checkpoints.header import read_header
from lean_merge.engine import CREW
from lean_merge.store import JOURNAL, OutputFolder, OutputTensor, plan_shards, read_journal
from lean_merge.store.joining import JoinedFolder, share
from lean_merge.store.journal import JournalWriter, encode_line, sealed_lines, start_record
from lean_merge.store.state import PARTS, UNSEALED, join_parts
from lean_merge.studies.ranks.job import own_device
from lean_merge.studies.ranks.sharing import deal, dealt, edges

pytestmark = pytest.mark.skipif(os.name == "nt", reason="forks and locks are POSIX")
CPU = Resources(device="cpu", threads=1)
NO_SHRINKING = (Phase.explicit, Phase.generate)
TIES: dict[str, Any] = {**OPTIONS, "merge_method": "ties", "trim_over": "model", "density": 0.3}


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return make_scene(tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module", params=["adapter", "own analysis"])
def every_scene(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """A merge that makes blocks; the second also makes a checkpoint, of what they tell."""
    return make_scene(tmp_path_factory.mktemp("others"), SCENES[request.param])


@pytest.fixture
def out(scene: Scene) -> Iterator[Path]:
    """An output folder that is not there yet."""
    yield scene.folder / "tried" / "out"
    shutil.rmtree(scene.folder / "tried", ignore_errors=True)


def merged(scene: Scene, out: Path) -> MergeResult:
    """What ranks do."""
    return scene.merge(out)


# --- how tensors are dealt ---------------------------------------------------------------------


@given(
    costs=st.lists(st.integers(0, 1000), max_size=40),
    size=st.integers(1, 9),
)
def test_neighbours_stay_together_and_no_rank_gets_more_than_its_part(costs: list[int], size: int):
    ranks = dealt(costs, size)
    assert len(ranks) == len(costs) and ranks == sorted(ranks)
    largest = max(costs, default=0)
    for rank in range(size):
        own = sum(cost for cost, owner in zip(costs, ranks, strict=True) if owner == rank)
        assert own <= sum(costs) / size + largest


@given(data=st.data(), size=st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_every_task_is_dealt_once(scene: Scene, data: st.DataObject, size: int):
    plan = make_plan(scene.triple.recipe(**OPTIONS), CPU)
    todo = [n for n in range(len(plan.tasks)) if data.draw(st.booleans())]
    shares = deal(plan, todo, size, data.draw(st.integers(1, 4)))
    assert sorted(n for own in shares for n in own) == todo
    assert all(own == sorted(own) for own in shares)
    owners = {plan.tasks[n].tensor.name: rank for rank, own in enumerate(shares) for n in own}
    found = edges(plan.shards, owners)
    for shard in plan.shards:
        names = list(shard.offsets)
        for name, after in itertools.pairwise(names):
            apart = {name, after} <= owners.keys() and owners[name] != owners[after]
            assert not apart or {name, after} <= found


@pytest.mark.parametrize(
    ("visible", "count", "rank", "wanted"),
    [
        (None, 0, 1, None),
        (None, 1, 1, None),
        (None, 4, 1, "1"),
        ("4,6", 2, 3, "6"),
        ("7", 1, 0, None),
    ],
)
def test_each_rank_has_a_device(visible: str | None, count: int, rank: int, wanted: str | None):
    assert own_device(visible, count, rank) == wanted


# --- the same bytes ----------------------------------------------------------------------------


def test_ranks_write_what_one_process_writes(scene: Scene, out: Path):
    results = in_ranks(3, merged, scene, out)
    assert_same(contents(out), scene.expected)
    assert [each.path for each in results] == [out] * 3
    assert results[0].report == results[1].report == results[2].report
    again = in_ranks(2, merged, scene, out)
    assert [each.was_complete for each in again] == [True, True]


def the_rest(scene: Scene, folder: Path) -> dict[str, Any]:
    """What one job makes after another: methods, outputs, an analysis, verifications, refusals."""
    ties = scene.triple.merge(folder / "ties", **TIES)
    adapter = scene.triple.merge(folder / "adapter", **SCENES["adapter"])
    auto = scene.triple.merge(folder / "auto", **AUTO)
    analysis = analyze(scene.triple.recipe(), folder / "analysis", resources=CPU)
    noted = scene.triple.merge(folder / "none", output="none")
    alone = merge(scene.triple.recipe(output="none"), resources=CPU)
    with pytest.raises(RecipeError, match="without torchrun"):
        sweep(scene.triple.recipe(), Grid(thresholds=(0.5,)), folder / "sweep", resources=CPU)
    return {
        "paths": [ties.path, adapter.path, auto.path, analysis.path, noted.path],
        "reports": [ties.report, noted.report, alone.report],
        "verified": [
            verify(folder / name, full=full, resources=CPU)
            for name in ("ties", "adapter", "forged")
            for full in (False, True)
        ],
        "streamed": sum(tensor.numel() for _, tensor in stream(scene.triple.recipe())),
    }


def steady_report(report: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in report.items() if name not in TIMED}


def test_ranks_do_all_that_one_process_does(scene: Scene, tmp_path: Path):
    """Two-look methods add up what all ranks see, and an adapter is made of all ranks' factors."""
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        forge_weight(scene, folder / "forged", "model.layers.1.mlp.gate_proj.weight")
    found = in_ranks(2, the_rest, scene, two)
    assert found[0]["paths"] == found[1]["paths"]
    assert found[0]["verified"] == found[1]["verified"]
    expected = {
        "ties": scene.triple.merge(one / "ties", **TIES).report,
        "none": scene.triple.merge(one / "none", output="none").report,
    }
    scene.triple.merge(one / "adapter", **SCENES["adapter"])
    scene.triple.merge(one / "auto", **AUTO)
    analyze(scene.triple.recipe(), one / "analysis", resources=CPU)
    for name in ("ties", "adapter", "auto", "none"):
        assert_same(contents(two / name), contents(one / name))
    analyses = [contents(folder / "analysis") for folder in (one, two)]
    assert {n: d for n, d in analyses[0].items() if n.endswith((".safetensors", ".yml"))} == {
        n: d for n, d in analyses[1].items() if n.endswith((".safetensors", ".yml"))
    }
    assert analyses[0].keys() == analyses[1].keys()
    ties, noted, alone = map(steady_report, found[0]["reports"])
    assert ties == steady_report(expected["ties"])
    assert noted == steady_report(expected["none"]) == alone
    assert not (two / "sweep").exists()
    *fine, sampled, whole = found[0]["verified"]
    assert all(each.ok and each.exact for each in fine)
    assert [len(each.recomputed) for each in fine] == [5, 5, 5, 5]
    alone_found = verify(one / "forged", full=True, resources=CPU)
    assert [str(each) for each in whole.differences] == [str(d) for d in alone_found.differences]
    assert len(whole.differences) == 1 and whole.differences == sampled.differences


def forge_weight(scene: Scene, out: Path, name: str) -> None:
    """Write the scene's output with one weight changed so that the journal agrees."""
    for file, data in scene.expected.items():
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        (out / file).write_bytes(data)
    journal = read_journal(out / JOURNAL)
    assert journal is not None
    place = out / journal.tensors[name]["shard"]
    specs, _ = read_header(place)
    spec = specs[name]
    data = bytearray(place.read_bytes())
    data[spec.offset] ^= 1
    place.write_bytes(data)
    journal.tensors[name]["crc32_data"] = zlib.crc32(data[spec.offset : spec.offset + spec.nbytes])
    records = [journal.start, *journal.tensors.values(), *journal.files.values()]
    (out / JOURNAL).write_bytes(sealed_lines(records))


# --- who dies, and who goes on -----------------------------------------------------------------


def dying(scene: Scene, out: Path, rank: int, after: int, how: str) -> None:
    """A merge in which one rank dies, or fails, once it has finished so many tensors."""
    crew = CREW.get()
    assert crew is not None
    left = [after]

    def finish(self: JournalWriter, record: Mapping[str, Any]) -> None:
        left[0] -= 1
        if left[0] < 0:
            if how == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            raise {"fails": OutputError("the disk is on fire"), "stops": KeyboardInterrupt}[how]
        whole(self, record)

    whole = JournalWriter.finish
    with often(), pytest.MonkeyPatch.context() as patch:
        if int(os.environ["RANK"]) == rank:
            patch.setattr(JournalWriter, "finish", finish)
        scene.merge(out)


@pytest.mark.parametrize(
    ("rank", "how", "told"),
    [
        (1, "dies", "rank 1 has ended"),
        (0, "dies", "rank 0 has ended"),
        (1, "fails", "rank 1: the disk is on fire"),
        (0, "stops", "rank 0: KeyboardInterrupt"),
    ],
)
def test_all_stop_when_one_does_and_others_go_on(
    scene: Scene, out: Path, rank: int, how: str, told: str
):
    ends = Ranks(2, dying, scene, out, rank, 1, how).join()
    assert ends[1 - rank].error.startswith("RankError") and told in ends[1 - rank].error
    assert ends[rank].code == (-signal.SIGKILL if how == "dies" else 0)
    assert (out / UNSEALED).exists()
    with in_turn(3) if rank else nullcontext():
        assert scene.merge(out).reused >= 1
    assert_same(contents(out), scene.expected)


def unlike(scene: Scene, out: Path) -> None:
    scene.merge(out, scale=0.5 if os.environ["RANK"] == "0" else 0.25)


def test_ranks_of_different_commands_are_refused(scene: Scene, out: Path):
    leader, other = Ranks(2, unlike, scene, out).join()
    assert "RecipeError: The settings of rank 1 differ" in other.error
    assert "rank 1: The settings of rank 1 differ" in leader.error


@given(data=st.data())
@settings(max_examples=2, deadline=None, phases=NO_SHRINKING, derandomize=True)
def test_any_number_of_ranks_goes_on_after_any(every_scene: Scene, data: st.DataObject):
    root = every_scene.folder / "resumed"
    shutil.rmtree(root, ignore_errors=True)
    with often():
        for _ in range(data.draw(st.integers(0, 3))):
            size, after = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
            with in_turn(size) if size > 1 else nullcontext(), suppress(Stop):
                every_scene.merge(root / "out", on_event=stopping(after))
        size = data.draw(st.integers(1, 4))
        with in_turn(size) if size > 1 else nullcontext():
            every_scene.merge(root / "out")
    assert_same(contents(root / "out"), every_scene.expected)


def recorded(scene: Scene) -> Recorder:
    """The changes that a merge by three ranks makes to the disk."""
    root = scene.folder / "root"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    recorder = Recorder(root)
    with often(), recorder.recording(), in_turn(3):
        scene.merge(root / "out")
    assert_same(contents(root / "out"), scene.expected)
    return recorder


def test_power_may_fail_while_ranks_write(every_scene: Scene):
    """What one process makes of the disks."""
    recorder, folder = recorded(every_scene), every_scene.folder / "cut"
    for share_of in (0.3, 0.5, 0.7):
        cut = int(len(recorder.changes) * share_of)
        write_tree(recorder.after(cut, everything if share_of < 0.7 else nothing_more), folder)
        every_scene.merge(folder / "out")
        assert_same(contents(folder / "out"), every_scene.expected)
        shutil.rmtree(folder)


@pytest.mark.durability
def test_power_may_fail_after_any_change_by_ranks(every_scene: Scene, capsys):
    recorder = recorded(every_scene)
    found: Counter[str] = Counter()
    for cut in range(len(recorder.changes), -1, -1):
        for survives in (nothing_more, everything):
            found[try_disk(recorder.after(cut, survives), every_scene, overwrite=False)] += 1
    with capsys.disabled():
        print(f"\npower failures by three ranks: {found.total()} disks, {dict(found)}, none lost")


# --- one folder, several writers ---------------------------------------------------------------


def test_the_folder_is_held_as_long_as_any_rank_lives(tmp_path: Path):
    tensors = [OutputTensor(name, "F32", (4,), 16) for name in "abc"]
    shards = plan_shards(tensors, shard_size=100)

    def made() -> OutputFolder:
        return OutputFolder.create(tmp_path / "out", shards, inputs=(), overwrite=False)

    folder = made()
    start, blocks_from = share(folder, 100, 2)
    joined = JoinedFolder(folder.path, shards, start, part=1, blocks_from=blocks_from[1])
    with pytest.raises(OutputError, match="another lean-merge"):
        made()
    numbers = torch.arange(4, dtype=torch.float32)
    joined.writer(shards[0], "b")(0, as_bytes(numbers))
    joined.finish_tensor(shards[0], "b", {"note": 1})
    folder.abort()
    with pytest.raises(OutputError, match="another lean-merge"):
        made()
    joined.abort()
    with made() as again:
        assert again.finished == {"b": {"note": 1}}
        assert [each.name for each in again.path.glob(PARTS)] == []
        for name in "ac":
            again.writer(shards[0], name)(0, as_bytes(numbers))
        again.seal()
    assert load_file(tmp_path / "out" / "model.safetensors")["b"].tolist() == [0, 1, 2, 3]


def test_bytes_that_were_lost_beside_another_rank_are_written_again(scene: Scene, out: Path):
    """As on a file system where two machines that write into one page undo each other's bytes."""
    lost: list[str] = []
    take = ranks_support.take_over

    def forgetful(folder: OutputFolder, again: Set[str]) -> None:
        for shard in folder.shards:
            for name in shard.offsets.keys() & again:
                with open(folder.path / f"{shard.file_name}.partial", "r+b") as stream:
                    stream.seek(shard.offsets[name])
                    byte = stream.read(1)[0]
                    stream.seek(shard.offsets[name])
                    stream.write(bytes([byte ^ 1]))
                lost.append(name)
        take(folder, again)

    with pytest.MonkeyPatch.context() as patch, in_turn(3):
        patch.setattr(ranks_support, "take_over", forgetful)
        scene.merge(out)
    assert lost
    assert_same(contents(out), scene.expected)


@given(cut=st.integers(0, 400), torn=st.integers(0, 60))
@settings(max_examples=30, deadline=None)
def test_whole_lines_of_another_journal_are_taken_over(
    tmp_path_factory: pytest.TempPathFactory, cut: int, torn: int
):
    folder = tmp_path_factory.mktemp("parts")
    start = start_record({"seed": 1}, ())
    lines = [
        encode_line({"record": "tensor", "name": name, "shard": "s", "crc32_data": 1, "result": 0})
        for name in "abc"
    ]
    part = b"".join([encode_line(start), *lines])[: cut or None]
    (folder / PARTS.replace("*", "part-1")).write_bytes(part)
    (folder / PARTS.replace("*", "part-2")).write_bytes(
        encode_line(start_record({"seed": 2}, ())) + lines[0].replace(b'"a"', b'"x"')
    )
    (folder / UNSEALED).write_bytes(encode_line(start) + lines[2] + lines[0][:torn])
    join_parts(folder)
    journal = read_journal(folder / UNSEALED)
    whole = [
        name
        for name, n in zip("abc", range(1, 4), strict=True)
        if len(b"".join([encode_line(start), *lines[:n]])) <= len(part)
    ]
    assert journal is not None
    assert sorted(journal.tensors) == sorted({"c", *whole})
    assert [each.name for each in folder.iterdir()] == [UNSEALED]


# --- killed at random --------------------------------------------------------------------------


def kill_ranks(scene: Scene, *, kills: int, seed: int) -> Counter[str]:
    """Kill single ranks at random moments, and let other numbers of them go on."""
    seeded, found = random.Random(seed), Counter[str]()
    root = scene.folder / "killed"
    while found.total() < kills:
        shutil.rmtree(root, ignore_errors=True)
        for _ in range(5):
            size = seeded.choice((2, 2, 3))
            victim, after = seeded.randrange(size), seeded.randrange(4)
            ends = Ranks(size, dying, scene, root / "out", victim, after, "dies").join()
            if not ends[victim].error:
                break
            assert ends[victim].code == -signal.SIGKILL
            others = [each for rank, each in enumerate(ends) if rank != victim]
            assert all(f"rank {victim} has ended" in each.error for each in others)
            found[f"rank {victim} of {size}"] += 1
        scene.merge(root / "out")
        assert_same(contents(root / "out"), scene.expected)
    return found


@pytest.mark.durability
def test_kills_of_single_ranks_lose_nothing(every_scene: Scene, capsys):
    found = kill_ranks(every_scene, kills=12, seed=3)
    with capsys.disabled():
        print(f"\nSIGKILL of single ranks: {dict(found)}, none lost")
