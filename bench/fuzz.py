"""Throws mutated files at everything that reads what strangers wrote.

    python bench/fuzz.py [--inputs 100000] [--seed 0] [--only TARGET | --only forms]

Each target starts from whole, valid files and changes them: bytes flipped, cut out, repeated and
spliced in; numbers, words and punctuation of JSON and YAML replaced by what parsers get wrong; and,
in half of them, one value of the whole tree replaced, removed or renamed, so that the text stays
well-formed and gets further. Every input must be read, or refused by a LeanMergeError with a short
message that is fit for a terminal, within SECONDS and within BYTES of memory beyond what the
process held before. A watchdog ends the process, printing where it hangs and leaving the file; the
memory limit is the system's (RLIMIT_DATA), so that nothing escapes it. Inputs that are read are
used as well: their names are mapped, their tensors read.

The inputs follow from the seed alone. What fails is kept in the folder `fuzz-failures`.
"""

from __future__ import annotations

import argparse
import copy
import faulthandler
import json
import random
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fuzzforms
import torch
import yaml
from safetensors.torch import save_file

from lean_merge.checkpoints import TensorReader, as_bytes, open_checkpoint, read_header
from lean_merge.checkpoints.sidefiles import remote_code, side_files
from lean_merge.errors import LeanMergeError, is_plain
from lean_merge.mapping import map_roles
from lean_merge.memory import usage
from lean_merge.outputs.card import front_matter_of
from lean_merge.plan.parameters import build_method
from lean_merge.recipe import MergeRecipe, load_recipe_file

SECONDS = 5
"""Time that one input may take: thousands of times the usual."""
BYTES = 256 << 20
"""Memory that one input may take; the inputs have some kilobytes."""
MESSAGE = 4000
"""Characters that an error may have."""
FAILURES = Path("fuzz-failures")

NUMBERS = [b"0", b"-1", b"1", b"7", b"255", b"65536", b"2147483648", b"9223372036854775807"]
NUMBERS += [b"9223372036854775808", b"18446744073709551616", b"1e308", b"1e999", b"-0.0", b"0.5"]
NUMBERS += [b"9" * 30, b"9" * 4301, b"NaN", b"Infinity", b"0x" + b"f" * 300, b"1:1:1:1:1"]
WORDS = [
    b"null",
    b"true",
    b'""',
    b"[]",
    b"{}",
    b"[[[[[[[[",
    b'{"a":' * 70,
    b'"\\ud800"',
    b'"\\u0000"',
]
WORDS += [b'"../x"', b'"a/b.safetensors"', b'"\xe2\x80\xae"', b'"\x1b[31m"', b"\xff\xfe", b"\0"]
WORDS += [
    b'"F4"',
    b'"F64"',
    b'"F8_E4M3"',
    b'"__metadata__"',
    b'"dtype"',
    b'"shape"',
    b'"weight_map"',
]
WORDS += [b'"data_offsets"', b"&a [*a, *a]", b"<<: *a", b"*a", b"!!python/object:os.system x"]
WORDS += [b'!!int ""', b"!!timestamp x", b"? [a]", b"- - - - -", b"|\n x", b"%YAML 9.9", b"---\n"]
WORDS += [b'"quantization_config": {"quant_method": 1}', b"model.layers.999999.x", b"layers.0."]


def _numbers(data: bytes) -> list[tuple[int, int]]:
    """Where the runs of digits are."""
    spans, start = [], None
    for place, byte in enumerate(data):
        if 48 <= byte <= 57:
            start = place if start is None else start
        elif start is not None:
            spans.append((start, place))
            start = None
    return spans if start is None else [*spans, (start, len(data))]


