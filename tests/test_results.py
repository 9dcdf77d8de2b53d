"""What was measured is remembered, whoever else writes, dies or has filled the disk."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kernelwise import _results
from kernelwise._cli import main
from kernelwise._data import to_json
from kernelwise._errors import KernelwiseError
from kernelwise._evidence import Comparison

KEY = {"kernel": "sha256:1", "device": ("H100", "570.1"), "versions": [["torch", "2.13"]], "calls": 3, "none": None}


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("KERNELWISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_results, "_told", set())
    return tmp_path / "cache"


def in_another_process(code: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", f"from kernelwise import _results\n{code}"],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_what_was_put_is_got_and_nothing_else() -> None:
    assert _results.get(KEY) is None
    _results.put(KEY, {"us": 1.5, "paths": ["a", "b"]})
    assert _results.get(KEY) == {"us": 1.5, "paths": ["a", "b"]}
    assert _results.get({**KEY, "calls": 4}) is None
    assert _results.get({**KEY, "kernel": "sha256:2"}) is None
    _results.put(KEY, [2])
    assert _results.get(KEY) == [2]
    assert _results.size() == (1, _results.size()[1])


def test_the_order_of_a_dict_and_the_kind_of_a_list_do_not_matter() -> None:
    _results.put(KEY, 1)
    assert _results.get(dict(reversed([*KEY.items()])) | {"device": ["H100", "570.1"]}) == 1


def test_it_is_there_in_another_process() -> None:
    _results.put(KEY, {"us": 1.5})
    out, errors = in_another_process(f"print(_results.get({KEY!r}))").communicate(timeout=60)
    assert out == "{'us': 1.5}\n", errors


WRITER = """
import sys, time
for number in range(400):
    _results.put(["shared", number % 8], [sys.argv[0], number, "x" * 20_000])
    found = _results.get(["shared", (number + 3) % 8])
    assert found is None or (len(found) == 3 and len(found[2]) == 20_000), found
"""


def test_several_processes_write_the_same_keys_at_once(caplog: pytest.LogCaptureFixture) -> None:
    writers = [in_another_process(WRITER) for _ in range(3)]
    for writer in writers:
        _, errors = writer.communicate(timeout=120)
        assert (writer.returncode, errors) == (0, "")
    for number in range(8):
        assert _results.get(["shared", number])[1] in range(400)
    assert _results.size()[0] == 8
    assert not caplog.records


@pytest.mark.parametrize("moment", [0.0, 0.013, 0.05])
def test_a_killed_writer_leaves_every_result_whole(moment: float, directory: Path) -> None:
    _results.put("before", 1)
    writer = in_another_process(
        "print('ready', flush=True)\nn = 0\n"
        "while True:\n    n += 1\n    _results.put(['killed', n % 4], [n, 'x' * 3_000_000])"
    )
    assert writer.stdout is not None
    writer.stdout.readline()
    while _results.size()[0] < 2:
        time.sleep(0.001)
    time.sleep(moment)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    for number in range(4):
        found = _results.get(["killed", number])
        assert found is None or len(found[1]) == 3_000_000
    assert any(_results.get(["killed", number]) for number in range(4))
    assert _results.get("before") == 1
    _results.clear()
    assert not [*(directory / "results").iterdir()]  # what it had begun to write too


def test_a_full_disk_costs_a_line_in_the_log(directory: Path) -> None:
    """A limit on the size of files stands for the disk: a write ends in the middle, with an error of the system."""
    code = f"""
import logging, resource, signal
logging.basicConfig(format="%(message)s")
_results.put("before", 1)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
for _ in range(3):
    _results.put({KEY!r}, "x" * 100_000)
