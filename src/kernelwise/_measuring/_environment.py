"""What a timing depends on besides the code that is timed: the machine, the versions, the threads."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

_PACKAGES = ("kernelwise", "torch", "triton", "kernels", "transformers", "liger-kernel")


def environment(device: str) -> tuple[tuple[str, str], ...]:
    """Return pairs of a name and what it is here, for a device such as "cpu" or "cuda:1"."""
    found = [("system", f"{platform.system()} {platform.machine()}"), ("python", platform.python_version())]
    for package in _PACKAGES:
        try:
            found.append((package, version(package)))
        except PackageNotFoundError:
            continue
    found += [("processor", _processor()), ("threads", str(torch.get_num_threads()))]
    kind, _, index = device.partition(":")
    if kind in ("cuda", "rocm") and torch.cuda.is_available():
        at = int(index) if index else torch.cuda.current_device()
        properties = torch.cuda.get_device_properties(at)
        found.append(("device", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"))
        if torch.version.hip:
            found += [("architecture", properties.gcnArchName), ("runtime", f"ROCm {torch.version.hip}")]
        else:
            found += [
                ("architecture", f"sm_{properties.major}{properties.minor}"),
                ("runtime", f"CUDA {torch.version.cuda}"),
            ]
        found.append(("driver", _driver()))
    else:
        found.append(("device", kind))
    return tuple(found)


def _driver() -> str:
    """The version of the GPU's driver: NVIDIA's kernel module says its own, else the CUDA version that the driver supports."""
    try:
        return Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        ask = getattr(torch._C, "_cuda_getDriverVersion", None)
        return "unknown" if ask is None else f"CUDA {ask()}"


def _processor() -> str:
    """The processor's name, its vector instructions as PyTorch sees them, and how many cores this process may use."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        cores = os.cpu_count() or 1
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, {cores} cores"
