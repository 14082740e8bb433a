"""The errors that cross a layer border. Each names its cause in words a user can act on."""

from __future__ import annotations


class OctavoError(Exception):
    """Base of every error that a user may see. `str(error)` is the whole message."""


class InvalidParam(OctavoError, ValueError):
    """A request or option field has a value that cannot be honoured."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(f"{param}: {message}")
        self.param = param
        self.message = message


class ContextOverflow(InvalidParam):
    """Prompt plus requested output cannot fit the model or the KV cache, even alone."""


class ModelError(OctavoError):
    """A model's files, config or weights cannot be used; the message names file and field."""


class CapacityError(OctavoError):
    """The model or its KV cache does not fit the memory that it was given."""


class QueueFull(OctavoError):
    """The engine's bounded queue is full; try again in `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineStopped(OctavoError):
    """The engine is draining or dead and takes no more requests."""
