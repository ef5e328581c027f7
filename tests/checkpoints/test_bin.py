"""PyTorch's own files: read in place like safetensors, nothing of them run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tracemalloc
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.families import SMALL, Triple, contents, load, write_triple
from torch import Tensor

from lean_merge import open_checkpoint
from lean_merge import plan as make_plan
from lean_merge.checkpoints import ITEM_BITS, TensorReader, as_bytes, torch_dtype
from lean_merge.checkpoints.forms.pytorch import read_pickle_header
from lean_merge.errors import CheckpointError, is_plain

INDEX = "pytorch_model.bin.index.json"
DTYPES = [torch_dtype(name) for name in ITEM_BITS if name not in {"F4", "F6_E2M3", "F6_E3M2"}]


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of arbitrary bits."""
    tensor = torch.empty(shape, dtype=dtype)
    view = tensor.reshape(-1).view(torch.uint8)
    view.copy_(torch.randint(0, 2 if dtype == torch.bool else 256, view.shape))
    return tensor


def raw(tensor: Tensor) -> bytes:
    return bytes(as_bytes(tensor.detach().contiguous()))


def read_all(file: Path) -> dict[str, Tensor]:
    """Every tensor, read at the place that its header names."""
    found = {}
    with TensorReader() as reader:
        for name, spec in read_pickle_header(file).items():
            found[name] = torch.empty(spec.shape, dtype=torch_dtype(spec.dtype))
            assert spec.nbytes == found[name].numel() * found[name].element_size()
            if spec.nbytes:
                reader.read_into(spec, 0, as_bytes(found[name]))
    return found


def same_as_torch(file: Path, *, inside: str | None = None) -> dict[str, Tensor]:
    """`read_all`, after comparing it with torch's own reading."""
    expected = torch.load(file, weights_only=True, mmap=True)
    expected = expected if inside is None else expected[inside]
    expected = {n: t for n, t in expected.items() if isinstance(t, Tensor)}
    found = read_all(file)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape)
        assert raw(tensor) == raw(expected[name]), name
    return found


def as_bins(folder: Path, *, shards: int = 1, delete: bool = True) -> None:
    """Turn a checkpoint's safetensors into PyTorch files, with an index if there are several."""
    tensors = load(folder)
    if delete:
        for file in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
            file.unlink()
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    weight_map = {}
    for number in range(shards):
        name = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        part = dict(list(tensors.items())[number::shards])
        torch.save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))


