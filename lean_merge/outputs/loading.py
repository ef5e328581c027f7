"""Ask transformers and PEFT which rows of which modules a checkpoint's tensors become.

transformers renames, fuses and splits tensors while it loads them, by tables that differ between
its versions. So the model that config.json describes is built without numbers, the tables of the
installed version rename the tensors, and the operations that they ask for are carried out on small
tensors which hold the numbers of their rows. PEFT, where it is installed, then puts an adapter on
that model, and what it did not apply is told.

Importing both takes seconds and some hundred megabytes, so they are imported inside functions, and
`answer_stdin` lets a process of its own do so.
"""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch

_TABLES = (
    "FOR_MULTIMODAL_LM",
    "FOR_IMAGE_TEXT_TO_TEXT",
    "FOR_CAUSAL_LM",
    "FOR_SEQ_TO_SEQ_CAUSAL_LM",
    "FOR_SPEECH_SEQ_2_SEQ",
    "FOR_TEXT_TO_WAVEFORM",
)
"""transformers' tables of classes by model type, in the order in which they are asked."""
_COUNTS = re.compile(r"(^|_)(num_.*layers|layers|depth|num_.*blocks|n_layers?)$")
_KEY = "base_model.model."
Answer = dict[str, Any]


def ask(
    config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], wanted: Sequence[str]
) -> Answer:
    """Return how the installed transformers names the modules of a checkpoint's tensors.

    Parameters
    ----------
    config
        The content of config.json.
    shapes
        The shapes of all tensors of the checkpoint by name.
    wanted
        The names of those that an adapter is to change.

    Returns
    -------
    dict
        The answer as plain data. `unknown` says why transformers has no rules for this checkpoint,
        or `failed` why the class that its config.json names cannot be built. Else `refused` says of
        tensors why no adapter changes them, and is empty if it changes them all; `pieces` has for
        each wanted tensor a list of [module, [[row of the tensor, row of the module, count], ...]];
        `sizes` has [out, in] of each module; `beside` are the modules that PEFT would take for
        them, and `task` is PEFT's type of task.
    """
    with _quiet():
        return _asked(config, shapes, wanted)


def _asked(
    config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], wanted: Sequence[str]
) -> Answer:
    kind, is_named = _class_of(config)
    if kind is None:
        installed = f"transformers {version('transformers')}"
        return {"unknown": f"{installed} has no class for {config.get('model_type')!r}"}
    try:
        _check_depth(config, len(shapes))
        model = _built(kind, config)
    except Exception as error:
        words = f"transformers cannot build {kind.__name__} from its config.json ({_brief(error)})"
        return {"failed" if is_named else "unknown": words}
    found = _located(model, shapes, wanted, strict=is_named)
    strangers = [name for name in wanted if not found["pieces"][name]]
    strangers = [name for name in strangers if name not in found["refused"]]
    no_module = f"transformers' {kind.__name__} has no module for it"
    if strangers and (not is_named or "auto_map" in config):
        # The class that goes with the model type is not that of these files.
        return {"unknown": f"{no_module.removesuffix('it')}{strangers[0]}"}
    found["refused"] |= dict.fromkeys(strangers, no_module)
    sizes = found["sizes"]
    ends = tuple(f".{module}" for module in sizes)
    names = [name for name, _ in model.named_modules()]
    found["beside"] = [name for name in names if name not in sizes and name.endswith(ends)]
    found["task"] = "CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None
    faults = _unapplied(lambda: _built(kind, config), model, found) if sizes else {}
    for tensor, pieces in found["pieces"].items():
        reasons = [faults[module] for module, _ in pieces if module in faults]
        if reasons:
            found["refused"].setdefault(tensor, reasons[0])
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what libraries warn of, and the numbers that they draw, from the caller."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)


# --- the model ----------------------------------------------------------------------------------


