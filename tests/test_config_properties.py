"""A config survives a round trip through TOML, JSON and plain data, whatever is in it; and nothing odd is an exception."""

from __future__ import annotations

import copy
import json
import keyword
import tempfile
from importlib.resources import files
from pathlib import Path

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernels import Mode

from kernelwise._configuring._config import KernelConfig
from kernelwise._configuring._config_file import tomllib
from kernelwise._data import DEVICE_TYPES, MODES
from kernelwise._errors import KernelConfigError, Problem
from kernelwise._mapping import Rule, parse_mapping, read_keys

SCHEMA = json.loads(files("kernelwise").joinpath("config-schema.json").read_text())
VALIDATOR = jsonschema.Draft7Validator(SCHEMA)

identifiers = st.one_of(
    st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,12}", fullmatch=True), st.text(min_size=1, max_size=4)
).filter(lambda text: text.isidentifier() and not keyword.iskeyword(text))
hub_parts = st.from_regex(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,10}[A-Za-z0-9_])?", fullmatch=True).filter(
    lambda part: "--" not in part and ".." not in part and not part.endswith(".git")
)
repositories = st.builds("{}/{}".format, hub_parts, hub_parts)
revisions = st.from_regex(r"[A-Za-z0-9._@+#-]{1,8}(/[A-Za-z0-9._-]{1,8})?", fullmatch=True).filter(
    lambda text: ".." not in text
)
printable = st.text(max_size=6).filter(str.isprintable)
directories = st.lists(printable.filter(lambda part: part.strip(".")), min_size=1, max_size=3).map("/".join)
paths = st.one_of(directories.map("/{}".format), directories.map("C:\\{}".format))

names = st.one_of(
    st.just("none"),
    st.builds("{}:{}".format, repositories, identifiers),
    st.builds("{}@v{}:{}".format, repositories, st.integers(0, 10**9 - 1), identifiers),
    st.builds("{}@{}:{}".format, repositories, revisions, identifiers),
    st.builds("{}:{}".format, paths, identifiers),
    st.builds("package:{}.{}:{}".format, identifiers, identifiers, identifiers),
    st.builds("builtin:{}".format, identifiers),
    st.builds("builtin:{}:{}".format, st.sampled_from(["torch", "inductor"]), identifiers),
)
pins = st.one_of(
    st.fixed_dictionaries({"version": st.integers(0, 2**40)}, optional={"trust_remote_code": st.booleans()}),
    st.fixed_dictionaries({"revision": revisions}, optional={"trust_remote_code": st.booleans()}),
)
leaves = st.one_of(names, st.none(), st.tuples(st.builds("{}:{}".format, repositories, identifiers), pins))
devices = st.sampled_from(DEVICE_TYPES)
modes = st.one_of(
    st.sampled_from(MODES),
    st.sampled_from([Mode.INFERENCE, Mode.TRAINING, Mode.INFERENCE | Mode.TORCH_COMPILE]),
)


def one_claim_each(value: object) -> bool:
    """`"inference"` and `Mode.INFERENCE` in one dict claim the same."""
    return not parse_mapping({"A": value})[1]


def by(keys: st.SearchStrategy, values: st.SearchStrategy) -> st.SearchStrategy:
    return st.dictionaries(keys, values, min_size=1, max_size=3).filter(one_claim_each)


values = st.one_of(
    leaves, by(devices, st.one_of(leaves, by(modes, leaves))), by(modes, st.one_of(leaves, by(devices, leaves)))
)
layer_names = printable.map(str.strip).filter(lambda name: name and "@" not in name)
globs = st.lists(
    printable.map(str.strip).filter(lambda part: part and not set(part) & set(".@[]"))
    | st.sampled_from(["*", "[0-3]", "l?"]),
    min_size=1,
    max_size=3,
).map(".".join)
fusions = st.lists(st.tuples(layer_names, globs), min_size=2, max_size=3, unique=True).map(tuple)
mappings = st.dictionaries(
    st.one_of(layer_names, st.builds("{}@{}".format, layer_names, globs), fusions), values, max_size=5
).filter(
    lambda mapping: (
        len({frozenset(key) for key in mapping if isinstance(key, tuple)}) == sum(isinstance(k, tuple) for k in mapping)
    )
)
configs = st.builds(
    KernelConfig,
    mappings,
    st.just(False),
    st.booleans(),
    on_miss=st.sampled_from(["raise", "keep"]),
    verify=st.sampled_from(["auto", False]),
)

quick = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)


def what_is_asked(config: KernelConfig) -> set[tuple[object, ...]]:
    return {(rule.layer, rule.path, rule.device, rule.mode, rule.ref, rule.fuses) for rule in config.rules()}


