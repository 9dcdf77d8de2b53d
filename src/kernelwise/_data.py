"""The nouns: frozen values that one stage hands to the next. Imports nothing of this package and not torch.

dtypes are strings without the module (`"bfloat16"`), devices are type strings (`"cuda"`), paths are dotted module paths.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

Scalar = str | int | float | bool | None
Scheme = Literal["hub", "path", "package", "builtin"]

DEVICE_TYPES: tuple[str, ...] = ("cuda", "rocm", "xpu", "npu", "cpu", "mps", "neuron", "tpu")
MODES: tuple[str, ...] = ("inference", "training", "inference+compile", "training+compile")

Status = Literal[
    "passed",
    "skipped",  # the layer's own code, or this machine, cannot do what the case asks for; no evidence either way
    # what a kernel gives is not what the layer gives
    "wrong_values",
    "wrong_gradient",
    "missing_gradient",
    "non_finite",
    "not_written",
    "wrong_structure",
    "wrong_shape",
    "wrong_dtype",
    "wrong_device",
    "wrong_layout",
    "wrong_requires_grad",
    # what a kernel does besides
    "input_overwritten",
    "setting_changed",  # one of the process: the default dtype, the number of threads
    "not_repeatable",
    "leaks_memory",
    "does_not_compile",
    "no_cuda_graph",
    # a kernel gives nothing
    "raised",
    "load_failed",
    "crashed",
    "exited",
    "timed_out",
    "out_of_memory",
]
STATUSES: tuple[str, ...] = typing.get_args(Status)


@dataclass(frozen=True, slots=True)
class KernelRef:
    """Where one kernel comes from.

    `location` is `"org/repo"` for a Hub kernel, an absolute directory for a local one, an importable module for a
    package, and empty for a builtin one. A Hub kernel has exactly one of `version` and `revision`.
    """

    scheme: Scheme
    location: str
    layer: str
    version: int | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    def __str__(self) -> str:
        if self.scheme == "hub":
            pin = f"v{self.version}" if self.version is not None else self.revision
            return f"{self.location}@{pin}:{self.layer}"
        if self.scheme == "path":
            return f"{self.location}:{self.layer}"
        return f"{self.scheme}:{self.location + ':' if self.location else ''}{self.layer}"


@dataclass(frozen=True, slots=True)
class Binding:
    """What fills one role of an operation in one layer.

    argument: the forward's parameter of that name; attribute: `self.<name>` (a parameter, buffer or number, read at every
    call); child: a submodule, called through `__call__`; constant: a value that stands in the layer's code.
    """

    kind: Literal["argument", "attribute", "child", "constant"]
    value: Scalar


@dataclass(frozen=True, slots=True)
class Recognition:
    """What a layer computes: an operation of `kernelwise.ops`, its roles bound to this layer's names, its options.

    `depends` names the layer's attributes and children that fill no role but decide the answer (`act_fn`): what is put in
    holds only as long as they are the same objects. `held` has the values that were read inside of them, by dotted path
    (`("config.eps", 1e-6)`; of a list or a dict, what its items are), also where nothing stood, and `modes` the children that
    must be in the layer's own mode. `of_class` names what the layer has of its class (a method, a default) and must not
    have of its own.
    """

    op: str
    roles: tuple[tuple[str, Binding], ...]
    options: tuple[tuple[str, Scalar], ...] = ()
    depends: tuple[str, ...] = ()
    held: tuple[tuple[str, Any], ...] = ()
    modes: tuple[str, ...] = ()
    of_class: tuple[str, ...] = ()

    @property
    def holds_layers(self) -> bool:
        """Whether it is a layer of layers, which hands arguments of its own on to them."""
        return any(name == "passing" for name, _ in self.options)


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a forward: its name, its kind as `inspect` names it, and whether it has a default."""

    name: str
    kind: str
    has_default: bool = False


