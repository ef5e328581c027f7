"""Merging an adapter again: what its factors are is compared, wherever they lie in its tensors."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import Triple, write_triple
from torch import Tensor

from lean_merge import Resources, Verification, cli, verify
from lean_merge.outputs.adaptercheck import TOLERATED_UPDATE
from lean_merge.outputs.peft import ADAPTER
from lean_merge.plan import runfacts
from lean_merge.store import JOURNAL, read_journal
from lean_merge.store.journal import sealed_lines

MODULE = sys.modules["lean_merge.verify"]
CPU = Resources(device="cpu", threads=1)
Change = Callable[[dict[str, Tensor]], None]


@pytest.fixture(scope="module")
def made(
    family: Callable[..., Triple], two_experts: Triple, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Adapters: with fused modules, and with plain ones of two experts, one not selected."""
    folder = tmp_path_factory.mktemp("made")
    paths = {
        "fused": family("phi3").merge(folder / "fused", output="lora").path,
        "plain": two_experts.merge(
            folder / "plain", output="lora", out_dtype="float16", lora_uniform_rank=False
        ).path,
    }
    return {name: path for name, path in paths.items() if path is not None}


@pytest.fixture(params=["fused", "plain"])
def out(request: pytest.FixtureRequest, made: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of an adapter, to be harmed; its inputs are where they were."""
    return copied(made[request.param], tmp_path)


def copied(adapter: Path, folder: Path) -> Path:
    # Beside the first, from where the journal's relative paths lead to the inputs.
    target = adapter.parent / f"copy-{folder.name}"
    shutil.copytree(adapter, target)
    return target


def looked(out: Path, *, full: bool = True, seed: int | None = None) -> Verification:
    return verify(out, resources=CPU, full=full, seed=seed)


def rewrite(out: Path, change: Change) -> None:
    """Changes the tensors so that the journal agrees: only the inputs tell."""
    tensors = load_file(out / ADAPTER)
    change(tensors)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, out / ADAPTER, metadata={"format": "pt"})
    journal = read_journal(out / JOURNAL)
    assert journal is not None
    (record,) = journal.shards.values()
    from lean_merge.checkpoints.identity import header_digest

    record |= {"size": (out / ADAPTER).stat().st_size}
    record |= {"header_sha256": header_digest(out / ADAPTER)}
    lines = [
        {
            "record": "tensor",
            "name": name,
            "shard": ADAPTER,
            "result": None,
            "crc32_data": zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()),
        }
        for name, tensor in tensors.items()
    ]
    records = [journal.start, record, *journal.groups.values(), *lines, *journal.files.values()]
    (out / JOURNAL).write_bytes(sealed_lines(records))
    assert verify(out, with_inputs=False).ok


def modules(out: Path) -> list[str]:
    return json.loads((out / "adapter_config.json").read_text())["target_modules"]


def keys(module: str) -> tuple[str, str]:
    return tuple(f"base_model.model.{module}.lora_{factor}.weight" for factor in "AB")


def test_an_adapter_as_it_was_written(out: Path):
    result = looked(out)
    assert result.ok and result.exact and not result.notes
    assert len(result.recomputed) == result.in_scope >= 2


def test_any_number_of_any_factor_is_compared(out: Path):
    """The last bit of one number, also where the parts of a fused module leave zeros."""
    before = load_file(out / ADAPTER)
    for name in (key for module in modules(out)[:2] for key in keys(module)):
        tensor = before[name]
        for place in (0, tensor.numel() // 2, tensor.numel() - 1):

            def change(tensors: dict[str, Tensor], name: str = name, place: int = place) -> None:
                tensors.update({key: value.clone() for key, value in before.items()})
                raw = tensors[name].reshape(-1).view(torch.uint8)
                raw[place * tensors[name].element_size()] ^= 1

            rewrite(out, change)
            (difference,) = looked(out).differences
            assert (difference.file, difference.tensor) == (ADAPTER, name)
            assert difference.fault == "1 bytes are not what the merge gives"


def test_modules_that_are_missing_or_too_many_are_named(out: Path):
    module = modules(out)[0]
    a, b = keys(module)
    kept: dict[str, Tensor] = {}

    def remove(tensors: dict[str, Tensor]) -> None:
        kept.update({a: tensors.pop(a), b: tensors.pop(b)})

    rewrite(out, remove)
    (difference,) = looked(out).differences
    assert difference.tensor == a and "is missing" in difference.fault

    def one_only(tensors: dict[str, Tensor]) -> None:
        tensors[a] = kept[a]

    rewrite(out, one_only)
    (difference,) = looked(out).differences
    assert difference.tensor == a and "one factor only" in difference.fault

    def of_more_rank(tensors: dict[str, Tensor]) -> None:
        tensors[a] = torch.cat([kept[a], kept[a][:1]])
        tensors[b] = torch.cat([kept[b], torch.zeros_like(kept[b][:, :1])], dim=1)

    rewrite(out, of_more_rank)
    (difference,) = looked(out).differences
    rank = kept[a].shape[0]
    assert difference.tensor == a
    assert f"has rank {rank + 1}, and " in difference.fault

    def of_less_rank(tensors: dict[str, Tensor]) -> None:
        tensors[a], tensors[b] = kept[a][:-1], kept[b][:, :-1]

    if rank > 1:
        rewrite(out, of_less_rank)
        (difference,) = looked(out).differences
        assert f"has rank {rank - 1}" in difference.fault

    def of_another_shape(tensors: dict[str, Tensor]) -> None:
        tensors[a], tensors[b] = kept[a][:, 1:], kept[b]

    rewrite(out, of_another_shape)
    (difference,) = looked(out).differences
    assert "has factors of" in difference.fault


def test_an_update_that_the_merge_does_not_give_is_found(
    two_experts: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A weight that is not selected has no module."""
    names = {slot.canonical: slot.mllm.removesuffix(".weight") for slot in two_experts.slots}
    left_out = "layers.0.self_attn.q_proj"
    path = two_experts.merge(tmp_path / "out", output="lora", own=[{"threshold": 1.0}, {}]).path
    assert path is not None
    (module,) = modules(path)
    other = next(name for name in names.values() if name != module)
    assert names[left_out] in (module, other)
    shapes = {slot.mllm: load_file(two_experts.mllm / "model.safetensors")[slot.mllm].shape
              for slot in two_experts.slots}  # fmt: skip
    rows, columns = shapes[f"{other}.weight"]

    def add(tensors: dict[str, Tensor]) -> None:
        for key, shape in zip(keys(other), ((1, columns), (rows, 1)), strict=True):
            tensors[key] = torch.full(shape, 1e-3)

    rewrite(path, add)
    for elsewhere in (False, True):
        if elsewhere:
            pretend_another_machine(monkeypatch)
        found = looked(path).differences
        assert {each.tensor for each in found} <= {*keys(other)} and found


def pretend_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    real = runfacts.environment
    monkeypatch.setattr(MODULE, "environment", lambda device: {**real(device), "torch": "9.9"})


def test_elsewhere_the_update_counts_and_not_its_factors(
    out: Path, monkeypatch: pytest.MonkeyPatch
):
    """Signs and axes of factors are nobody's; a larger change of the product is found."""
    before = load_file(out / ADAPTER)
    a, b = keys(modules(out)[-1])
    generator = torch.Generator().manual_seed(5)
    rank = before[a].shape[0]
    turn = torch.linalg.qr(torch.randn(rank, rank, generator=generator))[0]
    # Of rank 1 it is a sign alone, and must not be the one that is there.
    turn *= -turn[0, 0].sign()

    def change(tensors: dict[str, Tensor], scale: float) -> None:
        tensors.update({key: value.clone() for key, value in before.items()})
        tensors[a] = (turn @ before[a].float()).to(before[a].dtype)
        tensors[b] = (scale * before[b].float() @ turn.T).to(before[b].dtype)

    for scale, fits in (
        (1.0, True),
        (1 + TOLERATED_UPDATE / 2, True),
        (0.98, False),
        (1.03, False),
    ):
        rewrite(out, lambda tensors, scale=scale: change(tensors, scale))
        assert not looked(out).ok
        with monkeypatch.context() as patch:
            pretend_another_machine(patch)
            result = looked(out)
        assert result.ok is fits and not result.exact
        if not fits:
            (difference,) = result.differences
            share = abs(scale - 1)
            assert difference.tensor == b
            assert f"differs from the merge's by {share:.1%}"[:-2] in difference.fault


def test_damage_is_told_once(out: Path):
    """A module whose bytes have changed is not merged again on top of that."""
    data = bytearray((out / ADAPTER).read_bytes())
    data[-1] ^= 1
    (out / ADAPTER).write_bytes(data)
    result = looked(out)
    (difference,) = result.differences
    assert "its bytes have changed" in difference.fault
    assert len(result.recomputed) == result.in_scope - 1


def test_the_sample_holds_modules_and_others(tmp_path: Path):
    """Eight of those with an update and eight of those without."""
    chosen = {f"layers.{n}.mlp.gate_proj": (16, 16) for n in range(24)}
    triple = write_triple(tmp_path, chosen)
    whole = triple.merge(tmp_path / "all", output="none").report["weights"]
    middle = sorted(row["similarity_first"] for row in whole)[12]
    out = triple.merge(tmp_path / "out", output="lora", threshold=middle).path
    assert out is not None
    names = {f"{module}.weight" for module in modules(out)}
    assert 8 < len(names) < 16
    first, again, another = (looked(out, full=False, seed=seed) for seed in (5, 5, 6))
    assert first.ok and first.recomputed == again.recomputed != another.recomputed
    assert len(names & {*first.recomputed}) == 8 and len(first.recomputed) == 16


def test_some_flipped_bits_of_every_file_are_found(out: Path):
    flipped_bits(out, every={ADAPTER: 4001, "adapter_config.json": 997, JOURNAL: 4999})


@pytest.mark.durability
def test_every_flipped_bit_of_an_adapters_header_is_found(
    out: Path, capsys: pytest.CaptureFixture[str]
):
    """And many of its weights, its config and its journal."""
    header = 8 * (8 + int.from_bytes((out / ADAPTER).read_bytes()[:8], "little"))
    count = flipped_bits(out, every={ADAPTER: 1}, most=header)
    count += flipped_bits(out, every={ADAPTER: 499, "adapter_config.json": 7, JOURNAL: 97})
    with capsys.disabled():
        print(f"\nflipped bits of an adapter, all found: {count}, {header} of them of its header")


def flipped_bits(out: Path, *, every: dict[str, int], most: int | None = None) -> int:
    """Flip bits of files, one at a time; how many, all of which were found."""
    count = 0
    for name, step in every.items():
        before = (out / name).read_bytes()
        data = bytearray(before)
        for bit in range(0, most or 8 * len(data), step):
            data[bit // 8] ^= 1 << bit % 8
            (out / name).write_bytes(data)
            found = {each.file for each in verify(out, with_inputs=False).differences}
            data[bit // 8] ^= 1 << bit % 8
            assert name in found, (name, bit)
            count += 1
        (out / name).write_bytes(before)
    assert verify(out, with_inputs=False).ok
    return count


@pytest.mark.durability
@pytest.mark.parametrize(
    "setting",
    ["ATEN_CPU_CAPABILITY=default", "DNNL_MAX_CPU_ISA=SSE41"],
    ids=lambda s: s.split("=")[0],
)
def test_other_instructions_of_the_processor_are_another_machine(
    sketched: Callable[..., Triple], tmp_path: Path, setting: str
):
    """Kernels without vectors, and products in float32 instead of bfloat16."""
    triple = sketched(torch.bfloat16)
    out = triple.merge(tmp_path / "out", output="lora").path
    name, value = setting.split("=")
    done = subprocess.run(
        [sys.executable, "-m", "lean_merge", "verify", str(out), "--full", "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, name: value},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["ok"] and found["counts"]["recomputed"] == 2
    assert found["exact"] is False or not found["notes"]


def test_the_command_line_tells_of_an_adapter(
    made: dict[str, Path], capsys: pytest.CaptureFixture[str]
):
    cli.main(["verify", str(made["plain"]), "--seed", "3"])
    printed = capsys.readouterr().out
    assert "2 of 2 weights in scope were merged again" in printed and "--seed 3" in printed
    assert "nothing differs" in printed