@given(configs)
@quick
def test_a_config_survives_a_round_trip(config):
    before = copy.deepcopy(config)
    with tempfile.TemporaryDirectory() as folder:
        for suffix, parse in ((".toml", tomllib.loads), (".json", json.loads)):
            file = Path(folder, "kernels" + suffix)
            config.save(file)
            loaded = KernelConfig.load(file)
            assert loaded == config
            assert what_is_asked(loaded) == what_is_asked(config)
            written = parse(file.read_bytes().decode())
            assert written == config.to_dict()
            VALIDATOR.validate(written)
            loaded.save(file)
            assert parse(file.read_bytes().decode()) == written
    assert KernelConfig.from_dict(config.to_dict()) == config
    assert config == before
    assert config.kernel_mapping == before.kernel_mapping


odd = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.binary(max_size=4),
        st.text(max_size=12),
        names,
        modes,
        devices,
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.tuples(
            inner,
            st.dictionaries(st.sampled_from(["version", "revision", "trust_remote_code", "x"]), inner, max_size=3),
        ),
        st.dictionaries(
            st.one_of(st.text(max_size=8), modes, devices, st.integers(), st.tuples(st.text(max_size=3))), inner
        ),
    ),
    max_leaves=8,
)


@given(odd, st.booleans())
@quick
def test_parsing_anything_gives_rules_or_problems_and_never_raises(mapping, use_local_kernel):
    rules, problems = parse_mapping(mapping, use_local_kernel=use_local_kernel, file="kernels.toml")
    assert all(isinstance(rule, Rule) for rule in rules)
    assert all(isinstance(problem, Problem) and problem.where and problem.what and problem.fix for problem in problems)
    assert len(read_keys(mapping)) <= (len(mapping) if isinstance(mapping, dict) else 0)
    if isinstance(mapping, dict) and not problems:
        assert len(rules) >= len(mapping)


@given(odd)
@quick
def test_reading_any_data_gives_a_config_or_a_config_error(data):
    try:
        config = KernelConfig.from_dict(data)
    except KernelConfigError:
        return
    assert KernelConfig.from_dict(config.to_dict()) == config


def entry(value: object) -> dict[str, object]:
    return {"kernels": {"RMSNorm": value}}


PLANTED = [
    [],
    {"kernel": {}},
    {"kernels": []},
    {"kernels": {"": "a/b:L"}},
    {"kernels": {"@x": "a/b:L"}},
    {"kernels": {"A@": "a/b:L"}},
    {"kernels": {"A@b@c": "a/b:L"}},
    {"on_miss": "ignore"},
    {"verify": "always"},
    {"use_local_kernel": 1},
    {"inherit_mapping": "no"},
    {"fuse": {}},
    {"fuse": [{"kernel": "a/b:L"}]},
    {"fuse": [{"layers": [["A", "a"]], "kernel": "a/b:L"}]},
    {"fuse": [{"layers": [["A", "a"], ["B"]], "kernel": "a/b:L"}]},
    {"fuse": [{"layers": [["A", "a"], ["A", "a"]], "kernel": "a/b:L"}]},
    {"fuse": [{"layers": [["A", "a"], ["B", "b"]], "kernel": "a/b"}]},
    {"fuse": [{"layers": [["A", "a"], ["B", "b"]], "kernel": "a/b:L", "more": 1}]},
    *map(
        entry,
        [
            "",
            "None",
            "a/b",
            "b:L",
            "a/b:",
            "a/b:1L",
            "a/b:L:extra",
            "a/b/c:L",
            "a/b--c:L",
            "a/b..c:L",
            "a/b.git:L",
            "-a/b:L",
            "a/b@:L",
            "a/b@x y:L",
            "../..",
            "./mine:L",
            "~/mine:L",
            "/mine",
            "https://huggingface.co/a/b:L",
            "a/b:L\0",
            "builtin:",
            "package:L",
            3,
            True,
            [],
            ["a/b:L"],
            ["a/b:L", {}],
            ["a/b:L", {"version": 1}, 3],
            ["a/b:L", {"version": 1, "revision": "main"}],
            ["a/b:L", {"trust_remote_code": True}],
            ["a/b:L", {"version": "1"}],
            ["a/b:L", {"version": True}],
            ["a/b:L", {"version": -1}],
            ["a/b:L", {"revision": ""}],
            ["a/b:L", {"versoin": 1}],
            ["a/b:L", {"version": 1, "trust_remote_code": "yes"}],
            ["a/b@v1:L", {"version": 1}],
            ["/mine:L", {"version": 1}],
            {},
            {"gpu": "a/b:L"},
            {"cuda": {}},
            {"cuda": {"cpu": "a/b:L"}},
            {"cuda": {"inference": {"cuda": "a/b:L"}}},
            {"inference": {"training": "a/b:L"}},
            {"cuda": "a/b:L", "inference": "a/b:L"},
        ],
    ),
]


@pytest.mark.parametrize("data", PLANTED, ids=str)
def test_a_planted_error_is_found_by_the_schema_and_by_the_config(data):
    assert list(VALIDATOR.iter_errors(data))
    with pytest.raises(KernelConfigError):
        KernelConfig.from_dict(data)


def test_the_schema_itself_is_one():
    jsonschema.Draft7Validator.check_schema(SCHEMA)
