"""The closed set of compiled programs: lowered, compiled in threads, kept on disk, called flat.

A program is called with flat lists of arrays, so a call costs no tree traversal; it is a
`Compiled` object, so a shape it was not made for is an error and never a compilation.
"""

from __future__ import annotations

import ast
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
from engine.stats import Counters

log = logging.getLogger("octavo.engine")
Report = Callable[[str, int, int], None]  # phase, how much of it is done, of how much
Shapes = jax.ShapeDtypeStruct
_PACKAGES = ("engine", "pallas_kernels", "sharding")


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

    def __init__(self, program: Program, compiled: jax.stages.Compiled) -> None:
        self.name = program.name
        self.compiled = compiled
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
        found = self.compiled.memory_analysis()
        if found is None:
            return Memory(0, 0, 0, 0, 0)
        return Memory(
            found.argument_size_in_bytes,
            found.output_size_in_bytes,
            found.alias_size_in_bytes,
            found.temp_size_in_bytes,
            found.generated_code_size_in_bytes,
        )


class ProgramCache:
    """Compiled programs on disk, in a folder that only its owner can write.

    Loading one runs its machine code, so a folder that others could write is refused.
    The folder's name is a digest of everything that shapes the code.
    """

    def __init__(self, root: Path, module: str = "engine.programs", **facts: Any) -> None:
        """module: where the programs are made; its source, and all that it imports, shapes them."""
        self.folder = root / "programs" / _digest(module, facts)

    def load(self, program: Program) -> Executable | None:
        """The program from disk; None when it is not there or its file is damaged."""
        path = self.folder / f"{program.name}.bin"
        if not path.exists():
            return None
        self._check_owner()
        num_inputs = len(jax.tree.leaves(program.inputs))
        num_outputs = len(jax.tree.leaves(program.outputs))
        in_tree = jax.tree.structure(((0,) * num_inputs, {}))
        out_tree = jax.tree.structure((0,) * num_outputs)
        payload = _sound(path.read_bytes())
        if payload is None:
            log.warning("%s is damaged; the program is compiled again", path)
            return None
        # Not as many devices as the program was compiled for abort the process; the default is all there are.
        devices = jax.devices()[:1] if program.mesh is None else list(program.mesh.devices.flat)
        loaded = serialize_executable.deserialize_and_load(payload, in_tree, out_tree, execution_devices=devices)
        return Executable(program, loaded)

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

    def save(self, executable: Executable) -> None:
        self._make()
        payload, _, _ = serialize_executable.serialize(executable.compiled)
        partial = self.folder / f".{executable.name}.{os.getpid()}"
        partial.write_bytes(hashlib.sha256(payload).digest() + payload)
        partial.rename(self.folder / f"{executable.name}.bin")

    def _make(self) -> None:
        self.folder.parent.parent.mkdir(parents=True, exist_ok=True)
        for folder in (self.folder.parent, self.folder):  # a mode given with `parents` is the last one's alone
            folder.mkdir(exist_ok=True, mode=0o700)
        self._check_owner()

    def _check_owner(self) -> None:
        for folder in (self.folder, self.folder.parent):
            info = folder.stat()
            if info.st_uid != os.getuid() or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise ModelError(
                    f"{folder}: compiled programs are code; the folder must be yours and writable by you alone"
                )


class NoProgramCache(ProgramCache):
    """Nothing is kept."""

    def __init__(self) -> None:
        pass

    def load(self, program: Program) -> Executable | None:
        return None

    @contextmanager
    def alone(self, program: Program) -> Iterator[None]:
        yield

    def save(self, executable: Executable) -> None:
        pass


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
        cache.save(executable)
    return executable


def _compiled(program: Program) -> Executable:
    try:
        return Executable(program, program.lower().compile())
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error) or "exceeds available" in str(error):
            raise CapacityError(
                f"program {program.name} does not fit the device: {str(error).splitlines()[0]}"
            ) from error
        raise


def _digest(module: str, facts: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    device = jax.devices()[0]
    environment = (
        jax.__version__,
        device.platform,
        device.device_kind,
        device.client.platform_version,
        jax.device_count(),
    )
    digest.update(json.dumps([environment, {k: repr(v) for k, v in sorted(facts.items())}]).encode())
    digest.update(os.environ.get("XLA_FLAGS", "").encode())
    if device.platform == "cpu":
        digest.update(_cpu_features().encode())
    for name, source in sorted(sources_of(module).items()):
        digest.update(name.encode() + source)
    return digest.hexdigest()[:32]


def sources_of(module: str, root: Path = Path(__file__).parent.parent) -> dict[str, bytes]:
    """What can shape a module's programs: every module of ours that it imports, directly or not, and the data
    beside them (tuned block sizes)."""
    found: dict[str, bytes] = {}
    todo = [module]
    while todo:
        name = todo.pop()
        path = root.joinpath(*name.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if name in found or name.split(".")[0] not in _PACKAGES or not path.exists():
            continue
        found[name] = path.read_bytes()
        if path.name == "__init__.py":
            found |= {f"{name}/{data.name}": data.read_bytes() for data in sorted(path.parent.glob("*.json"))}
        for node in ast.parse(found[name]).body:  # not what is imported late or for types
            if isinstance(node, ast.Import):
                todo += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                todo += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def _sound(data: bytes) -> bytes | None:
    """What follows the checksum, if it fits: damaged machine code must never be loaded."""
    checksum, payload = data[:32], data[32:]
    return payload if hashlib.sha256(payload).digest() == checksum else None


def _cpu_features() -> str:
    """Machine code of one CPU may not run on another."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
