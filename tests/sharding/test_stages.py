"""Layers in stages: what is refused, what each stage gets, and how a step is cut into micro-batches."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.attend import PrefillRows
from engine.config import EngineOptions
from engine.errors import InvalidParam
from engine.estimate.hlo import collectives_of
from engine.model.config import LayerSpec
from engine.model.known import known_config
from engine.model.place import local_model
from engine.pipeline import micro_of, split_chunks
from engine.programs import held_bytes, page_bytes, param_cuts, param_shapes
from engine.resolve import DeviceFacts, resolve, shards_of
from tests.engine.world import MODEL, ROPE, STATE_SPACE

FACTS = DeviceFacts("tpu", 32 << 30, True, "v6e", 8)


def test_llama_in_four_stages() -> None:
    """Twenty layers on each two devices, which share their heads."""
    model = known_config("llama-3.1-70b")
    config, whole = (resolve(EngineOptions(sharding=name), model, "bfloat16", FACTS) for name in ("pp", "tp"))
    assert local_model(model, config.shards).num_layers == 20
    shapes, cuts = param_shapes(model, config), param_cuts(model, config)
    assert shapes["layers.19.o"].shape == (4 * 8192, 8192) and "layers.20.o" not in shapes
    assert cuts["layers.19.o"] == jax.sharding.PartitionSpec(("stage", "tensor"), None)
    assert page_bytes(model, config) == page_bytes(model, whole), "a quarter of the layers, four times the heads"
    assert held_bytes(model, config) == pytest.approx(held_bytes(model, whole), rel=0.01)


def refusal(text: str, model: object, tmp_path: object) -> str:
    path = tmp_path / "mine.yaml"  # type: ignore[operator]
    path.write_text(text)
    with pytest.raises(InvalidParam) as error:
        shards_of(str(path), model, 4)  # type: ignore[arg-type]
    return str(error.value)


@pytest.mark.parametrize(
    ("model", "text", "message"),
    [
        (replace(MODEL, layers=(LayerSpec(ROPE),) * 6), "", "6 layers do not divide into 4 stages"),
        (
            replace(MODEL, layers=(*(LayerSpec(ROPE),) * 3, LayerSpec(ROPE, window=9))), "",
            "stages of 1 layers must be alike, but layer 3 is not as layer 0: window 9 and None",
        ),
        (replace(STATE_SPACE, layers=STATE_SPACE.layers[:1] * 4), "", "is not there with recurrent layers"),
        (
            replace(MODEL, layers=(LayerSpec(ROPE),) * 4, intermediate_size=512), "- mlp: s\n",
            "mlp cannot be cut over s: its devices have different layers",
        ),
        (
            replace(MODEL, layers=(LayerSpec(ROPE),) * 4), "overrides:\n- layers.0.*: {mlp: null}\n",
            "is not there with overrides of layers",
        ),
    ],
)  # fmt: skip
def test_what_has_no_stages_is_refused_by_name(model: object, text: str, message: str, tmp_path: object) -> None:
    assert message in refusal("mesh: {s: 4}\nrules:\n- layers: s\n" + text, model, tmp_path)


@pytest.mark.parametrize("other", ["requests", "sequence"])
def test_what_cannot_be_divided_beside_stages(other: str, tmp_path: object) -> None:
    model = replace(MODEL, layers=(LayerSpec(ROPE),) * 2)
    text = f"mesh: {{s: 2, x: 2}}\nrules:\n- layers: s\n- {other}: x\n"
    assert "cuts layers into stages, which is not there with" in refusal(text, model, tmp_path)


def test_every_token_is_in_one_micro_batch_with_its_row_and_position() -> None:
    rows = PrefillRows(*(jnp.asarray(a, jnp.int32) for a in ([0, 5, 18, 0], [5, 13, 2, 0], [7, 0, 40, 0])),
                       block_tables=jnp.arange(4, dtype=jnp.int32)[:, None])  # fmt: skip
    micro = micro_of(3, 7, 25)
    assert (micro.count, micro.rows, micro.tokens, micro.turns(3)) == (3, 3, 9, 5)
    row, position = (np.asarray(a) for a in rows.positions(25))
    parts, found = split_chunks(micro, rows), []
    for at in range(3):
        part = jax.tree.map(lambda a, at=at: a[at], parts)
        lens = np.asarray(part.q_len)
        assert (lens[np.argsort(lens == 0, kind="stable")] == lens).all(), "idle rows come last"
        mine, where = (np.asarray(a) for a in part.positions(9))
        found += [(int(part.block_tables[r, 0]) if r >= 0 else -1, int(p)) for r, p in zip(mine, where, strict=True)]
    assert found[:25] == list(zip(row.tolist(), position.tolist(), strict=True))
    x = jnp.arange(32 * 2).reshape(32, 2)
    np.testing.assert_array_equal(micro.joined(micro.split(x)), x)


def test_micro_batches_are_none_of_them_empty_and_few() -> None:
    found = [micro_of(4, *sizes).count for sizes in ((2, 0), (64, 0), (0, 1024), (0, 2048), (0, 1))]
    assert found == [2, 4, 4, 8, 1]


def test_what_is_handed_on_is_read_with_its_axis() -> None:
    text = """HloModule m

ENTRY %main (x: f32[4,8]) -> f32[4,8] {
  %x = f32[4,8] parameter(0)
  ROOT %y = f32[4,8] collective-permute(%x), channel_id=1, source_target_pairs={{0,2},{1,3}}
}
"""
    (call,) = collectives_of(text, [("stage", 2), ("tensor", 2)]).always
    assert (call.kind, call.axes, call.bytes) == ("collective-permute", ("stage",), 128)
