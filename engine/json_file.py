"""JSON beside a model's weights: bounded, and wrong content is a ModelError that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.errors import ModelError

MAX_BYTES = 50_000_000


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises ModelError that names the file."""
    value = _read(file)
    if not isinstance(value, dict):
        raise ModelError(f"{file}: not a JSON object")
    return value


def read_json_array(file: Path) -> list[Any]:
    """A JSON array. Raises ModelError that names the file."""
    value = _read(file)
    if not isinstance(value, list):
        raise ModelError(f"{file}: not a JSON array")
    return value


def _read(file: Path) -> Any:
    try:
        if file.stat().st_size > MAX_BYTES:
            raise ModelError(f"{file}: {file.stat().st_size} bytes is too long for this file")
        return json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file}: not JSON: {error}") from error
