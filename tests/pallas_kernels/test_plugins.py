"""The plugins that run the kernel suites elsewhere: on a real device, and ahead of time with a record."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from pallas_kernels.target import CPU, Target
from tests.pallas_kernels import aot, aot_rows, on_device

H200 = Target("gpu", "h200")


def item(name: str = "test_it", path: str = "test_op.py", **params: Any) -> Any:
    marker = {"get_closest_marker": lambda name: None}
    return SimpleNamespace(name=name, path=Path(path), callspec=SimpleNamespace(params=params), **marker)


def test_interpreted_targets_of_this_platform_become_the_device() -> None:
    module: Any = ModuleType("suite")
    asked = (("op", "gpu"),)
    module.ALONE = Target("gpu", "h100", asked, interpret=True)
    module.TARGETS = {
        "reference": CPU,
        "gpu": module.ALONE,
        "tpu": Target("tpu", "v6e", interpret=True),
        "fallback": Target("gpu", "h200", (("op", "reference"),)),
    }
    before = dict(module.TARGETS)
    assert on_device.make_real(module, H200) == {"gpu"}
    assert module.ALONE == module.TARGETS["gpu"] == Target("gpu", "h200", asked)
    assert {key: value for key, value in module.TARGETS.items() if key != "gpu"} == {
        key: value for key, value in before.items() if key != "gpu"
    }


def test_only_what_uses_the_device_is_run() -> None:
    def runs(wanted: Any) -> bool:
        return on_device.runs_here(wanted, {"gpu"}, H200)

    assert runs(item(implementation="gpu", case="ragged"))
    assert not runs(item(implementation="tpu", case="ragged"))
    assert not runs(item(case="ragged"))
    assert runs(item(path="test_paged_attention_gpu.py"))
    assert not runs(item(path="test_paged_attention_tpu.py"))
    assert not runs(item("test_the_detector_notices", path="test_paged_attention_gpu.py"))


def test_vmem_is_read_off_the_kernels_line() -> None:
    other = '%fusion.1 = fusion(), "used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"999"}]'
    call = '%k = custom-call(), custom_call_target="tpu_custom_call", "used_scoped_memory_configs":[{}]'
    sized = call.replace("{}", '{"memory_space":"1","offset":"0","size":"4096"}')
    assert aot.vmem_bytes(f"{other}\n{call}\n{sized}") == 4096
    assert aot.vmem_bytes(other) is None and aot.vmem_bytes(None) is None


@pytest.mark.parametrize(
    ("path", "name", "op"),
    [
        ("tests/test_aot_stored.py", "test_weights_stay_packed[x]", "steps"),
        ("test_aot_latent_attention.py", "test_compiles[x]", "latent_attention"),
        ("test_aot_paged_attention_tpu.py", "test_attention_compiles[x]", "paged_attention"),
        ("test_aot_paged_attention_tpu.py", "test_kv_write_compiles_in_place[x]", "kv_write"),
        ("test_aot_paged_attention_gpu.py", "test_compiles[x]", "paged_attention"),
        ("test_aot_grouped_matmul.py", "test_compiles[x]", "grouped_matmul"),
    ],
)
def test_a_row_names_its_op(path: str, name: str, op: str) -> None:
    path = path if "/" in path else f"tests/pallas_kernels/{path}"
    assert aot_rows.op_of(item(name, path)) == op


def test_a_row_of_a_whole_program_says_which() -> None:
    program = item("test_step[...]", "tests/test_aot.py", chip="v6e:2x2", kind="decode")
    program.callspec.id = "llama8b-decode-v6e:2x2"
    passed: Any = SimpleNamespace(outcome="passed", passed=True, duration=1.234)
    found = aot_rows.row(program, passed)
    assert (found["op"], found["chip"], found["case"], found["seconds"]) == ("steps", "v6e", "llama8b-decode", 1.2)
