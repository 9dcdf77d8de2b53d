"""Observe: run a layer's own code or a kernel once on a case and note everything that can be seen from outside.

The same function observes the layer's own code, that code in float64, and the kernel, here or in the worker. It judges
nothing; `_judge` compares what was noted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_leaves

from kernelwise._process import draw_from, drew_since, put_back, random_states, settings, user_random_state
from kernelwise._verifying._calls import Call
from kernelwise._verifying._circumstances import bytes_in_use, filled_memory, in_cuda_graph, in_inference_mode
from kernelwise._verifying._copies import CannotTryError
from kernelwise._verifying._exact import float64_mode
from kernelwise._verifying._given import Case, Given, same_bits


@dataclass(slots=True)
class Observed:
    """What one call gave and did. Gradients are by the name of their leaf; `None` where there is none.

    `settings` are those of the process that it left changed; they have been put back.
    """

    outputs: list[torch.Tensor] = field(default_factory=list)
    structure: str = ""
    requires_grad: list[bool] = field(default_factory=list)
    layouts: list[str] = field(default_factory=list)
    gradients: dict[str, torch.Tensor | None] = field(default_factory=dict)
    second: dict[str, torch.Tensor | None] = field(default_factory=dict)
    no_second: str = ""
    overwritten: list[str] = field(default_factory=list)
    settings: list[str] = field(default_factory=list)
    draws: bool = False  # whether it drew random numbers

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""
        found = [*self.outputs, *self.gradients.values(), *self.second.values()]
        return sum(tensor.nbytes for tensor in found if tensor is not None)


def observe(call: Call, case: Case, *, wide: bool = False, natively: bool = False) -> Observed:
    """Run a call on fresh copies of a case's tensors. `wide` runs it in float64. Raises what the call raises, unless the
    call has overwritten an input: that is what is observed then.

    A call that draws random numbers is made again from a seed that is always the same. `natively` also fills the memory that
    compiled code allocates, by a setting of the whole process: for a process that has nothing else to do.
    """
    with _device_of(case), _surroundings(case):
        states, found = random_states(), settings()
        changed: list[str] = []

        def run() -> Observed:
            return _observe_tiled(call, case) if case.tiled else _observe(call, case, wide, natively)

        try:
            seen = run()
            if drew_since(states):
                left = random_states()
                _seed()
                begun = random_states()
                seen = run()
                seen.draws = True
                if not _same_states(states, begun) and not drew_since(left):  # it ends in one state wherever it begins
                    changed.append("the seed of the random numbers")
        finally:
            changed += put_back(found)
            if drew_since(states):
                draw_from(states)
        seen.settings = changed
        return seen


_SEED = 51_797
"""No number that a kernel is likely to seed with itself."""


def _same_states(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=False))


def _seed() -> None:
    torch.default_generator.manual_seed(_SEED)
    # Where CUDA is not in use, a seed would wait for the first use that the user makes of it.
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(_SEED)


def _device_of(case: Case) -> AbstractContextManager[Any]:
    """Make the GPU of a case's tensors the current one: a kernel is started there unless it says otherwise."""
    found = next((v.device for v in case.arguments.values() if isinstance(v, torch.Tensor) and v.is_cuda), None)
    return nullcontext() if found is None else torch.cuda.device(found)


@contextmanager
def _surroundings(case: Case) -> Iterator[None]:
    """Record gradients where a case has them, and cast nothing, whatever the user does around: the worker knows none of it."""
    kinds = {"cpu", *(v.device.type for v in case.arguments.values() if isinstance(v, torch.Tensor))}
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(case.grad != "none"))
        for kind in kinds:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _observe(call: Call, case: Case, wide: bool, natively: bool) -> Observed:
    given = Given(case, wide=wide)
    if case.how == "compile":
        call = torch.compile(call, fullgraph=True)
    elif case.how == "cuda graph":
        call = in_cuda_graph(call)
    elif case.how == "inference mode":
        call = in_inference_mode(call)
    seen = Observed()
    memory = nullcontext() if case.fill is None else filled_memory(case.fill, natively)
    try:
        with float64_mode(_dtype_of(case)) if wide else memory:
            seen = _run(call, case, given)
    except Exception:
        if wide or not given.overwritten():  # an input that was written to explains most of what goes wrong after it
            raise
    seen.overwritten = [] if wide else [*given.overwritten(), *seen.overwritten]
    return seen


