"""LoRA adapters as PEFT saves them: what adapter_config.json says, and what is refused of it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lean_merge.checkpoints.jsonfile import read_object
from lean_merge.checkpoints.safepaths import checked_file
from lean_merge.errors import CheckpointError, shown

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_MAX_JSON = 10_000_000
_MAX_PATTERNS = 10_000
_MAX_PATTERN = 1024  # characters, as in a tensor's name
_NAME = re.compile(r"[\w.-]*")
# Syntax that means the same to `re` and to RE2. No token begins as another does, so that this
# itself matches in linear time.
_READ_ALIKE = re.compile(
    r"""(?: [^\\\[\](){}]                   # any character but these; also . ^ $ | * + ?
          | \\[dDwWsSb] | \\[^\w\s]          # a class, an escape
          | \[\^? (?: \\[dDwWsS] | \\[^\w\s] | [\w.](?:-[\w.])? )+ \]
          | \((?:\?:|(?!\?)) | \)            # a group
          | \{\d+(?:,\d*)?\}                 # a number of times
        )*""",
    re.VERBOSE,
)
# Far beyond any lora_alpha, and no quotient of it overflows.
_MAX_NUMBER = 1e30
_WRAPPER = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])(\.(?P<adapter>[^.]+))?\.weight")
# What leaves the base as it is. The others, PiSSA and its like, train against a changed base.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_VARIANTS = {
    "use_dora": "DoRA, whose magnitudes make the change no product of two factors",
    "layer_replication": "layers replicated, so it fits another model than the base",
    "alora_invocation_tokens": "activated LoRA, which is in force for some tokens only",
    "use_qalora": "QALoRA, whose factors see pooled inputs",
    "use_bdlora": "BD-LoRA",
    "monteclora_config": "MonteCLoRA",
    "kasa_config": "KaSA, which changes the base too",
    "arrow_config": "Arrow routing between adapters",
    "megatron_config": "Megatron's layers",
    "target_parameters": "parameters targeted without a module (target_parameters)",
}


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What of adapter_config.json decides the numbers.

    Attributes
    ----------
    alpha
        lora_alpha, for modules that no pattern names.
    alpha_patterns
        Exceptions: a pattern of modules' names, and their alpha. The first that matches counts.
    ranks
        Every rank that the config gives to some module.
    rslora
        Whether alpha is divided by sqrt(r) instead of r.
    base
        The model that it was trained on, named by its author.
    """

    alpha: float
    alpha_patterns: tuple[tuple[ModulePattern, float], ...]
    ranks: frozenset[int]
    rslora: bool
    base: str | None

    def scaling(self, module: str, rank: int) -> float:
        """What PEFT multiplies B A of a module by, given the rank of its factors."""
        stated = (alpha for pattern, alpha in self.alpha_patterns if pattern.match(module))
        alpha = float(next(stated, self.alpha))
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def split_factor(name: str) -> tuple[str, str] | None:
    """(module, "A" or "B") of a factor's name, None for any other tensor's.

    The module's name is that in the model, without PEFT's prefix.
    """
    match = _FACTOR.fullmatch(name)
    return None if match is None else (match["module"].removeprefix(_WRAPPER), match["factor"])


def find_adapter(folder: Path) -> tuple[AdapterConfig, Path] | None:
    """The adapter in a folder and the file of its tensors, None if the folder holds a whole model.

    Raises
    ------
    CheckpointError
        There is an adapter that cannot be read or is of a kind that is not understood.
    """
    file = folder / ADAPTER_CONFIG
    found = next((folder / name for name in ADAPTER_FILES if (folder / name).exists()), None)
    if not file.exists() or (found is None and _has_model(folder)):
        return None
    if found is None:
        raise CheckpointError(
            f"{folder}: has {ADAPTER_CONFIG} but neither {' nor '.join(ADAPTER_FILES)}; download "
            "the adapter again."
        )
    config = read_object(
        checked_file(folder, file),
        limit=_MAX_JSON,
        what="config",
        mend="save the adapter again with PEFT",
        unique=False,
    )
    return _config(file, config), checked_file(folder, found)


def _has_model(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("config.json", "model.safetensors"))


def _config(file: Path, config: Mapping[str, Any]) -> AdapterConfig:
    def fail(fault: str) -> CheckpointError:
        return CheckpointError(
            f"{file}: {fault}; merge the adapter into its base first (PEFT's merge_and_unload) and "
            "pass the result."
        )

    kind = config.get("peft_type")
    if kind != "LORA":
        raise fail(f"is an adapter of the type {shown(kind)}, and only LORA is understood")
    for key, what in _VARIANTS.items():
        if config.get(key):
            raise fail(f"is made with {what} ({key})")
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise fail(
            f"was started from the base's own weights (init_lora_weights {shown(start)}), "
            "so its factors are not the change of the base"
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if rank is None or not _is_rank(rank) or alpha is None or not _is_number(alpha):
        raise fail(
            f"states r {shown(rank)} and lora_alpha {shown(alpha)}, which are no rank and no factor"
        )
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    for key, stated, fits in (
        ("rank_pattern", ranks, _is_rank),
        ("alpha_pattern", alphas, _is_positive),
    ):
        if not isinstance(stated, dict) or not all(map(fits, stated.values())):
            raise fail(f"has a {key} that gives modules no positive numbers")
    if len(alphas) > _MAX_PATTERNS:
        raise fail(f"has an alpha_pattern of {len(alphas)} keys, more than {_MAX_PATTERNS}")
    patterns = []
    for each, value in alphas.items():
        try:
            patterns.append((module_pattern(each), value))
        except ValueError as error:
            raise fail(f"has the alpha_pattern {shown(each)}, which {error}") from error
    base = config.get("base_model_name_or_path")
    return AdapterConfig(
        alpha=float(alpha),
        alpha_patterns=tuple(patterns),
        ranks=frozenset({rank, *ranks.values()}),
        rslora=bool(config.get("use_rslora")),
        base=base if isinstance(base, str) and base else None,
    )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -_MAX_NUMBER <= value <= _MAX_NUMBER


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value < 2**31


class ModulePattern(Protocol):
    """A compiled pattern of modules' names."""

    def match(self, text: str, /) -> object:
        """Something true if the name fits."""


def module_pattern(key: str) -> ModulePattern:
    """The pattern that PEFT makes of a key of alpha_pattern: it fits the end of a module's name.

    A key without metacharacters but the dot repeats nothing, so `re` matches it in a time that is
    bounded by both lengths. Other keys come from strangers too, and `re` can take years for them:
    RE2 matches them in linear time, as far as it is sure to read them as `re` does.

    Raises
    ------
    ValueError
        The key cannot be matched as PEFT does; the message is a predicate with the mend.
    """
    if len(key) > _MAX_PATTERN:
        raise ValueError(f"has {len(key)} characters, more than {_MAX_PATTERN}")
    pattern = rf"(.*\.)?({key})$"
    if _NAME.fullmatch(key):
        return re.compile(pattern)
    try:
        import re2
    except ImportError as error:
        raise ValueError(
            "is a regular expression, so google-re2 has to be installed "
            "(pip install 'lean-merge[patterns]')"
        ) from error
    if not _READ_ALIKE.fullmatch(key):
        raise ValueError("is more of a regular expression than modules' names need")
    options = re2.Options()
    options.log_errors = False
    try:
        compiled: ModulePattern = re2.compile(pattern, options)
    except re2.error as error:
        raise ValueError("is no regular expression that can be matched in linear time") from error
    return compiled