@dataclass(frozen=True)  # without slots, so that `at` can copy all fields in one step; models have thousands of layers
class Layer:
    """A place in the model where a kernel can go.

    `path` is the first of `paths` (a shared module has several). A function that a module's forward calls has the path of
    that module followed by the function's layer name, and `function` is the global name through which it is called; a head
    with its loss has `"self.loss_function"` there.
    `attributes` are the names a kernel may read from the module. `blocked` says why no kernel can go here; `excluded` says
    that the author of the layer wants none here (`kernel_condition`), which is no failure of whoever asks for one.
    `numel` is how many numbers its own parameters hold, its children's left out.
    """

    path: str
    name: str
    class_name: str
    how: Literal["registered", "named", "recognised"]
    device: str
    dtypes: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    signature: tuple[Parameter, ...] = ()
    attributes: frozenset[str] = frozenset()
    function: str | None = None
    recognition: Recognition | None = None
    blocked: str | None = None
    excluded: str | None = None
    recognition_in_training: Recognition | None = None
    numel: int = 0

    def computes(self, mode: str) -> Recognition | None:
        """Return what the layer computes in a mode; a dropout makes training something else than inference."""
        return self.recognition_in_training if mode.startswith("training") else self.recognition

    @property
    def places(self) -> tuple[str, ...]:
        """Every path at which the model has it."""
        return self.paths or (self.path,)

    def at(self, paths: tuple[str, ...], numel: int | None = None) -> Layer:
        """Return an alike layer at these places, of which there is at least one, of this size or of the same.

        `dataclasses.replace` is six times as slow.
        """
        values = self.__dict__.copy()
        values["path"], values["paths"] = paths[0], paths
        if numel is not None:
            values["numel"] = numel
        alike = object.__new__(Layer)
        object.__setattr__(alike, "__dict__", values)
        return alike


@dataclass(frozen=True, slots=True)
class Limits:
    """What a kernel can run, as data. `None` or an empty tuple means no limit of that kind.

    `min_arch` is a CUDA compute capability (`"sm_80"`). `options` lists, for each option of the operation that the kernel
    does not support in full, the values it does support. `inference_only` are those of the dtypes for which training keeps the
    layer's own code. `gains_from` says for a dtype how many numbers a layer's own parameters must hold for the kernel to be put
    in unasked: with fewer there are inputs with which it gains nothing.
    """

    devices: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    min_arch: str | None = None
    options: tuple[tuple[str, tuple[Scalar, ...]], ...] = ()
    requires: tuple[str, ...] = ()
    inference_only: tuple[str, ...] = ()
    gains_from: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Target:
    """The machine a plan is for. Only `kernelwise._decide.current_target` asks the hardware.

    `device` is the device type of the model; a layer of a model spread over several has its own in `Layer.device`.
    """

    device: str
    arch: str | None = None
    versions: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Kernel:
    """A loaded kernel.

    `op` names the operation whose roles the function takes; without one the kernel is a layer class that reads the
    attributes (`reads`) of the module it replaces and has the `signature` of its forward (with `self` left out).
    `function` is that function, or that forward with `self` first; it is not part of the value's identity.
    """

    ref: KernelRef
    op: str | None = None
    limits: Limits = Limits()
    has_backward: bool = True
    can_torch_compile: bool = False
    revision: str | None = None
    content_hash: str | None = None
    signature: tuple[Parameter, ...] = ()
    reads: tuple[str, ...] = ()
    function: Callable[..., Any] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Decision:
    """What happens to one layer in one mode: its kernel, or none (its own code), and why the others lost.

    `asked_by` names the rule that decided (`"rule 2 (kernels.toml)"`, `"default"`). `reason` says why there is no kernel.
    """

    layer: Layer
    mode: str
    kernel: Kernel | None
    asked_by: str
    rejected: tuple[tuple[str, tuple[str, ...]], ...] = ()
    reason: str | None = None

    def about(self, layer: Layer) -> Decision:
        """Return the same decision about an alike layer. The constructor of a frozen dataclass is twice as slow."""
        alike = object.__new__(Decision)
        for_layer, for_mode, for_kernel, for_asked_by, for_rejected, for_reason = _SLOTS_OF_DECISION
        for_layer(alike, layer)
        for_mode(alike, self.mode)
        for_kernel(alike, self.kernel)
        for_asked_by(alike, self.asked_by)
        for_rejected(alike, self.rejected)
        for_reason(alike, self.reason)
        return alike