def refused(path: Path, *words: str) -> str:
    """The message of the error that opening `path` raises; it names the path and has the words."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert str(path.parent) in message
    for word in words:
        assert word in message, message
    return message


# --- what is read ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_read_as_torch_reads_it(tmp_path: Path, dtype: torch.dtype):
    tensors = {
        "matrix": random_tensor((3, 5), dtype),
        "scalar": random_tensor((), dtype),
        "empty": random_tensor((0, 4), dtype),
    }
    torch.save(tensors, tmp_path / "x.bin")
    same_as_torch(tmp_path / "x.bin")


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_contiguous_views_of_shared_storages_are_read(tmp_path: Path, data: st.DataObject):
    storage = torch.arange(200, dtype=data.draw(st.sampled_from([torch.float32, torch.int16])))
    tensors = {}
    for number in range(data.draw(st.integers(1, 5))):
        shape = tuple(data.draw(st.lists(st.integers(0, 5), max_size=3)))
        count = torch.Size(shape).numel()
        start = data.draw(st.integers(0, 200 - count))
        tensors[f"t{number}"] = storage[start : start + count].view(shape)
    torch.save(tensors, tmp_path / "x.bin")
    same_as_torch(tmp_path / "x.bin")


@pytest.mark.parametrize("wrap", ["state_dict", "model_state_dict", "model", "module"])
def test_containers_are_understood(tmp_path: Path, wrap: str):
    inner = OrderedDict(a=torch.ones(2, 3), b=torch.nn.Parameter(torch.zeros(4)))
    content = {wrap: inner, "epoch": 3, "rates": [0.1, (None, True)], "optimizer": {"step": 1}}
    torch.save(content, tmp_path / "x.bin")
    assert set(same_as_torch(tmp_path / "x.bin", inside=wrap)) == {"a", "b"}


def test_a_module_is_read_as_it_saves_itself(tmp_path: Path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    torch.save(module.state_dict(), tmp_path / "x.bin")
    assert len(same_as_torch(tmp_path / "x.bin")) == 7


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_of_pickle_is_read(tmp_path: Path, protocol: int):
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    torch.save(tensors, tmp_path / "x.bin", pickle_protocol=protocol)
    found = read_all(tmp_path / "x.bin")
    assert {name: raw(each) for name, each in found.items()} == {
        name: raw(each) for name, each in tensors.items()
    }


def test_a_merge_of_pickles_gives_the_bytes_that_a_merge_of_safetensors_gives(tmp_path: Path):
    triple = write_triple(tmp_path / "in", SMALL, dtype=torch.bfloat16)
    expected = triple.merge(tmp_path / "expected")
    as_bins(triple.base)
    as_bins(triple.mllm, shards=2)
    as_bins(triple.experts[0], shards=3)
    before = contents(tmp_path / "in")
    result = triple.merge(tmp_path / "out")
    read = result.report["bytes"]
    assert read["read"] == read["read_predicted"] == expected.report["bytes"]["read"]
    assert contents(tmp_path / "in") == before
    stored = contents(result.path)
    assert stored["model.safetensors"] == contents(expected.path)["model.safetensors"]
    assert not [name for name in stored if ".bin" in name]


def test_real_models_merge_from_pickles_and_load(family: Any, tmp_path: Path):
    import transformers as tf

    made: Triple = family("llava", dtype=torch.bfloat16)
    copies = {}
    for role, folder in (("base", made.base), ("mllm", made.mllm), ("expert1", made.experts[0])):
        copies[role] = tmp_path / role
        shutil.copytree(folder, copies[role])
        as_bins(copies[role], shards=2)
    triple = Triple(copies["base"], copies["mllm"], (copies["expert1"],), made.slots, made.loader)
    result = triple.merge(tmp_path / "out")
    assert result.report["counts"]["merged"] > 0
    _, info = getattr(tf, made.loader).from_pretrained(
        result.path, dtype="auto", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected = made.merge(tmp_path / "expected")
    wanted = load(expected.path)
    for name, tensor in load(result.path).items():
        assert raw(tensor) == raw(wanted[name]), name


def test_safetensors_are_preferred(tmp_path: Path):
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    torch.save({"b": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    assert set(open_checkpoint(tmp_path).tensors) == {"a"}


def test_other_pickles_beside_the_weights_are_not_touched(tmp_path: Path):
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    for name in ("training_args.bin", "optimizer.bin", "rng_state.pth"):
        (tmp_path / name).write_bytes(b"no pickle")
    assert set(open_checkpoint(tmp_path).tensors) == {"a"}


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth"])
def test_one_file_is_enough(tmp_path: Path, suffix: str):
    torch.save({"a": torch.ones(2)}, tmp_path / f"weights{suffix}")
    assert set(open_checkpoint(tmp_path / f"weights{suffix}").tensors) == {"a"}


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_written_once_as_transformers_does(tmp_path: Path, tied: bool):
    triple = write_triple(tmp_path / "in", SMALL)
    tensors: dict[str, Tensor] = load(triple.mllm)
    table = torch.randn(16, 8)
    tensors |= {"model.embed_tokens.weight": table, "lm_head.weight": table}
    tensors |= {"alias.weight": table}
    (triple.mllm / "model.safetensors").unlink()
    torch.save(tensors, triple.mllm / "pytorch_model.bin")
    config = {"model_type": "llama", "tie_word_embeddings": tied}
    (triple.mllm / "config.json").write_text(json.dumps(config))
    stored = load(triple.merge(tmp_path / "out").path)
    assert torch.equal(stored["model.embed_tokens.weight"], table)
    assert torch.equal(stored["alias.weight"], table)
    assert ("lm_head.weight" in stored) is not tied


def test_a_head_of_its_own_is_kept_although_the_config_ties_it(tmp_path: Path):
    tensors = {"model.embed_tokens.weight": torch.ones(4, 2), "lm_head.weight": torch.zeros(4, 2)}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))
    assert set(open_checkpoint(tmp_path).tensors) == set(tensors)


# --- what is refused ------------------------------------------------------------------------


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def test_a_pickle_that_would_run_code_is_refused_by_name(tmp_path: Path):
    mark = tmp_path / "mark"
    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(2), "b": Evil(mark)}, file)
    refused(file, f"asks for '{os.system.__module__}.system'", "may run code")
    assert not mark.exists()


@pytest.mark.parametrize(
    "name", ["builtins.eval", "builtins.getattr", "argparse.Namespace", "torch.load", "os.system"]
)
@pytest.mark.parametrize("opcode", ["GLOBAL", "STACK_GLOBAL", "NEWOBJ", "INST", "OBJ"])
def test_forbidden_names_are_refused_in_every_spelling(tmp_path: Path, name: str, opcode: str):
    module, _, symbol = name.rpartition(".")
    spelling = {
        "GLOBAL": f"c{module}\n{symbol}\n(tR.".encode(),
        "NEWOBJ": f"c{module}\n{symbol}\n)\x81.".encode(),
        "INST": f"(i{module}\n{symbol}\n.".encode(),
        "OBJ": f"(c{module}\n{symbol}\no.".encode(),
        "STACK_GLOBAL": b"\x80\x04"
        + b"".join(b"\x8c" + bytes([len(w)]) + w.encode() for w in (module, symbol))
        + b"\x93)R.",
    }[opcode]
    file = write_archive(tmp_path / "pytorch_model.bin", spelling)
    refused(file, "INST" if opcode == "INST" else repr(name))


def write_archive(file: Path, data: bytes, **entries: bytes) -> Path:
    """An archive as torch.save lays it out, with any data.pkl."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", data)
        for name, content in entries.items():
            archive.writestr(f"archive/{name.replace('__', '/')}", content)
    return file


