"""Files from strangers: every one is read, or refused in a sentence, in little time and memory.

`bench/fuzz.py` does the same with hundreds of thousands of mutants.
"""

from __future__ import annotations

import json
import os
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.checkpoint_files import entry, raw_file, save_checkpoint, write_index
from support.families import SMALL, Triple, contents, write_triple

from lean_merge import CheckpointError, LeanMergeError, MergeRecipe, RecipeError, cli, plan
from lean_merge.checkpoints import open_checkpoint, read_header
from lean_merge.checkpoints.jsonfile import MAX_PARSED, parse_object, parsed_bytes
from lean_merge.checkpoints.sidefiles import remote_code
from lean_merge.errors import is_plain, plain, shown
from lean_merge.mapping import language_layout, map_roles
from lean_merge.plan.parameters import build_method
from lean_merge.recipe import load_recipe_file
from lean_merge.recipe.yamlfile import MAX_TEXT, parse_yaml
from lean_merge.sizes import parse_size
from lean_merge.store import OutputTensor, plan_shards

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import fuzz

QUICK = settings(
    deadline=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
MIB = 1 << 20


def read_or_refuse(read: Callable[[], object]) -> None:
    """Run `read`; whatever it refuses must be fit to print."""
    try:
        read()
    except LeanMergeError as error:
        message = str(error)
        assert len(message) < 4000
        assert all(is_plain(line) for line in message.split("\n")), ascii(message)


# --- any text ------------------------------------------------------------------------------

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
SCALARS |= st.sampled_from([10**400, -(2**63), 2**64, "\ud800", "\0", "../x", "x" * 5000, "\u202e"])
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=10,
)
KEYS = st.sampled_from(["hidden_size", "num_attention_heads", "head_dim", "rope_theta", "auto_map"])
KEYS |= st.sampled_from(["rope_parameters", "text_config", "quantization_config", "hidden_act"])


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, fuzz.Target]:
    return fuzz.targets(tmp_path_factory.mktemp("fuzz"))


def attempt(target: fuzz.Target, data: bytes) -> None:
    target.file.write_bytes(data)
    try:
        read_or_refuse(target.read)
    finally:
        target.file.write_bytes(target.examples[0])


@QUICK
@given(data=st.data())
@pytest.mark.parametrize("name", fuzz.SHARES)
def test_mutants_are_read_or_refused(
    readers: dict[str, fuzz.Target], name: str, data: st.DataObject
):
    attempt(readers[name], readers[name].mutant(data.draw(st.randoms(use_true_random=False))))


@QUICK
@given(config=st.dictionaries(KEYS | st.text(max_size=4), TREES))
def test_any_config_is_read_or_refused(readers: dict[str, fuzz.Target], config: dict[str, Any]):
    attempt(readers["config"], json.dumps(config).encode())


@QUICK
@given(
    weight_map=st.dictionaries(
        st.text(max_size=8),
        st.sampled_from(["model-00001-of-00002.safetensors", "../x.safetensors"]) | TREES,
    )
)
def test_any_index_is_read_or_refused(readers: dict[str, fuzz.Target], weight_map: dict[str, Any]):
    attempt(readers["index"], json.dumps({"weight_map": weight_map}).encode())


RECIPE = {
    "merge_method": "ip_merging",
    "base_model": "base",
    "mllm_model": "mllm",
    "experts": ["expert"],
    "parameters": {"threshold": 0.4, "stages": ["select"], "rank": 3},
    "out_dtype": "auto",
    "seed": 1,
    "shard_size": "5GB",
    "allow_partial": False,
}


def use_recipe(recipe: MergeRecipe) -> None:
    hash(recipe)
    build_method(recipe)
    json.dumps(recipe.to_dict())
    if "nan" not in recipe.to_yaml():
        assert MergeRecipe.from_yaml(recipe.to_yaml()) == recipe


@QUICK
@given(key=st.sampled_from([*RECIPE, "unknown"]), value=TREES)
def test_any_value_in_a_recipe_is_taken_or_refused(key: str, value: Any):
    read_or_refuse(lambda: use_recipe(MergeRecipe.from_dict(RECIPE | {key: value})))


