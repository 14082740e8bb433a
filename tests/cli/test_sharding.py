"""`octavo sharding explain`, against sizes worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from server.cli import main


def explained(capsys: pytest.CaptureFixture[str], *argv: str) -> dict:
    assert main(["sharding", "explain", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_llama_70b_over_eight(capsys: pytest.CaptureFixture[str]) -> None:
    found = explained(capsys, "llama-3.1-70b", "--chip", "v6e", "--devices", "8")
    rows = {row["name"]: row for row in found["parameters"]}
    assert rows["layers.*.qkv (80)"]["bytes"] == 80 * 8192 * (64 + 2 * 8) * 128 * 2 // 8
    assert rows["layers.*.attn_norm (80)"]["bytes"] == 80 * 8192 * 4, "on every device"
    assert found["token_bytes"] == 80 * 2 * 128 * 2, "one KV head of eight"
    weights = sum(row["bytes"] for row in found["parameters"])
    assert 70_553_706_496 * 2 // 8 < weights < found["held_bytes"]


def test_what_overrides_cut_names_their_pattern(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("mesh: {t: 8}\nrules:\n- kv_heads: t\n- mlp: t\n- vocab: t\noverrides:\n"
                    "- embed: {vocab: null}\n- layers.7*.*: {mlp: null}\n")  # fmt: skip
    argv = ("llama-3.1-70b", "--chip", "v6e", "--sharding", str(path), "--devices", "8")
    rows = {(row["name"], row["override"]): row for row in explained(capsys, *argv)["parameters"]}
    assert rows["embed", "embed"]["bytes"] == 128256 * 8192 * 2
    assert rows["lm_head", None]["bytes"] == 128256 * 8192 * 2 // 8
    down = 28672 * 8192 * 2
    assert rows["layers.*.down (11)", "layers.7*.*"]["bytes"] == 11 * down
    assert rows["layers.*.down (69)", None]["bytes"] == 69 * down // 8
    assert ("layers.*.qkv (80)", None) in rows, "which has nothing that the override cuts"
    assert main(["sharding", "explain", *argv]) == 0
    assert "by layers.7*.*" in capsys.readouterr().out


def test_packed_weights_are_cut_with_their_scales(capsys: pytest.CaptureFixture[str]) -> None:
    found = explained(capsys, "llama-3.1-8b", "--devices", "4", "--quantization", "int8")
    rows = {row["name"]: row for row in found["parameters"]}
    # Rows are cut, and the one scale a column is on every device.
    assert rows["layers.*.down (32)"]["bytes"] == 32 * (14336 // 4 * 4096 + 4096 * 4)


def test_the_table_says_what_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sharding", "explain", "llama-3.1-70b", "--chip", "v6e", "--devices", "2"]) == 0
    assert "does not fit: 39.02 GB too many" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["llama-3.1-70b", "--devices", "16"], "kv_heads 8 does not divide over tensor=16; rules tried: kv_heads"),
        (["llama-3.1-70b", "--chip", "v9"], "chip: 'v9' is not in the table: v5e"),
        (["llama-3.1-70b", "--sharding", "tpp"], "did you mean tp?"),
    ],
)
def test_what_is_wrong_is_named(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sharding", "explain", *argv]) == 1
    assert message in capsys.readouterr().err


def test_a_checkpoint_at_hand(capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(__file__).parent.parent / "fixtures" / "models" / "llama"
    found = explained(capsys, str(folder), "--sharding", "single")
    assert {row["cut"] for row in found["parameters"]} == {"(None,)", "(None, None)"}