@pytest.mark.parametrize(
    "view",
    [
        lambda t: torch._neg_view(t),
        lambda t: torch.complex(t, t).conj(),
        lambda t: torch.complex(t, t).conj().imag,
        lambda t: torch.nn.Parameter(torch._neg_view(t)),
    ],
)
def test_numbers_that_are_not_those_stored_are_refused(
    tmp_path: Path, view: Callable[[Tensor], Tensor]
):
    """Torch notes beside the bytes that they are to be negated or conjugated."""
    numbers = torch.arange(1.0, 5.0)
    torch.save({"w": view(numbers), "v": numbers}, tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match=r"negated or conjugated .*resolve_neg"):
        read_pickle_header(tmp_path / "x.bin")
    whole = view(numbers).detach().resolve_neg().resolve_conj()
    torch.save({"w": whole, "v": numbers}, tmp_path / "x.bin")
    assert torch.equal(read_all(tmp_path / "x.bin")["w"], whole)


def described(
    shape: tuple[int, ...] = (2,),
    stride: tuple[int, ...] = (1,),
    *,
    offset: int = 0,
    key: str = "0",
    items: int = 2,
) -> bytes:
    """A data.pkl with one float32 tensor "a", described as a test wants."""

    class Tensors(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            if value is None or not isinstance(value, Storage):
                return None
            return "storage", torch.FloatStorage, key, "cpu", items

    class Storage:
        pass

    class Described:
        def __reduce__(self) -> Any:
            arguments = (Storage(), offset, shape, stride, False, OrderedDict())
            return torch._utils._rebuild_tensor_v2, arguments

    import io

    stream = io.BytesIO()
    Tensors(stream, protocol=2).dump({"a": Described()})
    return stream.getvalue()


def test_the_description_that_the_next_tests_bend_is_understood(tmp_path: Path):
    file = write_archive(tmp_path / "x.bin", described(), data__0=bytes(8), version=b"3\n")
    assert torch.equal(read_all(file)["a"], torch.zeros(2))


@pytest.mark.parametrize(
    ("bent", "words"),
    [
        ({"shape": (3,)}, "beyond the end of its entry"),
        ({"offset": 1}, "beyond the end of its entry"),
        ({"offset": 2**62}, "beyond the end of its entry"),
        ({"offset": -1}, "impossible shape"),
        ({"shape": (2**62, 2**62), "stride": (2**62, 1)}, "beyond the end of its entry"),
        ({"shape": (-2,)}, "impossible shape"),
        ({"shape": (2, 1)}, "without storage"),
        ({"shape": (2.5,)}, "impossible shape"),
        ({"shape": (1,) * 65, "stride": (1,) * 65}, "impossible shape"),
        ({"items": 3}, "needs 12 bytes stored, not 8"),
        ({"key": "9"}, "lies in entry data/'9'"),
        ({"key": "../x"}, "lies in entry"),
        ({"shape": (2, 2), "stride": (0, 1)}, "strides [0, 1]"),
        ({"shape": (2,), "stride": (2,)}, "strides [2]"),
    ],
)
def test_impossible_descriptions_are_refused(tmp_path: Path, bent: dict[str, Any], words: str):
    file = write_archive(tmp_path / "pytorch_model.bin", described(**bent), data__0=bytes(8))
    message = refused(file, words)
    assert "'a'" in message or "describes a tensor" in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda: {"a": torch.ones(3, 4).T}, "'a' of shape [4, 3] has strides [1, 4]"),
        (lambda: {"a": torch.ones(3, 4)[:, 1:]}, "after .contiguous()"),
        (lambda: {"a": torch.ones(3, 3).to_sparse()}, "a sparse tensor"),
        (
            lambda: {"a": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)},
            "a quantised tensor",
        ),
        (lambda: torch.ones(2), "no dict where a state_dict"),
        (lambda: [torch.ones(2)], "no dict where a state_dict"),
        (lambda: {"epoch": 3}, "a dict of 'epoch' where a state_dict"),
        (lambda: {"state_dict": {"a": torch.ones(1)}, "model": {"a": torch.ones(1)}}, "a dict of"),
        (lambda: {("a", "b"): torch.ones(2)}, "keys that are no names"),
        (lambda: {"a": torch.nn.Linear(2, 2)}, "asks for 'torch.nn.modules.linear.Linear'"),
    ],
)
def test_what_is_no_plain_state_dict_is_refused(
    tmp_path: Path, content: Callable[[], Any], words: str
):
    file = tmp_path / "pytorch_model.bin"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(content(), file)
    assert "save it again with torch.save" in refused(file, words)


