"""Stand-ins for objects that are neither modules nor tensors: lists, dicts, configs, and whatever else a layer holds.

What Python would answer of any object (that it is true, that it equals itself alone) is not what the real one answers, so it
is refused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kernelwise._recognize._reads import CODE, MISSING
from kernelwise._recognize._record import Untraceable

if TYPE_CHECKING:
    from kernelwise._recognize._stand_in import Stage


def _refusing(name: str) -> Callable[..., Any]:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        path = self.__dict__["_kernelwise"][2]
        raise Untraceable(f"it uses {'.'.join(path)} as more than a bag of values ({name})")

    return refuse


def refuses(*names: str) -> Callable[[type], type]:
    """Have a stand-in refuse what Python would answer for any object, or raise an exception for that code may catch."""

    def decorate(cls: type) -> type:
        for name in names:
            setattr(cls, name, _refusing(name))
        return cls

    return decorate


AS_AN_OBJECT = ("__eq__", "__ne__", "__hash__", "__repr__", "__str__", "__format__", "__dir__", "__sizeof__")
_AS_A_VALUE = (
    *("__lt__", "__le__", "__gt__", "__ge__", "__len__", "__iter__", "__next__", "__reversed__", "__contains__"),
    *("__getitem__", "__call__", "__int__", "__float__", "__complex__", "__index__", "__enter__", "__exit__"),
    *("__neg__", "__pos__", "__abs__", "__invert__", "__round__", "__trunc__", "__floor__", "__ceil__"),
    *(
        f"__{side}{name}__"
        for side in ("", "r")
        for name in ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "divmod", "pow")
    ),
    *(f"__{side}{name}__" for side in ("", "r") for name in ("lshift", "rshift", "and", "or", "xor")),
)


def _refuse_write(self: Any, *args: Any, **kwargs: Any) -> Any:
    raise Untraceable(f"it writes to a {type(self).__bases__[0].__name__} of its own")


class List(list):  # type: ignore[type-arg]
    """A list of the module, which a trace may only read."""

    __setitem__ = __delitem__ = __iadd__ = __imul__ = _refuse_write
    append = extend = insert = pop = remove = clear = sort = reverse = _refuse_write


class Dict(dict):  # type: ignore[type-arg]
    """A dict of the module, which a trace may only read."""

    __setitem__ = __delitem__ = __ior__ = _refuse_write
    pop = popitem = clear = update = setdefault = _refuse_write


def plain(value: Any, stage: Stage, path: tuple[str, ...], make: Callable[..., Any]) -> Any:
    """Return what stands for an object that is no list and no dict. `make` gives the stand-ins of its attributes.

    It refuses what its class has, and lacks what that lacks: code may ask for it (`callable`, an abstract class).
    """
    names = tuple(name for name in _AS_A_VALUE if _has(type(value), name))
    return _class_with(names)(value, stage, path, make)


def _has(cls: type, name: str) -> bool:
    """Whether objects of a class have a special method; `hasattr` would find those of the class itself, as `__call__`."""
    return next((base.__dict__[name] for base in cls.__mro__ if name in base.__dict__), None) is not None


@functools.lru_cache(maxsize=256)
def _class_with(names: tuple[str, ...]) -> type[Plain]:
    return refuses(*names)(type("Plain", (Plain,), {}))


@refuses(*AS_AN_OBJECT)
class Plain:
    """Stands for an object that is neither a module nor a tensor (a config): attributes can be read, nothing called.

    Nor compared: what is remembered of it is its class and what was read of it.
    """

    def __init__(self, value: Any, stage: Stage, path: tuple[str, ...], make: Callable[..., Any]) -> None:
        self.__dict__["_kernelwise"] = (value, stage, path, make)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self.__dict__["_kernelwise"][0])

    def __getattr__(self, name: str) -> Any:
        value, stage, path, make = self.__dict__["_kernelwise"]
        if name.startswith("__"):
            raise Untraceable(f"it uses {'.'.join(path)} as more than a bag of values ({name})")
        try:
            found = getattr(value, name)
        except AttributeError:
            stage.reads.tokens[(*path, name)] = MISSING
            raise
        if isinstance(found, CODE):
            raise Untraceable(f"it calls a method of {'.'.join(path)} ({name})")
        stage.reads.note((*path, name), found)
        return make(found, stage, (*path, name))

    def __bool__(self) -> bool:
        value, _, path, _ = self.__dict__["_kernelwise"]
        if _has(type(value), "__bool__") or _has(type(value), "__len__"):
            raise Untraceable(f"it uses {'.'.join(path)} as a condition, which its class answers")
        return True

    def __setattr__(self, name: str, value: Any) -> None:
        raise Untraceable(f"it writes to {'.'.join(self.__dict__['_kernelwise'][2])}.{name}")