@QUICK
@given(
    name=st.sampled_from(["threshold", "scale", "stages", "rank", "temperature", "svd"]),
    value=TREES,
)
def test_any_parameter_in_a_recipe_is_taken_or_refused(name: str, value: Any):
    given_recipe = RECIPE | {"parameters": {name: value}}
    read_or_refuse(lambda: use_recipe(MergeRecipe.from_dict(given_recipe)))


@QUICK
@given(text=st.text() | st.from_regex(r"\A[-+0-9.:_eExaA!&*<>{}\[\],? \n]{0,40}\Z"))
def test_any_yaml_is_read_or_refused(text: str):
    read_or_refuse(lambda: parse_yaml(text, what="recipe"))


@QUICK
@given(text=st.text() | st.from_regex(r"\A[0-9]{0,30}\.?[0-9]{0,400} ?[A-Za-z]{0,4}\Z"))
def test_any_size_is_read_or_refused(text: str):
    read_or_refuse(lambda: parse_size(text))


@QUICK
@given(text=st.text() | st.text(st.sampled_from("a\x1b\u202e\ud800\x9b\n\u2028\r")))
def test_what_is_printed_cannot_steer_a_terminal(text: str):
    assert all(is_plain(line) for line in plain(text).split("\n"))
    assert is_plain(shown(text)) and len(shown(text)) < 200


# --- memory and time are bounded before they are spent --------------------------------------

UNITS = {
    "lists": "[],",
    "objects": "{},",
    "pairs": '{"a":1},',
    "lists of one": "[1],",
    "integers": "999,",
    "floats": "0.5,",
    "texts": '"ab",',
    "wide texts": '"\u0100",',
    "astral texts": '"\U0001f600",',
    "escapes": '"\\u0100\\ud83d\\ude00",',
}