def test_the_format_before_1_6_is_refused_with_the_mend(tmp_path: Path):
    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(2)}, file, _use_new_zipfile_serialization=False)
    refused(file, "before version 1.6", "torch.load(weights_only=True)")


def test_a_program_is_refused(tmp_path: Path):
    file = write_archive(tmp_path / "pytorch_model.bin", described(), constants__pkl=b"")
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("archive/constants.pkl", b"")
    refused(file, "TorchScript program")


def test_big_endian_numbers_are_refused(tmp_path: Path):
    file = tmp_path / "pytorch_model.bin"
    write_archive(file, described(), data__0=bytes(8), byteorder=b"big")
    refused(file, "big-endian")


def test_compressed_entries_are_refused(tmp_path: Path):
    file = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", described())
        archive.writestr("archive/data/0", bytes(8))
    refused(file, "is compressed")


@pytest.mark.parametrize("name", ["archive/data.pkl", "archive/data/0"])
def test_a_zip_bomb_is_refused_within_little_memory(tmp_path: Path, name: str):
    file = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl" if "0" in name else "archive/data/0", b"x")
        with archive.open(name, "w", force_zip64=True) as bomb:
            for _ in range(64):
                bomb.write(bytes(1 << 20))
    assert file.stat().st_size < 1 << 20
    tracemalloc.start()
    refused(file, "compressed")
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_nested_references_cost_nothing(tmp_path: Path):
    """Tuples of tuples that would print, or hash, for ever: as a key, a dtype, a storage."""
    doubled = b"K\x01" + b"q\x00h\x00\x86" * 120
    for data in (b"}" + doubled + b"K\x01s.", doubled + b"Q.", b"ctorch\nSize\n" + doubled + b"R."):
        file = write_archive(tmp_path / "pytorch_model.bin", b"\x80\x02" + data)
        refused(file)


