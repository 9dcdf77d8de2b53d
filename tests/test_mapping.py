"""Every form of a mapping becomes the rules that it says; every bad one is named with where, what and how to fix it."""

from __future__ import annotations

import enum

import pytest
from kernels import Mode

from kernelwise._data import DEVICE_TYPES, MODES, KernelRef
from kernelwise._mapping import Rule, mode_name, parse_mapping, read_keys
from kernelwise._reference import nearest

HUB = KernelRef("hub", "org/repo", "Layer", version=1)
METADATA = {"version": 1}


def rules_of(mapping: object, **options) -> list[Rule]:
    rules, problems = parse_mapping(mapping, **options)
    assert problems == ()
    return list(rules)


def only_ref(value: object, **options) -> KernelRef | None:
    (rule,) = rules_of({"RMSNorm": value}, **options)
    assert (rule.layer, rule.path, rule.device, rule.mode, rule.fuses) == ("RMSNorm", None, None, None, ())
    assert rule.where == "rule 1 ('RMSNorm')"
    return rule.ref


GOOD = [
    ("org/repo:Layer", HUB),
    ("org/repo@v1:Layer", HUB),
    ("org/repo@v12:Layer", KernelRef("hub", "org/repo", "Layer", version=12)),
    ("org/repo@v0:Layer", KernelRef("hub", "org/repo", "Layer", version=0)),
    ("org/repo@main:Layer", KernelRef("hub", "org/repo", "Layer", revision="main")),
    ("org/repo@refs/pr/3:Layer", KernelRef("hub", "org/repo", "Layer", revision="refs/pr/3")),
    ("org/repo@v1.2:Layer", KernelRef("hub", "org/repo", "Layer", revision="v1.2")),
    ("org/repo@v:Layer", KernelRef("hub", "org/repo", "Layer", revision="v")),
    ("Org_1/re-po.x:Läyer", KernelRef("hub", "Org_1/re-po.x", "Läyer", version=1)),
    (("org/repo:Layer", {"version": 0}), KernelRef("hub", "org/repo", "Layer", version=0)),
    (("org/repo:Layer", {"revision": "v1"}), KernelRef("hub", "org/repo", "Layer", revision="v1")),
    (
        ("org/repo:Layer", {"version": 2, "trust_remote_code": True}),
        KernelRef("hub", "org/repo", "Layer", version=2, trust_remote_code=True),
    ),
    (
        ("org/repo:Layer", {"revision": "main", "trust_remote_code": True}),
        KernelRef("hub", "org/repo", "Layer", revision="main", trust_remote_code=True),
    ),
    ("/opt/kernels/mine:Layer", KernelRef("path", "/opt/kernels/mine", "Layer")),
    ("/opt/kernels/mine/:Layer", KernelRef("path", "/opt/kernels/mine", "Layer")),
    ("/opt/a:b/my kernel@1:Layer", KernelRef("path", "/opt/a:b/my kernel@1", "Layer")),
    ("C://kernels/mine:Layer", KernelRef("path", "C:\\kernels\\mine", "Layer")),
    ("C:\\kernels\\mine:Layer", KernelRef("path", "C:\\kernels\\mine", "Layer")),
    ("d:/kernels/mine:Layer", KernelRef("path", "d:\\kernels\\mine", "Layer")),
    ("\\\\host\\share\\mine:Layer", KernelRef("path", "\\\\host\\share\\mine", "Layer")),
    ("package:liger_kernel.ops:Norm", KernelRef("package", "liger_kernel.ops", "Norm")),
    ("builtin:RMSNorm", KernelRef("builtin", "", "RMSNorm")),
    (None, None),
    ("none", None),
]


@pytest.mark.parametrize(("value", "ref"), GOOD, ids=[str(value) for value, _ in GOOD])
def test_every_form_of_a_value(value, ref):
    assert only_ref(value) == ref


