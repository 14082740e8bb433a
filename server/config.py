"""What a user may ask of the server. Knows nothing about the engine behind it.

The command line and the YAML file are generated from these fields, as for `EngineOptions`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from engine.config import option
from engine.errors import InvalidParam

_AT_LEAST: dict[str, float] = {
    "port": 0,
    "max_body_bytes": 1024,
    "max_header_bytes": 1024,
    "max_choices": 1,
    "body_timeout_s": 0.01,
    "join_timeout_s": 0.1,
    "shutdown_timeout_s": 0,
    "keep_alive_s": 0,
}


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """How to listen, whom to let in, and how much one request may ask for."""

    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(8000, "port to listen on; 0 picks a free one")
    served_model_name: str | None = option(None, "name that clients use (default: the model's)")
    api_key: str | None = option(None, "bearer token that every request must bring, probes excepted")
    admin_routes: bool = option(False, "answer POST /admin/reshard; for operators, with an api_key")
    multihost: bool = option(False, "one replica of several processes, of which the first serves")
    coordinator: str | None = option(
        None, "HOST:PORT of the first process; JAX's own is the next port (default: LeaderWorkerSet's or JAX's)"
    )
    num_processes: int | None = option(None, "processes of the replica")
    process_id: int | None = option(None, "of this process; 0 schedules and serves")
    join_timeout_s: float = option(120.0, "how long processes of a replica wait for each other at the start")
    max_body_bytes: int = option(8 * 2**20, "largest request body; more is answered with 413")
    max_header_bytes: int = option(64 * 2**10, "largest request line and headers together")
    max_choices: int = option(1024, "most choices (n times prompts) or texts to embed that one request may ask for")
    body_timeout_s: float = option(30.0, "time for the headers of a request, and longest pause in its body")
    shutdown_timeout_s: float = option(30.0, "time that running requests get to finish after SIGTERM")
    keep_alive_s: float = option(75.0, "how long an idle connection stays open")

    def __post_init__(self) -> None:
        for name, low in _AT_LEAST.items():
            value = getattr(self, name)
            whole = isinstance(low, int) and not name.endswith("_s")
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                raise InvalidParam(name, f"must be {'an integer' if whole else 'a number'}, got {value!r}")
            if not math.isfinite(value) or value < low:
                raise InvalidParam(name, f"must be at least {low}, got {value}")
        if self.port > 65535:
            raise InvalidParam("port", f"must be at most 65535, got {self.port}")
        if self.api_key is not None and not self.api_key:
            raise InvalidParam("api_key", "must not be empty")