@pytest.mark.parametrize("kind", UNITS)
def test_parsing_takes_no_more_than_was_foreseen(kind: str):
    unit = UNITS[kind]
    data = ('{"a":[' + unit * (400_000 // len(unit)) + "1]}").encode()
    _check_foreseen(data)


@pytest.mark.parametrize("key", ["%x", "\u0100%x", "\U0001f600%x", "\\u0100%x"])
def test_parsing_keys_takes_no_more_than_was_foreseen(key: str):
    _check_foreseen(("{" + ",".join(f'"{key % n}":1' for n in range(40_000)) + "}").encode())


@pytest.mark.parametrize("text", ["x" * 400_000 + "\\ud83d\\ude00", "\U0001f600" + "x" * 400_000])
def test_parsing_one_long_text_takes_no_more_than_was_foreseen(text: str):
    _check_foreseen(f'{{"a":"{text}"}}'.encode())


def _check_foreseen(data: bytes) -> None:
    tracemalloc.start()
    try:
        parse_object(data, file=Path("x"), what="x", mend="x")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak + len(data) <= parsed_bytes(data)


@pytest.mark.parametrize("unit", [b"[],", b"{},", b'{"a":1},', b'"",'])
def test_a_header_that_would_swell_is_refused_before_it_is_parsed(tmp_path: Path, unit: bytes):
    """The largest that the format allows would take gigabytes."""
    body = b'{"a":[' + unit * (60_000_000 // len(unit)) + b"1]}"
    file = raw_file(tmp_path / "model.safetensors", body)
    began = time.thread_time()
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="beyond the limit of 512"):
            read_header(file)
        assert tracemalloc.get_traced_memory()[1] < len(body) + MIB
    finally:
        tracemalloc.stop()
    assert time.thread_time() - began < 5


def deepseek_names() -> list[str]:
    """91,991 names, as many as the largest public mixture of experts has, and as long."""
    names = [
        f"model.layers.{layer}.mlp.experts.{expert}.{leaf}.{part}"
        for layer in range(3, 62)
        for expert in range(256)
        for leaf in ("gate_proj", "up_proj", "down_proj")
        for part in ("weight", "weight_scale_inv")
    ]
    return (names + [f"model.layers.{n}.input_layernorm.weight" for n in range(2000)])[:91_991]


@pytest.mark.long
def test_the_largest_real_headers_and_indexes_pass(tmp_path: Path):
    names = deepseek_names()
    tensors = [OutputTensor(name, "U8", (0, 7168), 0) for name in names]
    shard = plan_shards(tensors, shard_size=1)[0]
    file = tmp_path / "model.safetensors"
    file.write_bytes(shard.header)
    specs, _ = read_header(file)
    assert len(specs) == len(names)
    text = (tmp_path / "model.safetensors").read_bytes()[8:]
    assert len(text) > 9_500_000 and parsed_bytes(text) < MAX_PARSED / 1.5
    index = json.dumps(
        {
            "weight_map": {
                n: f"model-{i % 163 + 1:05}-of-000163.safetensors" for i, n in enumerate(names)
            }
        },
        indent=2,
    )
    assert len(index) > 8_000_000 and parsed_bytes(index.encode()) < MAX_PARSED / 4


def test_nesting_is_bounded(tmp_path: Path):
    save_checkpoint(tmp_path, {"a": (1,)})
    for depth, fits in ((40, True), (70, False), (900, False), (100_000, False)):
        text = '{"a":' * depth + "1" + "}" * depth
        (tmp_path / "config.json").write_text(text)
        if fits:
            open_checkpoint(tmp_path)
            continue
        with pytest.raises(CheckpointError, match=r"config.* nested"):
            open_checkpoint(tmp_path)


LAUGHS = """
a: &a [ha, ha, ha, ha, ha, ha, ha, ha, ha]
b: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a]
c: &c [*b, *b, *b, *b, *b, *b, *b, *b, *b]
d: &d [*c, *c, *c, *c, *c, *c, *c, *c, *c]
e: &e [*d, *d, *d, *d, *d, *d, *d, *d, *d]
"""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: " + "[" * 10_000, "not valid YAML"),
        ("a: 1\na: 2", "the key .a. stands there twice"),
        ("x" * (MAX_TEXT + 1), "longer than"),
        ("a: !!python/object/apply:os.system [exit]", "not valid YAML"),
        ("a: !!timestamp x", "not valid YAML"),
        ('a: !!int ""', "not valid YAML"),
        ("a: !!bool x", "not valid YAML"),
        ("a: 2001-13-45", "not valid YAML"),
    ],
)
def test_yaml_that_is_too_long_or_would_run_is_refused(tmp_path: Path, text: str, words: str):
    file = tmp_path / "recipe.yml"
    file.write_text(text)
    began = time.thread_time()
    with pytest.raises(RecipeError, match=words) as caught:
        load_recipe_file(file)
    assert time.thread_time() - began < 5
    assert len(str(caught.value)) < 400


def test_anchors_that_people_write_are_read():
    text = "a: &own {threshold: 0.4}\nb: *own\nc: {<<: *own, scale: 2}"
    own = {"threshold": 0.4}
    assert parse_yaml(text, what="recipe") == {"a": own, "b": own, "c": own | {"scale": 2}}


def test_names_made_to_be_compared_for_ever_are_refused(tmp_path: Path):
    """Every layer of another kind, every prefix another part: quadratic, and worse."""
    kinds = {f"model.layers.{n}.k{n}.q_proj.weight": (1, 1) for n in range(4000)}
    parts = {f"p{n}.layers.0.q_proj.weight": (1, 1) for n in range(4000)}
    for folder, shapes in (("kinds", kinds), ("parts", parts)):
        checkpoint = open_checkpoint(save_checkpoint(tmp_path / folder, shapes))
        began = time.thread_time()
        with pytest.raises(LeanMergeError, match="no model has"):
            map_roles(checkpoint, checkpoint, [checkpoint])
        with pytest.raises(LeanMergeError, match="no model has"):
            language_layout(checkpoint)
        assert time.thread_time() - began < 5


# --- names ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["a\x1b[2J", "a\0", "\u202eb", "a\nb", "x" * 1025, "\u2028"], ids=ascii
)
def test_tensor_names_that_steer_or_swamp_a_terminal_are_refused(tmp_path: Path, name: str):
    file = raw_file(tmp_path / "model.safetensors", {name: entry("U8", [0], 0, 0)})
    with pytest.raises(CheckpointError, match="name") as caught:
        read_header(file)
    assert is_plain(str(caught.value)) and len(str(caught.value)) < 500


