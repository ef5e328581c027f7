"""Follow a pickle of tensors operation by operation on plain data, without running anything."""

from __future__ import annotations

import pickletools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from lean_merge.checkpoints.dtypes import dtype_by_torch_name
from lean_merge.errors import shown

_MAX_DIMENSIONS = 64
# Each operation may make an object, and so may each item given to a call; a tensor needs about 50.
_MAX_OPERATIONS = 4_000_000


class PickleError(ValueError):
    """A pickle does, or asks for, something that no file of weights needs."""


@dataclass(frozen=True, slots=True)
class PickledTensor:
    """A tensor as a pickle describes it; nothing of it is checked against the file yet.

    Attributes
    ----------
    dtype
        Its safetensors dtype.
    shape, stride
        Its lengths, and its strides in elements.
    offset
        The index of its first element in the storage.
    key
        The name of the archive's entry that holds the storage.
    storage_dtype, storage_items
        The storage's safetensors dtype, and its length in elements.
    """

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    key: str
    storage_dtype: str
    storage_items: int


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: str
    key: str
    items: int


@dataclass(frozen=True, slots=True)
class _Global:
    """The name of something that could be imported, and never is."""

    name: str


_STORAGES = MappingProxyType(
    {
        "torch.FloatStorage": "F32",
        "torch.HalfStorage": "F16",
        "torch.BFloat16Storage": "BF16",
        "torch.DoubleStorage": "F64",
        "torch.LongStorage": "I64",
        "torch.IntStorage": "I32",
        "torch.ShortStorage": "I16",
        "torch.CharStorage": "I8",
        "torch.ByteStorage": "U8",
        "torch.BoolStorage": "BOOL",
        "torch.ComplexFloatStorage": "C64",
        "torch.storage.UntypedStorage": "U8",
    }
)
_REFUSED = MappingProxyType(
    {
        "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
        "torch._utils._rebuild_sparse_csr_tensor": "a sparse tensor",
        "torch._utils._rebuild_qtensor": "a quantised tensor",
        "torch._utils._rebuild_meta_tensor_no_storage": "a tensor without numbers",
        "torch._utils._rebuild_wrapper_subclass": "a tensor subclass",
        "torch._tensor._rebuild_from_type_v2": "a tensor subclass",
        "torch._utils._rebuild_device_tensor_from_numpy": "a tensor of another device",
    }
)


def _counts(values: Any) -> tuple[int, ...]:
    """Check lengths or strides. Raises PickleError."""
    if not isinstance(values, (tuple, list)) or len(values) > _MAX_DIMENSIONS:
        raise PickleError("describes a tensor with an impossible shape")
    if not all(type(each) is int and 0 <= each < 2**63 for each in values):
        raise PickleError("describes a tensor with an impossible shape")
    return tuple(values)


def _tensor(dtype: str | None, storage: Any, offset: Any, shape: Any, stride: Any) -> PickledTensor:
    if not isinstance(storage, _Storage) or len(_counts(shape)) != len(_counts(stride)):
        raise PickleError("describes a tensor without storage")
    return PickledTensor(
        dtype=storage.dtype if dtype is None else dtype,
        shape=_counts(shape),
        stride=_counts(stride),
        offset=_counts([offset])[0],
        key=storage.key,
        storage_dtype=storage.dtype,
        storage_items=storage.items,
    )


def _plain(given: tuple[Any, ...]) -> None:
    """Check what follows the arguments that are read: torch notes there how numbers are to be read.

    These are its bits for negated and conjugated views. Raises PickleError for any of them.
    """
    if any(given):
        raise PickleError(
            "describes a tensor whose numbers are not those stored, as of a negated or conjugated "
            "view, which .resolve_neg().resolve_conj() stores"
        )


def _tensor_v2(
    storage: Any,
    offset: Any,
    shape: Any,
    stride: Any,
    _grad: Any = None,
    _hooks: Any = None,
    *noted: Any,
) -> PickledTensor:
    _plain(noted)
    return _tensor(None, storage, offset, shape, stride)


def _tensor_v3(
    storage: Any,
    offset: Any,
    shape: Any,
    stride: Any,
    _grad: Any,
    _hooks: Any,
    dtype: Any,
    *noted: Any,
) -> PickledTensor:
    _plain(noted)
    known = dtype_by_torch_name(dtype.name) if isinstance(dtype, _Global) else None
    if known is None:
        raise PickleError("describes a tensor of an unknown dtype")
    return _tensor(known, storage, offset, shape, stride)


def _key(value: Any) -> str | int:
    """Check a dict's key. Tuples are refused, as nested ones could take ages to hash or print."""
    if not isinstance(value, (str, int)):
        raise PickleError("has keys that are no names")
    if isinstance(value, int) and value.bit_length() > 64:  # hashing takes time by its length
        raise PickleError("has a key that is a huge number")
    return value


def _ordered_dict(*given: Any) -> dict[Any, Any]:
    if not given:
        return {}
    (pairs,) = given
    return {_key(key): value for key, value in pairs}


_CALLS: MappingProxyType[str, Callable[..., Any]] = MappingProxyType(
    {
        "collections.OrderedDict": _ordered_dict,
        "torch._utils._rebuild_tensor": _tensor_v2,
        "torch._utils._rebuild_tensor_v2": _tensor_v2,
        "torch._utils._rebuild_tensor_v3": _tensor_v3,
        "torch._utils._rebuild_parameter": lambda data, *_: data,
        "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
        "torch.Size": lambda *of: tuple(*of),
        "torch.device": lambda *_: None,
        "_codecs.encode": lambda *_: None,
    }
)
"""The substitute for each function that a pickle of weights may name."""