def _class_of(config: Mapping[str, Any]) -> tuple[Any, bool]:
    """Return the model's class, or None, and whether config.json names it."""
    from transformers.models.auto import modeling_auto

    named = config.get("architectures")
    for name in named if isinstance(named, list) else []:
        found = _class_named(name)
        if found is not None:
            return found, True
    kind = config.get("model_type")
    tables = [getattr(modeling_auto, f"MODEL_{name}_MAPPING_NAMES", {}) for name in _TABLES]
    for table in [*tables, getattr(modeling_auto, "MODEL_MAPPING_NAMES", {})]:
        names = table.get(kind) if isinstance(kind, str) else None
        for name in [names] if isinstance(names, str) else names or ():
            found = _class_named(name)
            if found is not None:
                return found, False
    return None, False


def _class_named(name: Any) -> Any:
    import transformers

    found: Any = getattr(transformers, name, None) if isinstance(name, str) else None
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if is_model and found.config_class is not None else None


def _check_depth(config: Mapping[str, Any], tensors: int) -> None:
    """Raise ValueError for more layers than there are tensors, which would take long to build."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            _check_depth(value, tensors)
        elif type(value) is int and value > max(tensors, 256) and _COUNTS.search(key):
            raise ValueError(f"{key} is {value}, and the files hold {tensors} tensors")


def _built(kind: Any, config: Mapping[str, Any]) -> Any:
    """Return the model without numbers."""
    left_out = ("auto_map", "quantization_config")
    plain = _with_floats({key: value for key, value in config.items() if key not in left_out})
    own = kind.config_class.from_dict(plain)
    own._attn_implementation = "eager"
    with torch.device("meta"):
        return kind(own)


def _with_floats(value: Any) -> Any:
    """Return a copy of JSON data, where {"__float__": "Infinity"} becomes that number."""
    if isinstance(value, Mapping):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _with_floats(each) for key, each in value.items()}
    return [_with_floats(each) for each in value] if isinstance(value, list) else value


# --- the names ----------------------------------------------------------------------------------


def _located(
    model: Any, shapes: Mapping[str, Sequence[int]], wanted: Sequence[str], *, strict: bool
) -> Answer:
    """Return the wanted tensors' rows in the modules' weights, as `ask` describes."""
    parameters = dict(model.state_dict())
    sources = _sources(model, shapes, parameters)
    asked = set(wanted)
    refused: dict[str, str] = {}
    pieces: dict[str, list[Any]] = {name: [] for name in wanted}
    sizes: dict[str, list[int]] = {}
    for target, (names, converter) in sources.items():
        if asked.isdisjoint(names) or (converter is None and target not in parameters):
            continue
        try:
            if target in parameters and parameters[target].dim() != 2:
                raise ValueError(f"transformers loads it into {target}, which is no matrix")
            made = _converted(target, names, converter, shapes, model)
            for parameter, runs in made.items():
                module = _module_of(model, parameter)
                rows, columns = sum(run[3] for run in runs), shapes[names[0]][1]
                have = list(parameters[parameter].shape)
                if have != [rows, columns] and strict:
                    raise ValueError(
                        f"config.json gives {module} the shape {have}, and the files "
                        f"{[rows, columns]}"
                    )
                sizes[module] = [rows, columns]
                for name in asked.intersection(names):
                    own = [run[1:] for run in runs if run[0] == name]
                    if own:
                        pieces[name].append([module, own])
        except (ValueError, AttributeError, KeyError) as error:
            refused |= dict.fromkeys(asked.intersection(names), str(error))
    return {"pieces": pieces, "sizes": sizes, "refused": refused}


def _sources(
    model: Any, shapes: Mapping[str, Any], parameters: Mapping[str, Any]
) -> dict[str, tuple[list[str], Any]]:
    """Return, for each parameter, the tensors that transformers makes it of, and its converter.

    A converter is a pair of transformers' own and of the patterns by which it takes the tensors;
    None where a tensor is loaded as it is.
    """
    rename, by_pattern, order = _rules(model, parameters)
    found: dict[str, tuple[list[str], Any]] = {}
    for name in sorted(shapes, key=order):
        target, pattern = rename(name)
        names, converter = found.setdefault(
            target, ([], None if pattern is None else (by_pattern[pattern], {}))
        )
        names.append(name)
        if converter is not None:
            converter[1][name] = pattern
    return found


def _rules(
    model: Any, parameters: Mapping[str, Any]
) -> tuple[Callable[[str], tuple[str, Any]], Mapping[str, Any], Callable[[str], Any]]:
    """Return the installed transformers' renaming, its converters by pattern, and its order."""
    prefix = model.base_model_prefix
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )
    except ImportError:
        return _older_rules(model, parameters), {}, str
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]

    def rename(name: str) -> tuple[str, Any]:
        renamed = rename_source_key(name, renamings, converters, prefix, parameters)
        if renamed[0] not in parameters and name in parameters:
            renamed = rename_source_key(name, [], [], prefix, parameters)
        return renamed[0], renamed[1]

    patterns = {each: rule for rule in converters for each in rule.source_patterns}
    return rename, patterns, dot_natural_key


