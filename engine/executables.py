"""The closed set of compiled programs: lowered, compiled in threads, kept on disk, called flat.

A program is called with flat lists of arrays, so a call costs no tree traversal; it is a
`Compiled` object, so a shape it was not made for is an error and never a compilation.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax import Array
from jax.experimental import serialize_executable
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from engine.errors import CapacityError, ModelError
from engine.program_key import ProgramKey
from engine.stats import Counters

log = logging.getLogger("octavo.engine")
Report = Callable[[str, int, int], None]  # phase, how much of it is done, of how much
Shapes = jax.ShapeDtypeStruct


@dataclass(frozen=True)
class Program:
    """A step function with the abstract trees it takes. `outputs` has the structure it returns."""

    name: str
    function: Callable[..., Any]
    inputs: tuple[Any, ...]
    donated: tuple[int, ...]  # indices into inputs
    outputs: tuple[Any, ...]
    mesh: Mesh | None = None  # the function is mapped over it, and sees one device's share of what is cut
    cuts: tuple[Any, Any] = ((), ())  # with a mesh: PartitionSpecs of the inputs, and of what the function returns

    def lower(self) -> jax.stages.Lowered:
        """Trace and lower with one flat argument a leaf."""
        leaves, structure = jax.tree.flatten(self.inputs)
        function = self.function
        if self.mesh is not None:
            function = jax.shard_map(
                function, mesh=self.mesh, in_specs=self.cuts[0], out_specs=self.cuts[1], check_vma=False
            )
            places = jax.tree.leaves(placed(self.mesh, self.inputs, self.cuts[0]))
            leaves = [Shapes(s.shape, s.dtype, sharding=at) for s, at in zip(leaves, places, strict=True)]
        counts = [len(jax.tree.leaves(tree)) for tree in self.inputs]
        starts = [sum(counts[:i]) for i in range(len(counts))]
        donate = [j for i in self.donated for j in range(starts[i], starts[i] + counts[i])]

        def flat(*args: Array) -> tuple[Array, ...]:
            return tuple(jax.tree.leaves(function(*jax.tree.unflatten(structure, args))))

        flat.__name__ = self.name
        return jax.jit(flat, donate_argnums=donate).lower(*leaves)


def placed(mesh: Mesh, tree: Any, cuts: Any) -> Any:
    """The sharding of every leaf of `tree`, of which `cuts` is a prefix."""
    return jax.tree.map(
        lambda cut, part: jax.tree.map(lambda _: NamedSharding(mesh, cut), part),
        cuts,
        tree,
        is_leaf=lambda node: isinstance(node, PartitionSpec),
    )


@dataclass(frozen=True)
class Memory:
    """The compiler's own account of a program, in bytes a device."""

    arguments: int
    outputs: int
    aliased: int  # outputs that live in donated arguments
    temporary: int
    code: int


class Executable:
    """A compiled program. Called with flat lists, one a tree of inputs; returns flat lists likewise."""

    def __init__(self, program: Program, compiled: jax.stages.Compiled, memory: Memory | None = None) -> None:
        """memory: what is known of it; else the compiler is asked."""
        self.name = program.name
        self.compiled = compiled
        self._memory = memory
        self._counts = [len(jax.tree.leaves(tree)) for tree in program.outputs]
        self.structures = [jax.tree.structure(tree) for tree in program.outputs]

    def __call__(self, *groups: Sequence[Any]) -> list[list[Array]]:
        flat = self.compiled(*(leaf for group in groups for leaf in group))
        out, start = [], 0
        for count in self._counts:
            out.append(list(flat[start : start + count]))
            start += count
        return out

    def memory(self) -> Memory:
        if self._memory is None:
            self._memory = _memory_of(self.compiled)
        return self._memory


def _memory_of(compiled: jax.stages.Compiled) -> Memory:
    found = compiled.memory_analysis()
    if found is None:
        return Memory(0, 0, 0, 0, 0)
    return Memory(
        found.argument_size_in_bytes,
        found.output_size_in_bytes,
        found.alias_size_in_bytes,
        found.temp_size_in_bytes,
        found.generated_code_size_in_bytes,
    )


def packed(executable: Executable) -> bytes:
    """A program as it is kept: a checksum of the rest, what memory it takes (JSON behind its length), the machine
    code."""
    payload, _, _ = serialize_executable.serialize(executable.compiled)
    head = json.dumps(dataclasses.asdict(executable.memory())).encode()
    rest = len(head).to_bytes(4, "little") + head + payload
    return hashlib.sha256(rest).digest() + rest


def is_sound(data: bytes) -> bool:
    """Whether the checksum fits: damaged machine code must never be loaded."""
    return len(data) > 36 and hashlib.sha256(memoryview(data)[32:]).digest() == data[:32]


def unpacked(program: Program, data: bytes) -> Executable:
    """The program of sound bytes. Runs what they say: they must be the user's own."""
    end = 36 + int.from_bytes(data[32:36], "little")
    num_inputs = len(jax.tree.leaves(program.inputs))
    num_outputs = len(jax.tree.leaves(program.outputs))
    in_tree = jax.tree.structure(((0,) * num_inputs, {}))
    out_tree = jax.tree.structure((0,) * num_outputs)
    # Not as many devices as the program was compiled for abort the process; the default is all there are.
    devices = jax.devices()[:1] if program.mesh is None else list(program.mesh.devices.flat)
    loaded = serialize_executable.deserialize_and_load(data[end:], in_tree, out_tree, execution_devices=devices)
    return Executable(program, loaded, Memory(**json.loads(data[36:end])))