_SLOTS_OF_DECISION = tuple(vars(Decision)[item.name].__set__ for item in dataclasses.fields(Decision))


@dataclass(frozen=True, slots=True)
class Plan:
    """All decisions for one model on one target. Entries of a mapping that did not apply stand in `notes`.

    `proofs` says of each kernel that is not builtin, by its reference, whether it is proven; empty where nobody has looked.
    """

    target: Target
    decisions: tuple[Decision, ...]
    notes: tuple[str, ...] = ()
    proofs: tuple[tuple[str, str], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain dicts, lists and scalars (functions are left out)."""
        data: dict[str, Any] = to_json(self)
        return data

    def __str__(self) -> str:
        from kernelwise._table import render  # only when somebody looks

        rows = [
            (
                d.layer.path,
                d.layer.name,
                d.mode,
                str(d.kernel.ref) if d.kernel else "own code",
                d.asked_by,
                d.reason or "",
            )
            for d in self.decisions
        ]
        return render(("layer", "name", "mode", "kernel", "asked by", "why not"), rows, notes=self.notes)


@dataclass(frozen=True, slots=True)
class Check:
    """Evidence of one case: a kernel against the layer's own code, with both judged against the layer in float64.

    `layer` is the first of the `paths` that the check speaks for: layers of one class, shape and option are checked once.
    `what` names the tensor with the worst element ("output 0", "gradient of weight") and `place` that element's index.
    `error` and `own_error` are the largest absolute errors of the kernel and of the layer's own code; `allowed` is how
    much the kernel may err. `marks` are properties that are no fault (`"result depends on the batch"`).

    Raises:
        ValueError: the status is none of `STATUSES`, or it is "passed" with an error above what is allowed.
    """

    layer: str
    paths: tuple[str, ...]
    kernel: str
    modes: tuple[str, ...]
    case: str
    status: Status
    detail: str = ""
    what: str | None = None
    place: tuple[int, ...] = ()
    got: str | None = None
    expected: str | None = None
    error: float | None = None
    own_error: float | None = None
    allowed: float | None = None
    marks: tuple[str, ...] = ()
    content_hash: str | None = None

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"a status is one of {', '.join(STATUSES)}, got {self.status!r}")
        if self.status == "passed" and self.error is not None and self.error > (self.allowed or 0.0):
            raise ValueError(f"a check cannot pass with an error of {self.error} where {self.allowed} is allowed")

    @property
    def failed(self) -> bool:
        """Whether this check speaks against the kernel."""
        return self.status not in ("passed", "skipped")

    @property
    def ratio(self) -> float | None:
        """The error as a multiple of what is allowed: at most 1 where the values are right."""
        if self.error is None or not self.allowed:
            return None
        return self.error / self.allowed

    def __str__(self) -> str:
        ratio = self.ratio
        value = f"{self.what}{list(self.place) if self.place else ''}" if self.what else ""
        if self.got is not None:
            value += f" is {self.got}, exact {self.expected}"
        if ratio is not None and ratio > 1:
            value += f", error {ratio:.3g} times what is allowed"
        return ": ".join(filter(None, (self.case, self.status, value, self.detail)))


@dataclass(frozen=True, slots=True)
class Checks:
    """All checks of one plan on one target. Prints as a table, serialises; `ok` where nothing failed."""

    target: Target
    checks: tuple[Check, ...]
    notes: tuple[str, ...] = ()

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that speak against a kernel."""
        return tuple(check for check in self.checks if check.failed)

    @property
    def ok(self) -> bool:
        """Whether every kernel has evidence for it and none against it."""
        kernels = {(check.layer, check.kernel) for check in self.checks}
        proven = {(check.layer, check.kernel) for check in self.checks if check.status == "passed"}
        return not self.failures and kernels == proven

    def to_json(self) -> dict[str, Any]:
        """Return the checks as plain dicts, lists and scalars."""
        data: dict[str, Any] = to_json(self)
        return data | {"ok": self.ok}

    def __str__(self) -> str:
        from kernelwise._table import render  # only when somebody looks

        grouped: dict[tuple[str, str], list[Check]] = {}
        for check in self.checks:
            grouped.setdefault((check.layer, check.kernel), []).append(check)
        rows = []
        for (layer, kernel), checks in grouped.items():
            failed = [check for check in checks if check.failed]
            passed = [check for check in checks if check.status == "passed"]
            ratio = max((check.ratio for check in checks if check.ratio is not None), default=None)
            rows.append(
                (
                    layer,
                    str(len(checks[0].paths)),
                    " + ".join(checks[0].modes),
                    kernel,
                    failed[0].status if failed else "passed" if passed else "skipped",
                    f"{len(passed)} of {len(checks)}",
                    f"{ratio:.2g}" if ratio is not None else "",
                    ", ".join(dict.fromkeys(mark for check in checks for mark in check.marks)),
                    "; ".join(map(str, failed[:2])) + (f"; {len(failed) - 2} more" if len(failed) > 2 else "")
                    or ("" if passed else "; ".join(map(str, checks[:2]))),
                )
            )
        headers = ("layer", "alike", "mode", "kernel", "status", "passed", "error / allowed", "marks", "what was found")
        return render(headers, rows, notes=self.notes)


Noun = TypeVar("Noun")


def to_json(value: Any) -> Any:
    """Turn a noun (or a tuple, dict or scalar of nouns) into what `json` can write. Callables are left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            item.name: to_json(getattr(value, item.name))
            for item in dataclasses.fields(value)
            if item.name != "function" or not callable(getattr(value, item.name))
        }
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, (tuple, list)):
        return [to_json(item) for item in value]
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    return value


def from_json(cls: type[Noun], data: Any) -> Noun:
    """Build a noun from what `to_json` wrote. Raises `TypeError` or `KeyError` where the data does not fit."""
    built: Noun = _decode(cls, data)
    return built


def _decode(hint: Any, data: Any) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (tuple, frozenset) and not isinstance(data, (list, tuple)):
        raise TypeError(f"expected a list, got {data!r}")
    if origin is tuple:
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_decode(args[0], item) for item in data)
        if len(args) != len(data):
            raise TypeError(f"expected a list of {len(args)}, got {data!r}")
        return tuple(_decode(arg, item) for arg, item in zip(args, data, strict=True))
    if origin is frozenset:
        return frozenset(_decode(args[0], item) for item in data)
    if origin in (types.UnionType, typing.Union):
        if data is None:
            return None
        nouns = [arg for arg in args if dataclasses.is_dataclass(arg)]
        return _decode(nouns[0], data) if nouns and isinstance(data, dict) else data
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(data, dict):
            raise TypeError(f"expected the fields of a {hint.__name__}, got {data!r}")
        hints = typing.get_type_hints(hint)
        unknown = set(data) - {item.name for item in dataclasses.fields(hint)}
        if unknown:
            raise TypeError(f"{hint.__name__} has no field {', '.join(sorted(unknown))}")
        needed = [f.name for f in dataclasses.fields(hint) if f.default is f.default_factory is dataclasses.MISSING]
        if missing := [name for name in needed if name not in data]:
            raise TypeError(f"{hint.__name__} lacks {', '.join(missing)}")
        return hint(**{name: _decode(hints[name], item) for name, item in data.items()})
    return data