def mutate(data: bytes, rng: random.Random) -> bytes:
    """`data` with one to four changes."""
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        size = len(data)
        at = rng.randrange(size + 1)
        end = min(size, at + rng.choice((1, 1, 2, 4, 8, 40)))
        kind = rng.randrange(9)
        if kind == 0 and at < size:
            data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at] + data[end:]
        elif kind == 2:
            data = data[:at] + data[at:end] * rng.choice((2, 3, 100)) + data[end:]
        elif kind == 3:
            data = data[:at] + rng.randbytes(rng.choice((1, 2, 8))) + data[end:]
        elif kind == 4:
            data = data[:at] + rng.choice(WORDS) + data[end:]
        elif kind == 5 and (spans := _numbers(data)):
            first, last = rng.choice(spans)
            data = data[:first] + rng.choice(NUMBERS) + data[last:]
        elif kind == 6:
            data = data[:at]
        elif kind == 7:
            other = rng.randrange(size + 1)
            data = data[:at] + data[other : other + rng.choice((4, 30, 200))] + data[at:]
        elif kind == 8 and (quotes := [i for i, b in enumerate(data) if b == 34]):
            first = rng.choice(quotes)
            last = next((q for q in quotes if q > first), size - 1)
            data = data[:first] + rng.choice(WORDS) + data[last + 1 :]
    return data


ODD = [None, True, False, 0, -1, 1, 2, 3, 2**31, 2**63 - 1, 2**63, 10**30, 10**400, 0.5, 1e308]
ODD += [
    float("nan"),
    float("inf"),
    "",
    "x",
    "\0",
    "\u202e",
    "\ud800",
    "../x",
    "x" * 300,
    "x" * 5000,
]
ODD += [
    "model-00001-of-00002.safetensors",
    "F64",
    "F4",
    "F8_E4M3",
    "I64",
    "BF16",
    "model.layers.0.x",
]
ODD += [[], {}, [[]], {"": 0}, [0, 0], [1, 2, 3], [0] * 70, [2**62, 2**62], ["a"], {"a": {"b": []}}]
ODD += [
    {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]},
    {"quant_method": [1]},
    "9" * 400 + "GB",
]


def mutate_tree(tree: Any, rng: random.Random) -> Any:
    """`tree`, changed in place at one to three random nodes."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(_places(tree))
        if not places:
            return rng.choice(ODD)
        parent, key = rng.choice(places)
        kind = rng.randrange(5)
        if kind == 0:
            del parent[key]
        elif kind == 1 and isinstance(parent, dict):
            name = rng.choice([each for each in ODD if isinstance(each, str)])
            parent[name] = parent.pop(key)
        elif kind == 2:
            other, where = rng.choice(places)
            parent[key] = copy.deepcopy(other[where])
        elif kind == 3 and type(parent[key]) is int:
            parent[key] += rng.choice((-2, -1, 1, 2, 2**40))
        else:
            parent[key] = copy.deepcopy(rng.choice(ODD))
    return tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """(parent, key) of every node below the root."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in list(items):
        yield tree, key
        if isinstance(value, (dict, list)):
            yield from _places(value)


@dataclass(frozen=True)
class Target:
    """One kind of input: whole examples, where a mutant goes, and what reads it."""

    examples: tuple[bytes, ...]
    file: Path
    read: Callable[[], object]
    form: str = "text"
    """Or "json", "yaml", "safetensors", JSON after its length, "scales", such a file whose numbers
    matter, or "archive", PyTorch's."""

    def mutant(self, rng: random.Random) -> bytes:
        """A mutated example; most of the headers get a length that fits, to come further."""
        whole = rng.choice(self.examples)
        if self.form == "archive":
            return fuzzforms.change_archive(whole, rng, mutate)
        if self.form == "scales" and rng.random() < 0.5:
            return fuzzforms.change_scales(whole, rng)
        if self.form not in ("safetensors", "scales"):
            return self._changed(whole, rng)
        if rng.random() < 0.2:
            return mutate(whole, rng)
        length = int.from_bytes(whole[:8], "little")
        header = self._changed(whole[8 : 8 + length], rng)
        return len(header).to_bytes(8, "little") + header + whole[8 + length :]

    def _changed(self, text: bytes, rng: random.Random) -> bytes:
        if self.form == "text" or rng.random() < 0.5:
            return mutate(text, rng)
        if self.form == "yaml":
            tree = mutate_tree(yaml.safe_load(text), rng)
            return yaml.safe_dump(tree, allow_unicode=False).encode()
        return json.dumps(mutate_tree(json.loads(text), rng)).encode()