def _dtype_of(case: Case) -> torch.dtype:
    """The dtype in which a layer draws random numbers: that of the first number it is given."""
    tensors = [v for v in case.arguments.values() if isinstance(v, torch.Tensor) and v.is_floating_point()]
    return tensors[0].dtype if tensors else torch.float32


def _run(call: Call, case: Case, given: Given) -> Observed:
    grad = case.grad != "none"
    if case.reused:
        states = random_states()  # what the first call draws, the second is to draw again
        with torch.no_grad(), given.other_values():
            call(given.module, **given.for_call())
        draw_from(states)
    between: list[torch.Tensor] = []
    found = call(given.module, **given.for_call())
    if case.between:
        between = [v for v in tree_leaves(call(given.module, **given.elsewhere())) if isinstance(v, torch.Tensor)]
        between = [output for output in between if output.requires_grad]
    leaves, spec = tree_flatten(found)
    outputs = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    seen = Observed(
        outputs=[output.detach().clone() for output in outputs],
        structure=_structure(leaves, spec),
        requires_grad=[output.requires_grad for output in outputs],
        layouts=[_layout(output, given) for output in outputs],
    )
    roots = [output for output in outputs if output.requires_grad]
    if not grad or not given.leaves:
        return seen
    upstream = [_upstream(output, index, case) for index, output in enumerate(roots)]
    if case.second:
        _second(seen, roots, upstream, given.leaves)
        return seen
    if between:
        # Other gradients than those below: with the same ones, what a norm gives its weight would cancel.
        torch.autograd.backward(between, [_upstream(output, 3 + index, case) for index, output in enumerate(between)])
    if roots:
        torch.autograd.backward(roots, upstream, retain_graph=case.retain)
        # The gradient of an output may be that of another tensor too: a residual stream hands one to both its branches.
        seen.overwritten = [
            f"the gradient of output {index}"
            for index, (output, handed) in enumerate(zip(roots, upstream, strict=True))
            if not same_bits(handed, _upstream(output, index, case))
        ]
        if case.retain:
            torch.autograd.backward(roots, [_upstream(output, index, case) for index, output in enumerate(roots)])
        if case.repeat:
            again = [v for v in tree_leaves(call(given.module, **given.for_call())) if isinstance(v, torch.Tensor)]
            again = [output for output in again if output.requires_grad]
            torch.autograd.backward(again, [_upstream(output, index, case) for index, output in enumerate(again)])
    seen.gradients = {name: leaf.grad for name, leaf in given.leaves.items()}
    return seen


def _structure(leaves: Sequence[Any], spec: Any) -> str:
    return f"{spec}: {', '.join('tensor' if isinstance(v, torch.Tensor) else repr(v)[:80] for v in leaves)}"


def _observe_tiled(call: Call, case: Case) -> Observed:
    """Run a call on repeated rows and note, for each output, a repeat that differs from the first, or the first.

    So what a kernel does beyond 2^31 elements is judged by results of a few rows, and nothing large is copied or sent.
    """
    tiled = {n: v for n, v in case.arguments.items() if n in case.tiled}
    needed = 4 * case.copies * sum(value.nbytes for value in tiled.values())
    device = next(iter(tiled.values())).device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else needed
    if needed > free:
        raise CannotTryError(f"it needs {needed / 1e9:.0f} GB of the GPU's memory")
    given = Given(_plain(case), wide=False)
    arguments = given.for_call()
    try:
        for name, at in case.tiled.items():
            times = [1] * arguments[name].dim()
            times[at] = case.copies
            arguments[name] = arguments[name].repeat(times)
        with torch.no_grad():
            found = call(given.module, **arguments)
    except torch.OutOfMemoryError as error:
        raise CannotTryError("its rows or intermediate results do not fit into the GPU's memory") from error
    at_of = {arguments[name].dim(): at for name, at in reversed(case.tiled.items())}
    leaves, spec = tree_flatten(found)
    seen = Observed(structure=_structure(leaves, spec))
    for output in leaves:
        if isinstance(output, torch.Tensor):
            seen.outputs.append(_odd_repeat(output, at_of.get(output.dim(), 0), case.copies))
            seen.requires_grad.append(output.requires_grad)
            seen.layouts.append("contiguous")  # of a slice there is nothing to say
    return seen