BAD = [
    # value, what the message says, what the fix says
    ("", "is empty", "org/repo:Layer"),
    ("   ", "is empty", "None to keep"),
    (" org/repo:Layer", "spaces around", "'org/repo:Layer'"),
    ("None", "names no kernel", '"none"'),
    ("org/repo:Layer\0", "control character", "remove"),
    ("/opt/a\nb:Layer", "control character", "remove"),
    ("org/repo", "names no layer", '"org/repo:Layer"'),
    ("org/repo:", "names no layer", "after the colon"),
    ("a/b:L:extra", "has 2 colons", '"a/b:Layer"'),
    ("a/b:L@v1", "pin after the layer", '"a/b@v1:L"'),
    ("a/b@v1", "names no layer", '"a/b:Layer"'),
    ("a/b@:L", "neither a version nor a revision", "org/repo@main:Layer"),
    ("a/b@x..y:L", "neither a version nor a revision", "org/repo@main:Layer"),
    ("a/b@x y:L", "neither a version nor a revision", "org/repo@main:Layer"),
    ("repo:Layer", "has no slash", '"org/repo:Layer"'),
    ("biultin:RMSNorm", "did you mean the scheme 'builtin'?", '"builtin:RMSNorm"'),
    ("liger_kernel.ops:Norm", "has no slash", '"package:liger_kernel.ops:Norm"'),
    ("a/b/c:Layer", "has 2 slashes", "org/repo:Layer"),
    ("a//b:Layer", "has 2 slashes", "org/repo:Layer"),
    ("a/:Layer", "does not allow the name ''", "1 to 96"),
    ("-a/b:Layer", "does not allow the name '-a'", "neither starts"),
    ("a/b.:Layer", "does not allow the name 'b.'", "neither starts"),
    ("a/b--c:Layer", "does not allow the name 'b--c'", "nor holds --"),
    ("a/b..c:Layer", "does not allow the name 'b..c'", "nor holds --"),
    ("a/b c:Layer", "does not allow the name 'b c'", "A-Z a-z"),
    ("a/bé:Layer", "does not allow", "A-Z a-z"),
    ("a/b.git:Layer", "does not allow the name 'b.git'", "A-Z a-z"),
    ("a/" + "b" * 97 + ":Layer", "does not allow", "1 to 96"),
    ("a\\b:Layer", "has no slash", "org/"),
    ("a/b:1Layer", "not a Python identifier", "name of a class"),
    ("a/b:La-yer", "not a Python identifier", "name of a class"),
    ("a/b:class", "not a Python identifier", "name of a class"),
    ("a/b:layers.Norm", "not a Python identifier", "name of a class"),
    ("https://huggingface.co/org/repo:Layer", "is a URL", '"org/repo:Layer"'),
    ("https://huggingface.co/kernels/org/repo", "is a URL", '"org/repo:Layer"'),
    ("https://example.com/org/repo:Layer", "is a URL", '"org/repo:Layer"'),
    ("file:///opt/kernels/mine:Layer", "is a URL", '"/opt/kernels/mine:Layer"'),
    ("../..", "is relative", "resolve()"),
    ("./mine:Layer", "is relative", 'Path("./mine").resolve()'),
    ("~/mine:Layer", "starts with '~'", 'Path("~/mine").expanduser()'),
    ("/opt/kernels/mine", "names no layer", '"/opt/kernels/mine:Layer"'),
    ("/opt/kernels/mine:", "names no layer", "after the colon"),
    ("C:\\kernels\\mine", "names no layer", '"C:\\kernels\\mine:Layer"'),
    ("/:Layer", "does not end in the name of a package", "/home/user/layer_norm"),
    ("/opt/..:Layer", "does not end in the name of a package", "/home/user/layer_norm"),
    ("package:Norm", "must have the form package:module:Layer", "package:liger_kernel"),
    ("package:a:b:Norm", "must have the form package:module:Layer", "package:liger_kernel"),
    ("package:a..b:Norm", "not the name of a module", "package:liger_kernel"),
    ("package:a/b:Norm", "not the name of a module", "package:liger_kernel"),
    ("builtin:", "names no layer", "builtin:RMSNorm"),
    ("builtin:a:b", "there is no backend 'a'", "torch, inductor"),
    ("builtin:inductr:b", "did you mean 'inductor'", "torch, inductor"),
    ("builtin:torch:b-c", "not a Python identifier", "builtin:RMSNorm"),
    (7, "is the int 7", "org/repo:Layer"),
    (True, "is the bool True", "org/repo:Layer"),
    (b"org/repo:Layer", "is the bytes", "org/repo:Layer"),
    (["org/repo:Layer", METADATA], "is the list", "org/repo:Layer"),
    (("org/repo:Layer",), "is a tuple of 1", '("org/repo:Layer", {"version": 1})'),
    (("org/repo:Layer", METADATA, None), "is a tuple of 3", '("org/repo:Layer", {"version": 1})'),
    (("org/repo:Layer", "v1"), "a tuple of a str and a dict", '("org/repo:Layer", {"version": 1})'),
    ((None, METADATA), "a tuple of a str and a dict", '("org/repo:Layer", {"version": 1})'),
    (("org/repo:Layer", {}), "neither a version nor a revision", '{"version": 1}'),
    (("org/repo:Layer", {"trust_remote_code": True}), "neither a version nor a revision", '{"version": 1}'),
    (("org/repo:Layer", {"version": 1, "revision": "main"}), "both a version and a revision", "keep the one"),
    (("org/repo@v1:Layer", METADATA), "pinned twice", "keep one pin"),
    (("org/repo:Layer", {"version": True}), "version is True", '{"version": 1}'),
    (("org/repo:Layer", {"version": "1"}), "version is '1'", '{"version": 1}'),
    (("org/repo:Layer", {"version": 1.0}), "version is 1.0", '{"version": 1}'),
    (("org/repo:Layer", {"version": None}), "version is None", '{"version": 1}'),
    (("org/repo:Layer", {"version": -1}), "version is -1", '{"version": 1}'),
    (("org/repo:Layer", {"revision": ""}), "revision is ''", '{"revision": "main"}'),
    (("org/repo:Layer", {"revision": 1}), "revision is 1", '{"revision": "main"}'),
    (("org/repo:Layer", {"revision": "a b"}), "revision is 'a b'", '{"revision": "main"}'),
    (("org/repo:Layer", {"version": 1, "trust_remote_code": "yes"}), "trust_remote_code is 'yes'", "True or False"),
    (("org/repo:Layer", {"version": 1, "trust_remote_code": 1}), "trust_remote_code is 1", "True or False"),
    (("org/repo:Layer", {"version": 1, "trust_remote_code": ["org"]}), "trust_remote_code is", "policy"),
    (("org/repo:Layer", {"version": 1, "trust_remote": True}), "did you mean 'trust_remote_code'?", "use only"),
    (("org/repo:Layer", {"version": 1, 3: True}), "unknown key 3", "use only"),
    (("/opt/mine:Layer", METADATA), "no kernel of the Hub", "'/opt/mine:Layer'"),
    (("builtin:Layer", METADATA), "no kernel of the Hub", "'builtin:Layer'"),
    ({}, "empty dict", "leave it out"),
    ({"cuad": "org/repo:Layer"}, "'cuad' is neither a device type nor a mode; did you mean 'cuda'?", "device types:"),
    ({"CUDA": "org/repo:Layer"}, "did you mean 'cuda'?", "device types:"),
    ({"cuda:0": "org/repo:Layer"}, "did you mean 'cuda'?", "device types:"),
    ({"gpu": "org/repo:Layer"}, "did you mean 'cuda' or 'rocm'?", "device types:"),
    ({"inferrence": "org/repo:Layer"}, "did you mean 'inference'?", "modes:"),
    ({0: "org/repo:Layer"}, "0 is neither", "device types:"),
    ({None: "org/repo:Layer"}, "None is neither", "device types:"),
    ({Mode.FALLBACK: "org/repo:Layer"}, "is neither", "modes:"),
    ({Mode.TORCH_COMPILE: "org/repo:Layer"}, "is neither", "modes:"),
    ({"cuda": {"cpu": "org/repo:Layer"}}, "a device type inside a device type", "one device type"),
    ({"inference": {"training": "org/repo:Layer"}}, "a mode inside a mode", "one mode"),
    ({"cuda": {"inference": {"cpu": None}}}, "a device type inside a device type", "one device type"),
    ({"cuda": "org/repo:Layer", "inference": None}, "mixes device types and modes", '{"cuda": {"inference"'),
    ({"inference": "org/repo:Layer", Mode.INFERENCE: None}, "names the mode inference a second time", "keep one"),
    (
        {"inference": {"cpu": None}, Mode.INFERENCE: {"cuda": None}},
        "names the mode inference a second time",
        "keep one",
    ),
]