def write_models(root: Path) -> None:
    """A base and an MLLM of one small family, the latter in shards with every side file."""
    shapes = {
        f"layers.{n}.{leaf}.weight": shape
        for n in range(2)
        for leaf, shape in (("self_attn.q_proj", (8, 4)), ("mlp.up_proj", (6, 4)))
    }
    for role, prefix in (("base", "model."), ("mllm", "language_model.model.")):
        tensors = {prefix + name: torch.ones(shape) for name, shape in shapes.items()}
        tensors[f"{prefix}norm.weight"] = torch.ones(4, dtype=torch.bfloat16)
        folder = root / role
        folder.mkdir()
        names = list(tensors)
        files = [f"model-{n:05d}-of-00002.safetensors" for n in (1, 2)]
        where = {name: files[index % 2] for index, name in enumerate(names)}
        for file in files:
            part = {name: tensors[name] for name in names if where[name] == file}
            save_file(part, folder / file, metadata={"format": "pt"})
        index = {"metadata": {"total_size": 400}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        config = {
            "model_type": "llava",
            "auto_map": {"AutoModel": "modeling_x.X", "AutoConfig": "o/n--configuration_x.C"},
            "text_config": {
                "hidden_size": 4,
                "num_attention_heads": 2,
                "head_dim": 4,
                "rope_theta": 1e4,
                "rope_parameters": {"full": {"rope_theta": 10000}},
                "hidden_act": "silu",
            },
        }
        (folder / "config.json").write_text(json.dumps(config))
        vocabulary = {word: place for place, word in enumerate([role, "a", "b", "c"])}
        added = [{"id": 7, "content": "<x>"}]
        tokenizer = {"model": {"vocab": vocabulary, "merges": []}, "added_tokens": added}
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        card = "---\nlicense: mit\nlicense_name: [a, b]\ntags: &t [x, *t]\n---\n# Model\n"
        (folder / "README.md").write_text(card.replace(", *t", ""))
        (folder / "modeling_x.py").write_text("raise SystemExit('this file was imported')\n")


RECIPES = (
    b"""merge_method: ip_merging
base_model: base
mllm_model: mllm
experts:
  - model: expert
    parameters: &own {threshold: 0.4, scale: 1.0}
  - {model: other, parameters: *own}
  - third
parameters:
  temperature: 32
  nuclear: full
  stages: [select, rescale, project]
  rank: auto
out_dtype: auto
rounding: nearest
seed: 0
shard_size: 5GB
allow_partial: false
""",
    b"""base_model: a/b@main
mllm_model: ./x
experts: [y]
merge_method: task-arithmetic
parameters: {symmetric: true, scale: .5}
""",
)


def targets(root: Path) -> dict[str, Target]:
    """Every reader of strangers' files, on folders in `root`."""
    write_models(root)
    fuzzforms.write_forms(root)
    archive, archives, fp8, adapter = (root / n for n in ("bin", "bins", "fp8", "adapter"))
    base, mllm, recipe = root / "base", root / "mllm", root / "recipe.yml"
    shard = "model-00001-of-00002.safetensors"

    def use() -> None:
        """Open both, map them, read a tensor, and look at the side files."""
        ours, theirs = open_checkpoint(base), open_checkpoint(mllm)
        map_roles(ours, theirs, [ours], allow_partial=True)
        side_files(mllm)
        remote_code(theirs)
        front_matter_of(mllm)
        with TensorReader() as reader:
            for spec in list(theirs.tensors.values())[:2]:
                buffer = torch.empty(min(spec.nbytes, 1 << 20), dtype=torch.uint8)
                reader.read_into(spec, 0, as_bytes(buffer))

    def read_recipe() -> None:
        parsed = MergeRecipe.from_dict(load_recipe_file(recipe))
        hash(parsed)
        build_method(parsed)
        again = MergeRecipe.from_yaml(parsed.to_yaml())
        assert again == parsed or "nan" in parsed.to_yaml(), "a recipe changed by being written"
        json.dumps(parsed.to_dict())

    def form(file: Path, how: str) -> Target:
        """One file of the base in another form, or of an adapter of it; used in every role."""
        folder = file.parent
        first = base if folder == adapter else folder
        examples = whole(file)
        return Target(examples, file, lambda: fuzzforms.use_roles(first, mllm, folder), form=how)

    def whole(file: Path) -> tuple[bytes, ...]:
        return (file.read_bytes(),)

    return {
        "header": Target(
            (*whole(mllm / shard), *whole(base / shard)),
            root / "alone.safetensors",
            lambda: read_header(root / "alone.safetensors"),
            form="safetensors",
        ),
        "shard": Target(whole(mllm / shard), mllm / shard, use, form="safetensors"),
        "index": Target(
            whole(mllm / "model.safetensors.index.json"),
            mllm / "model.safetensors.index.json",
            use,
            form="json",
        ),
        "config": Target(whole(mllm / "config.json"), mllm / "config.json", use, form="json"),
        "tokenizer": Target(
            whole(mllm / "tokenizer.json"), mllm / "tokenizer.json", use, form="json"
        ),
        "card": Target(whole(mllm / "README.md"), mllm / "README.md", use),
        "recipe": Target(RECIPES, recipe, read_recipe, form="yaml"),
        "archive": form(archive / fuzzforms.BIN, "archive"),
        "archives": form(archives / fuzzforms.BIN_INDEX, "json"),
        "adapter": form(adapter / "adapter_config.json", "json"),
        "factors": form(adapter / "adapter_model.safetensors", "scales"),
        "scales": form(fp8 / "model.safetensors", "scales"),
        "fp8 config": form(fp8 / "config.json", "json"),
    }


SHARES = {"header": 8, "shard": 3, "index": 3, "config": 3, "tokenizer": 1, "card": 1, "recipe": 2}
FORMS = {"archive": 4, "archives": 1, "adapter": 2, "factors": 2, "scales": 2, "fp8 config": 1}
SHARES |= FORMS


def attempt(target: Target, data: bytes) -> str:
    """How one input ends: "read" or the name of a LeanMergeError. Raises anything else."""
    target.file.write_bytes(data)
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    try:
        target.read()
    except LeanMergeError as error:
        message = str(error)
        assert len(message) <= MESSAGE, f"a message of {len(message)} characters"
        assert all(is_plain(line) for line in message.split("\n")), f"unfit to print: {message!r}"
        return type(error).__name__
    finally:
        faulthandler.cancel_dump_traceback_later()
    return "read"


def main(inputs: int, seed: int, only: str | None) -> int:
    """Run every target's share of `inputs`; print counts and time; return the failures."""
    failures = 0
    with tempfile.TemporaryDirectory() as scratch:
        wanted = {None: SHARES, "forms": FORMS}.get(only, [only])
        chosen = {n: t for n, t in targets(Path(scratch)).items() if n in wanted}
        for target in chosen.values():
            assert attempt(target, target.examples[0]) == "read", target.file
        held = usage().anonymous
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        data_now = _data_bytes()
        resource.setrlimit(resource.RLIMIT_DATA, (data_now + BYTES, hard))
        print("target       inputs     read  refused  failed      s  errors, and the slowest input")
        whole = sum(SHARES[name] for name in chosen)
        began, tried = time.perf_counter(), 0
        for name, target in chosen.items():
            rng = random.Random(f"{seed} {name}")
            count = -(-inputs * SHARES[name] // whole)
            ends: Counter[str] = Counter()
            start, slowest = time.perf_counter(), 0.0
            for _ in range(count):
                data = target.mutant(rng)
                one = time.perf_counter()
                try:
                    ends[attempt(target, data)] += 1
                except Exception:
                    ends["failed"] += 1
                    FAILURES.mkdir(exist_ok=True)
                    kept = FAILURES / f"{name}-{seed}-{sum(ends.values())}"
                    kept.write_bytes(data)
                    print(f"{kept}:\n{traceback.format_exc(limit=-4)}", flush=True)
                slowest = max(slowest, time.perf_counter() - one)
            target.file.write_bytes(target.examples[0])
            read, failed = ends.pop("read", 0), ends.pop("failed", 0)
            failures, tried = failures + failed, tried + count
            print(
                f"{name:<10} {count:>8} {read:>8} {ends.total():>8} {failed:>7} "
                f"{time.perf_counter() - start:>6.1f}  {dict(ends)}, {slowest * 1e3:.0f} ms",
                flush=True,
            )
        grown = usage().anonymous - held
    seconds, mebibytes = time.perf_counter() - began, grown / (1 << 20)
    print(f"{tried} inputs, {failures} failures, {seconds:.0f} s, memory +{mebibytes:.0f} MiB")
    return failures


def _data_bytes() -> int:
    """What RLIMIT_DATA counts now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    raise OSError("this system does not say what a process's data segment holds")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only")
    given = parser.parse_args()
    sys.exit(1 if main(given.inputs, given.seed, given.only) else 0)
