"""Worker: runs a kernel that is not ours in another process, and survives what happens there.

`Worker` is this side, `python -m kernelwise._verifying._worker` the other. One process serves one kernel for all its cases.
It gets the kernel's reference, the layer as data, tensors, and a stand-in for the module with what the kernel reads; never the
user's `__main__`. Whatever the kernel does, this side gets what it observed or a `WorkerError` with a status.
"""

from __future__ import annotations

import contextlib
import io
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from kernelwise import sources
from kernelwise._data import Kernel, Layer, Status, from_json, to_json
from kernelwise._errors import KernelLoadError, said
from kernelwise._process import changed_by_imports
from kernelwise._verifying._calls import kernel_call
from kernelwise._verifying._copies import CannotTryError
from kernelwise._verifying._description import describe, rebuild
from kernelwise._verifying._given import Case
from kernelwise._verifying._observe import Observed, growth, observe

SECONDS = 60.0
MEMORY = 8 << 30
_TAIL = 2000  # characters of what a kernel printed that are kept
_POLL = 0.02
_END = 20.0  # seconds that a process that was killed may take to end


class WorkerError(Exception):
    """A kernel gave nothing: `status` says in which way, `detail` what is known."""

    def __init__(self, status: Status, detail: str) -> None:
        self.status, self.detail = status, detail
        super().__init__(f"{status}: {detail}")


class WorkerStartError(KernelLoadError):
    """There is no process to check a kernel in: no fault of the kernel, of which nothing is known then."""

    def __init__(self, kernel: str, reason: str) -> None:
        super().__init__(
            kernel,
            f"the process that would try it first cannot be started ({reason}); that is no fault of the kernel",
            fix=f"see why `{sys.executable} -m kernelwise._verifying._worker` does not run here "
            "(limits on processes and memory, another Python);\n             verify=False puts the kernel in unproven",
        )