@pytest.mark.parametrize(("value", "what", "fix"), BAD, ids=[str(value)[:50] for value, _, _ in BAD])
def test_every_bad_value_is_named(value, what, fix):
    rules, problems = parse_mapping({"RMSNorm": value, "SiLU": "builtin:SiLU"})
    assert [rule.layer for rule in rules if rule.layer != "RMSNorm"] == ["SiLU"]
    assert any(what in problem.what and fix in problem.fix for problem in problems), problems
    assert all(problem.where.startswith("rule 1 ('RMSNorm'") for problem in problems)


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("", "layer name is empty"),
        ("  ", "layer name is empty"),
        (" RMSNorm", "spaces around"),
        ("RMS\0Norm", "control character"),
        ("@model.*", "layer name is empty"),
        ("RMSNorm@", "module path is empty"),
        ("RMSNorm@model..norm", "empty part"),
        ("RMSNorm@.norm", "empty part"),
        ("RMSNorm@a@b", "an '@'"),
        ("RMSNorm@model.[0-3", "bracket that is not closed"),
        (3, "the key is the int 3"),
        (None, "the key is None"),
        ((), "at least two"),
        (("RMSNorm", "MLP"), "at least two"),
        ((("RMSNorm", "a.norm"),), "at least two"),
        ((("RMSNorm", "a.norm"), ("MLP", 3)), "at least two"),
        ((("RMSNorm", "a.norm"), ("MLP",)), "at least two"),
        ((("RMSNorm", "a.norm"), ("RMSNorm", "a.norm")), "twice"),
        ((("RMSNorm", "a.norm"), ("", "a.mlp")), "layer name is empty"),
        ((("RMSNorm", "a.norm"), ("MLP", "a..mlp")), "empty part"),
    ],
    ids=str,
)
def test_every_bad_key_is_named_and_gives_no_rule(key, what):
    rules, problems = parse_mapping({key: "builtin:Layer"})
    assert rules == ()
    assert [what in problem.what for problem in problems] == [True]
    assert problems[0].where.startswith("rule 1 (")
    assert problems[0].fix
    assert read_keys({key: "builtin:Layer"}) == ()


