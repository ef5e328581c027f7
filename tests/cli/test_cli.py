"""The command line: fixed names, JSON for scripts, silence where asked, plans without traces."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.families import Triple, contents, load

from lean_merge import MergeRecipe, __version__, cli
from lean_merge.checkpoints import TensorReader
from lean_merge.methods import all_methods

# The package's own names are the commands and the program, not the modules.
planning = importlib.import_module("lean_merge.plan")

Call = Callable[..., tuple[str, str]]


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command that succeeds; its standard output and error."""

    def run(*words: object) -> tuple[str, str]:
        try:
            cli.main([str(word) for word in words])
        except SystemExit as left:
            assert left.code in (0, None), capsys.readouterr().err
        printed = capsys.readouterr()
        return printed.out, printed.err

    return run


def roles(triple: Triple) -> list[object]:
    words: list[object] = ["--base", triple.base, "--mllm", triple.mllm, "--device", "cpu"]
    for expert in triple.experts:
        words += ["--expert", expert]
    return words


# --- merge --------------------------------------------------------------------------------


def test_merge_prints_its_report_as_json(call: Call, small: Triple, tmp_path: Path):
    out, err = call("merge", *roles(small), "--out", tmp_path / "out", "--json")
    assert err == ""
    report = json.loads(out)
    assert report == json.loads((tmp_path / "out" / "lean_merge_report.json").read_text())
    assert report["counts"] == {
        "merged": 2,
        "unchanged": 0,
        "copied": 1,
        "filtered": 0,
        "skipped": 0,
        "logical_weights": 2,
        "tensors": 3,
    }


def test_merge_says_what_it_did(call: Call, small: Triple, tmp_path: Path):
    out, err = call("merge", *roles(small), "--out", tmp_path / "out")
    assert err == ""
    assert "2 of 2 in scope were changed; 1 other tensors are the receiver's own" in out
    assert "threshold  0.4" in out
    summary = (tmp_path / "out" / "lean_merge_summary.txt").read_text()
    assert out.startswith(summary) and len(summary.splitlines()) <= 10
    assert "lean_merge_report.json" in out
    assert f"verify   lean-merge verify {tmp_path / 'out'}" in out
    assert f'from_pretrained("{tmp_path / "out"}"' in out


def test_quiet_prints_nothing(call: Call, small: Triple, tmp_path: Path):
    assert call("merge", *roles(small), "--out", tmp_path / "out", "--quiet") == ("", "")
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_math_is_another_name_of_expert(call: Call, two_experts: Triple, tmp_path: Path):
    words = ["merge", "--base", two_experts.base, "--mllm", two_experts.mllm, "--quiet"]
    first, second = two_experts.experts
    mixed = [*words, "--math", first, "--expert", second, "--out", tmp_path / "a"]
    call(*mixed)
    call(*words, "--expert", first, "--expert", second, "--out", tmp_path / "b")
    one, other = (contents(tmp_path / name) for name in "ab")
    assert one["lean_merge_recipe.yml"] == other["lean_merge_recipe.yml"]
    assert one["model.safetensors"] == other["model.safetensors"]


FLAGS: list[tuple[str, list[object], dict[str, Any]]] = [
    ("threshold", ["--threshold", 0.9], {"threshold": 0.9}),
    ("select_by", ["--select-by", "max"], {"select_by": "max"}),
    ("temperature", ["--temperature", 8], {"temperature": 8.0}),
    ("nuclear", ["--nuclear", "top_q"], {"nuclear": "top_q"}),
    ("stages", ["--stages", "select,project"], {"stages": ("select", "project")}),
    ("scale", ["--scale", 2], {"scale": 2.0}),
    ("rank", ["--rank", 7], {"rank": 7}),
    ("rank", ["--rank", "auto"], {"rank": "auto"}),
    ("svd", ["--svd", "exact"], {"svd": "exact"}),
    ("importance", ["--importance", "relative"], {"importance": "relative"}),
    ("sizes", ["--memory", "10G", "--out-dtype", "bf16"], {}),
    ("set", ["--set", "similarity_weight=sigma"], {"similarity_weight": "sigma"}),
]


