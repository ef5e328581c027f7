"""Measure the family: task vectors, merges by lean_merge, and what rank the skill has.

    python bench/family/smol/compare.py --family DIR --out bench/family/smol

Every row is written to ``results.json`` as it is measured; those that are there are not measured
again, so that this can be stopped at any time. Without ``--out`` it only looks at the task vectors,
those of any family with these three folders.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # the first family's modules
sys.path.insert(1, str(Path(__file__).resolve().parents[3]))  # the package, when not installed

import torch
from anatomy import anatomy, decompose, dominant_inputs, projected, summarise, truncated
from forced import TASKS, problems, score
from sight import in_scope
from torch import Tensor
from transformers import (
    AutoTokenizer,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.utils import logging
from worksheets import Encoder

from lean_merge import Expert, MergeRecipe, Resources, stream
from lean_merge.demo.evaluate import Accuracy

QUESTION_SEED = 7  # the questions are the same for every model
ROLES = ("base", "mllm", "expert")
PLAIN = (  # text without digits, unlike anything in either tuning
    "The river had been rising since the morning, and by noon the lower fields were under water. "
    "Nobody in the village was surprised: old people remembered worse, and the younger ones had "
    "carried their chairs and their books upstairs the evening before. What worried them was the "
    "bridge. It was built of wood, by a carpenter who had never seen the sea, and every tree that "
    "came down with the flood struck it like a hammer."
)
_IN_SCOPE = re.compile(r"language_model\.(?:model\.)?(layers\.\d+\.(?:self_attn|mlp)\..*weight)$")

Weights = Mapping[str, Tensor]

# In the order of what is wanted first: each row takes minutes on a busy machine.
MERGES: dict[str, tuple[str, dict[str, Any]]] = {
    "Task Arithmetic, 1": ("task_arithmetic", {}),
    "Task Arithmetic, 0.5": ("task_arithmetic", {"scale": 0.5}),
    "IP-Merging, defaults": ("ip_merging", {}),
    "select, threshold 0.4": ("ip_merging", {"stages": ("select",)}),
    "IP-Merging, threshold 0, s weighted by sigma": (
        "ip_merging",
        {"threshold": 0.0, "similarity_weight": "sigma"},
    ),
    "IP-Merging, threshold 0, relative, temperature 1": (
        "ip_merging",
        {"threshold": 0.0, "importance": "relative", "temperature": 1.0},
    ),
    "Task Arithmetic, 0.3": ("task_arithmetic", {"scale": 0.3}),
    "IP-Merging, threshold 0": ("ip_merging", {"threshold": 0.0}),
    "select,rescale, threshold 0.4": ("ip_merging", {"stages": ("select", "rescale")}),
    "select,project, threshold 0": (
        "ip_merging",
        {"threshold": 0.0, "stages": ("select", "project")},
    ),
    "IP-Merging, s weighted by sigma": ("ip_merging", {"similarity_weight": "sigma"}),
    "IP-Merging, threshold 0.4, largest s": ("ip_merging", {"select_by": "max"}),
    "IP-Merging, rank 64": ("ip_merging", {"rank": 64}),
    "IP-Merging, threshold 0.2": ("ip_merging", {"threshold": 0.2}),
    "IP-Merging, threshold 0, relative": (
        "ip_merging",
        {"threshold": 0.0, "importance": "relative"},
    ),
    "IP-Merging, threshold 0, temperature 8": (
        "ip_merging",
        {"threshold": 0.0, "temperature": 8.0},
    ),
    "IP-Merging, threshold 0, temperature 1": (
        "ip_merging",
        {"threshold": 0.0, "temperature": 1.0},
    ),
}
FIRST = 4  # so many merges come before the rank of the skill


class Family:
    """The three saved models; one LLM and one MLLM in memory, whose weights are changed in place.

    Parameters
    ----------
    folder : Path
        Holds ``base``, ``mllm`` and ``expert``.
    counts : mapping of str to int
        Problems of each task.
    """

    def __init__(self, folder: Path, counts: Mapping[str, int]) -> None:
        self.folders = {role: folder / role for role in ROLES}
        how: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
        self.llm = LlamaForCausalLM.from_pretrained(self.folders["base"], **how).eval()
        expert = LlamaForCausalLM.from_pretrained(self.folders["expert"], **how)
        self.mllm = LlavaForConditionalGeneration.from_pretrained(
            self.folders["mllm"], **how
        ).eval()
        models = {"base": self.llm, "mllm": self.mllm, "expert": expert}
        self.weights = {
            role: {name: weight.detach().clone() for name, weight in in_scope(model).items()}
            for role, model in models.items()
        }
        processor = LlavaProcessor.from_pretrained(self.folders["mllm"])
        self.readers = {
            self.llm: Encoder(AutoTokenizer.from_pretrained(self.folders["base"])),
            self.mllm: Encoder(processor.tokenizer),
        }
        self.counts = counts

    def task_vector(self, role: str, name: str) -> Tensor:
        """W_role - W_0."""
        return self.weights[role][name] - self.weights["base"][name]

    def ask(self, model: Any, weights: Weights, shots: int = 0) -> dict[str, dict[str, float]]:
        """Score a model with these matrices in scope: text sums, and what else it can do."""
        with torch.no_grad():
            for name, weight in in_scope(model).items():
                weight.copy_(weights[name])
        scores = {}
        for task in TASKS if model is self.mllm else ("text_sums",):
            encoder = self.readers[model]
            asked = problems(task, encoder, self.counts[task], seed=QUESTION_SEED, shots=shots)
            for kind, accuracy in score(model, encoder, asked).items():
                scores[task if kind == "right" else f"{task}_{kind}"] = told(accuracy)
        return scores

    def merged(self, method: str, parameters: Mapping[str, Any]) -> Weights:
        """The matrices in scope of a merge by lean_merge, as it would store them."""
        recipe = MergeRecipe(
            base_model=str(self.folders["base"]),
            mllm_model=str(self.folders["mllm"]),
            experts=(Expert(str(self.folders["expert"])),),
            merge_method=method,
            parameters=tuple(parameters.items()),
        )
        found = {}
        for name, tensor in stream(recipe, resources=Resources(threads=torch.get_num_threads())):
            match = _IN_SCOPE.search(name)
            if match:
                found[match[1]] = tensor.float()
        assert found.keys() == self.weights["base"].keys()
        return found

    def toward_expert(self, weight: float) -> Weights:
        """The straight line from the MLLM to the expert."""
        mllm, expert = self.weights["mllm"], self.weights["expert"]
        return {name: torch.lerp(mllm[name], expert[name], weight) for name in mllm}

    def cut(self, rank: int) -> Weights:
        """The base with the expert's task vectors cut to a rank."""
        return {
            name: weight + truncated(self.task_vector("expert", name), rank)
            for name, weight in self.weights["base"].items()
        }

    def inside(self, rank: int) -> Weights:
        """The MLLM with what of the expert lies in so many of the MLLM's leading directions."""
        return {
            name: weight
            + projected(self.task_vector("expert", name), self.task_vector("mllm", name), rank)
            for name, weight in self.weights["mllm"].items()
        }