@pytest.mark.parametrize("name", ["\x1b[2J", "a\n", "\u202e", "\0", "x" * 300], ids=ascii)
def test_file_names_of_an_index_are_plain(tmp_path: Path, name: str):
    save_checkpoint(tmp_path, {"a": (1,), "b": (1,)}, shards=2)
    write_index(tmp_path, {"a": f"{name}.safetensors"})
    with pytest.raises(CheckpointError, match="not the name of a") as caught:
        open_checkpoint(tmp_path)
    assert is_plain(str(caught.value)) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "folder", ["new\nline", "\u05d0\u05d1 \u202etxt", "e\u0301\U0001f600", "  a  "]
)
def test_folders_with_odd_names_are_merged(
    small: Triple, tmp_path: Path, capsys: pytest.CaptureFixture[str], folder: str
):
    root = tmp_path / folder
    for role, files in (("base", small.base), ("mllm", small.mllm), ("e", small.experts[0])):
        (root / role).mkdir(parents=True)
        for file in files.iterdir():
            (root / role / file.name).write_bytes(file.read_bytes())
    words = ["--base", root / "base", "--mllm", root / "mllm", "--expert", root / "e"]
    cli.main(["merge", *map(str, words), "--out", str(root / "out"), "--device", "cpu"])
    printed = capsys.readouterr()
    for line in (printed.out + printed.err).split("\n"):
        assert is_plain(line.replace("\r", "")), ascii(line)
    again = MergeRecipe.from_yaml((root / "out" / "lean_merge_recipe.yml").read_text())
    assert again.mllm_model == str(root / "mllm")


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are bytes on Linux alone")
def test_a_folder_whose_name_is_no_text_is_refused_before_any_work(small: Triple, tmp_path: Path):
    broken = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    with pytest.raises(RecipeError, match="not valid Unicode"):
        MergeRecipe(str(small.base), broken, (str(small.experts[0]),))  # type: ignore[arg-type]


# --- odd folders ---------------------------------------------------------------------------


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.mkdir()


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


def _dangling(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.skipif(os.name == "nt", reason="POSIX files")
@pytest.mark.parametrize("make", [_fifo, _folder, _device, _loop, _dangling])
@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "config.json", "tokenizer.json", "model.safetensors.index.json"],
)
def test_what_is_no_file_is_refused_and_nothing_hangs(
    tmp_path: Path, name: str, make: Callable[[Path], None]
):
    shapes = {"model.layers.0.self_attn.q_proj.weight": (4, 4)}
    good = save_checkpoint(tmp_path / "good", shapes)
    (good / "tokenizer.json").write_text("{}")
    bad = save_checkpoint(tmp_path / "bad", shapes)
    (bad / name).unlink(missing_ok=True)
    make(bad / name)
    recipe = MergeRecipe(str(good), str(bad), (str(good),))  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=name):
        plan(recipe)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="POSIX rights")
@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "config.json", "tokenizer.json", "notes.txt", "README.md"],
)
def test_a_file_that_may_not_be_read_is_named(
    small: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    """By refusing `open`, since root may read everything."""
    for role in ("base", "mllm", "expert1"):
        (tmp_path / role).mkdir()
        for file in (small.base.parent / role).iterdir():
            (tmp_path / role / file.name).write_bytes(file.read_bytes())
        (tmp_path / role / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {role: 1}}}))
    for extra in ("notes.txt", "README.md"):
        (tmp_path / "mllm" / extra).write_text("---\nlicense: mit\n---\n")
    real_open = open

    def refuse(file: Any, *arguments: Any, **options: Any) -> Any:
        if str(file) == str(tmp_path / "mllm" / name):
            raise PermissionError(13, "Permission denied")
        return real_open(file, *arguments, **options)

    monkeypatch.setattr("builtins.open", refuse)
    triple = Triple(tmp_path / "base", tmp_path / "mllm", (tmp_path / "expert1",), small.slots)
    with pytest.raises(CheckpointError, match=r"(?s)Permission denied") as caught:
        triple.merge(tmp_path / "out")
    assert str(tmp_path / "mllm" / name) in str(caught.value)