@pytest.mark.parametrize(("flags", "wanted"), [flag[1:] for flag in FLAGS], ids=str)
def test_a_flag_reaches_the_method(
    monkeypatch: pytest.MonkeyPatch, call: Call, small: Triple, flags: list[object], wanted: Any
):
    seen = []
    make_plan = planning.plan

    def remember(*arguments: Any, **options: Any) -> Any:
        seen.append(make_plan(*arguments, **options))
        return seen[-1]

    monkeypatch.setattr(planning, "plan", remember)
    call("plan", *roles(small), *flags)
    common = seen[0].method.common
    assert dataclasses.asdict(common) == dataclasses.asdict(type(common)()) | wanted


def test_flags_of_the_recipe_and_of_the_machine(call: Call, small: Triple):
    flags = ["--out-dtype", "float16", "--rounding", "stochastic", "--seed", 3]
    flags += ["--shard-size", "20KB", "--memory", "1GiB", "--threads", 3, "--allow-partial"]
    out, _ = call("plan", *roles(small), *flags, "--json")
    planned = json.loads(out)
    recipe = planned["recipe"]
    assert (recipe["out_dtype"], recipe["rounding"], recipe["seed"]) == ("float16", "stochastic", 3)
    assert (recipe["shard_size"], recipe["allow_partial"]) == (20_000, True)
    assert (planned["memory_limit"], planned["threads"], planned["device"]) == (2**30, 3, "cpu")


def test_a_recipe_file_is_merged_and_flags_override_it(
    call: Call, two_experts: Triple, tmp_path: Path
):
    own = [{"threshold": 0.9}, {"scale": 0.5}]
    recipe = two_experts.recipe(own=own, temperature=8.0, seed=5, scale=3.0)
    file = tmp_path / "recipe.yml"
    file.write_text(recipe.to_yaml())
    call("merge", file, "--out", tmp_path / "file", "--quiet")
    written = (tmp_path / "file" / "lean_merge_recipe.yml").read_text()
    assert MergeRecipe.from_yaml(written) == recipe
    flags = ["--threshold", 0.2, "--seed", 6, "--quiet"]
    call("merge", file, "--out", tmp_path / "flags", *flags)
    changed = yaml.safe_load((tmp_path / "flags" / "lean_merge_recipe.yml").read_text())
    assert changed["seed"] == 6
    assert changed["parameters"] == {"temperature": 8.0, "scale": 3.0, "threshold": 0.2}
    # What a flag says of all experts is said of each.
    assert "parameters" not in changed["experts"][0]
    assert changed["experts"][1]["parameters"] == {"scale": 0.5}


def test_the_output_is_made_again_from_its_own_recipe(call: Call, small: Triple, tmp_path: Path):
    flags = ["--scale", 0.5, "--rounding", "stochastic", "--out-dtype", "bfloat16", "--quiet"]
    call("merge", *roles(small), *flags, "--out", tmp_path / "a")
    call("merge", tmp_path / "a" / "lean_merge_recipe.yml", "--out", tmp_path / "b", "--quiet")
    one, other = (contents(tmp_path / name) for name in "ab")
    assert one.keys() == other.keys()
    differ = [name for name in one if one[name] != other[name]]
    assert differ == ["lean_merge_journal.jsonl", "lean_merge_report.json"]


def test_the_recipe_of_the_issue_is_read():
    text = """
        merge_method: ip_merging
        base_model: meta-llama/Llama-2-7b-hf
        mllm_model: llava-hf/llava-1.5-7b-hf
        experts:
          - model: meta-math/MetaMath-7B-V1.0
            parameters: {threshold: 0.4, scale: 1.0}
        parameters: {temperature: 32, nuclear: full, stages: [select, rescale, project]}
    """
    recipe = MergeRecipe.from_yaml(text)
    assert recipe.experts[0].model == "meta-math/MetaMath-7B-V1.0"
    assert dict(recipe.parameters)["stages"] == ("select", "rescale", "project")
    assert MergeRecipe.from_yaml(recipe.to_yaml()) == recipe
    assert hash(recipe) == hash(MergeRecipe.from_yaml(recipe.to_yaml()))