def _older_rules(model: Any, parameters: Mapping[str, Any]) -> Callable[[str], tuple[str, Any]]:
    """Return the renaming of transformers 4: one table for each class, and the base's prefix."""
    rules = getattr(model, "_checkpoint_conversion_mapping", {})
    prefix = f"{model.base_model_prefix}."

    def rename(name: str) -> tuple[str, Any]:
        for pattern, template in rules.items():
            renamed, count = re.subn(pattern, template, name)
            if count:
                name = renamed
                break
        near = (name, prefix + name, name.removeprefix(prefix))
        return next((each for each in near if each in parameters), name), None

    return rename


def _converted(
    target: str, names: Sequence[str], converter: Any, shapes: Mapping[str, Any], model: Any
) -> dict[str, list[list[Any]]]:
    """Return [tensor, row of the tensor, row of the parameter, count] for each parameter.

    Raises ValueError where a parameter is not made of whole rows.
    """
    if any(len(shapes[name]) != 2 for name in names):
        raise ValueError(f"transformers makes {target} of it, and not row by row")
    if converter is None:
        if len(names) > 1:
            raise ValueError(f"transformers loads {len(names)} tensors into {target}")
        return {target: [[names[0], 0, 0, shapes[names[0]][0]]]}
    rule, patterns = deepcopy(converter[0]), converter[1]
    firsts, start = [], 0
    for name in names:
        # The number of a row stands in it with both signs, so that columns that move are seen.
        rows = torch.arange(start, start + shapes[name][0], dtype=torch.int64, device="cpu")
        firsts.append((start, name))
        start += len(rows)
        rule.add_tensor(target, name, patterns[name], torch.stack([rows, -1 - rows], dim=1))
    try:
        made = rule.convert(target, model=model, config=model.config)
    except Exception as error:
        raise ValueError(f"transformers cannot load it into {target} ({_brief(error)})") from error
    return {name: _runs(name, found, firsts) for name, found in made.items()}


def _runs(parameter: str, made: Any, firsts: Sequence[tuple[int, str]]) -> list[list[Any]]:
    """Return the runs of rows whose numbers stand in a converted tensor."""
    tensor = made[0] if isinstance(made, list) else made
    if tensor.dim() != 2 or tensor.shape[1] != 2 or not bool((tensor[:, 1] == ~tensor[:, 0]).all()):
        raise ValueError(f"transformers makes {parameter} of it, and not row by row")
    numbers = tensor[:, 0]
    starts = torch.tensor([start for start, _ in firsts], device="cpu")
    breaks = (numbers[1:] != numbers[:-1] + 1) | torch.isin(numbers[1:], starts)
    begins = [0, *(torch.nonzero(breaks).flatten() + 1).tolist()]
    runs = []
    for begin, end in zip(begins, [*begins[1:], len(numbers)], strict=True):
        first = int(numbers[begin])
        start, name = max((start, name) for start, name in firsts if start <= first)
        runs.append([name, first - start, begin, end - begin])
    return runs


