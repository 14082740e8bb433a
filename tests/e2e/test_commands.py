"""The commands of the terminal with the real model: what they print is what the engine says."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from engine import LLM, SamplingParams
from tests.e2e.serving import COMMAND, MODEL, OPTIONS, ROOT, Served, flags, octavo, running

pytestmark = pytest.mark.model

PROMPT = "The capital of France is"
ENGINE = flags(**OPTIONS)


def test_generate(llm: LLM) -> None:
    done = octavo("generate", PROMPT, "--temperature", "0", "--max-tokens", "20", *ENGINE)
    assert done.returncode == 0, done.stderr
    assert done.stdout == llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=20))[0].outputs[0].text + "\n"


@pytest.mark.slow
def test_chat_from_a_pipe(llm: LLM, tmp_path: Path) -> None:
    """Two questions with a system message; all options come from a file that `serve` could read, too."""
    config = tmp_path / "octavo.yaml"
    config.write_text(yaml.safe_dump(OPTIONS | {"model": MODEL, "temperature": 0, "max_tokens": 16, "port": 8000}))
    asked = ["Name a colour.", "Name another one."]
    done = octavo("chat", "--config", str(config), "--system", "Be brief.", text="\n".join(asked) + "\n")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "port" in done.stderr  # passed over with a note
    history: list[dict[str, Any]] = [{"role": "system", "content": "Be brief."}]
    said = ""
    for question in asked:
        history.append({"role": "user", "content": question})
        answer = llm.chat(history, SamplingParams(temperature=0, max_tokens=16))[0].outputs[0].text
        history.append({"role": "assistant", "content": answer})
        said += answer + "\n"
    assert done.stdout == said


@pytest.mark.slow
def test_batch_is_killed_and_resumed(server: Served, http: httpx.Client, tmp_path: Path) -> None:
    """kill -9 in the middle, a torn last line, the same command again: every result once, and none different."""
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    bodies = [{"prompt": f"{i}, {i + 1}, ", "max_tokens": 24, "seed": i, "temperature": i % 2} for i in range(40)]
    lines = [
        {"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions", "body": body}
        for i, body in enumerate(bodies)
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    argv = ["batch", "-i", str(source), "-o", str(out), "--max-in-flight", "4", "--no-progress", *ENGINE]
    process = subprocess.Popen([*COMMAND, *argv], cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        deadline_s = time.monotonic() + 300
        while not out.exists() or out.read_bytes().count(b"\n") < 5:
            assert process.poll() is None and time.monotonic() < deadline_s
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    kept = [line for line in out.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    assert 5 <= len(kept) < 40
    with out.open("ab") as file:
        file.write(b'{"id": "batch_req_')
    done = octavo(*argv)
    assert done.returncode == 0 and "40 of 40 results" in done.stderr, done.stderr
    found = out.read_bytes().splitlines(keepends=True)
    assert found[: len(kept)] == kept and len(found) == 40
    texts = {r["custom_id"]: r["response"]["body"]["choices"][0]["text"] for r in map(json.loads, found)}
    wanted = [http.post("/v1/completions", json=body).json()["choices"][0]["text"] for body in bodies]
    assert [texts[f"r{i}"] for i in range(40)] == wanted


@pytest.mark.slow
def test_convert_and_serve(llm: LLM, tmp_path: Path) -> None:
    """The Orbax folder is the same model: same tokens, same tokenizer, same template."""
    folder = tmp_path / "model"
    done = octavo("convert", MODEL, str(folder), "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    messages: list[dict[str, Any]] = [{"role": "user", "content": "What is the capital of France?"}]
    with running(tmp_path, str(folder), served_model_name="converted") as served:
        fields = {"messages": messages, "temperature": 0, "max_tokens": 20, "model": "converted"}
        answer = httpx.post(served.url + "/v1/chat/completions", json=fields, timeout=60).json()
        assert [m["id"] for m in httpx.get(served.url + "/v1/models").json()["data"]] == ["converted"]
    want = llm.chat(messages, SamplingParams(temperature=0, max_tokens=20))[0]
    assert answer["choices"][0]["message"]["content"] == want.outputs[0].text
    assert answer["usage"]["prompt_tokens"] == len(want.prompt_token_ids)


def test_models_and_version() -> None:
    entries = {entry["name"]: entry for entry in map(json.loads, octavo("models", "--json").stdout.splitlines())}
    assert entries[MODEL]["downloaded"] and [name for name, entry in entries.items() if entry["default"]] == [MODEL]
    assert "jax " in octavo("version").stdout
