"""Builds the CPU kernels: each source once per instruction set, all into one library, against torch's stable ABI.

Everything else about the package stands in pyproject.toml. The library is no Python module (it registers operators with
torch's dispatcher and is loaded with `torch.ops.load_library`), so one build serves every Python and, by the stable
ABI, every torch from 2.10 on. Where it cannot be built the package is installed without it.
"""

from __future__ import annotations

import os
import platform
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCE = Path("src/kernelwise/kernels/cpu/csrc")
VECTOR_SOURCES = (
    "activation.cpp",
    "attention.cpp",
    "cross_entropy.cpp",
    "gated_activation.cpp",
    "gemm.cpp",
    "layer_norm.cpp",
    "linear.cpp",
    "qk_norm_rotary.cpp",
    "rms_norm.cpp",
    "rotary.cpp",
)
OPERATOR_SOURCES = (
    "isa.cpp",
    "ops.cpp",
    "ops_activations.cpp",
    "ops_attention.cpp",
    "ops_linear.cpp",
    "ops_loss.cpp",
    "ops_norms.cpp",
    "ops_rotary.cpp",
)
HEADERS = ("activations.h", "kernels.h", "norm.h", "panels.h", "products.h", "tensor.h", "tensors.h", "vec.h")
X86 = platform.machine().lower() in ("x86_64", "amd64") and sys.platform != "win32"
ISA_FLAGS: dict[str, list[str]] = {"baseline": []}
if X86:
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["avx512"] = [*ISA_FLAGS["avx2"], "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
# Numbers may not be reordered beyond what a source says with `omp simd`; errno and floating-point traps are not used.
FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
if sys.platform == "win32":
    FLAGS = ["/std:c++17", "/O2", "/openmp:experimental"]


class MissingTorch(Exception):  # noqa: N818
    """There is no torch to build against."""


class BuildKernels(build_ext):
    """Compile in parallel, link without Python; on failure say so and go on without the kernels."""

    def get_ext_filename(self, fullname: str) -> str:
        """Give the library one name for every Python, since it is no Python module."""
        return os.path.join(*fullname.split(".")) + {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """Export nothing: there is no PyInit function."""
        return []

    def build_extension(self, ext: Extension) -> None:
        """Build the one extension, or warn why there is none."""
        try:
            self._build(ext)
        except Exception as error:  # any failure here must leave an installable package
            reason = (
                str(error) if isinstance(error, MissingTorch) else f"the C++ compiler failed ({type(error).__name__})"
            )
            warnings.warn(
                f"kernelwise is installed without its CPU kernels: {reason}. Layers keep their own code on the CPU. To have "
                "the kernels, install torch and a C++17 compiler, then build again without isolation: "
                "pip install --no-build-isolation --force-reinstall --no-deps kernelwise",
                stacklevel=1,
            )

    def _build(self, ext: Extension) -> None:
        try:
            import torch
        except ImportError as error:
            raise MissingTorch("torch is not installed where the package is built") from error
        root = Path(torch.__file__).parent
        includes = [str(root / "include"), str(root / "include/torch/csrc/api/include"), str(SOURCE)]
        target = [("TORCH_TARGET_VERSION", "0x020a000000000000")]  # the stable ABI of torch 2.10
        x86 = [("KERNELWISE_X86", "1")] if X86 else []
        jobs = [(source, "common", []) for source in OPERATOR_SOURCES]
        jobs += [(source, isa, flags) for isa, flags in ISA_FLAGS.items() for source in VECTOR_SOURCES]

        def compile_one(job: tuple[str, str, list[str]]) -> list[str]:
            source, isa, flags = job
            return self.compiler.compile(
                [str(SOURCE / source)],
                output_dir=os.path.join(self.build_temp, isa),
                include_dirs=includes,
                macros=[*target, *x86, ("KERNELWISE_ISA", isa)],
                extra_postargs=[*FLAGS, *flags],
                depends=ext.depends,
            )

        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            objects = [name for names in pool.map(compile_one, jobs) for name in names]
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            libraries=["torch_cpu"],
            library_dirs=[str(root / "lib")],
            build_temp=self.build_temp,
            target_lang="c++",
        )


class Wheel(bdist_wheel):
    """Tag the wheel for this platform but any Python 3: nothing in it is bound to Python's ABI."""

    def get_tag(self) -> tuple[str, str, str]:
        """Replace the tags of the running Python."""
        return ("py3", "none", super().get_tag()[2])


setup(
    ext_modules=[
        Extension(
            "kernelwise.kernels.cpu._kernels",
            sources=[str(SOURCE / name) for name in (*OPERATOR_SOURCES, *VECTOR_SOURCES)],
            depends=[str(SOURCE / name) for name in HEADERS],
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel},
)