def _module_of(model: Any, parameter: str) -> str:
    """Return the module whose weight a parameter is. Raises ValueError if it is not linear."""
    module, _, leaf = parameter.rpartition(".")
    if leaf != "weight" or not isinstance(model.get_submodule(module), torch.nn.Linear):
        raise ValueError(
            f"transformers loads it into {parameter}, which is not the weight of a linear module"
        )
    return module


# --- PEFT ---------------------------------------------------------------------------------------


def _unapplied(build: Callable[[], Any], model: Any, found: Answer) -> dict[str, str]:
    """Return the modules that PEFT does not apply, with a reason; none if it is not installed."""
    if not find_spec("peft"):
        return {}
    sizes = found["sizes"]
    try:
        return _tried(model, sizes, sizes, found)
    except Exception as error:
        words = f"PEFT {version('peft')} cannot put an adapter on it ({_brief(error)})"
    # Which modules it stumbles over is seen where those of one name are tried alone.
    faults: dict[str, str] = {}
    for leaf in dict.fromkeys(name.rpartition(".")[2] for name in sizes):
        alone = [name for name in sizes if name.rpartition(".")[2] == leaf]
        try:
            faults |= _tried(build(), alone, sizes, found)
        except Exception:
            faults |= dict.fromkeys(alone, words)
    return faults or dict.fromkeys(sizes, words)


def _tried(
    model: Any, modules: Iterable[str], sizes: Mapping[str, Sequence[int]], found: Answer
) -> dict[str, str]:
    """Put an adapter of these modules on the model, and return what PEFT does not apply."""
    import peft
    from peft.tuners.lora import LoraLayer

    modules = list(modules)
    config = peft.LoraConfig(
        r=1,
        lora_alpha=1,
        target_modules=modules,
        exclude_modules=found["beside"] or None,
        task_type=found["task"],
    )
    tensors = {}
    for name in modules:
        # The model's own sizes, which files may contradict where no class is named.
        weight = model.get_submodule(name).weight
        rows, columns = weight.shape
        tensors[f"{_KEY}{name}.lora_A.weight"] = torch.empty(
            (1, columns), dtype=weight.dtype, device="meta"
        )
        tensors[f"{_KEY}{name}.lora_B.weight"] = torch.empty(
            (rows, 1), dtype=weight.dtype, device="meta"
        )
    adapted = peft.get_peft_model(model, config, low_cpu_mem_usage=True)
    loaded = peft.set_peft_model_state_dict(adapted, tensors, low_cpu_mem_usage=True)
    inner = adapted.base_model.model
    layers = {name for name, each in inner.named_modules() if isinstance(each, LoraLayer)}
    missing = {key for key in loaded.missing_keys if ".lora_" in key}
    words = f"PEFT {version('peft')} does not apply an adapter to its module"
    return {
        name: words
        for name in modules
        if name not in layers or any(key.startswith(f"{_KEY}{name}.lora_") for key in missing)
    }


def _brief(error: Exception) -> str:
    """Return an error in one line, cut to a readable length."""
    line = " ".join(f"{type(error).__name__}: {error}".split())
    return line if len(line) <= 300 else f"{line[:300]}..."


# --- in a process of its own --------------------------------------------------------------------


def answer_stdin() -> None:
    """Read the arguments of `ask` as JSON from standard input, and write what it returns."""
    out = os.dup(1)
    # Libraries may print; only the answer may go where it is read.
    os.dup2(2, 1)
    question = json.load(sys.stdin.buffer)
    with os.fdopen(out, "wb") as stream:
        stream.write(json.dumps(ask(**question)).encode())


__all__ = ["answer_stdin", "ask"]