_results.put("small", 2)
print(_results.get("before"), _results.get({KEY!r}), _results.get("small"))
"""
    out, errors = in_another_process(code).communicate(timeout=60)
    assert out == "1 None 2\n", errors
    assert errors.count("cannot be written") == 1
    assert "measured again" in errors
    assert len([*(directory / "results").iterdir()]) == 2  # nothing of what could not be written stays behind


@pytest.mark.parametrize("left", ["", "{", '{"key": 1}', "[]", "null", '{"key": "other", "value": 3}', "\udcff\x00"])
def test_a_file_that_something_has_spoilt_is_not_believed(
    left: str, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _results.put(KEY, 1)
    _results.put("other", 2)
    for file in (directory / "results").iterdir():
        if json.loads(file.read_text())["value"] == 1:
            file.write_bytes(left.encode("utf-8", "surrogateescape"))
    with caplog.at_level(logging.WARNING, "kernelwise"):
        assert [_results.get(KEY) for _ in range(3)] == [None] * 3
    assert len(caplog.records) == 1
    assert _results.get("other") == 2
    _results.put(KEY, 4)
    assert _results.get(KEY) == 4


def test_a_directory_that_cannot_be_written(
    directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    directory.write_text("a file stands here")
    with caplog.at_level(logging.WARNING, "kernelwise"):
        for number in range(3):
            _results.put([number], 1)
            assert _results.get([number]) is None
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2  # one of writing, one of reading
    assert str(directory) in said[0]
    assert _results.size() == (0, 0)
    assert _results.clear() == 0


def test_a_directory_without_permission(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    _results.put("known", 1)
    monkeypatch.setattr(Path, "write_text", refuse)
    _results.put("more", 2)
    assert _results.get("known") == 1
    assert _results.get("more") is None
    assert "Permission denied" in caplog.text
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(KernelwiseError, match=r"cannot be removed: Permission denied\n  go on"):
        _results.clear()


def test_clearing_leaves_other_files_alone(directory: Path) -> None:
    """`results` is a usual name, and the cache directory is the user's choice."""
    _results.put(KEY, 1)
    mine = directory / "results" / "thesis.json"
    mine.write_text("42")
    (directory / "results" / ("0" * 64)).write_text("42")
    (directory / "results" / "figures").mkdir()
    assert _results.size()[0] == 1
    assert _results.clear() == 1
    assert mine.read_text() == "42"
    assert len([*(directory / "results").iterdir()]) == 3


def test_show_and_clear_on_the_command_line(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _results.put(KEY, 1)
    _results.put("other", 1)
    (directory / "proofs").mkdir()
    (directory / "proofs" / f"{'a' * 64}.json").write_text("[]")
    assert run("cache", "show") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(directory)
    assert [line.split()[:2] for line in lines[1:]] == [["results", "2"], ["proofs", "1"], ["imports", "0"]]
    assert run("cache", "show", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["directory"] == str(directory)
    assert shown["remembered"]["proofs"] == {"number": 1, "bytes": 2}
    assert run("cache", "clear", "results") == 0
    assert capsys.readouterr().out == "results: 2 removed\n"
    assert _results.size("proofs")[0] == 1
    assert run("cache", "clear") == 0
    assert _results.size("proofs") == (0, 0)
    assert run("cache", "clear", "result") == 2
    assert "did you mean 'results'" in capsys.readouterr().err


def run(*args: str) -> int:
    try:
        main(args)
    except SystemExit as exit:
        return int(exit.code or 0)
    return 0


def test_the_proofs_of_the_worker_are_what_is_counted(directory: Path) -> None:
    """`_prove` writes its own files; their names must be among those that are counted and cleared."""
    from kernelwise._verifying import _prove

    for folder in ("proofs", "imports"):
        _prove._write(_prove._file(folder, ["a"]), [])
        assert _results.size(folder)[0] == 1
        assert _results.clear(folder) == 1


def test_a_noun_is_recalled_and_nothing_that_only_has_its_place(caplog: pytest.LogCaptureFixture) -> None:
    comparison = Comparison(2.0, 1.0, 2.0, 1.9, 2.1, 9)
    assert _results.recall(KEY, Comparison) is None
    _results.put(KEY, to_json(comparison))
    assert _results.recall(KEY, Comparison) == comparison
    with caplog.at_level(logging.WARNING, "kernelwise"):
        for spoilt in (
            {},
            [],
            3,
            {"checks": []},
            {**to_json(comparison), "us": "1"},
            {**to_json(comparison), "new": 1},
        ):
            _results.put(KEY, spoilt)
            assert _results.recall(KEY, Comparison) is None
    assert len(caplog.records) == 1


def test_results_of_another_format_are_as_good_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    _results.put(KEY, 1)
    monkeypatch.setattr(_results, "FORMAT", _results.FORMAT + 1)
    assert _results.get(KEY) is None
