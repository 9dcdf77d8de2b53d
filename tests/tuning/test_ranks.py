"""Tuning in several processes: one that was killed, all ranks of a job, and results of devices that differ."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

from planted import ratio

import kernelwise as kw
from kernelwise._configuring._config_file import tomllib
from kernelwise._evidence import EAGER, OWN_CODE, Choice, Run, Tuning
from kernelwise._tuning import _ranks

TUNING = """
    import os, sys
    import torch
    sys.path.insert(0, {tests!r})
    from torch import nn
    import kernelwise as kw
    from kernelwise._tuning import _races, _session, _trials, _tune
    from kernelwise._verifying import _cases
    from sorting import Sorting, register_sorting
    _cases._SIZES, _races.MOST_S, _trials.TIMING_S, _session._rivals_of = (), 1.0, 0.2, lambda model: ()
    import kernelwise.sources._inductor as inductor
    inductor.DEVICES = ()
    register_sorting()
    torch.manual_seed(0)
    x = torch.randn(2, 32, 256)
    real, log = _trials.measure_group, os.environ["MEASURED"]

    def measured(*args, **options):
        with open(log, "a") as file:
            print("measured", file=file)
        return real(*args, **options)

    _trials.measure_group = measured
"""


def script(then: str) -> list[str]:
    text = textwrap.dedent(TUNING).format(tests=str(Path(__file__).parent))
    return [sys.executable, "-c", text + textwrap.dedent(then)]


def test_a_tuner_that_was_killed_goes_on_where_it_was(tmp_path):
    command = script(
        """
        model = nn.Sequential(Sorting(), Sorting(1e-2)).eval()
        print(_tune.tune(model, x, seconds=200).kernel_mapping, "done")
        """
    )
    log = tmp_path / "log"
    env = {**os.environ, "KERNELWISE_CACHE": str(tmp_path / "cache"), "MEASURED": str(log), "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not log.exists() or log.read_text().count("measured") < 3:
        assert time.monotonic() < end
        assert first.poll() is None
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    before = log.read_text().count("measured")
    finished = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100, check=False)
    assert "{'SortingNorm': {'inference': 'builtin:straight'}} done" in finished.stdout, finished.stderr
    all_in_all = log.read_text().count("measured")
    assert before >= 3
    assert all_in_all <= 4 + 1, "two kinds with two candidates each, and the one in flight again"


RANKS = """
    import json
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", world_size=2, rank=rank)
    model = nn.Sequential(Sorting()).eval()
    try:
        kw.tune(model if rank == 0 else nn.Sequential(Sorting(1e-2)), x, seconds=100)
    except kw.PlanError as error:
        print("different:", str(error).splitlines()[0])
    _session.kinds_of, kinds_of = (lambda *args: 1 / 0), _session.kinds_of
    try:
        kw.tune(model, x, seconds=100)
    except kw.KernelwiseError as error:
        print("failed:", str(error))
    _session.kinds_of = kinds_of
    _tune.hash_of, hash_of = (lambda model: 1 / 0) if rank == 1 else _tune.hash_of, _tune.hash_of
    try:
        kw.tune(model, x, seconds=100)
    except kw.KernelwiseError as error:
        print("lost:", str(error))
    _tune.hash_of = hash_of
    config = kw.tune(model, x, seconds=100)
    print("chosen:", json.dumps([config.to_dict(), config.evidence.to_json()], sort_keys=True))
    dist.destroy_process_group()
