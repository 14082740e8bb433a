"""Compiled programs on disk: same results, nobody else's code, and no harm from a damaged file."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from threading import Thread
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.errors import ModelError
from engine.executables import (
    Executable,
    NoProgramCache,
    Program,
    ProgramCache,
    compile_all,
    compile_one,
    count_compiles,
    packed,
)
from engine.program_key import program_key, sources_of
from engine.stats import Counters
from tests.engine.fakes import CONFIG, config

SHAPE = jax.ShapeDtypeStruct((3,), jnp.float32)


def program(name: str = "double") -> Program:
    """Trees in and out, the second input donated."""

    def double(x: dict[str, Any], state: tuple[Any, Any]) -> tuple[Any, Any]:
        return (state[0] + x["a"], state[1] * 2), x["b"] - x["a"]

    return Program(
        name, double, ({"b": SHAPE, "a": SHAPE}, (SHAPE, SHAPE)), donated=(1,), outputs=((SHAPE, SHAPE), SHAPE)
    )


def run(executable: Executable) -> list[list[float]]:
    a, b, c, d = (jnp.asarray([i, i + 1, i + 2], jnp.float32) for i in (1, 10, 100, 1000))
    state, out = executable([a, b], [c, d])  # leaves of a dict come by name
    assert executable.structures == [jax.tree.structure((0, 0)), jax.tree.structure(0)]
    return [np.asarray(x).tolist() for x in (*state, *out)]


EXPECTED = [[101.0, 103.0, 105.0], [2000.0, 2002.0, 2004.0], [9.0, 9.0, 9.0]]


def cache(root: Path, **facts: Any) -> ProgramCache:
    return ProgramCache(root, program_key("engine.programs", **(facts or {"config": CONFIG})))


def compiles(function: Any) -> tuple[Any, int]:
    """What `function` returns and how many compilations JAX reports meanwhile."""
    counters = Counters()
    count_compiles(counters)
    return function(), counters.compiles


def saved(root: Path) -> Path:
    compile_one(program(), cache(root))
    (path,) = root.glob("programs/*/double.bin")
    return path


def test_a_program_is_compiled_once_and_loaded_later(tmp_path: Path) -> None:
    first, num_first = compiles(lambda: compile_one(program(), cache(tmp_path)))
    second, num_second = compiles(lambda: compile_one(program(), cache(tmp_path)))
    assert (num_first, num_second) == (1, 0)
    assert run(first) == run(second) == EXPECTED
    assert first.memory().aliased == second.memory().aliased == 24, "donation survives the disk"
    left = sorted(path.name for path in cache(tmp_path).folder.iterdir())
    assert left == [".double.lock", "double.bin"], "no partial files are left"


def test_processes_that_start_together_compile_once(tmp_path: Path) -> None:
    """The second waits for the first, and loads what that one saved."""
    mine, found = cache(tmp_path), []
    with mine.alone(program()):
        other = Thread(target=lambda: found.append(compile_one(program(), cache(tmp_path))))
        other.start()
        other.join(timeout=0.3)
        assert other.is_alive() and not found
        mine.keep("double", packed(compile_one(program(), NoProgramCache())))
        later = Counters()
        count_compiles(later)
    other.join(timeout=60)
    assert run(found[0]) == EXPECTED and later.compiles == 0


def test_compile_all_reports_and_names(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    found = compile_all(
        [program("a"), program("b")], cache(tmp_path), lambda phase, done, of: seen.append((phase, done, of))
    )
    assert list(found) == ["a", "b"] and seen == [("compile", done, 2) for done in range(3)]
    assert all(run(executable) == EXPECTED for executable in found.values())


def test_without_cache_nothing_is_kept(tmp_path: Path) -> None:
    assert run(compile_one(program(), NoProgramCache())) == EXPECTED
    assert compiles(lambda: compile_one(program(), NoProgramCache()))[1] == 1


def test_whatever_shapes_the_code_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = {cache(tmp_path, config=c).folder for c in (CONFIG, config(page_size=8), config(num_pages=34))}
    assert len(folders) == 3 and cache(tmp_path, config=config()).folder in folders
    monkeypatch.setenv("XLA_FLAGS", "--xla_something")
    assert cache(tmp_path, config=CONFIG).folder not in folders


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
@pytest.mark.parametrize("which", ["folder", "parent"])
def test_a_folder_that_others_can_write_is_refused(tmp_path: Path, mode: int, which: str) -> None:
    path = saved(tmp_path)
    folder = path.parent if which == "folder" else path.parent.parent
    folder.chmod(mode)
    with pytest.raises(ModelError, match="writable by you alone"):
        compile_one(program(), cache(tmp_path))
    path.unlink()
    with pytest.raises(ModelError, match="writable by you alone"):
        compile_one(program(), cache(tmp_path))


def test_the_folder_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        folder = saved(tmp_path).parent
    finally:
        os.umask(old)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert run(compile_one(program(), cache(tmp_path))) == EXPECTED


def damage_cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def damage_empty(data: bytes) -> bytes:
    return b""


def damage_flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize("damage", [damage_cut, damage_empty, damage_flip])
def test_a_damaged_file_is_compiled_again(tmp_path: Path, damage: Any, caplog: pytest.LogCaptureFixture) -> None:
    path = saved(tmp_path)
    sound = path.read_bytes()
    path.write_bytes(damage(sound))
    with caplog.at_level(logging.WARNING):
        again, num = compiles(lambda: compile_one(program(), cache(tmp_path)))
    assert num == 1 and run(again) == EXPECTED and "damaged" in caplog.text
    assert compiles(lambda: compile_one(program(), cache(tmp_path)))[1] == 0, "the file is whole again"


def test_a_wrong_shape_is_an_error_and_not_a_compilation() -> None:
    executable = compile_one(program(), NoProgramCache())
    long = [jnp.zeros(4, jnp.float32)] * 2

    def wrong() -> None:
        with pytest.raises(TypeError, match="compiled with"):
            executable(long, long)

    assert compiles(wrong)[1] == 0


def test_compiles_after_ready_are_counted_apart() -> None:
    counters = Counters()
    count_compiles(counters)
    compile_one(program(), NoProgramCache())
    assert (counters.compiles, counters.compiles_after_ready) == (1, 0) and counters.compile_s > 0
    counters.ready = True
    compile_one(program(), NoProgramCache())
    assert (counters.compiles, counters.compiles_after_ready) == (2, 1)


def test_the_cache_key_holds_what_shapes_programs_and_no_more() -> None:
    sources = sources_of("engine.programs")
    assert {"engine.steps", "engine.sampler", "engine.model.decoder", "pallas_kernels.kv_write.api"} <= set(sources)
    assert "pallas_kernels.paged_attention.reference" in sources and "sharding.params" in sources
    assert "pallas_kernels.paged_attention.gpu_kernel" in sources, "what is imported where it is needed counts too"
    assert not {"engine.loop", "engine.scheduler", "engine.text"} & set(sources), "editing these recompiles nothing"


def test_the_cache_key_holds_tuned_block_sizes(tmp_path: Path) -> None:
    op = tmp_path / "pallas_kernels" / "op"
    op.mkdir(parents=True)
    (op / "__init__.py").write_text("from pallas_kernels.op import api\n")
    (op / "api.py").write_text("")
    before = sources_of("pallas_kernels.op", tmp_path)
    (op / "tuned.json").write_text("{}")
    after = sources_of("pallas_kernels.op", tmp_path)
    assert set(after) - set(before) == {"pallas_kernels.op/tuned.json"} and "pallas_kernels.op.api" in before