@pytest.mark.parametrize("mapping", [None, [], ["RMSNorm"], "org/repo:Layer", 3, [("RMSNorm", "a/b:L")]], ids=str)
def test_a_mapping_that_is_no_dict(mapping):
    rules, (problem,) = parse_mapping(mapping, file="kernels.toml")
    assert rules == ()
    assert problem.where == "kernels.toml"
    assert "must be a dict" in problem.what
    assert '{"RMSNorm": "org/repo:Layer"}' in problem.fix


@pytest.mark.parametrize("device", DEVICE_TYPES)
@pytest.mark.parametrize("mode", MODES)
def test_devices_and_modes_nest_in_either_order(device, mode):
    (by_device,) = rules_of({"RMSNorm": {device: {mode: "org/repo:Layer"}}})
    (by_mode,) = rules_of({"RMSNorm": {mode: {device: "org/repo:Layer"}}})
    assert (by_device.device, by_device.mode, by_device.ref) == (device, mode, HUB)
    assert (by_mode.device, by_mode.mode, by_mode.ref) == (device, mode, HUB)
    assert by_device.where == f"rule 1 ('RMSNorm' → {device} → {mode})"


def test_a_dict_from_device_with_every_kind_of_value():
    rules = rules_of(
        {"A": {"cuda": {"inference": "org/repo:Layer", "training": None}, "cpu": ("org/repo:Layer", METADATA)}}
    )
    assert [(rule.device, rule.mode, rule.ref) for rule in rules] == [
        ("cuda", "inference", HUB),
        ("cuda", "training", None),
        ("cpu", None, HUB),
    ]


class Other(enum.Flag):
    INFERENCE = 1


def test_a_kernels_mode_is_known_by_its_flags():
    compiled = {mode: Mode[mode.upper()] | Mode.TORCH_COMPILE for mode in ("inference", "training")}
    assert [mode_name(mode) for mode in (Mode.INFERENCE, Mode.TRAINING)] == ["inference", "training"]
    assert {mode: mode_name(flag) for mode, flag in compiled.items()} == {
        "inference": "inference+compile",
        "training": "training+compile",
    }
    assert [mode_name(key) for key in (Mode.FALLBACK, Mode.TORCH_COMPILE, Other.INFERENCE, 1)] == [None] * 4
    (rule,) = rules_of({"A": {compiled["training"]: {"cuda": None}}})
    assert (rule.device, rule.mode) == ("cuda", "training+compile")


