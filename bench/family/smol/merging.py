"""The family as the reproduction's candidates need it: weights in scope, merges, exams."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from forced import Exam, problems
from reproduction.candidates import SHOWN
from reproduction.exam import Weights
from reproduction.family import TaskVectors
from safetensors.torch import load_file
from sight import in_scope
from torch import Tensor
from transformers import (
    AutoTokenizer,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from worksheets import Encoder

from lean_merge import Analysis, Resources, analyze, merge, stream

QUESTION_SEED = 7  # the questions are the same for every model
_IN_SCOPE = re.compile(r"language_model\.(?:model\.)?(layers\.\d+\.(?:self_attn|mlp)\..*weight)$")


class SmolFamily(TaskVectors):
    """The three saved models; one LLM and one MLLM stay in memory, and their weights change.

    Parameters
    ----------
    folder : Path
        Holds ``base``, ``mllm`` and ``expert``; the analysis is kept beside them.
    problems : int
        Held-out problems of each task.
    """

    def __init__(self, folder: Path, *, problems: int) -> None:
        how: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
        self.llm = LlamaForCausalLM.from_pretrained(folder / "base", **how).eval()
        self.seeing = LlavaForConditionalGeneration.from_pretrained(folder / "mllm", **how).eval()
        expert = LlamaForCausalLM.from_pretrained(folder / "expert", **how)
        super().__init__(folder, *(_copied(model) for model in (self.llm, self.seeing, expert)))
        self.text = Encoder(AutoTokenizer.from_pretrained(folder / "base"))
        self._sight = Encoder(LlavaProcessor.from_pretrained(folder / "mllm").tokenizer)
        self._problems = problems
        self._resources = Resources(threads=torch.get_num_threads())

    @cached_property
    def exams(self) -> Mapping[str, Exam]:
        """Of the MLLM, and of the text model: the expert's embeddings and norms are the base's."""
        count = self._problems
        seeing = {
            task: problems(task, self._sight, count, seed=QUESTION_SEED)
            for task in ("read", "text_sums", "picture_sums")
        }
        asked = problems("text_sums", self.text, count, seed=QUESTION_SEED)
        shown = problems("text_sums", self.text, count, seed=QUESTION_SEED, shots=3)
        text = Exam(self.llm, self.text, {"text_sums": asked})
        return {
            "mllm": Exam(self.seeing, self._sight, seeing),
            "base": text,
            "expert": text,
            SHOWN: Exam(self.llm, self.text, {"text_sums": shown}),
        }

    @cached_property
    def analysis(self) -> Analysis:
        """What lean-merge decides all its merges from; made once and kept."""
        recipe = self.recipe("ip_merging")
        return analyze(recipe, self.folder / "analysis", resources=self._resources).analysis

    @cached_property
    def survey(self) -> dict[str, Any]:
        """What `lean-merge analyze` says of thresholds."""
        survey: dict[str, Any] = self.analysis.document["thresholds"][0]
        return survey

    def merged(self, method: str, out_dtype: str = "float32", **parameters: Any) -> Weights:
        """What lean-merge makes of this family; IP-Merging from the analysis, so without SVDs.

        The analysis does not hold what the published variant needs.
        """
        recipe = self.recipe(method, out_dtype, **parameters)
        if method != "ip_merging" or "variant" in parameters:
            return _taken(stream(recipe, resources=self._resources))
        with TemporaryDirectory() as scratch:
            out = Path(scratch) / "merged"
            merge(recipe, out, analysis=self.analysis, resources=self._resources)
            return _taken(
                pair
                for file in sorted(out.glob("*.safetensors"))
                for pair in load_file(file).items()
            )


def _copied(model: Any) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in in_scope(model).items()}


def _taken(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The language model's matrices by their names within it, in float32."""
    matches = ((_IN_SCOPE.search(name), tensor) for name, tensor in tensors)
    return {match[1]: tensor.float() for match, tensor in matches if match}
