"""A tuning as one would be found: a Llama-shaped model of 30 layers on a CPU, five candidates for each kind of layer.

The figures are made up, but hang together. `.venv/bin/python tests/samples.py FILE.json` writes it for `kernelwise report`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

from kernelwise._data import Target
from kernelwise._evidence import EAGER, OWN_CODE, Candidate, Choice, Comparison, Run, Timing, Tuning

WORKLOADS = ("prefill", "decode")
LAYERS = range(30)
MIB = 2**20

CONFIG = """\
[kernels]
RMSNorm = "builtin:RMSNorm"
SwiGLUMLP = { inference = "builtin:SwiGLUMLP" }
rotary_pos_emb = "none"
Linear = "builtin:Linear"
"""


def compared(own_us: float, speedup: float, spread: float = 0.03, **facts: float | int | None) -> Comparison:
    """Return a comparison whose interval is `spread` wide to each side."""
    return Comparison(
        own_us=own_us,
        us=own_us / speedup,
        speedup=speedup,
        low=speedup * (1 - spread),
        high=speedup * (1 + spread),
        rounds=24,
        **facts,  # type: ignore[arg-type]
    )


def choice(
    name: str,
    class_name: str,
    op: str,
    paths: tuple[str, ...],
    chosen: str,
    reason: str,
    own_us: tuple[float, float],
    candidates: dict[str, tuple[tuple[float, float] | None, float | None, int, str | None]],
) -> Choice:
    """Return a choice from (speed-ups per workload, error, checks, why out) of each candidate."""
    found = []
    for kernel, (speedups, error, checks, out) in candidates.items():
        timings = tuple(
            Timing(paths[0], paths, kernel, "inference", workload, compared(own, speedup, 0.04), calls=len(paths))
            for workload, own, speedup in zip(WORKLOADS, own_us, speedups or (), strict=speedups is not None)
        )
        found.append(Candidate(kernel, out, error, checks, timings))
    return Choice(paths[0], paths, name, class_name, op, "inference", chosen, reason, tuple(found))


def sample() -> Tuning:
    """Return what tuning a small Llama on a CPU might find: something won, lost, was wrong, hung, and made no difference."""
    norms = tuple(
        f"model.layers.{i}.{name}" for i in LAYERS for name in ("input_layernorm", "post_attention_layernorm")
    )
    linears = tuple(f"model.layers.{i}.self_attn.{name}_proj" for i in LAYERS for name in "qkvo")
    choices = (
        choice(
            "RMSNorm",
            "LlamaRMSNorm",
            "rms_norm",
            (*norms, "model.norm"),
            "builtin:RMSNorm",
            "the fastest in both workloads: 3.12 times in prefill, 1.86 times in decode",
            (412.0, 14.1),
            {
                "builtin:RMSNorm": ((3.12, 1.86), 0.41, 214, None),
                "builtin:torch:RMSNorm": ((2.05, 1.43), 0.38, 214, None),
                "builtin:inductor:RMSNorm": ((2.71, 0.62), 0.41, 214, None),
                "/opt/kernels/fast-norm:RMSNorm": (
                    None,
                    38.2,
                    214,
                    "wrong values: inputs x 0.01: output 0[3, 17] is 0.0312, exact 0.1187, error 38.2 times what is allowed",
                ),
                "package:spin_norm:RMSNorm": (None, None, 3, "timed out: inputs (1, 576): no answer within 60 s"),
            },
        ),
        choice(
            "SwiGLUMLP",
            "LlamaMLP",
            "gated_mlp",
            tuple(f"model.layers.{i}.mlp" for i in LAYERS),
            "builtin:SwiGLUMLP",
            "the fastest in both workloads: 1.38 times in prefill, 1.21 times in decode",
            (9120.0, 331.0),
            {
                "builtin:SwiGLUMLP": ((1.38, 1.21), 0.22, 188, None),
                "builtin:inductor:SwiGLUMLP": ((1.11, 1.02), 0.25, 188, None),
                "builtin:torch:SwiGLUMLP": ((1.00, 0.99), 0.19, 188, None),
                "hub-user/mlp@v2:SwiGLU": (None, 1.9e4, 188, "wrong gradient: gradient of down_proj.weight is zero"),
                "package:quick_mlp:MLP": (None, None, 0, "does not load: needs CUDA, this machine has none"),
            },
        ),
        choice(
            "rotary_pos_emb",
            "apply_rotary_pos_emb",
            "rotary",
            tuple(f"model.layers.{i}.self_attn.rotary_pos_emb" for i in LAYERS),
            OWN_CODE,
            "no candidate is clearly faster in prefill and decode together",
            (288.0, 41.0),
            {
                "builtin:RotaryEmb": ((1.03, 0.97), 0.11, 96, None),
                "builtin:torch:RotaryEmb": ((0.99, 1.00), 0.05, 96, None),
                "builtin:inductor:RotaryEmb": ((1.35, 0.31), 0.11, 96, None),
                "hub-user/rope@v1:Rope": ((0.72, 0.66), 0.45, 96, None),
                "package:half_rope:Rope": (None, 512.0, 96, "wrong values: odd positions are turned the wrong way"),
            },
        ),
        choice(
            "Linear",
            "Linear",
            "linear",
            linears,
            "builtin:Linear",
            "1.19 times as fast in decode, no clear difference in prefill",
            (1710.0, 68.0),
            {
                "builtin:Linear": ((1.01, 1.19), 0.64, 120, None),
                "builtin:torch:Linear": ((1.00, 1.00), 0.33, 120, None),
                "builtin:inductor:Linear": ((0.97, 0.58), 0.33, 120, None),
                "/opt/kernels/int8:Linear": (None, 71.0, 120, "wrong values: error 71 times what is allowed"),
                "hub-user/gemm@v3:Linear": (None, None, 0, "not trusted: load it with trust_remote_code"),
            },
        ),
    )
    runs = []
    for workload, own_us, tokens, speedups in (
        ("prefill", 842_000.0, 512, {"tuned": 1.42, "builtin": 1.36, "torch.compile": 1.21}),
        ("decode", 1_930_000.0, 64, {"tuned": 1.18, "builtin": 1.07, "torch.compile": 0.84}),
    ):
        runs.append(Run(EAGER, workload, compared(own_us, 1.0, 0.0), tokens))
        for contender, speedup in speedups.items():
            first = {"torch.compile": 41.3}.get(contender, 0.92)
            own_peak, peak = 611 * MIB, {"tuned": 498, "builtin": 498}.get(contender, 605) * MIB
            compared_run = compared(own_us, speedup, 0.025, own_peak=own_peak, peak=peak, first_s=first)
            runs.append(Run(contender, workload, compared_run, tokens))
        alone = {"RMSNorm": 1.09, "SwiGLUMLP": 1.24 if workload == "prefill" else 1.06, "Linear": 1.01}
        runs += [Run(kernel, workload, compared(own_us, x, 0.02), tokens) for kernel, x in alone.items()]
        why = "offline: the Hub cannot be reached, and its kernels are not in the cache"
        runs.append(Run("transformers kernels", workload, None, tokens, error=why))
    return Tuning(
        model="SmolLM2-135M-Instruct (LlamaForCausalLM, bfloat16)",
        target=Target("cpu", None, (("torch", "2.13.0"), ("transformers", "5.22.2"))),
        objective="latency",
        workloads=WORKLOADS,
        choices=choices,
        runs=tuple(runs),
        environment=(
            ("system", "Linux x86_64"),
            ("processor", "AMD EPYC 9R14, AVX512, 2 cores"),
            ("threads", "2"),
            ("torch", "2.13.0+cpu"),
            ("transformers", "5.22.2"),
            ("kernels", "0.17.2"),
            ("python", "3.11.9"),
            ("device", "cpu"),
        ),
        notes=(
            "the embedding and the head have no candidate but their own code",
            "memory was counted in a separate run, which is not timed",
        ),
        config=CONFIG,
        date="2026-11-23T00:12:00+00:00",
        seconds=192.4,
    )


def bench_sample() -> Tuning:
    """Return what a bench finds: runs, and nothing chosen."""
    whole = sample()
    runs = tuple(run for run in whole.runs if run.contender != "tuned" and not whole.is_part(run))
    return replace(whole, choices=(), runs=runs, config="", notes=())


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(sample().to_json(), indent=1))
