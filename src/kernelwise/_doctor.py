"""Doctor: what is installed, what does not fit together, and the command that mends it.

`gather` asks the machine once and returns a value, `examine` judges that value and asks nothing, `show` prints both.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.version import Version

from kernelwise._discover import device_type
from kernelwise._models import cache_directory
from kernelwise.kernels import cpu as cpu_kernels

PACKAGES = ("kernelwise", "torch", "triton", "kernels", "transformers", "huggingface_hub", "accelerate")


@dataclass(frozen=True, slots=True)
class Cpu:
    """The processor: its name, torch's instruction set, the path of the CPU kernels (or why there is none)."""

    name: str
    torch_capability: str
    kernel_path: str | None
    half_products: str
    why_no_kernels: str


@dataclass(frozen=True, slots=True)
class Cache:
    """A directory where files are kept between runs, and the variable that moves it."""

    variable: str
    path: str
    writable: bool


@dataclass(frozen=True, slots=True)
class Facts:
    """One machine as the doctor sees it.

    `versions` has every package of `PACKAGES`, None where it is missing. `needs` are the ranges that Kernelwise itself
    states (`("torch", ">=2.10")`). `accepted_kernels` is the window of the `kernels` library that transformers accepts,
    from the first to before the second; None where it states none. `accelerator` is a device type, `gpus` are its
    devices, `drivers` are those that the operating system has whether torch can use them or not.
    """

    python: str
    system: str
    versions: tuple[tuple[str, str | None], ...]
    needs: tuple[tuple[str, str], ...]
    accepted_kernels: tuple[str, str] | None
    transformers_problem: str | None
    accelerator: str | None
    gpus: tuple[str, ...]
    drivers: tuple[str, ...]
    compiler: str | None
    cpu: Cpu
    caches: tuple[Cache, ...]

    def version(self, package: str) -> str | None:
        """Return the installed version of a package, or None."""
        return dict(self.versions).get(package)


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that does not fit: what, what follows from it, and the command that mends it."""

    what: str
    effect: str
    fix: str


def gather() -> Facts:
    """Ask this machine. Imports transformers where it is installed; changes nothing."""
    accepted, problem = _accepted_kernels()
    accelerator, gpus = _gpus()
    return Facts(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        versions=tuple((name, _version(name)) for name in PACKAGES),
        needs=_needs(),
        accepted_kernels=accepted,
        transformers_problem=problem,
        accelerator=accelerator,
        gpus=gpus,
        drivers=tuple(name for name, file in (("NVIDIA", "/dev/nvidia0"), ("AMD", "/dev/kfd")) if Path(file).exists()),
        compiler=_compiler(),
        cpu=_cpu(),
        caches=(_cache("KERNELWISE_CACHE", cache_directory()), _cache("HF_HUB_CACHE", _hub_cache())),
    )


def examine(facts: Facts) -> tuple[Finding, ...]:
    """Return everything that does not fit together on a machine. Asks nothing but the facts."""
    found: list[Finding] = []
    for name, specifier in facts.needs:
        version = facts.version(name)
        if version is None and name == "transformers":
            continue  # optional
        if version is None or not Requirement(name + specifier).specifier.contains(version, prereleases=True):
            have = "is not installed" if version is None else f"{version} is outside {specifier}"
            upgrade = _kernels_fix(facts) if name == "kernels" else f'pip install "{name}{specifier}"'
            found.append(
                Finding(f"{name} {have}", "Kernelwise is made for that range and may fail outside it", upgrade)
            )
    kernels, window = facts.version("kernels"), facts.accepted_kernels
    if facts.transformers_problem:
        again = f"pip install --force-reinstall --no-deps transformers=={facts.version('transformers')}"
        found.append(Finding("transformers cannot be imported", facts.transformers_problem, again))
    if kernels and window and not Version(window[0]) <= Version(kernels) < Version(window[1]):
        found.append(
            Finding(
                f"transformers {facts.version('transformers')} rejects kernels {kernels}: it accepts {window[0]} up to, but "
                f"not including, {window[1]}",
                "its layers are not registered (Kernelwise then goes by what they compute alone), and use_kernels=True fails",
                _kernels_fix(facts),
            )
        )
    if facts.accelerator == "cuda" and facts.version("triton") is None:
        found.append(Finding("a GPU without Triton", "the builtin GPU kernels cannot run", "pip install triton"))
    for driver in facts.drivers if facts.accelerator is None else ():
        build, fix = (
            ("CUDA", "pip install --force-reinstall torch")
            if driver == "NVIDIA"
            else ("ROCm", "the command that https://pytorch.org/get-started/locally gives for ROCm")
        )
        found.append(
            Finding(
                f"an {driver} GPU that torch {facts.version('torch')} cannot use",
                f"models run on the CPU: torch is built without {build}, or the driver does not fit it",
                fix,
            )
        )
    if facts.cpu.why_no_kernels and facts.accelerator is None:
        compiler = "" if facts.compiler else "install a C++17 compiler first (Debian: apt install g++), then: "
        build = "pip install --no-build-isolation --force-reinstall --no-deps kernelwise"
        found.append(Finding("no CPU kernels", facts.cpu.why_no_kernels.removesuffix(f": {build}"), compiler + build))
    for cache in facts.caches:
        if not cache.writable:
            effect = "nothing can be kept there between runs"
            fix = f"export {cache.variable}=DIRECTORY  (one that you can write)"
            found.append(Finding(f"the cache {cache.path} cannot be written", effect, fix))
    return tuple(found)


def _kernels_fix(facts: Facts) -> str:
    """Return the command for a version of `kernels` that transformers and Kernelwise both accept."""
    ours = Requirement("kernels" + dict(facts.needs).get("kernels", ""))
    if facts.accepted_kernels is None:
        return f'pip install "{ours}"'
    first, end = facts.accepted_kernels
    bounds = {spec.operator: Version(spec.version) for spec in ours.specifier}
    low = max(Version(first), bounds.get(">=", Version(first)))
    high = min(Version(end), bounds.get("<", Version(end)))
    if low < high:
        return f'pip install "kernels>={low},<{high}"'
    direction = "--upgrade transformers" if Version(end) <= low else f'"transformers<{facts.version("transformers")}"'
    return f"pip install {direction}  (no version of kernels suits both)"


def show(facts: Facts, findings: tuple[Finding, ...]) -> str:
    """Return the facts and the findings as text for a terminal."""
    cpu = facts.cpu
    path = f"kernels for {cpu.kernel_path}" if cpu.kernel_path else f"no kernels: {cpu.why_no_kernels}"
    halves = f", products of half precision: {cpu.half_products or 'none'}" if cpu.kernel_path else ""
    rows = [("python", f"{facts.python}, {facts.system}")]
    rows += [(name, version or "not installed") for name, version in facts.versions]
    if facts.accepted_kernels:
        first, end = facts.accepted_kernels
        rows.append(("", f"transformers accepts kernels >={first},<{end}"))
    rows += [
        ("GPU", ", ".join(facts.gpus) if facts.accelerator else "none that torch can use"),
        ("CPU", f"{cpu.name}, torch uses {cpu.torch_capability}; {path}{halves}"),
        ("compiler", facts.compiler or "none"),
    ]
    rows += [("cache", f"{cache.path}{'' if cache.writable else ' (cannot be written)'}") for cache in facts.caches]
    lines = [f"{name:<16} {value}" for name, value in rows] + [""]
    for finding in findings:
        lines += [f"does not fit: {finding.what}", f"  effect  {finding.effect}", f"  mend    {finding.fix}"]
    return "\n".join(lines if findings else [*lines, "everything fits together"])


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _needs() -> tuple[tuple[str, str], ...]:
    """Return the ranges that this package states for what the doctor looks at, with its optional parts."""
    try:
        stated = [Requirement(line) for line in importlib.metadata.requires("kernelwise") or ()]
    except importlib.metadata.PackageNotFoundError:
        return ()  # run from its sources without being installed
    chosen = {
        need.name: str(need.specifier)
        for extra in ("transformers", "")
        for need in stated
        if need.name in PACKAGES and need.specifier and (need.marker is None or need.marker.evaluate({"extra": extra}))
    }
    return tuple(sorted(chosen.items()))


def _accepted_kernels() -> tuple[tuple[str, str] | None, str | None]:
    """Return the window of `kernels` versions that transformers accepts, and why transformers cannot be imported."""
    if _version("transformers") is None:
        return None, None
    try:
        utils = importlib.import_module("transformers.utils.import_utils")
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"
    first, end = getattr(utils, "KERNELS_MIN_VERSION", None), getattr(utils, "KERNELS_MAX_VERSION", None)
    return (None if first is None or end is None else (str(first), str(end))), None


def _gpus() -> tuple[str | None, tuple[str, ...]]:
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        return None, ()
    kind = device_type(found)
    if kind == "cuda":
        names = [
            "{} (sm_{}{})".format(torch.cuda.get_device_name(index), *torch.cuda.get_device_capability(index))
            for index in range(torch.cuda.device_count())
        ]
    elif kind == "rocm":
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    else:
        names = [f"{torch.accelerator.device_count()} x {kind}"]
    return kind, tuple(names)


def _compiler() -> str | None:
    name = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++", "cl"))), None)
    if name is None:
        return None
    try:
        said = subprocess.run([name, "--version"], capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.SubprocessError):
        return name
    return f"{name}, {said.splitlines()[0]}" if said.strip() else name


def _cpu() -> Cpu:
    why = cpu_kernels.why_unavailable()
    return Cpu(
        name=_processor(),
        torch_capability=torch.backends.cpu.get_cpu_capability(),
        kernel_path=None if why else cpu_kernels.isa(),
        half_products="" if why else torch.ops.kernelwise.cpu_half_products.default(),
        why_no_kernels=why,
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{named or platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def _hub_cache() -> Path:
    """Return where the Hub client keeps downloads, as it decides itself, without importing it."""
    chosen = os.environ.get("KERNELS_CACHE") or os.environ.get("HF_HUB_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    home = os.environ.get("HF_HOME")
    if home:
        return Path(home).expanduser() / "hub"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "huggingface" / "hub"


def _cache(variable: str, path: Path) -> Cache:
    """Say whether a directory can be written, or made where it does not exist."""
    nearest = next((place for place in (path, *path.parents) if os.path.lexists(place)), path)
    writable = nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)
    return Cache(variable, str(path), writable)