class ProgramCache:
    """Compiled programs on disk, in a folder that only its owner can write.

    Loading one runs its machine code, so a folder that others could write is refused.
    The folder's name is a digest of everything that shapes the code.
    """

    keeps = True

    def __init__(self, root: Path, key: ProgramKey) -> None:
        self.folder = root / "programs" / key.digest

    def load(self, program: Program) -> Executable | None:
        """The program from disk; None when it is not there or its file is damaged."""
        data = self.read(program.name)
        return None if data is None else unpacked(program, data)

    def read(self, name: str) -> bytes | None:
        """The program's file as `packed` made it; None when it is not there or damaged."""
        path = self.folder / f"{name}.bin"
        if not path.exists():
            return None
        self._check_owner()
        data = path.read_bytes()
        if is_sound(data):
            return data
        log.warning("%s is damaged; the program is compiled again", path)
        return None

    @contextmanager
    def alone(self, program: Program) -> Iterator[None]:
        """While inside, no other process that starts with this cache compiles the program."""
        self._make()
        with (self.folder / f".{program.name}.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:  # a network file system without locks
                log.warning("%s: processes that start together compile the same programs: %s", self.folder, error)
            yield

    def keep(self, name: str, data: bytes) -> None:
        """Store what `packed` made of the program."""
        self._make()
        partial = self.folder / f".{name}.{os.getpid()}"
        partial.write_bytes(data)
        partial.rename(self.folder / f"{name}.bin")

    def _make(self) -> None:
        self.folder.parent.parent.mkdir(parents=True, exist_ok=True)
        for folder in (self.folder.parent, self.folder):  # a mode given with `parents` is the last one's alone
            folder.mkdir(exist_ok=True, mode=0o700)
        self._check_owner()

    def _check_owner(self) -> None:
        for folder in (self.folder, self.folder.parent):
            owned(folder.stat(), folder, (os.getuid(),))


class NoProgramCache(ProgramCache):
    """Nothing is kept."""

    def __init__(self) -> None:
        pass

    keeps = False

    def load(self, program: Program) -> Executable | None:
        return None

    def read(self, name: str) -> bytes | None:
        return None

    @contextmanager
    def alone(self, program: Program) -> Iterator[None]:
        yield

    def keep(self, name: str, data: bytes) -> None:
        pass


def owned(info: os.stat_result, path: Path, owners: tuple[int, ...]) -> None:
    """Raises ModelError where somebody else could have written what is at `path`."""
    if info.st_uid not in owners or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ModelError(f"{path}: compiled programs are code; it must be yours and writable by you alone")


def count_compiles(counters: Counters) -> None:
    """Count the process's compilations into `counters`, as JAX itself reports them."""

    def heard(event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            counters.compiles += 1
            counters.compile_s += duration_secs
            counters.compiles_after_ready += counters.ready

    jax.monitoring.register_event_duration_secs_listener(heard)


class Compiling:
    """Programs on their way, loaded or compiled, a thread a core: whoever began it may do something else meanwhile.

    A context, at whose end nothing is left to do.
    """

    def __init__(self, programs: Sequence[Program], cache: ProgramCache) -> None:
        self._pool = ThreadPoolExecutor(max_workers=os.cpu_count() or 1)
        self._coming = [self._pool.submit(compile_one, program, cache) for program in programs]

    def __enter__(self) -> Compiling:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def result(self, report: Report) -> dict[str, Executable]:
        """All of them, by their names; raises as compiling did."""
        done: dict[str, Executable] = {}
        for future in self._coming:
            report("compile", len(done), len(self._coming))
            executable = future.result()
            done[executable.name] = executable
        report("compile", len(done), len(done))
        return done


def compile_all(programs: Sequence[Program], cache: ProgramCache, report: Report) -> dict[str, Executable]:
    """Every program, loaded or compiled; keys are the programs' names."""
    with Compiling(programs, cache) as compiling:
        return compiling.result(report)


def compile_one(program: Program, cache: ProgramCache) -> Executable:
    if (loaded := cache.load(program)) is not None:
        return loaded
    with cache.alone(program):
        if (loaded := cache.load(program)) is not None:
            return loaded
        executable = _compiled(program)
        if cache.keeps:
            cache.keep(program.name, packed(executable))
    return executable


def compile_packed(program: Program, cache: ProgramCache) -> bytes:
    """The program as `packed` makes it, compiled where the cache does not have it; it is not loaded."""
    with cache.alone(program):
        data = cache.read(program.name)
        if data is None:
            data = packed(_compiled(program))
            cache.keep(program.name, data)
    return data


# A CPU's compiler leaves out roundings to bfloat16 where it fuses what is before and behind them, which differs from
# program to program: a token's bits would depend on what it is batched with.
_OPTIONS = {"cpu": {"xla_allow_excess_precision": False}}


def _compiled(program: Program) -> Executable:
    try:
        options = _OPTIONS.get(jax.default_backend())
        return Executable(program, program.lower().compile(options))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error) or "exceeds available" in str(error):
            raise CapacityError(
                f"program {program.name} does not fit the device: {str(error).splitlines()[0]}"
            ) from error
        raise
