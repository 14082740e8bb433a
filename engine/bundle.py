"""A bundle: the closed set of one configuration in a folder, compiled ahead by `octavo compile`, loaded in place of
compiling. It is used for exactly what it was made for, else refused, field by field.

Loading is running code: a bundle is read from a folder that the user names, or that lies beside the checkpoint; the
folder and its files must be the user's (or, where the folder is named, root's) and writable by nobody else.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from engine.config import EngineOptions
from engine.errors import ModelError
from engine.executables import Executable, Program, ProgramCache, Report, compile_packed, owned, unpacked
from engine.program_key import ProgramKey

log = logging.getLogger("octavo.engine")
MANIFEST = "bundle.json"
FORMAT = 1


class Bundle(ProgramCache):
    """Programs of a bundle. What is not in it, or is not what was written, is a ModelError: nothing is compiled."""

    def __init__(self, folder: Path, key: ProgramKey, digests: Mapping[str, str], owners: tuple[int, ...]) -> None:
        self.folder = folder
        self.key = key
        self.digests = digests  # sha256 of each program's file
        self._owners = owners

    @property
    def num_pages(self) -> int | None:
        """Of the KV pool that the programs take; None: they take none."""
        text = self.key.fields.get("config.num_pages", "")
        return int(text) if text.isdecimal() else None

    def load(self, program: Program) -> Executable:
        path = self.folder / f"{program.name}.bin"
        if program.name not in self.digests:
            raise ModelError(f"{self.folder}: has no program {program.name}; write it anew with octavo compile")
        data = read_owned(path, self._owners)
        if hashlib.sha256(data).hexdigest() != self.digests[program.name]:
            raise ModelError(
                f"{path}: is damaged (its sha256 is not the manifest's); write it anew with octavo compile"
            )
        return unpacked(program, data)

    def alone(self, program: Program) -> AbstractContextManager[None]:
        return nullcontext()

    def keep(self, name: str, data: bytes) -> None:
        raise ModelError(f"{self.folder}: a bundle is not added to")


def beside(path: Path) -> Path:
    """Where a checkpoint's own bundle lies."""
    return path / "octavo-programs" if path.is_dir() else path.with_name(f"{path.name}.octavo-programs")


def bundle_of(options: EngineOptions, path: Path) -> Bundle | None:
    """The bundle that the user names, else the one beside the checkpoint, else None.

    Raises ModelError for a named one that cannot be trusted or read; another is passed over with a warning.
    """
    if options.programs is not None:
        return open_bundle(Path(options.programs).expanduser(), (os.getuid(), 0))
    folder = beside(path)
    if not options.compile_cache or not (folder / MANIFEST).exists():
        return None
    try:
        return open_bundle(folder, (os.getuid(),))
    except ModelError as error:
        log.warning("compiled programs beside the checkpoint are not used: %s", error)
        return None


def fits(options: EngineOptions, bundle: Bundle, key: ProgramKey) -> bool:
    """Whether the bundle is for `key`. Where it is not: ModelError for one that was named, else a warning."""
    refusals = bundle.key.refusals(key)
    if not refusals:
        return True
    why = f"{bundle.folder}: programs of something else; {'; '.join(refusals)}"
    if options.programs is not None:
        raise ModelError(why)
    log.warning("compiled programs beside the checkpoint are not used: %s", why)
    return False


def open_bundle(folder: Path, owners: tuple[int, ...]) -> Bundle:
    """The manifest of `folder`, which must belong to one of `owners`; no program is read. Raises ModelError."""
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder of compiled programs")
    owned(folder.stat(), folder, owners)
    path = folder / MANIFEST
    try:
        found = json.loads(read_owned(path, owners))
        fields, digests = found["key"], found["programs"]
        texts = [*fields.items(), *digests.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: is no manifest of compiled programs: {error}") from None
    if found.get("format") != FORMAT or not all(isinstance(text, str) for pair in texts for text in pair):
        raise ModelError(f"{path}: is a manifest of another format; write it anew with octavo compile")
    return Bundle(folder, ProgramKey(fields), digests, owners)


def read_owned(path: Path, owners: tuple[int, ...]) -> bytes:
    """A file's bytes, through one descriptor: what was looked at is what is read. No links."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            owned(os.fstat(file.fileno()), path, owners)
            return file.read()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from None


def write_bundle(
    folder: Path, key: ProgramKey, programs: Sequence[Program], cache: ProgramCache, report: Report
) -> dict[str, int]:
    """Every program, from `cache` or compiled, in a new folder, or in place of a bundle; bytes of each.

    The folder appears when all of it is there. Raises ModelError.
    """
    if folder.exists() and not (folder / MANIFEST).exists() and any(folder.iterdir()):
        raise ModelError(f"{folder} holds something else; name a new folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))  # 0700
    except OSError as error:
        raise ModelError(f"{folder}: cannot be written: {error.strerror or error}") from None
    try:
        sizes, digests = {}, {}
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            for data, program in zip(pool.map(lambda p: compile_packed(p, cache), programs), programs, strict=True):
                _write(made / f"{program.name}.bin", data)
                sizes[program.name] = len(data)
                digests[program.name] = hashlib.sha256(data).hexdigest()
                report("compile", len(sizes), len(programs))
        manifest = {"format": FORMAT, "key": dict(key.fields), "programs": digests}
        _write(made / MANIFEST, json.dumps(manifest, indent=1).encode())
        made.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        made.rename(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return sizes


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    path.chmod(0o644)  # whatever the umask: nobody else may write, whoever serves may read
