"""transformers: a `KernelConfig` for `from_pretrained(..., kernel_config=...)`, `set_use_kernels` and `use_kernels`.

    from kernelwise.integrations.transformers import KernelConfig

    config = KernelConfig({"RMSNorm": {"cuda": "kernels-community/layer_norm@v1:LlamaRMSNorm", "cpu": "builtin:RMSNorm"}})
    model = AutoModelForCausalLM.from_pretrained(name, use_kernels=True, kernel_config=config)
    model.use_kernels = False    # the model's own code, bit for bit
    model.use_kernels = True     # and the kernels again

No magic: importing this module replaces three attributes of `transformers.PreTrainedModel`: `from_pretrained`,
`set_use_kernels` and the property `use_kernels`. Each looks whether the config is one of Kernelwise (the class here or
`kernelwise.KernelConfig`) and calls transformers' own code with its own arguments where it is not. `unpatch()` takes them
out again, `patch()` puts them in.

They are needed because transformers' own way cannot be entered with an object: `set_use_kernels` ends in the `kernelize`
of the kernels library, which writes over the `forward` of every layer (and so destroys accelerate's hooks and our undo),
`use_kernels = False` does nothing there, and `from_pretrained` loads every kernel before it knows the device. Where they
step in, `kernelwise.plan` decides and `kernelwise.apply` puts in, after the model has its weights and its hooks. Nothing
of it asks which versions of the kernels library transformers accepts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from kernelwise import _decide
from kernelwise._applying import _apply
from kernelwise._configuring import _config
from kernelwise._discover import STATE, discover
from kernelwise._errors import MissingDependencyError
from kernelwise._mapping import mode_name

try:
    import transformers
    from transformers.modeling_utils import PreTrainedModel
except ImportError as error:
    raise MissingDependencyError(
        'kernelwise.integrations.transformers needs transformers\n  go on      pip install "kernelwise[transformers]"'
    ) from error

from kernelwise.integrations import _attention, _fusion
from kernelwise.integrations._cache import GrowingCache

__all__ = ["GrowingCache", "KernelConfig", "patch", "unpatch"]


class KernelConfig(_config.KernelConfig, transformers.KernelConfig):  # type: ignore[misc]
    """A `kernelwise.KernelConfig` that transformers takes wherever it takes its own.

    One object serves any number of models and stays as it was written. `registered_layer_names` alone follows the model
    that was looked at last, as it does in transformers.
    """

    def __init__(
        self,
        kernel_mapping: dict[Any, Any] | None = None,
        use_local_kernel: bool = False,
        inherit_mapping: bool = True,
        *,
        on_miss: str = "raise",
        verify: bool | str = "auto",
    ) -> None:
        super().__init__(kernel_mapping, use_local_kernel, inherit_mapping, on_miss=on_miss, verify=verify)
        self.registered_layer_names: dict[str, str] = {}
        """Layer names by module path: those that a mapping for the model can name, registered or recognised."""

    def store_registered_layer_names(self, model: nn.Module) -> None:
        """Fill `registered_layer_names` with the layers of a model."""
        self.registered_layer_names = {path: layer.name for layer in discover(model) for path in layer.paths}

    def sanitize_kernel_mapping(self, model: nn.Module, *, layers: Any = None) -> None:
        """Check the config against a model, as `kernelwise.KernelConfig` does, and note the model's layer names."""
        found = discover(model) if layers is None and isinstance(model, nn.Module) else layers
        super().sanitize_kernel_mapping(model, layers=found)
        self.registered_layer_names = {path: layer.name for layer in found for path in layer.paths}

    def update_kernel(
        self,
        repo_id: str,
        registered_name: str,
        layer_name: str,
        device: str,
        mode: object,
        revision: str | None = None,
        version: int | None = 1,
        trust_remote_code: bool = False,
    ) -> None:
        """Ask for another kernel for one layer. A `revision` stands in place of the version.

        The mapping gets the entry in Kernelwise's own form; the dict that the config was made from is not changed.
        """
        pin = {"version": version} if revision is None else {"revision": revision}
        trust = {"trust_remote_code": trust_remote_code} if trust_remote_code else {}
        value = (f"{repo_id}:{layer_name}", pin | trust)
        entry = {device: {mode_name(mode) or mode: value}}
        self.kernel_mapping = {**self.kernel_mapping, registered_name: entry}