def follow(data: bytes) -> Any:
    """Return the object that a pickle describes: dicts, lists, tuples, plain values and tensors.

    Raises
    ------
    PickleError
        The pickle is damaged, or names anything but dicts and tensors; the message is a predicate.
    """
    machine = _Machine()
    try:
        # The parser warns of odd escapes in its input, which do not concern the user.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _run(machine, data)
    except PickleError:
        raise
    except (ValueError, TypeError, IndexError, KeyError, UnicodeError, RecursionError) as error:
        raise PickleError(f"is damaged ({shown(str(error))})") from error
    return machine.result


def _run(machine: _Machine, data: bytes) -> None:
    for count, (operation, argument, _) in enumerate(pickletools.genops(data)):
        if count + machine.copied >= _MAX_OPERATIONS:
            raise PickleError(f"has more than {_MAX_OPERATIONS} operations")
        machine.step(operation.name, argument)


_SIZED = (list, tuple, dict, str, bytes)


class _Machine:
    """The stack of a pickle, holding plain data."""

    def __init__(self) -> None:
        self.result: Any = None
        self.copied = 0
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Follow one operation."""
        stack = self._stack
        if name in _PUSHED:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self._memo[int(argument)] = stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self._memo[int(argument)])
        elif name in ("PROTO", "FRAME"):
            pass
        elif name in _TUPLES:
            count = _TUPLES[name]
            items = tuple(stack[len(stack) - count :])
            if len(items) != count:
                raise PickleError("is damaged (it takes more than it has)")
            del stack[len(stack) - count :]
            stack.append(items)
        elif name == "STOP":
            self.result = stack.pop()
        else:
            step = _STEPS.get(name)
            if step is None:
                raise PickleError(f"uses the operation {name}, which weights do not need")
            step(self, argument)

    def mark(self, _: Any) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def _since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marks.pop()
        return items

    def tuple_of_all(self, _: Any) -> None:
        items = self._since_mark()
        self._stack.append(tuple(items))

    def set_item(self, _: Any) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._dict()[_key(key)] = value

    def set_items(self, _: Any) -> None:
        items = self._since_mark()
        self._dict().update(zip(map(_key, items[::2]), items[1::2], strict=True))

    def _dict(self) -> dict[Any, Any]:
        if not isinstance(self._stack[-1], dict):
            raise PickleError("puts items into what is no dict")
        return self._stack[-1]

    def append(self, _: Any) -> None:
        item = self._stack.pop()
        self._list().append(item)

    def extend(self, _: Any) -> None:
        items = self._since_mark()
        self._list().extend(items)

    def _list(self) -> list[Any]:
        if not isinstance(self._stack[-1], list):
            raise PickleError("appends to what is no list")
        return self._stack[-1]

    def push_global(self, argument: Any) -> None:
        self._push_name(".".join(str(argument).split(" ")))

    def stack_global(self, _: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise PickleError("names what is no name")
        self._push_name(f"{module}.{name}")

    def _push_name(self, name: str) -> None:
        if name in _REFUSED:
            raise PickleError(f"holds {_REFUSED[name]} ({name}), which cannot be merged")
        if name not in _CALLS and name not in _STORAGES and dtype_by_torch_name(name) is None:
            raise PickleError(f"asks for {shown(name)}, which weights do not need and may run code")
        self._stack.append(_Global(name))

    def call(self, _: Any) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        stand_in = _CALLS.get(function.name) if isinstance(function, _Global) else None
        if stand_in is None or not isinstance(arguments, tuple):
            raise PickleError("calls what is no function that weights need")
        # One memoised list may be given to any number of calls, and each call copies it.
        self.copied += sum(len(each) for each in arguments if isinstance(each, _SIZED))
        if self.copied >= _MAX_OPERATIONS:
            raise PickleError(f"has more than {_MAX_OPERATIONS} operations")
        self._stack.append(stand_in(*arguments))

    def build(self, _: Any) -> None:
        # These are attributes of a state_dict, such as its modules' versions, and no weights.
        self._stack.pop()
        if not isinstance(self._stack[-1], dict):
            raise PickleError("sets attributes of what is no dict")

    def persistent(self, _: Any) -> None:
        kind, storage, key, _location, items = self._stack.pop()
        dtype = _STORAGES.get(storage.name) if isinstance(storage, _Global) else None
        if kind != "storage" or dtype is None or not isinstance(key, str):
            raise PickleError("refers to what is no storage of numbers")
        self._stack.append(_Storage(dtype, key, _counts([items])[0]))


_PUSHED = frozenset(
    {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "INT", "LONG", "BINFLOAT", "FLOAT"}
    | {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "SHORT_BINSTRING", "BINSTRING"}
    | {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
)
_CONSTANTS: MappingProxyType[str, Callable[[], Any]] = MappingProxyType(
    {
        "NONE": lambda: None,
        "NEWTRUE": lambda: True,
        "NEWFALSE": lambda: False,
        "EMPTY_DICT": dict,
        "EMPTY_LIST": list,
        "EMPTY_TUPLE": tuple,
        "EMPTY_SET": list,
    }
)
_TUPLES = MappingProxyType({"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3})
_STEPS: MappingProxyType[str, Callable[[_Machine, Any], None]] = MappingProxyType(
    {
        "MARK": _Machine.mark,
        "TUPLE": _Machine.tuple_of_all,
        "SETITEM": _Machine.set_item,
        "SETITEMS": _Machine.set_items,
        "APPEND": _Machine.append,
        "APPENDS": _Machine.extend,
        "ADDITEMS": _Machine.extend,
        "GLOBAL": _Machine.push_global,
        "STACK_GLOBAL": _Machine.stack_global,
        "REDUCE": _Machine.call,
        "BUILD": _Machine.build,
        "BINPERSID": _Machine.persistent,
    }
)
