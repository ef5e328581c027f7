"""On a GPU: the same bars as on the CPU, memory within `--vram`, and copies that do not wait.

    python -m pytest tests/test_gpu.py -rs

Everything about the order of copies that needs no GPU is in tests/engine/test_transfer.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.agreement import EXACT, MEDIAN, WORST, compare
from support.families import SKETCHED, Triple, cases, load, rows_of, write_triple
from support.invariance import identity

from lean_merge import BudgetError, MergeResult, Resources, merge, verify
from lean_merge import plan as make_plan
from lean_merge.engine.devices import cuda

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="there is no CUDA device on this machine"
)
MIB = 1 << 20


def on_gpu(triple: Triple, out: Path, *, vram: int | None = None, **options: Any) -> MergeResult:
    resources = Resources(device="cuda", vram=vram, threads=2)
    return merge(triple.recipe(**options), out, resources=resources)


def tensors(result: MergeResult) -> dict[str, torch.Tensor]:
    assert result.path is not None
    return load(result.path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sketches_agree_with_the_oracle(
    sketched: Callable[..., Triple], tmp_path: Path, dtype: torch.dtype
):
    triple = sketched(dtype)
    result = on_gpu(triple, tmp_path / "out", out_dtype="float32")
    assert result.report["device"].startswith("cuda") and result.report["fallbacks"] == []
    compare(list(cases(triple, result)), rows_of(result), median=MEDIAN, worst=WORST)


def test_whole_spectra_agree_with_the_oracle(small: Triple, tmp_path: Path):
    result = on_gpu(small, tmp_path / "out")
    compare(list(cases(small, result)), rows_of(result), median=EXACT, worst=EXACT)


def test_whole_task_vectors_are_added(two_experts: Triple, tmp_path: Path):
    options: dict[str, Any] = {"stages": ("select", "rescale")}
    result = on_gpu(two_experts, tmp_path / "gpu", **options)
    on_cpu = two_experts.merge(tmp_path / "cpu", **options)
    assert {name: row["selected"] for name, row in rows_of(result).items()} == {
        name: row["selected"] for name, row in rows_of(on_cpu).items()
    }
    for name, tensor in tensors(on_cpu).items():
        assert torch.allclose(tensors(result)[name], tensor, rtol=1e-5, atol=1e-6), name
    assert result.report["bytes"]["read"] == result.report["bytes"]["read_predicted"]


def test_an_adapter_is_made(sketched: Callable[..., Triple], tmp_path: Path):
    result = on_gpu(sketched(torch.bfloat16), tmp_path / "out", output="lora")
    assert any(row["lora_rank"] for row in result.report["weights"])


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Triple:
    """Weights of many tiles in bfloat16."""
    shapes = {
        "layers.0.mlp.down_proj": (2048, 5632),
        "layers.0.mlp.gate_proj": (5632, 2048),
        "layers.0.self_attn.q_proj": (2048, 2048),
    }
    return write_triple(tmp_path_factory.mktemp("wide"), shapes, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def roomy(wide: Triple, tmp_path_factory: pytest.TempPathFactory) -> MergeResult:
    return on_gpu(wide, tmp_path_factory.mktemp("roomy") / "out", vram=2048 * MIB)


def test_the_same_twice_is_the_same(wide: Triple, roomy: MergeResult, tmp_path: Path):
    assert identity(on_gpu(wide, tmp_path / "out", vram=2048 * MIB)) == identity(roomy)


def test_memory_stays_within_the_prediction_and_the_ceiling(
    wide: Triple, roomy: MergeResult, tmp_path: Path
):
    """Roomy, and with the smallest that works, where rows come over again; to the same bytes."""
    smallest = smallest_vram(wide)
    tight = on_gpu(wide, tmp_path / "out", vram=smallest)
    assert identity(tight) == identity(roomy)
    for result, limit in ((roomy, 2048 * MIB), (tight, smallest)):
        memory = result.report["memory"]
        assert 0 < memory["peak_vram_used"] <= memory["predicted_vram"] <= limit
        assert memory["peak_vram"] <= limit
        assert memory["peak_anonymous"] + memory["pinned"] <= memory["predicted_anonymous"]
        assert memory["pinned"].bit_count() == 1


def smallest_vram(triple: Triple) -> int:
    low, high = 1, 2048
    while high - low > 1:
        middle = (low + high) // 2
        try:
            make_plan(triple.recipe(), Resources(device="cuda", vram=middle * MIB, threads=2))
            high = middle
        except BudgetError:
            low = middle
    return high * MIB


def test_copies_go_on_a_stream_of_their_own_from_pinned_memory(
    wide: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    streams: set[int] = set()
    real = cuda.CudaQueues.copy

    def copy(queues: Any, source: torch.Tensor, target: torch.Tensor) -> None:
        assert source.is_pinned() and target.is_cuda
        real(queues, source, target)
        streams.add(queues._copies.cuda_stream)
        assert queues._copies.cuda_stream != queues._products.cuda_stream
        assert torch.cuda.current_stream() == queues._products

    monkeypatch.setattr(cuda.CudaQueues, "copy", copy)
    # A stream of the caller's own is left alone, and back in force afterwards.
    with torch.cuda.stream(torch.cuda.Stream()):
        own = torch.cuda.current_stream()
        on_gpu(wide, tmp_path / "out")
        assert torch.cuda.current_stream() == own
    assert len(streams) == 1


def test_a_copy_goes_on_while_products_are_made():
    """The call returns before the copy is done; products asked for later are done before it."""
    queues = cuda.CudaQueues(torch.device("cuda"))
    host = torch.empty(512 * MIB, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(host, device="cuda", pin_memory=False)
    square = torch.randn(512, 512, device="cuda")
    torch.mm(square, square)
    queues.synchronize()
    queues.copy(host, target)
    copied = queues.copied()
    torch.mm(square, square)
    queues.computed().synchronize()
    assert not copied.query()  # type: ignore[attr-defined]
    copied.synchronize()


@pytest.fixture
def at_most() -> Iterator[Callable[[int], None]]:
    """Lets torch have so many bytes of the device and no more."""
    total = torch.cuda.mem_get_info()[1]

    def limit(size: int) -> None:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, size / total))

    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_running_out_of_memory_ends_no_merge(
    wide: Triple, roomy: MergeResult, tmp_path: Path, at_most: Callable[[int], None]
):
    """From next to nothing on, every weight is that of the place which the report names."""
    on_cpu = tensors(wide.merge(tmp_path / "cpu"))
    on_device = tensors(roomy)
    names = {slot.canonical: slot.mllm for slot in wide.slots}
    places = set()
    for size in (1, 40, 80, 120, 160, 240, 320):
        at_most(torch.cuda.memory_allocated() + size * MIB)
        result = on_gpu(wide, tmp_path / f"{size}", vram=2048 * MIB)
        stored = tensors(result)
        fallen = {row["weight"]: row["place"] for row in result.report["fallbacks"]}
        places.update(fallen.values())
        for canonical, name in names.items():
            wanted = on_cpu if fallen.get(canonical) == "cpu" else on_device
            assert torch.equal(stored[name], wanted[name]), (size, canonical)
        if size == 1:
            assert set(fallen) == set(names) and set(fallen.values()) == {"cpu"}
        at_most(torch.cuda.mem_get_info()[1])
    assert "cpu" in places


def test_what_the_gpu_wrote_is_verified(sketched: Callable[..., Triple], tmp_path: Path):
    """Bit for bit by itself, and within a last place by the CPU."""
    result = on_gpu(sketched(torch.bfloat16), tmp_path / "out")
    assert result.path is not None
    again = verify(result.path, full=True, resources=Resources(device="cuda"))
    assert again.ok and again.exact and len(again.recomputed) == len(SKETCHED)
    assert not verify(result.path, resources=Resources(device="cpu")).exact
