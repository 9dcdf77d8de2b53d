"""All that a model holds, to see that nothing of it has changed."""

from __future__ import annotations

from typing import Any

from torch import nn


def all_modules(model: nn.Module) -> list[nn.Module]:
    """Every module, and every function of the kernels library that hides on one."""
    hidden = [
        wrapper
        for module in model.modules()
        for attribute in ("_kernel_funcs", "_hidden_kernels")
        for wrapper in module.__dict__.get(attribute, {}).values()
    ]
    return [*model.modules(), *{id(wrapper): wrapper for wrapper in hidden}.values()]


class Snapshot:
    """All that a model holds: classes, every `__dict__` with its order and the very objects in it, parameters' memory."""

    def __init__(self, model: nn.Module) -> None:
        self.seen = [
            (module, type(module), type(module).forward, list(module.__dict__.items()), self._inner(module))
            for module in all_modules(model)
        ]
        self.state = {name: (tensor, tensor.data_ptr()) for name, tensor in model.state_dict(keep_vars=True).items()}

    @staticmethod
    def _inner(module: nn.Module) -> dict[str, list[tuple[Any, Any]]]:
        return {key: list(value.items()) for key, value in module.__dict__.items() if isinstance(value, dict)}

    def differences(self, model: nn.Module) -> list[str]:
        """What is not as it was, in words; empty where everything is."""
        found: list[str] = []
        now = Snapshot(model)
        if [entry[0] for entry in self.seen] != [entry[0] for entry in now.seen]:
            found.append("other modules")
        for before, after in zip(self.seen, now.seen, strict=False):
            name = before[1].__name__
            if before[1] is not after[1] or before[2] is not after[2]:
                found.append(f"{name}: another class or class forward")
            if [key for key, _ in before[3]] != [key for key, _ in after[3]]:
                found.append(f"{name}: keys {[key for key, _ in before[3]]} became {[key for key, _ in after[3]]}")
            elif any(old is not new for (_, old), (_, new) in zip(before[3], after[3], strict=True)):
                changed = [key for (key, old), (_, new) in zip(before[3], after[3], strict=True) if old is not new]
                found.append(f"{name}: other objects in {changed}")
            for key, items in before[4].items():
                others = after[4].get(key, [])
                if len(items) != len(others) or any(
                    a is not b or x is not y for (a, x), (b, y) in zip(items, others, strict=True)
                ):
                    found.append(f"{name}.{key}: other contents")
        if list(self.state) != list(now.state) or any(
            self.state[name][0] is not now.state[name][0] or self.state[name][1] != now.state[name][1]
            for name in self.state
        ):
            found.append("other tensors in the state dict")
        return found