def rows_to_measure(family: Family) -> dict[str, Callable[[], dict[str, Any]]]:
    """Every row of the table: its title, and what measures it."""

    def asking(
        model: Any, weights: Callable[..., Weights], *values: Any
    ) -> Callable[[], dict[str, Any]]:
        return lambda: family.ask(model, weights(*values))

    own = family.weights
    llm, seeing = family.llm, family.mllm
    merges = {
        title: asking(seeing, family.merged, method, parameters)
        for title, (method, parameters) in MERGES.items()
    }
    rows = {
        "base": lambda: family.ask(llm, own["base"]),
        "base, three sums shown": lambda: family.ask(llm, own["base"], shots=3),
        "expert": lambda: family.ask(llm, own["expert"]),
        "mllm": lambda: family.ask(seeing, own["mllm"]),
        **dict(list(merges.items())[:FIRST]),
        "base + expert's rank 16": asking(llm, family.cut, 16),
        "MLLM + expert inside its leading 64": asking(seeing, family.inside, 64),
        "base + expert's rank 64": asking(llm, family.cut, 64),
        "base + expert's rank 4": asking(llm, family.cut, 4),
        "MLLM + expert inside its leading 16": asking(seeing, family.inside, 16),
        "base + expert's rank 1": asking(llm, family.cut, 1),
        **dict(list(merges.items())[FIRST:]),
        "MLLM toward expert, 0.5": asking(seeing, family.toward_expert, 0.5),
        "MLLM toward expert, 1": asking(seeing, family.toward_expert, 1.0),
    }
    return rows