def patch() -> None:
    """Replace `from_pretrained`, `set_use_kernels` and `use_kernels` of `PreTrainedModel`. Done once, at import."""
    if _replaced:
        return
    originals = {name: PreTrainedModel.__dict__[name] for name in ("from_pretrained", "set_use_kernels", "use_kernels")}
    ours = {
        "from_pretrained": classmethod(_from_pretrained(originals["from_pretrained"].__func__)),
        "set_use_kernels": _set_use_kernels(originals["set_use_kernels"]),
        "use_kernels": _use_kernels(originals["use_kernels"]),
    }
    for name, replacement in ours.items():
        setattr(PreTrainedModel, name, replacement)
        _replaced[name] = originals[name], replacement


def unpatch() -> None:
    """Put back what `patch` found. What somebody else replaced since is left, with ours inside it.

    Kernels stay in the models that have them; `kernelwise.unkernelize(model)` takes them out.
    """
    for name, (original, replacement) in _replaced.items():
        if PreTrainedModel.__dict__[name] is replacement:
            setattr(PreTrainedModel, name, original)
    _replaced.clear()


_replaced: dict[str, tuple[Any, Any]] = {}


def _from_pretrained(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def from_pretrained(cls: type[nn.Module], *args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("kernel_config")
        if not isinstance(config, _config.KernelConfig):
            return original(cls, *args, **kwargs)
        config.rules()  # what is wrong with its form is said before anything is read or downloaded
        if kwargs.get("allow_all_kernels"):
            config = _fusion.trusting(config)
        with _fusion.stand_in(config) as kwargs["kernel_config"]:
            loaded = original(cls, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # a tuple with output_loading_info=True
        model.set_use_kernels(True, config)
        return loaded

    return from_pretrained


def _set_use_kernels(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def set_use_kernels(self: nn.Module, use_kernels: bool, kernel_config: Any = None, mode: object = None) -> None:
        if isinstance(kernel_config, _fusion.StandIn):
            return  # from_pretrained is not done yet: accelerate's hooks come last
        attached = _attached(self)
        config = attached if kernel_config is None else kernel_config
        if isinstance(config, _config.KernelConfig) and use_kernels:
            # train() and eval() come here too: the kernels of both modes are in the model, and each call looks.
            if kernel_config is not None or mode is not None or not _is_on(self):
                _put_in(self, config, mode)
        elif attached is not None and not use_kernels:
            _take_out(self, attached)
        else:
            if attached is not None:
                _apply.remove(self)  # the kernels library writes over every forward
            original(self, use_kernels, kernel_config, mode)

    return set_use_kernels


def _use_kernels(original: property) -> property:
    assert original.fget is not None
    assert original.fset is not None
    get, put = original.fget, original.fset

    @functools.wraps(get)
    def fget(self: nn.Module) -> bool:
        return _is_on(self) if _attached(self) is not None else bool(get(self))

    @functools.wraps(put)
    def fset(self: nn.Module, value: bool) -> None:
        if _attached(self) is not None:
            self.set_use_kernels(bool(value))  # type: ignore[operator]
        else:
            put(self, value)

    return property(fget, fset, original.fdel, original.__doc__)


def _attached(model: nn.Module) -> _config.KernelConfig | None:
    config = getattr(model, "kernel_config", None)
    return config if isinstance(config, _config.KernelConfig) else None


def _is_on(model: nn.Module) -> bool:
    state = model.__dict__.get(STATE)
    return state is not None and bool(state.plans)


def _put_in(model: nn.Module, config: _config.KernelConfig, mode: object) -> None:
    """Give a model the kernels of a config in place of those it has. An error leaves the model as it was."""
    planned = _fusion.with_fused_layers(model, config)
    plan = _decide.decide(model, planned, mode=mode)
    if isinstance(config, KernelConfig) and isinstance(planned, KernelConfig):
        config.registered_layer_names = planned.registered_layer_names
    state = model.__dict__.get(STATE)
    before = list(state.plans) if state is not None else []
    _apply.apply(model, plan)
    for token in before:
        _apply.remove(model, token=token)
    _apply.set_attribute(model, "kernel_config", config)


def _take_out(model: nn.Module, config: _config.KernelConfig) -> None:
    """Give a model its own code back. The config stays, so that `use_kernels = True` puts the kernels in again."""
    _fusion.check_can_run_without(model)
    _apply.remove(model)
    _apply.set_attribute(model, "kernel_config", config)


_attention.register()
patch()
