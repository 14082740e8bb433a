"""Chips and topologies as data, and what their links allow; by hand."""

from __future__ import annotations

import pytest

from engine.errors import InvalidParam
from engine.estimate.chips import chips, topology_of
from engine.estimate.links import Collective, group_shape, incoming_bytes_per_s, link_seconds, num_links
from pallas_kernels.target import CHIPS
from sharding.shards import Axis, Shards
from sharding.topology import GPUS

EIGHT = Shards((Axis("tensor", 8),), (("mlp", ("tensor",)),))


def test_the_chips_of_the_issue_are_there() -> None:
    assert list(chips()) == ["v4", "v5e", "v5p", "v6e", "tpu7x", "h100", "h200", "b200", "cpu"]
    assert all(chip.source for chip in chips().values())


@pytest.mark.parametrize("name", CHIPS)
def test_figures_are_those_that_kernels_know(name: str) -> None:
    """Of a device; rates come from other tables than the kernels' and may differ by what vendors round."""
    chip, known = chips()[name], CHIPS[name]
    assert topology_of(name).device.memory_bytes == known.memory_bytes and chip.scratch_bytes == known.scratch_bytes
    assert chip.device_bytes_per_s == pytest.approx(known.memory_bytes_per_s, rel=0.13)
    assert chip.device_flops("bfloat16") == pytest.approx(known.bfloat16_flops, rel=0.01)
    if known.float8_flops:
        assert chip.device_flops("float8_e4m3fn") == pytest.approx(known.float8_flops, rel=0.01)


@pytest.mark.parametrize("name", GPUS)
def test_figures_are_those_that_the_compiler_is_told(name: str) -> None:
    assert chips()[name].memory_bytes == GPUS[name].memory_bytes
    assert chips()[name].memory_bytes_per_s == GPUS[name].memory_bytes_per_s


def test_topologies() -> None:
    assert topology_of("v6e:2x4").num_devices == 8
    assert topology_of("tpu7x:2x2x1").num_devices == 8, "two devices a chip"
    assert topology_of("h200:8").num_devices == 8 and topology_of("v6e").name == "v6e:1x1"
    assert topology_of("tpu7x:2x2x1").device.memory_bytes == 96 << 30


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v9:2x2", "'v9' is not in configs/chips.yaml: v4, v5e, v5p, v6e, tpu7x, h100, h200, b200, cpu"),
        ("v6e:8", "'v6e:8' has 1 sizes; v6e takes 2, as v6e:2x2"),
        ("v6e:2x", "is not v6e: and its sizes"),
        ("v6e:0x4", "is not v6e: and its sizes"),
        ("h200:16", "more than the 8 chips"),
        ("cpu:1000000000", "is not cpu: and its sizes"),
        ("v5p:99999x99999x9", "more than the 16384 chips"),
    ],
)
def test_a_wrong_topology_is_named(text: str, message: str) -> None:
    with pytest.raises(InvalidParam, match=message):
        topology_of(text)


def test_the_compilers_figures_are_of_every_gpu() -> None:
    assert [name for name, chip in chips().items() if chip.platform == "gpu"] == list(GPUS)


def test_rates_that_are_not_known_are_errors() -> None:
    with pytest.raises(InvalidParam, match="no peak rate of float32 products is known for v6e"):
        chips()["v6e"].device_flops("float32")
    with pytest.raises(InvalidParam, match="no memory bandwidth is known for cpu"):
        _ = chips()["cpu"].device_bytes_per_s
    assert chips()["v5e"].device_flops("float8_e4m3fn") == chips()["v5e"].device_flops("bfloat16")


def test_corners_have_the_fewest_links() -> None:
    assert num_links((2, 4), 16) == 2
    assert num_links((4, 4, 4), 4) == 6, "a torus"
    assert num_links((16, 16), 16) == 4
    assert num_links((8,), 16) == 1 and num_links((1, 1), 16) == 1


def test_ring_formulas() -> None:
    """A sum of 8 MB over a 2 x 4 slice: 14 MB come in, over two links of 100 GB/s."""
    topology = topology_of("v6e:2x4")
    reduce, gather = Collective("all-reduce", ("tensor",), 8e6), Collective("all-gather", ("tensor",), 8e6, count=3)
    assert incoming_bytes_per_s(topology, EIGHT, ("tensor",)) == 200e9
    assert link_seconds(topology, EIGHT, [reduce]) == pytest.approx(14e6 / 200e9)
    assert link_seconds(topology, EIGHT, [gather]) == pytest.approx(3 * 7e6 / 200e9)
    assert link_seconds(topology_of("h200:8"), EIGHT, [reduce]) == pytest.approx(14e6 / 450e9)
    assert link_seconds(topology, Shards((Axis("tensor", 1),)), [reduce]) == 0


def test_mesh_axes_take_whole_dimensions_of_the_grid() -> None:
    shards = Shards((Axis("expert", 4), Axis("tensor", 2)))
    topology = topology_of("v6e:2x4")
    assert group_shape(topology, shards, ("expert",)) == (4,)
    assert group_shape(topology, shards, ("tensor",)) == (2,)
    assert group_shape(topology, shards, ("expert", "tensor")) == (2, 4)
    assert group_shape(topology_of("v5p:4x4x4"), Shards((Axis("a", 16), Axis("b", 4))), ("a",)) == (4, 4)
    assert group_shape(topology_of("v6e:4x4"), Shards((Axis("a", 8), Axis("b", 2))), ("a",)) == (8,), "a line"
    # Two devices a chip share its links.
    assert incoming_bytes_per_s(topology_of("tpu7x:2x2x1"), EIGHT, ("tensor",)) == 2 * 50e9
