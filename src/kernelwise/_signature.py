"""Bind the forward of a kernel to the forward of a layer by position, or say why that would be a guess. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from kernelwise._data import Parameter

_POSITIONAL = ("positional_only", "positional_or_keyword")


def bind(layer: Sequence[Parameter], kernel: Sequence[Parameter]) -> tuple[str, tuple[str, ...]]:
    """Return the source of the call's arguments, in the layer's names, and the reasons against it.

    Positional parameters meet by position, keyword-only ones by name. A kernel may have further parameters with defaults;
    it may not lack one of the layer's, and it may not name the layer's parameters in another order.

    >>> x = Parameter("hidden_states", "positional_or_keyword")
    >>> bind([x], [Parameter("x", "positional_or_keyword")])
    ('hidden_states', ())
    >>> bind([x], [])
    ('', ("it takes no argument for the layer's `hidden_states`",))
    """
    own = [p for p in layer if p.kind in _POSITIONAL]
    theirs = [p for p in kernel if p.kind in _POSITIONAL]
    met = list(zip(own, theirs, strict=False))
    spare = theirs[len(own) :]
    by_keyword = {p.name for p in kernel if p.kind == "keyword_only"}
    by_keyword |= {p.name for p in spare if p.kind == "positional_or_keyword"}
    takes_any = any(p.kind == "var_positional" for p in kernel)
    takes_any_keyword = any(p.kind == "var_keyword" for p in kernel)
    in_layer, in_kernel = {p.name for p in layer}, {p.name for p in kernel}
    crossed = [mine.name for mine, other in met if mine.name != other.name and mine.name in in_kernel]
    crossed += [other.name for mine, other in met if mine.name != other.name and other.name in in_layer]
    reasons = [f"it names the layer's `{name}` in another position" for name in dict.fromkeys(crossed)]
    positional = [p.name for p in own[: len(theirs)]]
    keywords: list[str] = []
    for parameter in [*own[len(theirs) :], *(p for p in layer if p.kind == "keyword_only")]:
        if parameter.name in by_keyword:
            keywords.append(parameter.name)
        elif takes_any and parameter.kind != "keyword_only":
            positional.append(parameter.name)
        elif takes_any_keyword and parameter.name not in in_kernel:
            keywords.append(parameter.name)
        else:
            reasons.append(f"it takes no argument for the layer's `{parameter.name}`")
    for other in kernel:
        required = (other in spare or other.kind == "keyword_only") and not other.has_default
        if required and (other.name not in keywords or other.kind == "positional_only"):
            reasons.append(f"it needs `{other.name}`, which the layer does not have")
    arguments = [*positional]
    for parameter in layer:
        if parameter.kind == "var_positional":
            arguments.append(f"*{parameter.name}")
            if not takes_any:
                reasons.append(f"it does not take the layer's `*{parameter.name}`")
            elif spare:
                reasons.append(f"the layer's `*{parameter.name}` would fill its `{spare[0].name}`")
    arguments += [f"{name}={name}" for name in keywords]
    for parameter in layer:
        if parameter.kind == "var_keyword":
            arguments.append(f"**{parameter.name}")
            if not takes_any_keyword:
                reasons.append(f"it does not take the layer's `**{parameter.name}`")
    return ", ".join(arguments), tuple(reasons)


def source(parameters: Sequence[Parameter]) -> tuple[str, str]:
    """Return the source of a parameter list (defaults stand as `None`) and of a call that passes all of it on."""
    declared: list[str] = []
    passed: list[str] = []
    star = slash = False
    for parameter in parameters:
        default = "=None" if parameter.has_default else ""
        if slash and parameter.kind != "positional_only":
            declared.append("/")
            slash = False
        if parameter.kind == "positional_only":
            slash = True
            declared.append(parameter.name + default)
            passed.append(parameter.name)
        elif parameter.kind == "positional_or_keyword":
            declared.append(parameter.name + default)
            passed.append(parameter.name)
        elif parameter.kind == "var_positional":
            star = True
            declared.append(f"*{parameter.name}")
            passed.append(f"*{parameter.name}")
        elif parameter.kind == "keyword_only":
            if not star:
                declared.append("*")
                star = True
            declared.append(parameter.name + default)
            passed.append(f"{parameter.name}={parameter.name}")
        else:
            declared.append(f"**{parameter.name}")
            passed.append(f"**{parameter.name}")
    if slash:
        declared.append("/")
    return ", ".join(declared), ", ".join(passed)