def _odd_repeat(output: torch.Tensor, at: int, copies: int) -> torch.Tensor:
    """Of an output that is a number of repeats, return the first that differs from the first one, else the first."""
    if output.dim() == 0 or output.shape[at] % copies:
        raise CannotTryError("its output is not one of rows")
    shape = output.shape
    repeats = output.detach().reshape(*shape[:at], copies, shape[at] // copies, *shape[at + 1 :]).movedim(at, 0)
    first, step = repeats[0], max(1, (1 << 26) // max(repeats[0].numel(), 1))
    for start in range(0, copies, step):
        part = repeats[start : start + step]
        same = ((part == first) | (part.isnan() & first.isnan())).flatten(1).all(1)
        if not bool(same.all()):
            first = part[int((~same).to(torch.uint8).argmax())]
            break
    return first.clone()


def _plain(case: Case) -> Case:
    return Case(case.name, case.arguments, case.module, grad="none")


def _second(
    seen: Observed, roots: list[torch.Tensor], upstream: list[torch.Tensor], leaves: dict[str, torch.Tensor]
) -> None:
    """Note the gradients of a function of the gradients, or why there are none."""
    inputs = list(leaves.values())
    try:
        first = torch.autograd.grad(roots, inputs, upstream, create_graph=True, allow_unused=True)
        roots = [gradient for gradient in first if gradient is not None and gradient.requires_grad]
        # Not torch.autograd.grad: asked for some leaves, it passes by the error that @once_differentiable has put there.
        torch.autograd.backward(roots, [_upstream(gradient, 7 + index) for index, gradient in enumerate(roots)])
        seen.second = {name: leaf.grad for name, leaf in leaves.items()}
    except RuntimeError as error:
        seen.no_second = str(error).split("\n")[0]


def _upstream(output: torch.Tensor, seed: int, case: Case | None = None) -> torch.Tensor:
    """The same gradient for every contender: the one of the case where it has one for this output, by its place and shape,
    else multiples of 1/64 within +-3, which every floating dtype holds exactly."""
    given = case.upstream[seed] if case is not None and seed < len(case.upstream) else None
    if given is not None and given.shape == output.shape:
        return given.to(output.dtype, copy=True)
    generator = torch.Generator().manual_seed(seed)
    handed = "contiguous" if case is None or output.dim() < 2 else case.handed
    shape = torch.Size((output.shape[-1],)) if handed == "expanded" else output.shape  # as that of a sum over rows
    values = torch.randint(-192, 193, shape, generator=generator, device="cpu")
    gradient: torch.Tensor = (values / 64).to(output.dtype).to(output.device)
    if handed == "expanded":
        return gradient.expand(output.shape)
    return gradient.mT.contiguous().mT if handed == "transposed" else gradient


def _layout(output: torch.Tensor, given: Given) -> str:
    """Name what users of an output may rely on: contiguous, no two elements in one place, memory of its own."""
    alias = given.aliased(output)
    if alias is not None:
        return f"shares memory with {alias}"
    if any(size > 1 and stride == 0 for size, stride in zip(output.shape, output.stride(), strict=True)):
        return "has several elements in one place"
    return "contiguous" if output.is_contiguous() else "strided"


def growth(call: Call, case: Case) -> tuple[int, int]:
    """Return by how many bytes the process grows while a call is made many times, and how many bytes the calls gave.

    A call is one with its backward, where the case has gradients. The smallest growth of three rounds after a warm-up: what
    grows once is a cache, what grows every time is a leak.
    """
    with _device_of(case), user_random_state(), _surroundings(case):
        given = Given(case, wide=False)

        def once() -> list[torch.Tensor]:
            outputs = [v for v in tree_leaves(call(given.module, **given.for_call())) if isinstance(v, torch.Tensor)]
            roots = [output for output in outputs if output.requires_grad]
            if roots and given.leaves:
                torch.autograd.backward(roots, [torch.ones_like(output) for output in roots])
            return outputs

        outputs = once()
        nbytes = sum(output.nbytes for output in outputs)
        on_gpu = any(output.is_cuda for output in outputs)
        del outputs
        calls = min(max(8, (512 << 10) // max(nbytes, 1)), 256)  # so many that a leak stands out
        rounds = []
        for _ in range(4):
            before = bytes_in_use(on_gpu)
            for _ in range(calls):
                once()
            rounds.append(bytes_in_use(on_gpu) - before)
    return min(rounds[1:]), nbytes * calls
