"""What a forward decides by the sizes of its tensors, and at which other sizes it would decide otherwise.

A branch on a size compares it with something: a number in the code, an attribute, an entry of a config, another size. While a
forward is traced, every size that it reads knows where it comes from, and every comparison is written down with its outcome.
Then sizes are looked for at which one of them has the other outcome (`_conditions`), and the forward is traced there too.
"""

from __future__ import annotations

import dis
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from kernelwise._recognize._conditions import (
    COMPARISONS,
    COMPUTE,
    FIXED,
    MOST_PARTS,
    OF_ONE,
    OPERATORS,
    Tree,
    parts_of,
)
from kernelwise._recognize._record import WHOLE, Untraceable

_GIVE_SIZES = frozenset(
    {torch.Tensor.shape.__get__, torch.Tensor.size, torch.Tensor.numel, torch.Tensor.nelement, torch.numel}  # type: ignore[attr-defined]
)
_TAKE_NUMBERS = frozenset({torch.sym_int, torch.sym_float, torch.sym_not, torch.sym_max, torch.sym_min, torch.sym_sqrt})
_GIVE_ALL = frozenset({torch.Tensor.unbind, torch.unbind})
_GIVE_PIECES = frozenset({torch.Tensor.split, torch.split})
_UNPACK = frozenset({dis.opmap["UNPACK_SEQUENCE"], dis.opmap["UNPACK_EX"]})
_MOST_DECIDED = 128
_PIECES = 8
"""Whole parts of fewer elements are taken of most sizes (`shape[-1] // 2`) and decide nothing by themselves."""