# --- plan ---------------------------------------------------------------------------------


def test_a_plan_reads_headers_only_and_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, call: Call, family: Callable[..., Triple], tmp_path: Path
):
    def fail(*arguments: object, **options: object) -> None:
        raise AssertionError("a plan reads no tensor data")

    triple = family("llava", dtype=torch.bfloat16)
    before = contents(triple.base.parent)
    monkeypatch.setattr(TensorReader, "__init__", fail)
    monkeypatch.setattr(TensorReader, "read_into", fail)
    monkeypatch.chdir(tmp_path)
    for flags in ([], ["--json"]):
        out, err = call("plan", *roles(triple), *flags)
        assert (bool(out), err) == (True, "")
    assert contents(triple.base.parent) == before
    assert list(tmp_path.iterdir()) == []


def test_a_plan_predicts_what_the_merge_does(
    call: Call, family: Callable[..., Triple], tmp_path: Path
):
    triple = family("llava", dtype=torch.bfloat16)
    flags = ["--shard-size", "60KB", "--threads", 1]
    planned = json.loads(call("plan", *roles(triple), *flags, "--json")[0])
    words = ["merge", *roles(triple), *flags, "--out", tmp_path / "out", "--json"]
    report = json.loads(call(*words)[0])
    predicted, counted = planned["predicted"], report["bytes"]
    assert predicted["bytes_read"] == counted["read"]
    assert predicted["bytes_written"] == counted["written"]
    files = [each for each in triple.mllm.iterdir() if not each.name.startswith("model.")]
    beside = sum(each.stat().st_size for each in files if each.name != "README.md")
    assert predicted["disk"] == counted["written"] + beside
    files = {file.name: file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")}
    assert {shard["file"]: shard["bytes"] for shard in planned["shards"]} == files
    counts = planned["counts"]
    assert counts["in_scope"] == report["counts"]["merged"] + report["counts"]["unchanged"]
    assert (counts["copied"], counts["skipped"]) == (report["counts"]["copied"], 0)
    assert {weight["name"] for weight in planned["weights"]} == {s.mllm for s in triple.slots}
    everything = {weight["name"] for weight in planned["weights"]} | set(planned["copied"])
    assert everything == load(triple.mllm).keys()
    assert planned["prefixes"] == {
        "base": "model.layers.",
        "mllm": "model.language_model.layers.",
        "expert 1": "model.layers.",
    }
    peak = report["memory"]["peak_anonymous"] - report["memory"]["start_anonymous"]
    assert peak <= report["memory"]["predicted_anonymous"]


def test_a_plan_for_people(call: Call, small: Triple):
    out, _ = call("plan", *roles(small))
    assert "in scope  2 tensors" in out
    assert "1 q_proj" in out and "1 gate_proj" in out
    for word in ("copied", "output", "reads", "memory", "device"):
        assert re.search(rf"^{word}\b", out, re.MULTILINE), word


# --- inspect, methods ---------------------------------------------------------------------


def test_inspect_lists_a_checkpoint(call: Call, family: Callable[..., Triple]):
    triple = family("qwen2.5-vl", dtype=torch.bfloat16, max_shard_size="60KB")
    facts = json.loads(call("inspect", triple.mllm, "--json")[0])
    tensors = load(triple.mllm)
    assert facts["model_type"] == "qwen2_5_vl"
    assert facts["language_model"]["model.layers."] == 2
    assert facts["bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert facts["dtypes"] == {"BF16": len(tensors)}
    assert len(facts["files"]) > 1
    assert {each["name"]: each["shape"] for each in facts["tensors"]} == {
        name: list(tensor.shape) for name, tensor in tensors.items()
    }
    text = call("inspect", triple.mllm)[0]
    assert "language model: model.layers.* (2 layers)" in text
    assert all(name in text for name in tensors)


def test_methods_are_listed_with_parameters_and_references(call: Call):
    methods = {each["name"]: each for each in json.loads(call("methods", "--json")[0])}
    assert methods.keys() == all_methods().keys() > {"ip_merging", "task_arithmetic", "ties"}
    assert methods["ip_merging"]["reference"] == "arXiv:2510.14387"
    defaults = {each["name"]: each["default"] for each in methods["ip_merging"]["parameters"]}
    assert defaults["threshold"] == 0.4
    assert defaults["temperature"] == 32
    assert defaults["stages"] == ["select", "rescale", "project"]
    lines = call("methods")[0].splitlines()
    for name, method in methods.items():
        (row,) = [line for line in lines if line.startswith(f"{name} ")]
        for told in (method["reference"], method["summary"], method["adapter"], method["evidence"]):
            assert told in row
        assert method == json.loads(call("methods", name.replace("_", "-"), "--json")[0])
        text = call("methods", name)[0]
        for parameter in method["parameters"]:
            assert f"\n{parameter['name']} " in text
            assert parameter["name"] in method["help"]


def test_what_methods_need_is_what_they_cost(call: Call):
    methods = {each["name"]: each for each in json.loads(call("methods", "--json")[0])}
    assert methods["task_arithmetic"]["needs"] == {"passes": 0, "most_passes": 0, "memory": 0}
    assert methods["ties"]["needs"]["passes"] == 2
    assert methods["ip_merging"]["adapter"] == "exact"
    assert {methods[name]["adapter"] for name in ("task_arithmetic", "ties")} == {"cut"}


def test_a_method_that_does_not_exist_is_refused_with_the_nearest(
    capsys: pytest.CaptureFixture[str],
):
    with pytest.raises(SystemExit) as left:
        cli.main(["methods", "task-arithmetics"])
    assert left.value.code == 2
    assert "the nearest known one is 'task_arithmetic'" in capsys.readouterr().err


# --- the surface --------------------------------------------------------------------------

PROMISED = """
    --base --mllm --expert --math --method --threshold --select-by --temperature --nuclear --stages
    --scale --rank --svd --out-dtype --rounding --importance --device --memory --vram --shard-size
    --seed --threads --allow-partial --json
""".split()


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("merge", [*PROMISED, "--out", "--overwrite", "--quiet", "--debug"]),
        ("plan", [*PROMISED, "--debug"]),
        ("demo", ["--json", "--out"]),
        ("methods", ["--json"]),
        ("inspect", ["--json"]),
    ],
)
def test_every_promised_flag_exists(call: Call, command: str, flags: list[str]):
    out, _ = call(command, "--help")
    offered = set(re.findall(r"--[a-z][a-z-]*", out))
    assert set(flags) <= offered


def test_help_names_every_command(call: Call):
    out, _ = call("--help")
    for command in ("merge", "plan", "demo", "methods", "inspect"):
        assert re.search(rf"^\s+{command}\s+\S", out, re.MULTILINE)


def test_the_module_runs_and_tells_its_version():
    command = [sys.executable, "-m", "lean_merge", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert (done.stdout, done.stderr) == (f"lean-merge {__version__}\n", "")


def test_plan_takes_the_arguments_of_merge_and_checks_the_output_without_writing(
    call: Call, small: Triple, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    printed, _ = call("plan", *roles(small), "--out", out, "--overwrite", "--quiet")
    assert printed == "" and not out.exists()
    for folder, word in ((small.mllm, "input"), (small.mllm / "in", "input")):
        with pytest.raises(SystemExit) as left:
            cli.main(["plan", *map(str, roles(small)), "--out", str(folder)])
        assert left.value.code == 1
        assert word in capsys.readouterr().err
    out.mkdir()
    (out / "model.safetensors").write_bytes(b"old")
    with pytest.raises(SystemExit):
        cli.main(["plan", *map(str, roles(small)), "--out", str(out)])
    assert "--overwrite" in capsys.readouterr().err
    assert (out / "model.safetensors").read_bytes() == b"old"