class Worker:
    """A process that runs one kernel, for one layer after the other. Use it as a context manager.

    It starts, and imports the kernel, at `start` or at the first request; where it has ended, the next request starts it
    anew. `seconds` limits each request, `memory` (bytes) how far the process may grow above what it needs to start.
    """

    def __init__(self, kernel: Kernel, device: str, *, seconds: float = SECONDS, memory: int = MEMORY) -> None:
        self.kernel, self._device = kernel, device
        self.until: float | None = None  # of `time.monotonic`: when all must have ended, whatever each request may take
        self._seconds, self._memory = seconds, memory
        self._process: subprocess.Popen[bytes] | None = None
        self._layer: tuple[Layer, str] | None = None
        self._sent: tuple[Layer, str] | None = None  # what the process has
        self._module: nn.Module | None = None  # what the process has
        self._base = 0  # its memory before it loaded anything
        self._tail = b""

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def serve(self, layer: Layer, mode: str) -> None:
        """Say which layer the next requests are about."""
        self._layer = layer, mode

    def start(self) -> None:
        """Start the process and import the kernel there.

        Raises:
            WorkerError: the import fails, or does not survive. WorkerStartError: there is no process to import it in.
        """
        path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])
        try:
            self._process = subprocess.Popen(
                # Importing the package imports this module too, of which Python warns: no words of a kernel.
                [sys.executable, "-W", "ignore::RuntimeWarning:runpy", "-m", "kernelwise._verifying._worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                # Between its calls this side computes: its threads are to leave the processor then.
                env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
                start_new_session=True,
            )
            threading.Thread(target=self._drain, args=(self._process.stderr,), daemon=True).start()
            self._exchange({"memory": self._memory}, starting=True)
        except (OSError, RuntimeError, WorkerError) as error:  # no program, no more processes, no more threads
            self.close()
            if isinstance(error, WorkerError) and self.until is not None and time.monotonic() >= self.until:
                raise  # the time was up before the process could be started
            reason = error.detail if isinstance(error, WorkerError) else said(error)
            raise WorkerStartError(str(self.kernel.ref), reason) from error
        try:
            self._ask({"kernel": to_json(self.kernel), "device": self._device})
        except WorkerError:
            self.close()
            raise

    def observe(self, case: Case, *, most: int | None = None) -> Observed:
        """Run the kernel on a case. Raises `WorkerError`, also where what it gives takes more than `most` bytes."""
        return Observed(**self._ask({"do": "observe", **self._message(case)}, most=most))

    def growth(self, case: Case) -> tuple[int, int]:
        """Return what `_observe.growth` found. Raises `WorkerError`."""
        grown, given = self._ask({"do": "growth", **self._message(case)})
        return int(grown), int(given)

    def close(self) -> None:
        """End the process and everything it started."""
        process, self._process, self._sent, self._module = self._process, None, None, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold on to it
                process.wait(timeout=_END)
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()

    def _message(self, case: Case) -> dict[str, Any]:
        """The request of a case, without the layer and the module where the process has them already."""
        assert self._layer is not None
        if self._process is None:
            self.start()
        layer, mode = self._layer
        message = {f.name: getattr(case, f.name) for f in fields(case) if f.name != "module"}
        if self._sent != self._layer:
            message |= {"layer": to_json(_plain(layer)), "mode": mode}
        if case.module is None or case.module is not self._module or self._sent != self._layer:
            reads = _reads(layer, self.kernel, mode)
            message["module"] = None if case.module is None else describe(case.module, reads)
        self._sent, self._module = self._layer, case.module
        return message

    def _ask(self, message: dict[str, Any], *, most: int | None = None) -> Any:
        answer = self._exchange(message, most=most)
        if not (isinstance(answer, dict) and ("ok" in answer or "failed" in answer)):
            self.close()
            raise WorkerError("crashed", "the worker's answer cannot be read")
        if "failed" in answer:
            error = WorkerError(*answer["failed"])
            if error.status == "crashed":  # its GPU context is lost: what comes next needs another process
                self.close()
            raise error
        return answer["ok"]

    def _drain(self, pipe: BinaryIO) -> None:
        """Read what the kernel prints, however much it is, and keep the end."""
        with contextlib.suppress(OSError, ValueError):
            while chunk := os.read(pipe.fileno(), 1 << 16):
                self._tail = (self._tail + chunk)[-_TAIL:]

    def _exchange(self, message: dict[str, Any], *, starting: bool = False, most: int | None = None) -> Any:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        limit = time.monotonic() + (max(self._seconds, 120.0) if starting else self._seconds)
        if self.until is not None:
            limit = min(limit, self.until)
        memory = None if starting else self._base + self._memory
        try:
            buffer = _saved(message)
        except Exception as error:  # arguments that no file can hold
            raise WorkerError("skipped", f"its arguments cannot be sent to another process: {said(error)}") from error
        try:
            data = b"".join(_answer_within(process, buffer, limit, memory, most))
        except _LimitError as error:
            self.close()
            raise WorkerError(error.status, error.detail) from None
        if starting:
            self._base = _resident(process.pid)
        if not data:
            raise self._ended(process)
        try:
            return torch.load(io.BytesIO(data), weights_only=True)
        except Exception as error:  # what a kernel that went astray has written there
            self.close()
            raise WorkerError("crashed", f"the worker's answer cannot be read: {type(error).__name__}") from error

    def _ended(self, process: subprocess.Popen[bytes]) -> WorkerError:
        try:
            code = process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            code = None
        self.close()
        tail = self._tail.decode(errors="replace").strip().split("\n")[-1][-200:]
        printed = f"; it printed: {tail}" if tail else ""
        if code is None:
            return WorkerError("exited", f"it closed the worker's channel{printed}")
        if code < 0:
            name = signal.Signals(-code).name if -code in signal.valid_signals() else str(-code)
            return WorkerError("crashed", f"the process died of {name}{printed}")
        return WorkerError("exited", f"the process left with exit code {code}{printed}")


class _LimitError(Exception):
    def __init__(self, status: Status, detail: str) -> None:
        self.status, self.detail = status, detail


def _answer_within(
    process: subprocess.Popen[bytes], request: memoryview, limit: float, memory: int | None, most: int | None
) -> Iterator[bytes]:
    """Send a request and yield a whole answer, nothing where the process ended; watch time and memory meanwhile.

    A process that does not read, because it stands still, must not hold this one: what its pipe takes is written, no more.
    """
    assert process.stdin is not None
    assert process.stdout is not None
    start, out, into = time.monotonic(), process.stdout.fileno(), process.stdin.fileno()
    unsent = [memoryview(len(request).to_bytes(8, "little")), request]
    missing, header = 8, b""
    os.set_blocking(into, False)
    with selectors.DefaultSelector() as selector:
        selector.register(out, selectors.EVENT_READ)
        selector.register(into, selectors.EVENT_WRITE)
        while missing:
            ended = process.poll() is not None
            ready = {key.fd for key, _ in selector.select(0 if ended else _POLL)}
            if memory is not None and (used := _resident(process.pid)) > memory:
                raise _LimitError("out_of_memory", f"the process took {used >> 20} MiB")
            if time.monotonic() > limit:
                raise _LimitError("timed_out", f"no answer after {time.monotonic() - start:.0f} s")
            if into in ready:
                unsent = _send_some(into, unsent)
                if not unsent:
                    selector.unregister(into)
            if out not in ready:
                if ended:  # a child that it left behind may still hold the pipe
                    return
                continue
            chunk = os.read(out, min(missing, 1 << 20))
            if not chunk:
                return
            missing -= len(chunk)
            if len(header) < 8:
                header += chunk
                missing = int.from_bytes(header, "little") if len(header) == 8 else missing
                if len(header) == 8 and most is not None and missing > most:  # it need not fit into this process
                    why = f"what it gives takes {missing >> 20} MiB, far more than what the layer's own code gives"
                    raise _LimitError("wrong_shape", why)
            else:
                yield chunk


def _send_some(into: int, unsent: list[memoryview]) -> list[memoryview]:
    """Write as much as a pipe takes now and return the rest; nothing is left for a pipe that nobody reads any more."""
    try:
        written = os.write(into, unsent[0][: 1 << 20])
    except BlockingIOError:
        return unsent
    except BrokenPipeError:  # the answer, or its end, says what happened
        return []
    return [part for part in (unsent[0][written:], *unsent[1:]) if len(part)]


def _resident(pid: int) -> int:
    """The resident memory of a process in bytes; 0 where this system does not tell."""
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0


def _write(pipe: Any, message: dict[str, Any]) -> None:
    data = _saved(message)
    pipe.write(len(data).to_bytes(8, "little"))
    pipe.write(data)
    pipe.flush()


def _saved(message: dict[str, Any]) -> memoryview:
    buffer = io.BytesIO()
    torch.save(message, buffer)
    return buffer.getbuffer()


def _plain(layer: Layer) -> Layer:
    return replace(layer, attributes=frozenset(), paths=())


def _reads(layer: Layer, kernel: Kernel, mode: str) -> frozenset[str] | None:
    """The attributes of the module that a kernel needs; None for all, where they cannot be told."""
    found = layer.computes(mode) if kernel.op is not None else None
    if found is not None:
        return frozenset(str(b.value) for _, b in found.roles if b.kind in ("attribute", "child"))
    return frozenset(kernel.reads) if kernel.reads else None


# ------------------------------------------------------------------------------------------------------ the other side


def main() -> None:
    """Serve requests until the channel closes. Runs in the worker process."""
    incoming = os.fdopen(os.dup(0), "rb")
    outgoing = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a kernel prints goes where it is drained, not into the answers
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    _limit(_receive(incoming)["memory"])
    _write(outgoing, {"ok": True})
    start = _receive(incoming)
    try:
        kernel = _load(from_json(Kernel, start["kernel"]), start["device"])
        if changed_by_imports:
            why = f"its import changes {', '.join(changed_by_imports)} for the whole process"
            return _write(outgoing, {"failed": ["setting_changed", why]})
        _write(outgoing, {"ok": True})
    except BaseException as error:
        _write(outgoing, {"failed": ["load_failed", said(error)]})
        return
    call: Any = None
    module: nn.Module | None = None
    process = os.getpid()
    while True:
        try:
            message = _receive(incoming)
        except EOFError:
            return
        try:
            if "layer" in message:
                call = kernel_call(from_json(Layer, message.pop("layer")), kernel, message.pop("mode"))
            if "module" in message:
                described = message.pop("module")
                module = None if described is None else rebuild(described, stub=True)
            do = message.pop("do")
            case = Case(module=module, **message)
            if do == "observe":
                seen = observe(call, case, natively=True)
                answer: Any = {f.name: getattr(seen, f.name) for f in fields(seen)}
            else:
                answer = list(growth(call, case))
            answer = {"ok": answer}
        except BaseException as error:
            failed = failure_of(error)
            answer = {"failed": [failed.status, failed.detail]}
        if os.getpid() != process:  # a copy that the kernel has made of this process: the channel is not its
            os._exit(1)
        _write(outgoing, answer)


def _receive(incoming: BinaryIO) -> Any:
    header = incoming.read(8)
    if len(header) < 8:
        raise EOFError
    return torch.load(io.BytesIO(incoming.read(int.from_bytes(header, "little"))), weights_only=False)


def _load(kernel: Kernel, device: str) -> Kernel:
    """Load the kernel that the other side has loaded: a Hub kernel by its commit, which the user has trusted there."""
    ref = kernel.ref
    if ref.scheme == "hub" and kernel.revision is not None:
        ref = replace(ref, version=None, revision=kernel.revision, trust_remote_code=True)
    loaded = sources.load(ref, device=device)
    if kernel.content_hash is not None and loaded.content_hash != kernel.content_hash:
        raise RuntimeError("its files have changed since it was loaded")
    return loaded


def _limit(memory: int) -> None:
    """No core files; on Linux, an address space that cannot outgrow the limit by one allocation, and no life of its own."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if sys.platform == "linux":
            if not torch.cuda.is_available():  # CUDA reserves far more addresses than it uses
                with open("/proc/self/statm") as file:
                    used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
                resource.setrlimit(resource.RLIMIT_AS, (used + memory + (2 << 30),) * 2)
            import ctypes

            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with the process that started it


def failure_of(error: BaseException) -> WorkerError:
    """Return an exception of a kernel as a status and one line."""
    text = said(error)
    if isinstance(error, CannotTryError):
        return WorkerError("skipped", str(error))
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
        return WorkerError("out_of_memory", text)
    return WorkerError("crashed" if "CUDA error" in text or "illegal memory access" in text else "raised", text)


if __name__ == "__main__":
    main()
