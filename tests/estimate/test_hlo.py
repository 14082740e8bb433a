"""Collectives read from HLO text: every spelling of groups, loops, calls and branches."""

from __future__ import annotations

import pytest

from engine.estimate.hlo import collectives_of
from engine.estimate.links import Collective

MESH = [("expert", 2), ("tensor", 4)]
MODULE = """HloModule jit_step, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %add = f32[] add(%a, %b)
}

%layer (x: bf16[6,32]) -> bf16[6,32] {
  ROOT %psum = bf16[6,32]{1,0:T(8,128)(2,1)} all-reduce(%x), channel_id=1, replica_groups=GROUPS, to_apply=%sum
}

%body (s: (s32[], bf16[6,32])) -> (s32[], bf16[6,32]) {
  %one = bf16[6,32]{1,0} call(%x), to_apply=%layer
  %two = bf16[6,32]{1,0} call(%one), to_apply=%layer
  %both = (f32[6,1]{1,0}, f32[6,2]{1,0}) all-reduce(%a, %b), channel_id=2, replica_groups=GROUPS, to_apply=%sum
  %chosen = (f32[6,8]{1,0}) conditional(%i, %x, %y), branch_computations={%never, %asked}
  ROOT %out = (s32[], bf16[6,32]{1,0}) tuple(%i, %two)
}

%never (x: f32[6,8]) -> (f32[6,8]) {
  ROOT %out = (f32[6,8]{1,0}) tuple(%x)
}

%asked (x: f32[6,8]) -> (f32[6,8]) {
  %some = f32[6,8]{1,0} all-gather(%x), channel_id=3, replica_groups=GROUPS, dimensions={1}
  ROOT %out = (f32[6,8]{1,0}) tuple(%some)
}

%unused (x: f32[6,8]) -> f32[6,8] {
  ROOT %none = f32[6,8]{1,0} all-reduce(%x), channel_id=4, replica_groups=GROUPS, to_apply=%sum
}

ENTRY %main.1_spmd (p: bf16[6,32]) -> bf16[6,32] {
  %loop = (s32[], bf16[6,32]{1,0}) while(%init), condition=%more, body=%body
  %start = (f32[6,2]{1,0}, f32[6,8]{1,0}) all-gather-start(%q), channel_id=5, replica_groups=GROUPS, dimensions={1}
  %done = f32[6,8]{1,0} all-gather-done(%start)
  ROOT %out = bf16[6,32]{1,0} get-tuple-element(%loop), index=1
}
"""
GROUPS = {
    "mesh['expert'=2,'tensor'=4] {'tensor'}": ("tensor",),
    "mesh['expert'=2,'tensor'=4] {'expert','tensor'}": ("expert", "tensor"),
    "{{0,1,2,3},{4,5,6,7}}": ("tensor",),
    "{{0,4},{1,5},{2,6},{3,7}}": ("expert",),
    "[2,4]<=[8]": ("tensor",),
    "[4,2]<=[2,4]T(1,0)": ("expert",),
    "[1,8]<=[8]": ("expert", "tensor"),
}


@pytest.mark.parametrize("groups", GROUPS)
def test_calls_count_as_often_as_they_run(groups: str) -> None:
    axes = GROUPS[groups]
    found = collectives_of(MODULE.replace("GROUPS", groups), MESH)
    assert found.always == (
        Collective("all-reduce", axes, 6 * 32 * 2, 2),
        Collective("all-reduce", axes, 6 * 3 * 4),
        Collective("all-gather", axes, 6 * 8 * 4),
    )
    assert found.branches == (Collective("all-gather", axes, 6 * 8 * 4),)


def test_what_is_scattered_is_told_whole() -> None:
    line = "  %mine = bf16[3,32]{1,0} reduce-scatter(%x), replica_groups={{0,4},{1,5}}, dimensions={0}, to_apply=%sum\n"
    found = collectives_of("ENTRY %main (x: bf16[6,32]) -> bf16[3,32] {\n" + line + "}\n", MESH)
    assert found.always == (Collective("reduce-scatter", ("expert",), 6 * 32 * 2),)


def test_a_program_without_any() -> None:
    assert collectives_of(MODULE.split("ENTRY")[0], MESH).always == ()