def test_keys_with_a_path_and_keys_that_fuse():
    fusion = (("RMSNorm", "model.layers.*.norm"), ("MLP", "model.layers.*.mlp"))
    mapping = {"RMSNorm": None, "RMSNorm@model.layers.[0-3].*": "org/repo:Layer", fusion: "org/repo:Layer"}
    everywhere, scoped, fused = rules_of(mapping, file="kernels.toml")
    assert (everywhere.layer, everywhere.path) == ("RMSNorm", None)
    assert (scoped.layer, scoped.path) == ("RMSNorm", "model.layers.[0-3].*")
    assert (fused.layer, fused.path, fused.fuses) == ("RMSNorm+MLP", None, fusion)
    assert [rule.where for rule in (everywhere, fused)] == [
        "rule 1 (kernels.toml: 'RMSNorm')",
        "rule 3 (kernels.toml: 'RMSNorm' + 'MLP')",
    ]
    assert [(key.layer, key.path, key.fuses, key.where) for key in read_keys(mapping, file="kernels.toml")] == [
        (rule.layer, rule.path, rule.fuses, rule.where) for rule in (everywhere, scoped, fused)
    ]


def test_the_same_fusion_in_another_order_is_a_second_claim():
    pair = (("A", "x.a"), ("B", "x.b"))
    rules, (problem,) = parse_mapping({pair: "org/repo:Layer", pair[::-1]: None})
    assert [rule.layer for rule in rules] == ["A+B"]
    assert "claims the same as rule 1" in problem.what
    assert problem.where == "rule 2 ('B' + 'A')"


def test_use_local_kernel_reads_names_as_paths():
    assert only_ref("/opt/mine:Layer", use_local_kernel=True) == KernelRef("path", "/opt/mine", "Layer")
    assert only_ref("builtin:RMSNorm", use_local_kernel=True) == KernelRef("builtin", "", "RMSNorm")
    assert only_ref(None, use_local_kernel=True) is None
    _, (problem,) = parse_mapping({"RMSNorm": "org/repo:Layer"}, use_local_kernel=True)
    assert "use_local_kernel=True" in problem.what
    assert "not absolute" in problem.what


def test_all_problems_are_listed_at_once():
    mapping = {
        "": "org/repo:Layer",
        "A": {"cuad": "a/b", "cpu": ("a/b:1L", {"version": True, "revison": "x"})},
        "B": "org/repo:Layer",
        "C": [],
    }
    rules, problems = parse_mapping(mapping)
    assert [rule.layer for rule in rules] == ["B"]
    assert [problem.where for problem in problems] == [
        "rule 1 ('')",
        "rule 2 ('A' → cuad)",
        "rule 2 ('A' → cuad)",
        "rule 2 ('A' → cpu)",
        "rule 2 ('A' → cpu)",
        "rule 2 ('A' → cpu)",
        "rule 4 ('C')",
    ]
    assert "did you mean 'revision'?" in problems[4].what


class Hostile:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


def test_hostile_values_are_problems_and_no_exceptions():
    endless: dict[object, object] = {}
    endless.update(cuda=endless, x=endless)
    mapping = {"A": endless, "B": Hostile(), Hostile(): None, "C": ("a/b:L", {Hostile(): 1, "version": Hostile()})}
    rules, problems = parse_mapping(mapping | {"D": "builtin:" + "x-" * 100_000})
    assert rules == ()
    assert {problem.where[:6] for problem in problems} == {f"rule {number}" for number in range(1, 6)}
    assert max(len(str(problem)) for problem in problems) < 2000


@pytest.mark.parametrize(
    ("name", "known", "said"),
    [
        ("RMSNrom", ["RMSNorm", "MLP"], "; did you mean 'RMSNorm'?"),
        ("rmsnorm", ["RMSNorm", "MLP"], "; did you mean 'RMSNorm'?"),
        ("Attention", ["RMSNorm", "MLP"], "; known: MLP, RMSNorm"),
        ("Attention", [f"Layer{number}" for number in range(50)], ""),
        ("Attention", [], ""),
    ],
)
def test_nearest(name, known, said):
    assert nearest(name, known) == said