class Watch(TorchFunctionMode):
    """Notes what code decides by the sizes of tensors while it is entered.

    `names` says where a size comes from: sizes of one trace that have a name differ from each other. Those for which it
    says None may be one or another.
    """

    def __init__(self, names: Mapping[int, Tree | None]) -> None:
        super().__init__()
        self.names = names
        self.decisions: dict[Tree, bool] = {}
        self.paused = False
        self.failed = False
        """Whether PyTorch raised an exception: code that catches it has decided something by it."""

    def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        try:
            result = func(*args, **kwargs)
        except Exception:
            self.failed |= not self.paused
            raise
        if self.paused:
            return result
        self._look_at_pieces(func, args, kwargs, result)
        if func is torch.Tensor.__getitem__:
            self._look_at_ends(*args)
        if func is torch.Tensor.__repr__:
            raise Untraceable("it takes a tensor as text, which cannot be followed")
        if func in _GIVE_SIZES and _is_asked_by_a_model(1):
            return self._size(result) if type(result) is int else torch.Size([self._size(item) for item in result])
        if func is torch.Tensor.__len__ and _is_asked_by_a_model(3):  # PyTorch asks twice in Python
            raise Untraceable("it takes the length of a tensor as a number (len), which cannot be followed")
        return result

    def _look_at_ends(self, tensor: torch.Tensor, index: Any) -> None:
        """Note where a part ends beyond a size: PyTorch gives the tensor itself, and no operation is seen."""
        items = [item for item in (index if isinstance(index, tuple) else (index,)) if item is not None]
        rest = next((place for place, item in enumerate(items) if item is Ellipsis), len(items))
        dims = (
            *enumerate(items[:rest]),
            *((place - len(items), items[place]) for place in range(rest + 1, len(items))),
        )
        for dim, item in dims:
            if isinstance(item, slice) and isinstance(item.stop, int) and tensor.shape[dim] < item.stop < WHOLE:
                self.cut(tensor.shape[dim], item.stop)

    def _look_at_pieces(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Refuse as many tensors as a size says: how many there are is a number that Python takes without asking."""
        if func in _TAKE_NUMBERS and any(isinstance(item, _Followed) for item in args) and _is_asked_by_a_model(4):
            raise Untraceable(f"it takes a size as a number ({func.__name__}), which cannot be followed")
        if func not in _GIVE_ALL and func not in _GIVE_PIECES:
            return
        rest = [*args[1:], *kwargs.values()]
        cut = rest.pop(0) if func in _GIVE_PIECES and rest else None
        if type(cut) in (tuple, list) or isinstance(cut, _Followed) or not args:
            return
        asker = sys._getframe(2)
        if asker.f_code is torch.Tensor.__iter__.__code__ and _is_unpacking(asker.f_back):
            return  # the code says how many there must be
        size = args[0].shape[kwargs.get("dim", rest[0] if rest else 0)]
        tree = self.names.get(size)
        if type(cut) is int and len(result) <= 2:
            self.cut(size, cut * len(result))  # where it is longer there is one more
        elif tree is not None and any(name != FIXED for name in parts_of(tree, "size")):
            raise Untraceable("it takes as many tensors as a size says, which cannot be followed")

    def _size(self, value: int) -> int:
        tree = self.names.get(value, ("unnamed", value) if value > 1 else None)
        return value if tree is None else _Size(value, tree, self)

    def decide(self, tree: Tree, outcome: bool) -> None:
        """Note a question and its answer."""
        if not self.paused:
            self.decisions.setdefault(tree, outcome)
            if len(self.decisions) > _MOST_DECIDED:
                raise Untraceable(f"it decides more than {_MOST_DECIDED} things by sizes")

    def cut(self, size: int, end: int) -> None:
        """Note that a part up to `end` was taken, which at this size is the whole."""
        tree = self.names.get(size)
        if tree is not None:
            self.decide(("le", tree, _tree(end)), True)


def _is_asked_by_a_model(depth: int) -> bool:
    """Whether the code that runs so many calls above the caller is neither PyTorch's nor ours."""
    name = sys._getframe(depth + 1).f_globals.get("__name__")
    return str(name).partition(".")[0] not in ("torch", "kernelwise")


def _is_unpacking(asker: types.FrameType | None) -> bool:
    """Whether `a, b = tensor` asks."""
    return asker is not None and asker.f_code.co_code[asker.f_lasti] in _UNPACK


class _Followed:
    """A number that knows how it came about. `num_parts` counts what its tree is made of."""

    tree: Tree
    watch: Watch
    num_parts: int

    def __bool__(self) -> bool:
        return bool(_compared("ne", self, 0))

    def __hash__(self) -> int:
        self._lost("as a key")
        return hash(_plain(self))

    def __int__(self) -> int:
        self._lost("int")
        return int(_plain(self))

    def __float__(self) -> float:
        self._lost("float")
        return float(_plain(self))

    def _lost(self, how: str) -> None:
        if self.watch.paused or not _is_asked_by_a_model(2):
            return
        if next(parts_of(self.tree, "size"), None) is not None:
            raise Untraceable(f"it takes a size as a number ({how}), which cannot be followed")
        self.watch.decide((how, self.tree), True)  # it may always be the same: other rounds tell

    def __divmod__(self, other: Any) -> Any:
        return _computed("floordiv", self, other), _computed("mod", self, other)

    def __rdivmod__(self, other: Any) -> Any:
        return _computed("floordiv", other, self), _computed("mod", other, self)

    def __round__(self, digits: int | None = None) -> Any:
        if digits is None:
            return _computed("round", self)
        self._lost("round")
        return round(_plain(self), digits)

    def __deepcopy__(self, memo: Any) -> Any:
        return self


class _Size(_Followed, int):  # type: ignore[misc]
    def __new__(cls, value: int, tree: Tree, watch: Watch, num_parts: int = 1) -> _Size:
        made = int.__new__(cls, value)
        made.tree, made.watch, made.num_parts = tree, watch, num_parts
        return made


class _Ratio(_Followed, float):  # type: ignore[misc]
    def __new__(cls, value: float, tree: Tree, watch: Watch, num_parts: int = 1) -> _Ratio:
        made = float.__new__(cls, value)
        made.tree, made.watch, made.num_parts = tree, watch, num_parts
        return made


def _plain(value: Any) -> Any:
    if isinstance(value, _Size):
        return int.__add__(value, 0)
    return float.__add__(value, 0.0) if isinstance(value, _Ratio) else value


def _is_number(value: Any) -> bool:
    return issubclass(type(value), (int, float))  # not isinstance: an argument in a trace is asked for no class


def _tree(value: Any) -> Tree:
    return value.tree if isinstance(value, _Followed) else ("number", value)


def _computed(name: str, *operands: Any) -> Any:
    """A number computed from others, one of which is followed."""
    for item in operands:
        if not _is_number(item):
            return _met(item, 2)
    value = COMPUTE[name](*map(_plain, operands))
    watch = next(item.watch for item in operands if isinstance(item, _Followed))
    tree = (name, *map(_tree, operands))
    num_parts = 1 + sum(item.num_parts if isinstance(item, _Followed) else 1 for item in operands)
    if num_parts > MOST_PARTS:
        raise Untraceable("it computes more with a size than can be followed")
    asked = _is_asked_by_a_model(2)
    if asked and name == "mod" and type(value) is int:
        watch.decide(("ne", tree, ("number", 0)), bool(value))
    if asked and name == "floordiv" and type(operands[1]) is int and operands[1] >= _PIECES:
        watch.decide(("ge", *tree[1:]), bool(_plain(operands[0]) >= operands[1]))
    if type(value) is int:
        return _Size(value, tree, watch, num_parts)
    return _Ratio(value, tree, watch, num_parts) if type(value) is float else value


def _met(other: Any, depth: int) -> Any:
    """Leave what is no number to PyTorch or Python; not where it could take the value out of a size."""
    is_harmless = type(other) in (str, type(None)) or issubclass(type(other), torch.Tensor)
    if not is_harmless and _is_asked_by_a_model(depth + 1):
        raise Untraceable(f"it puts a size together with a {type(other).__name__}, which cannot be followed")
    return NotImplemented


def _compared(name: str, left: _Followed, right: Any) -> Any:
    if not _is_number(right):
        return _met(right, 2)
    outcome = bool(COMPUTE[name](_plain(left), _plain(right)))
    if _is_asked_by_a_model(2):
        left.watch.decide((name, left.tree, _tree(right)), outcome)
    return outcome


def _define() -> None:
    """Give followed numbers the operators of numbers."""

    def forward(name: str) -> Callable[..., Any]:
        return lambda self, other, *_: _computed(name, self, other)

    def backward(name: str) -> Callable[..., Any]:
        return lambda self, other, *_: _computed(name, other, self)

    def of_one(name: str) -> Callable[..., Any]:
        return lambda self: _computed(name, self)

    def compared(name: str) -> Callable[..., Any]:
        return lambda self, other: _compared(name, self, other)

    for name in OPERATORS:
        word = name.rstrip("_")
        setattr(_Followed, f"__{word}__", forward(name))
        setattr(_Followed, f"__r{word}__", backward(name))
    for name in OF_ONE:
        setattr(_Followed, f"__{name}__", of_one(name))

    def taken(name: str, kind: type) -> Callable[..., Any]:
        def take(self: _Followed, *args: Any) -> Any:
            self._lost(name)
            found = getattr(kind, name)
            return found(_plain(self), *args) if callable(found) else found.__get__(_plain(self))

        return take

    for name in COMPARISONS:
        setattr(_Followed, f"__{name}__", compared(name))
    for kind in (int, float):
        followed = _Size if kind is int else _Ratio
        for name in _TAKEN:
            if hasattr(kind, name):
                take = taken(name, kind)
                setattr(followed, name, take if callable(getattr(kind, name)) else property(take))


_TAKEN = (
    *("__index__", "is_integer", "as_integer_ratio", "real", "imag", "numerator", "denominator", "conjugate"),
    *("bit_length", "bit_count", "to_bytes", "hex"),
)
_define()