@pytest.mark.parametrize("change", ["shorter", "longer", "gone"])
def test_a_file_that_changes_after_the_plan(small: Triple, tmp_path: Path, change: str):
    from lean_merge import Resources, merge

    for role in ("base", "mllm", "expert1"):
        (tmp_path / role).mkdir()
        for each in (small.base.parent / role).iterdir():
            (tmp_path / role / each.name).write_bytes(each.read_bytes())
    triple = Triple(tmp_path / "base", tmp_path / "mllm", (tmp_path / "expert1",), small.slots)
    work = plan(triple.recipe(), Resources(device="cpu", threads=1))
    file = tmp_path / "expert1" / "model.safetensors"
    data = file.read_bytes()
    if change == "gone":
        file.unlink()
    else:
        file.write_bytes(data[:-5000] if change == "shorter" else data + bytes(5000))
    with pytest.raises(CheckpointError, match=r"expert1/model\.safetensors"):
        merge(work, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.skipif(sys.platform != "linux", reason="sparse files")
def test_a_huge_sparse_checkpoint_is_planned_in_little_memory(tmp_path: Path):
    """Terabytes that are not there: refused for want of disk or memory, not tried."""
    columns = 2**36
    folder = tmp_path / "model"
    folder.mkdir()
    name = "model.layers.0.self_attn.q_proj.weight"
    header = {name: entry("BF16", [4, columns], 0, 8 * columns)}
    file = raw_file(folder / "model.safetensors", header)
    os.truncate(file, file.stat().st_size + 8 * columns)
    recipe = MergeRecipe(str(folder), str(folder), (str(folder),))  # type: ignore[arg-type]
    tracemalloc.start()
    try:
        with pytest.raises(LeanMergeError, match=r"too small|free"):
            plan(recipe)
        assert tracemalloc.get_traced_memory()[1] < 16 * MIB
    finally:
        tracemalloc.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="sparse files")
def test_side_files_are_copied_in_little_memory(small: Triple, tmp_path: Path):
    root = tmp_path / "in"
    for role in ("base", "mllm", "expert1"):
        (root / role).mkdir(parents=True)
        for each in (small.base.parent / role).iterdir():
            (root / role / each.name).write_bytes(each.read_bytes())
    with open(root / "mllm" / "notes.txt", "wb") as stream:
        stream.truncate(200 * MIB)
    triple = Triple(root / "base", root / "mllm", (root / "expert1",), small.slots)
    tracemalloc.start()
    try:
        result = triple.merge(tmp_path / "out")
        assert tracemalloc.get_traced_memory()[1] < 50 * MIB
    finally:
        tracemalloc.stop()
    assert (result.path / "notes.txt").stat().st_size == 200 * MIB


# --- code ----------------------------------------------------------------------------------


