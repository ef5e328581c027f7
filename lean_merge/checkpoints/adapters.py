"""LoRA adapters as PEFT saves them: what adapter_config.json says, and what is refused of it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lean_merge.checkpoints.jsonfile import read_object
from lean_merge.checkpoints.modulepattern import ModulePattern, module_pattern
from lean_merge.checkpoints.safepaths import checked_file
from lean_merge.errors import CheckpointError, shown

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_MAX_JSON = 10_000_000
_MAX_PATTERNS = 10_000
# Of lora_alpha: far beyond any, and no quotient of it overflows.
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


Patterns = tuple[tuple[ModulePattern, float], ...]


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What of adapter_config.json decides the numbers.

    Attributes
    ----------
    rank, alpha
        r and lora_alpha where no pattern says otherwise.
    rank_pattern, alpha_pattern
        Exceptions: what the end of a module's name matches, and the value. The first counts.
    rslora
        Whether alpha is divided by sqrt(r) instead of r.
    base
        The model that it was trained on, as its author named it.
    fan_in_fan_out
        Whether it was made for weights stored as [in, out].
    """

    rank: int
    alpha: float
    rank_pattern: Patterns
    alpha_pattern: Patterns
    rslora: bool
    base: str | None
    fan_in_fan_out: bool

    def stated_rank(self, module: str) -> int:
        """r of a module, named without PEFT's own prefix."""
        return int(_by_pattern(self.rank_pattern, module, self.rank))

    def scaling(self, module: str) -> float:
        """What B A is multiplied by, as PEFT computes it."""
        rank = self.stated_rank(module)
        alpha = float(_by_pattern(self.alpha_pattern, module, self.alpha))
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def _by_pattern(patterns: Patterns, module: str, default: float) -> float:
    """The value of the first pattern that matches the name's end, as PEFT looks it up."""
    return next((value for pattern, value in patterns if pattern.matches(module)), default)


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
    base = config.get("base_model_name_or_path")
    return AdapterConfig(
        rank=int(rank),
        alpha=float(alpha),
        rank_pattern=_patterns(config, "rank_pattern", _is_rank, fail),
        alpha_pattern=_patterns(config, "alpha_pattern", _is_positive, fail),
        rslora=bool(config.get("use_rslora")),
        base=base if isinstance(base, str) and base else None,
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
    )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -_MAX_NUMBER <= value <= _MAX_NUMBER


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value < 2**31


def _patterns(
    config: Mapping[str, Any],
    key: str,
    fits: Callable[[Any], bool],
    fail: Callable[[str], CheckpointError],
) -> Patterns:
    """rank_pattern or alpha_pattern, with its keys read."""
    stated = config.get(key) or {}
    if not isinstance(stated, dict) or not all(map(fits, stated.values())):
        raise fail(f"has a {key} that gives modules no positive numbers")
    if len(stated) > _MAX_PATTERNS:
        raise fail(f"has a {key} of {len(stated)} keys, more than {_MAX_PATTERNS}")
    patterns = []
    for each, value in stated.items():
        try:
            patterns.append((module_pattern(each), value))
        except ValueError as error:
            raise fail(f"has the {key} {shown(each)}, which {error}") from error
    return tuple(patterns)