def test_stated_sizes_never_size_anything(tmp_path: Path):
    file = write_archive(tmp_path / "pytorch_model.bin", described(), data__0=bytes(8))
    data = bytearray(file.read_bytes())
    end = data.rfind(b"PK\x05\x06")
    data[end + 12 : end + 16] = (2**31).to_bytes(4, "little")
    file.write_bytes(data)
    tracemalloc.start()
    refused(file)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    "call",
    [b"ctorch\nSize\n", b"ccollections\nOrderedDict\n"],
    ids=["Size", "OrderedDict"],
)
def test_one_list_that_is_copied_by_many_calls_costs_little(tmp_path: Path, call: bytes):
    """A memoised list of 50,000 pairs, given to one call after the other."""
    pairs = b"](" + b"K\x01K\x02\x86" * 50_000 + b"e\x85q\x00"
    data = b"\x80\x02" + call + b"q\x01" + pairs + b"h\x01h\x00R" * 20_000 + b"."
    file = write_archive(tmp_path / "pytorch_model.bin", data)
    tracemalloc.start()
    try:
        refused(file, "more than 4000000 operations")
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()


def test_a_key_whose_hash_takes_long_is_refused(tmp_path: Path):
    number = b"\x8b" + (100_000).to_bytes(4, "little") + b"\x01" * 100_000
    data = b"\x80\x02}" + number + b"Ns."
    refused(write_archive(tmp_path / "pytorch_model.bin", data), "a huge number")


@pytest.mark.parametrize("name", ["a\x1b[2J", "a\0", "\u202eb", "x" * 1025], ids=ascii)
def test_names_are_limited_as_those_of_safetensors(tmp_path: Path, name: str):
    torch.save({name: torch.ones(2)}, tmp_path / "pytorch_model.bin")
    message = refused(tmp_path / "pytorch_model.bin", "has a name")
    assert is_plain(message) and len(message) < 500


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("sample") / "pytorch_model.bin"
    torch.save({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.int8)}, file)
    return file


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_files_are_errors_or_lie_inside_the_file(sample: Path, data: st.DataObject):
    content = bytearray(sample.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
        if not content:
            content = bytearray(b"x")
    file = sample.with_name("damaged.bin")
    file.write_bytes(content)
    try:
        specs = read_pickle_header(file)
    except CheckpointError as error:
        assert str(file) in str(error)
        return
    for spec in specs.values():
        assert 0 <= spec.offset <= spec.offset + spec.nbytes <= len(content)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.binary(max_size=60), st.data())
def test_damaged_pickles_are_errors(tmp_path: Path, noise: bytes, data: st.DataObject):
    good = described()
    at = data.draw(st.integers(0, len(good)))
    bad = good[:at] + noise + good[at + data.draw(st.integers(0, 8)) :]
    file = write_archive(tmp_path / "x.bin", bad, data__0=bytes(8))
    try:
        specs = read_pickle_header(file)
    except CheckpointError:
        return
    assert all(spec.nbytes <= 8 for spec in specs.values())


def test_a_truncated_file_is_refused(sample: Path, tmp_path: Path):
    content = sample.read_bytes()
    file = tmp_path / "pytorch_model.bin"
    for length in (0, 3, 100, len(content) - 1):
        file.write_bytes(content[:length])
        refused(file, "download or save the file again")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "pytorch_model-00002-of-00002.bin").unlink(), "missing"),
        (lambda folder: (folder / INDEX).unlink() or next(folder.glob("*2.bin")).unlink(), "1 of"),
        (
            lambda folder: (folder / INDEX).write_text(
                json.dumps({"weight_map": {"a": "model.safetensors"}})
            ),
            "not the name of a .bin file",
        ),
    ],
)
def test_incomplete_shards_are_refused(tmp_path: Path, damage: Any, words: str):
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "model.safetensors")
    as_bins(tmp_path, shards=2)
    assert set(open_checkpoint(tmp_path).tensors) == {"a", "b"}
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(tmp_path)


def test_nothing_of_the_tensors_is_read_before_it_is_needed(tmp_path: Path):
    torch.save({"a": torch.zeros(8 << 20)}, tmp_path / "pytorch_model.bin")
    tracemalloc.start()
    (spec,) = open_checkpoint(tmp_path).tensors.values()
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert spec.nbytes == 32 << 20


def test_a_plan_of_pickles_predicts_what_a_plan_of_safetensors_does(tmp_path: Path):
    triple = write_triple(tmp_path / "in", SMALL)
    before = make_plan(triple.recipe()).prediction
    for folder in (triple.base, triple.mllm, *triple.experts):
        assert load_file(folder / "model.safetensors")
        as_bins(folder, shards=2)
    after = make_plan(triple.recipe()).prediction
    assert (after.bytes_read, after.disk) == (before.bytes_read, before.disk)