def test_remote_code_is_copied_named_and_never_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    triple = write_triple(tmp_path / "in", SMALL)
    bomb = "raise SystemExit('this file was run')\n"
    for name in ("modeling_evil.py", "configuration_evil.py", "__init__.py", "torch.py"):
        (triple.mllm / name).write_text(bomb)
    auto_map = {"AutoModel": "modeling_evil.Evil", "AutoConfig": ["other/repo--config.C", None]}
    config = json.loads((triple.mllm / "config.json").read_text()) | {"auto_map": auto_map}
    (triple.mllm / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(triple.mllm)
    result = triple.merge(tmp_path / "out")
    named = ["__init__.py", "configuration_evil.py", "modeling_evil.py", "torch.py"]
    assert result.report["remote_code"] == [*named, "other/repo--config.C"]
    assert remote_code(plan(triple.recipe()).mllm) == tuple(result.report["remote_code"])
    (line,) = [line for line in result.report["warnings"] if "code of its own" in line]
    assert "trust_remote_code" in line
    for name in named:
        assert (result.path / name).read_text() == bomb
    assert contents(result.path)["config.json"] == contents(triple.mllm)["config.json"]


def test_a_model_without_code_has_none_in_the_report(small: Triple, tmp_path: Path):
    assert small.merge(tmp_path / "out").report["remote_code"] == []


# --- found by mutation, and mended ----------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"shard_size": "9" * 400 + "GB"},
        {"seed": 16**4000},
        {"parameters": {"threshold": 10**400}},
        {"parameters": {"svd": {"a": 1}}},
        {"parameters": {"stages": [["select"]]}},
        {"parameters": {"select_by": "x" * 4000}},
        {"experts": [{"model": "x", "parameters": {"threshold": [{}] * 4000}}]},
        {"base_model": "a\0b"},
        {"out_dtype": {"a": "b" * 4000}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_values_that_once_crashed_are_refused(change: dict[str, Any]):
    with pytest.raises(RecipeError) as caught:
        use_recipe(MergeRecipe.from_dict(RECIPE | change))
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("theta", [10**400, -(10**400), True, [1], "x", None], ids=type)
def test_a_rope_theta_of_any_kind_is_no_crash(tmp_path: Path, theta: Any):
    shapes = {"model.layers.0.self_attn.q_proj.weight": (4, 4)}
    for name, value in (("a", 10000), ("b", theta)):
        save_checkpoint(tmp_path / name, shapes, config={"rope_theta": value})
    ours, theirs = (open_checkpoint(tmp_path / name) for name in "ab")
    map_roles(ours, theirs, [ours])


@pytest.mark.parametrize("key", ["num_attention_heads", "num_key_value_heads", "head_dim"])
def test_a_head_count_of_thousands_of_digits_is_no_count(tmp_path: Path, key: str):
    shapes = {"model.layers.0.self_attn.q_proj.weight": (4, 4)}
    for name, value in (("a", 4), ("b", 10**4200)):
        save_checkpoint(tmp_path / name, shapes, config={key: value})
    ours, theirs = (open_checkpoint(tmp_path / name) for name in "ab")
    read_or_refuse(lambda: map_roles(ours, theirs, [ours]))


def test_the_licence_of_a_card_cannot_swell(small: Triple, tmp_path: Path):
    from lean_merge.outputs.card import front_matter_of

    (tmp_path / "README.md").write_text(f"---\nlicense: mit\n{LAUGHS}---\n")
    began = time.thread_time()
    assert front_matter_of(tmp_path) == {"license": "mit"}
    assert time.thread_time() - began < 5


def test_a_config_with_half_a_surrogate_is_rewritten(tmp_path: Path):
    triple = write_triple(tmp_path / "in", SMALL)
    config = json.loads((triple.mllm / "config.json").read_text()) | {"note": "\ud800 \u00e9"}
    (triple.mllm / "config.json").write_text(json.dumps(config))
    result = triple.merge(tmp_path / "out", out_dtype="bfloat16")
    written = json.loads((result.path / "config.json").read_bytes())
    assert written["note"] == config["note"] and written["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    "settings",
    [
        {"format": "\x1b[2J" + "x" * 5000},
        {"config_groups": {"g": {"weights": {"type": "\u202e" + "x" * 5000}}}},
        {"config_groups": {"g": {"weights": {"num_bits": 10**4000}}}},
        {"config_groups": {"g": {"weights": {"type": [["x" * 5000]]}}}},
    ],
    ids=["format", "type", "bits", "list"],
)
def test_words_of_a_quantisation_are_shown_short_and_plain(
    tmp_path: Path, settings: dict[str, Any]
):
    config = {"quantization_config": {"quant_method": "compressed-tensors"} | settings}
    save_checkpoint(tmp_path, {"a": (1,)}, config=config)
    with pytest.raises(CheckpointError, match=r"compressed-tensors \(") as caught:
        open_checkpoint(tmp_path)
    assert is_plain(str(caught.value)) and len(str(caught.value)) < 600