def anatomies(family: Family) -> dict[str, dict[str, Any]]:
    """Every matrix measured."""
    base, mllm, expert = (family.weights[role] for role in ROLES)
    ids = torch.tensor([family.readers[family.llm].ids(PLAIN)])
    inputs = dominant_inputs(family.llm, ids)  # still the base: nothing was put into it
    return {name: anatomy(base[name], mllm[name], expert[name], inputs[name]) for name in base}


def storage(family: Family, states: Mapping[str, Path]) -> dict[str, Any]:
    """What storing in bf16 does to nuclear norms: stored task vectors against those trained.

    Parameters
    ----------
    states : mapping of str to Path
        The trainings' states of "mllm" and "expert", with the float32 weights before rounding.
    """
    ratios: dict[str, list[float]] = {role: [] for role in states}
    errors: dict[str, list[float]] = {role: [] for role in states}
    for role, file in states.items():
        trained = torch.load(file, weights_only=True, mmap=True)["weights"]
        for name, start in family.weights["base"].items():
            exact = trained[name] - start
            stored = family.task_vector(role, name)
            nuclear = [float(decompose(each).sigma.sum()) for each in (stored, exact)]
            ratios[role].append(nuclear[0] / nuclear[1])
            errors[role].append(float((stored - exact).norm() / exact.norm()))
    factors = [v / e for v, e in zip(ratios["mllm"], ratios["expert"], strict=True)]
    found = {"lambda": factors}
    found |= {f"nuclear_norm_{role}": values for role, values in ratios.items()}
    found |= {f"error_{role}": values for role, values in errors.items()}
    return {
        name: {"low": min(v), "median": sorted(v)[len(v) // 2], "high": max(v)}
        for name, v in found.items()
    }


def told(accuracy: Accuracy) -> dict[str, float]:
    """An accuracy for the log."""
    return {"share": accuracy.share, **asdict(accuracy)}


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The results as a Markdown table: % right (Wilson 95 % interval)."""
    columns = {
        "read": "reads",
        "text_sums": "text sums",
        "picture_sums": "picture sums",
        "picture_sums_seen": "question written down",
        "picture_sums_added": "result, the question given",
    }
    lines = ["| model | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 1) + "|"]
    for title, scores in rows.items():
        cells = [
            f"{100 * s['share']:.1f} ({100 * s['low']:.1f} to {100 * s['high']:.1f})"
            if (s := scores["scores"].get(column))
            else ""
            for column in columns
        ]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def rounded(value: Any) -> Any:
    """Four significant digits: the rest is noise in a diff."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return value


def write(file: Path, value: Any, *, indent: int | None = 1) -> None:
    """Write JSON, rounded."""
    text = json.dumps(rounded(value), indent=indent)
    if indent is None:  # one matrix a line
        text = text.replace('}, "layers', '},\n"layers')
    file.write_text(text + "\n", encoding="utf-8")


def main() -> None:
    """Measure what is not measured yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--family", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="without it, only the task vectors, printed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--problems", type=int, default=300, help="sums; readings are half of it")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    counts = {task: options.problems for task in TASKS} | {"read": options.problems // 2}
    family = Family(options.family, counts)
    if options.out is None:
        print(json.dumps(rounded(summarise(anatomies(family))["all"]), indent=1))
        return
    file = options.out / "results.json"
    results: dict[str, Any] = (
        json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"rows": {}}
    )
    if "anatomy" not in results:
        matrices = anatomies(family)
        results["anatomy"] = summarise(matrices)
        write(options.out / "spectra.json", matrices, indent=None)
        write(file, results)
        print(time.strftime("%H:%M:%S"), "anatomy", flush=True)
    for title, measure in rows_to_measure(family).items():
        if title in results["rows"]:
            continue
        began = time.perf_counter()
        results["rows"][title] = {
            "scores": measure(),
            "seconds": time.perf_counter() - began,
        }
        write(file, results)
        shares = (f"{k} {v['share']:.3f}" for k, v in results["rows"][title]["scores"].items())
        print(time.strftime("%H:%M:%S"), title, *shares, flush=True)
    states = {role: options.family / f"{role}.state" for role in ("mllm", "expert")}
    if "storage" not in results and all(state.exists() for state in states.values()):
        results["storage"] = storage(family, states)
        write(file, results)
    (options.out / "results.md").write_text(table(results["rows"]), encoding="utf-8")


if __name__ == "__main__":
    main()