"""


def test_all_ranks_take_the_same_decision_or_all_raise(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    base = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    ranks = []
    for rank in (0, 1):
        own = {
            "RANK": str(rank),
            "KERNELWISE_CACHE": str(tmp_path / f"cache{rank}"),
            "MEASURED": str(tmp_path / f"{rank}"),
        }
        process = subprocess.Popen(
            script(RANKS), env={**base, **own}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        ranks.append(process)
    said = []
    for process in ranks:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        said.append(dict(line.split(": ", 1) for line in out.splitlines() if ": " in line))
    for what in ("different", "failed", "lost", "chosen"):
        assert said[0][what] == said[1][what], what
    assert "different models" in said[0]["different"]
    assert "1 of 2 ranks failed" in said[0]["failed"]  # the one that measures
    assert "1 of 2 ranks failed" in said[0]["lost"]  # the other one
    assert '{"inference": "builtin:straight"}' in said[0]["chosen"]
    assert (tmp_path / "0").exists()
    assert not (tmp_path / "1").exists(), "one rank measures"


def found_on(chosen: dict[tuple[str, str], str], kernels: dict[str, object]) -> dict[str, object]:
    """What tuning gives on one kind of device: choices by name and mode, and the rules of its config."""
    choices = [
        Choice(name.lower(), (name.lower(),), name, f"x.{name}", "", mode, ref, "it is fast")
        for (name, mode), ref in chosen.items()
    ]
    names = (EAGER, "builtin", "tuned", "tuned+compile", *dict.fromkeys(name for name, _ in chosen))
    runs = [Run(name, "prefill", ratio(1.5)) for name in names]
    evidence = Tuning("m", kw.Target("cuda"), "latency", ("prefill",), tuple(choices), tuple(runs))
    return {"config": {"kernels": kernels, "on_miss": "keep"}, "evidence": evidence.to_json()}


def test_kinds_of_devices_that_differ_leave_layers_their_own_code():
    modes = ("inference", "training")
    one = found_on(
        {**{("RMSNorm", mode): "builtin:RMSNorm" for mode in modes}, **{("SiLU", mode): "a/b@v1:C" for mode in modes}},
        {"RMSNorm": "builtin:RMSNorm", "SiLU": "a/b@v1:C", "GeLU": "none"},
    )
    other = found_on(
        {
            **{("RMSNorm", mode): "builtin:RMSNorm" for mode in modes},
            ("SiLU", "inference"): "a/b@v1:C",
            ("SiLU", "training"): "own code",
        },
        {"RMSNorm": "builtin:RMSNorm", "SiLU": {"inference": "a/b@v1:C", "training": "none"}, "GeLU": "none"},
    )
    joined = _ranks.join({"H100": one, "A100": other})
    assert joined["config"] == {
        "kernels": {
            "RMSNorm": "builtin:RMSNorm",
            "SiLU": {"inference": "a/b@v1:C", "training": "none"},
            "GeLU": "none",
        },
        "on_miss": "keep",
    }
    evidence = Tuning.from_json(joined["evidence"])
    chosen = {(choice.name, choice.mode): choice.chosen for choice in evidence.choices}
    assert chosen == {
        ("RMSNorm", "inference"): "builtin:RMSNorm",
        ("RMSNorm", "training"): "builtin:RMSNorm",
        ("SiLU", "inference"): "a/b@v1:C",
        ("SiLU", "training"): OWN_CODE,
    }
    assert "devices differ" in next(choice.reason for choice in evidence.choices if choice.chosen == OWN_CODE)
    assert [run.contender for run in evidence.runs] == [EAGER, "builtin"], "nobody has run the joined config"
    assert "SiLU (training)" in evidence.notes[0]
    assert tomllib.loads(evidence.config) == joined["config"]
    assert _ranks.join({"H100": one}) is one


def test_modes_that_nobody_tuned_are_not_turned_off_where_devices_differ():
    one = found_on({("RMSNorm", "inference"): "builtin:RMSNorm"}, {"RMSNorm": {"inference": "builtin:RMSNorm"}})
    other = found_on(
        {("RMSNorm", "inference"): "a/b@v1:N"},
        {"RMSNorm@layers.*": {"inference": "a/b@v1:N"}, "RMSNorm@norm": {"inference": "none"}},
    )
    joined = _ranks.join({"H100": one, "A100": other})
    assert joined["config"]["kernels"] == {"RMSNorm": {"inference": "none"}}
    assert [choice["chosen"] for choice in joined["evidence"]["choices"]] == [OWN_CODE]
