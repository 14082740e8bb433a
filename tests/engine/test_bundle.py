"""Bundles: what was compiled for something else, damaged, or open to others is refused with the reason."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.bundle import MANIFEST, Bundle, beside, bundle_of, fits, open_bundle, write_bundle
from engine.config import EngineOptions
from engine.errors import InvalidParam, ModelError
from engine.executables import NoProgramCache, compile_all
from engine.llm import LLM
from engine.program_key import ProgramKey, program_key
from engine.start import write_programs
from server.commands import compile as command
from server.commands.options import CompileOptions
from tests.conftest import ROOT
from tests.engine.fakes import CONFIG, config
from tests.engine.test_executables import EXPECTED, compiles, program, run
from tests.engine.world import MODEL
from tests.model import models

OWNERS = (os.getuid(),)
KEY = program_key("engine.programs", model=MODEL, config=CONFIG)


def silent(phase: str, done: int, of: int) -> None:
    pass


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "made"
    seen: list[tuple[str, int, int]] = []
    programs = [program("a"), program("b")]
    sizes = write_bundle(folder, KEY, programs, NoProgramCache(), lambda *report: seen.append(report))
    assert list(sizes) == ["a", "b"] and seen == [("compile", 1, 2), ("compile", 2, 2)]
    assert sorted(os.listdir(folder.parent)) == ["made"], "nothing partial is left"
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "bundle")


def load(folder: Path) -> Any:
    return open_bundle(folder, OWNERS).load(program("a"))


def test_programs_of_a_bundle_are_not_compiled(made: Path) -> None:
    bundle = open_bundle(made, OWNERS)
    assert bundle.key == KEY and bundle.num_pages == CONFIG.num_pages
    found, num = compiles(lambda: compile_all([program("a"), program("b")], bundle, silent))
    assert num == 0 and all(run(executable) == EXPECTED for executable in found.values())
    assert found["a"].memory().aliased == 24


def changed(name: str, value: str) -> ProgramKey:
    return ProgramKey({**KEY.fields, name: value})


OTHERS: dict[str, tuple[Callable[[], ProgramKey], str]] = {
    "jax": (lambda: changed("jax", "0.11.2"), r"^jax: .* there, 0\.11\.2 here$"),
    "chip": (lambda: changed("device", "TPU v6 lite"), r"^device: cpu there, TPU v6 lite here$"),
    "devices": (lambda: changed("devices", "8"), r"^devices: \d there, 8 here$"),
    "flags": (lambda: changed("XLA_FLAGS", "--xla_x"), "^XLA_FLAGS: .* there, --xla_x here$"),
    "cpu": (lambda: changed("cpu features", "fpu"), "^cpu features: .* there, not here$"),
    "source": (lambda: changed("source of engine.steps", "0"), r"^source of engine\.steps: \w+ there, 0 here$"),
    "config": (
        lambda: program_key("engine.programs", model=MODEL, config=config(page_size=8)),
        "^config.page_size: 4 there, 8 here$",
    ),
    "model": (
        lambda: program_key("engine.programs", model=dataclasses.replace(MODEL, vocab_size=7), config=CONFIG),
        r"^model.vocab_size: \d+ there, 7 here$",
    ),
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_was_made_for_something_else_is_refused_by_field(
    what: str, made: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make, expected = OTHERS[what]
    bundle, here = open_bundle(made, OWNERS), make()
    (reason,) = bundle.key.refusals(here)
    assert re.match(expected, reason)
    with pytest.raises(ModelError, match="programs of something else"):
        fits(EngineOptions(programs=str(made)), bundle, here)
    with caplog.at_level(logging.WARNING):
        assert not fits(EngineOptions(), bundle, here), "one that nobody named is passed over"
    assert reason in caplog.text


def test_a_better_cpu_and_what_only_the_host_reads_refuse_nothing() -> None:
    more = changed("cpu features", f"{KEY.fields['cpu features']} avx1024")
    other = config(overlap=True, seed=5, max_queued_requests=7, enable_prefix_caching=False)
    assert KEY.refusals(more) == [] and more.refusals(KEY) == ["cpu features: avx1024 there, not here"]
    assert program_key("engine.programs", model=MODEL, config=other) == KEY


def test_many_reasons_are_counted() -> None:
    reasons = KEY.refusals(ProgramKey({}))
    assert len(reasons) == 9 and reasons[-1] == f"and {len(KEY.fields) - 8} more"


def flip(folder: Path) -> None:
    data = bytearray((folder / "a.bin").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "a.bin").write_bytes(data)


def link(folder: Path) -> None:
    (folder / "a.bin").rename(folder / "real.bin")
    (folder / "a.bin").symlink_to(folder / "real.bin")


def forget(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["programs"]["a"]
    (folder / MANIFEST).write_text(json.dumps(manifest))


def age(folder: Path) -> None:
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace('"format": 1', '"format": 0'))


HARM: dict[str, tuple[Callable[[Path], object], str]] = {
    "byte": (flip, "a.bin: is damaged"),
    "link": (link, "a.bin: cannot be read"),
    "missing file": (lambda folder: (folder / "a.bin").unlink(), "a.bin: cannot be read"),
    "missing program": (forget, "has no program a"),
    "manifest": (lambda folder: (folder / MANIFEST).write_text("{}"), "is no manifest"),
    "format": (age, "another format"),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), f"{MANIFEST}: cannot be read"),
    "no folder": (shutil.rmtree, "no such folder"),
    "folder for all": (lambda folder: folder.chmod(0o777), "writable by you alone"),
    "file for a group": (lambda folder: (folder / "a.bin").chmod(0o664), "a.bin: .*writable by you alone"),
    "manifest for all": (lambda folder: (folder / MANIFEST).chmod(0o666), f"{MANIFEST}: .*writable by you alone"),
}


@pytest.mark.parametrize("harm", HARM)
def test_what_cannot_be_trusted_is_not_loaded(harm: str, folder: Path) -> None:
    do, reason = HARM[harm]
    assert run(load(folder)) == EXPECTED
    do(folder)
    with pytest.raises(ModelError, match=reason):
        load(folder)


@pytest.mark.parametrize("name", [".", "a.bin", MANIFEST])
def test_what_belongs_to_somebody_else_is_not_loaded(name: str, folder: Path) -> None:
    if os.getuid():
        with pytest.raises(ModelError, match="it must be yours"):
            open_bundle(folder, (os.getuid() + 1,))
        return
    os.chown(folder / name, 12345, -1)
    with pytest.raises(ModelError, match="it must be yours"):
        load(folder)


def test_nobody_is_made_to_use_a_bundle_that_he_did_not_name(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = folder.with_name("model.gguf")
    assert bundle_of(EngineOptions(), model) is None
    folder.rename(beside(model))
    found = bundle_of(EngineOptions(), model)
    assert isinstance(found, Bundle) and found.folder == beside(model)
    assert bundle_of(EngineOptions(compile_cache=False), model) is None
    found.folder.chmod(0o777)
    with caplog.at_level(logging.WARNING):
        assert bundle_of(EngineOptions(), model) is None
    assert "writable by you alone" in caplog.text
    with pytest.raises(ModelError, match="writable by you alone"):
        bundle_of(EngineOptions(programs=str(found.folder)), model)


def test_a_bundle_is_written_in_the_place_of_a_bundle_and_of_nothing_else(folder: Path) -> None:
    write_bundle(folder, KEY, [program("c")], NoProgramCache(), silent)
    assert sorted(os.listdir(folder)) == [MANIFEST, "c.bin"]
    (folder / MANIFEST).unlink()
    with pytest.raises(ModelError, match="holds something else"):
        write_bundle(folder, KEY, [program("c")], NoProgramCache(), silent)
    assert os.listdir(folder) == ["c.bin"]


SERVED: dict[str, Any] = {
    "dtype": "float32", "skip_tokenizer_init": True, "max_model_len": 64, "max_num_seqs": 2, "page_size": 8,
    "max_num_batched_tokens": 32, "compile_cache": False,
}  # fmt: skip
SERVE = """
import json, sys
from engine.llm import LLM
from engine.request import SamplingParams
llm = LLM(sys.argv[1], programs=sys.argv[2], **json.loads(sys.argv[3]))
prompt = {"prompt_token_ids": json.loads(sys.argv[4])}
(out,) = llm.generate([prompt], SamplingParams(max_tokens=8, temperature=0, ignore_eos=True))
unneeded = [name for name in ("jax.experimental.pallas.mosaic_gpu", "huggingface_hub", "orbax") if name in sys.modules]
print(json.dumps([llm.engine.stats().compiles, list(out.outputs[0].token_ids), unneeded]))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a real model, by the command."""
    folder = tmp_path_factory.mktemp("served") / "programs"
    options = EngineOptions(model=str(models.FOLDER / "llama"), **SERVED)
    assert command.run(options, CompileOptions(out=str(folder))) == 0
    return folder


def test_a_model_is_served_from_a_bundle_without_compiling_anything(compiled: Path) -> None:
    """In a process of its own: nothing is there from before, and no eager operation compiles either."""
    (expected, *_) = models.expected("llama")
    arguments = [str(models.FOLDER / "llama"), str(compiled), json.dumps(SERVED), json.dumps(expected.prompt)]
    done = subprocess.run(
        [sys.executable, "-c", SERVE, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    num_compiles, token_ids, unneeded = json.loads(done.stdout.splitlines()[-1])
    assert unneeded == [], "half a second of imports that a CPU and a local model have no use for"
    assert num_compiles == 0 and token_ids == expected.greedy[:8]


def test_options_that_a_bundle_was_not_made_for_are_named(compiled: Path) -> None:
    served: dict[str, Any] = {"programs": str(compiled), **SERVED}
    other: dict[str, Any] = {**served, "max_num_seqs": 3}
    with pytest.raises(ModelError, match=r"config\.max_num_seqs: 2 there, 3 here"):
        LLM(str(models.FOLDER / "llama"), **other)
    with pytest.raises(ModelError, match=r"model\.family: 'llama' there, 'qwen3' here"):
        LLM(str(models.FOLDER / "qwen3"), **served)
    with pytest.raises(InvalidParam, match="programs"):
        write_programs(EngineOptions(model=str(models.FOLDER / "llama"), **served), None, silent)
