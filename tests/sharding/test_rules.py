"""Sharding files: what they come to, and every wrong one refused with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.model.known import known_config
from engine.model.params import axis_sizes, param_axes
from sharding.rules import ShardingError, load_strategy, parse_strategy, strategies
from sharding.shards import Axis, Shards

LLAMA = axis_sizes(known_config("llama-3.1-70b"))
QWEN = axis_sizes(known_config("qwen3-30b-a3b"))
DEEPSEEK = known_config("deepseek-v3")


@pytest.mark.parametrize("name", strategies())
def test_every_file_fits_eight_devices(name: str) -> None:
    assert load_strategy(name).shards(LLAMA, 8).num_devices in (1, 8)


def test_tensor_parallelism_cuts_heads_and_mlps() -> None:
    shards = load_strategy("tp").shards(LLAMA, 8)
    assert shards.mesh == (Axis("tensor", 8),)
    assert {axis: shards.count(axis) for axis in LLAMA} == {
        "vocab": 8, "embed": 1, "kv_heads": 8, "head_dim": 1, "mlp": 8,
    }  # fmt: skip


def test_experts_and_tensors() -> None:
    shards = load_strategy("tp-ep").shards(QWEN, 4)
    assert shards.count("experts") == 2 and shards.count("expert_mlp") == 2
    assert shards.axes("kv_heads") == ("expert", "tensor")


def test_one_device_is_cut_nowhere() -> None:
    assert load_strategy("tp").shards(LLAMA, 1) == Shards((Axis("tensor", 1),))


def test_the_first_rule_that_divides_wins() -> None:
    text = "mesh: {a: 2, b: 3}\nrules:\n- vocab: [a, b]\n- vocab: b\n- vocab: a\n- kv_heads: b\n- kv_heads: null\n"
    shards = parse_strategy("mine", text).shards({"vocab": (8,), "kv_heads": (8, 64)}, 6)
    assert shards.axes("vocab") == ("a",) and shards.axes("kv_heads") == ()


def test_requests_are_divided_over_an_axis_of_their_own() -> None:
    shards = load_strategy("dp-attention").shards(LLAMA, 8)
    assert shards.num_groups == 4 and shards.count("kv_heads") == 2 and shards.count("mlp") == 8
    assert load_strategy("tp-dp").shards(LLAMA, 8).count("mlp") == 2
    text = "mesh: {a: 2}\nrules:\n- requests: a\n- vocab: a\n"
    with pytest.raises(ShardingError, match="vocab cannot be cut over a: requests are divided there"):
        parse_strategy("mine", text).shards(LLAMA, 2)


def test_pages_are_spread_over_an_axis_of_their_own() -> None:
    shards = load_strategy("context").shards(LLAMA, 8)
    assert (shards.count("sequence"), shards.count("kv_heads"), shards.count("mlp")) == (4, 2, 8)
    text = "mesh: {a: 2}\nrules:\n- sequence: a\n- %s: a\n"
    for logical, why in (("kv_heads", "a sequence's pages are spread there"), ("requests", "requests are divided")):
        with pytest.raises(ShardingError, match=f"cannot be cut over a: {why}"):
            parse_strategy("mine", text % logical).shards(LLAMA, 2)


def test_replication_is_a_stated_choice() -> None:
    shards = load_strategy("tp-replicated").shards(LLAMA, 16)
    assert shards.count("kv_heads") == 16 and shards.copies == (("kv_heads", 2),)
    assert load_strategy("tp-replicated").shards(LLAMA, 8).copies == ()
    with pytest.raises(ShardingError, match=r"kv_heads 8 does not .* tensor=12; .* tensor, replicated \(line 7\)"):
        load_strategy("tp-replicated").shards({"kv_heads": (8,)}, 12)


def test_what_does_not_divide_is_named_with_the_rules() -> None:
    with pytest.raises(ShardingError, match=r"kv_heads 8 does not divide over tensor=16; rules tried: kv_heads: tens"):
        load_strategy("tp").shards(LLAMA, 16)
    with pytest.raises(ShardingError, match="expert=fill, tensor=2 needs a multiple of 2 devices, there are 7"):
        load_strategy("tp-ep").shards(LLAMA, 7)


OVERRIDDEN = """
mesh: {t: 4}
rules:
- mlp: t
- experts: t
- q_heads: t
- vocab: t
overrides:
- layers.10.*: {mlp: t}
- layers.*.shared_*: {mlp: null}
- embed: {vocab: null}
- layers.2.*: {mlp: null}
"""


def of_deepseek(overrides: str) -> Shards:
    text = OVERRIDDEN if not overrides else OVERRIDDEN[: OVERRIDDEN.index("- layers.10")] + overrides
    return parse_strategy("mine", text).shards(axis_sizes(DEEPSEEK), 4, param_axes(DEEPSEEK))


def test_the_first_override_that_matches_a_parameter_wins() -> None:
    shards = of_deepseek("")
    found = {scope: shards.at(scope).count("mlp") for scope in ("layers.0", "layers.2", "layers.9", "layers.10")}
    assert found == {"layers.0": 4, "layers.2": 1, "layers.9": 1, "layers.10": 4}
    assert (shards.at("embed").count("vocab"), shards.at("lm_head").count("vocab")) == (1, 4)
    assert shards.at("layers.20") == shards.at("layers.30"), "equal layers are traced once"
    assert shards.at("layers.9").count("experts") == 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            "- layers.*.shared_down: {mlp: null}",
            r"line 9: layers.3.shared_down and \S*gate_up are multiplied along mlp",
        ),
        (
            "- layers.*.shred_up: {mlp: null}",
            r"line 9: no parameter .* matches '\S*shred_up'; there is layers.*.shared",
        ),
        ("- layers.3: {mlp: null}", "line 9: no parameter of the model matches 'layers.3'"),
        ("- layers.*.router: {mlp: null}", r"line 9: nothing that 'layers.\*.router' matches has an axis mlp"),
        ("- layers.*.experts_*: {expert_mlp: t}", "layers.3.experts_gate_up would be cut over t twice, along experts"),
        ("- lm_head: {vocab: x}", "line 9: the mesh has no axis 'x'; it has t"),
        ("- layers.*.qkv: {kv_heads: t}", "line 9: kv_heads is cut alike everywhere: overrides are for vocab, mlp"),
        ("- layers.*.down: {mpl: t}", "line 9: unknown key 'mpl'; did you mean mlp"),
        ("- embed: t", "line 9: what an override says must be a mapping"),
        ("- {embed: {}, lm_head: {}}", "line 9: an override has one pattern"),
        ("- 'lay ers': {vocab: t}", "line 9: 'lay ers' is no path of a parameter"),
    ],
)
def test_a_wrong_override_is_refused_with_its_line(overrides: str, message: str) -> None:
    with pytest.raises(ShardingError, match=message):
        of_deepseek(overrides)


def test_an_override_must_divide_and_leave_groups_what_they_need() -> None:
    params = {"embed": {"vocab": 12, "embed": 8}, "lm_head": {"vocab": 12, "embed": 8}}
    text = "mesh: {a: 2, b: 5}\nrules:\n- requests: a\noverrides:\n- embed: {vocab: %s}\n"
    for axis, message in (("b", r"line 5: vocab 12 of embed does not divide over b = 5"), ("a", "embed: vocab cannot")):
        with pytest.raises(ShardingError, match=message):
            parse_strategy("mine", text % axis).shards({"vocab": (12,)}, 10, params)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mesh: {tensor: 2}\nrules:\n- kvheads: tensor\n", "line 3: unknown key 'kvheads'; did you mean kv_heads"),
        ("mesh: {tensor: 2}\nrules:\n- mlp: tensr\n", "line 3: the mesh has no axis 'tensr'; it has tensor"),
        ("mesh: {tensor: 2}\nrules:\n- mlp: [tensor, tensor]\n", "line 3: a mesh axis is used twice"),
        ("mesh:\n  a: 1000000000\n", "line 2: the size of mesh axis a must be a number of devices, or fill"),
        ("mesh:\n  a: 100000\n  b: 100000\n", "line 3: a mesh of over 1048576 devices"),
        ("mesh:\n  a: fill\n  b: fill\n", "line 3: only one mesh axis can be filled"),
        ("mesh:\n  a: 2\n  a: 4\n", "line 3: 'a' stands twice"),
        ("mesh:\n  a: -1\n", "line 2: the size of mesh axis a"),
        ("mesh: {A b: 1}\n", "line 1: mesh axis 'A b' must be lower-case"),
        ("mesh: [1]\n", "line 1: mesh must be a mapping"),
        ("mash: {}\n", "line 1: unknown key 'mash'; did you mean mesh"),
        ("mesh: {a: 2}\nrules: {mlp: a}\n", "line 2: rules must be a list"),
        ("mesh: {a: 2}\nrules:\n- {mlp: a, vocab: a}\n", "line 3: a rule has one logical axis"),
        ("mesh: {a: 2}\nrules:\n- embed: a\n", "line 3: embed cannot be cut"),
        ("mesh: {a: 2}\nrules:\n- mlp: 3\n", "line 3: a name is expected"),
        ("mesh: {a: 2}\nrules:\n- mlp: {axes: a, replicate: true}\n", "line 3: mlp cannot be replicated, only kv"),
        ("mesh: {a: 2}\nrules:\n- kv_heads: {axes: a, replicate: 1}\n", "line 3: replicate must be true or false"),
        ("mesh: {a: 2}\nrules:\n- kv_heads: {replicate: true}\n", "line 3: axes are missing"),
        ("mesh: {a: 2}\nrules:\n- kv_heads: {axis: a}\n", "line 3: unknown key 'axis'; did you mean axes"),
        ("mesh: &m {a: 2}\nrules: *m\n", "line 1: anchors and aliases are not read"),
        ("a: &a\n  - *a\n", "line 1: anchors and aliases are not read"),
        ("mesh: {a: 2\n", "line 2 is not YAML"),
        ("[" * 5000, "not YAML"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_with_its_line(text: str, message: str) -> None:
    with pytest.raises(ShardingError, match=message):
        parse_strategy("mine", text)


def test_files_and_names(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("mesh: {x: 2}\nrules:\n- mlp: x\n")
    assert load_strategy(str(path)).name == "mine"
    with pytest.raises(ShardingError, match="neither a file nor a name in configs/sharding; did you mean tp-ep"):
        load_strategy("tp_ep")
    path.write_bytes(b"#" * 70000)
    with pytest.raises(ShardingError, match="over 65536 bytes"):
        load_strategy(str(path))
