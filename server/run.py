"""`octavo serve`: the server process around a real engine, or around one process's part of it."""

from __future__ import annotations

import logging
import signal

from engine.config import EngineOptions
from engine.errors import InvalidParam, OctavoError
from engine.hosts import hosts_of
from engine.replica import Replica, detected_hosts
from engine.start import follow, load_any_engine
from server.config import ServerOptions
from server.lifecycle import ModelHandle, Report
from server.process import leave, run, say

log = logging.getLogger("octavo.server")


def serve(engine_options: EngineOptions, server_options: ServerOptions) -> int:
    """Load a model and serve it until a signal or a failure. Returns the exit code."""
    if server_options.multihost:
        return _serve_together(engine_options, server_options)
    for name in ("coordinator", "num_processes", "process_id"):
        if getattr(server_options, name) is not None:
            raise InvalidParam(name, "is for multihost")

    def launch(report: Report) -> ModelHandle:
        return _started(engine_options, report, None)

    return run(launch, server_options)


def _started(options: EngineOptions, report: Report, replica: Replica | None) -> ModelHandle:
    engine = load_any_engine(options, report, replica).start()
    say(f"{engine.model_name}: {engine.config.summary()}")
    return engine


def _serve_together(engine_options: EngineOptions, server_options: ServerOptions) -> int:
    """One process of several: the first serves, the others do as it does. Who is left alone ends at once."""
    asked = (server_options.coordinator, server_options.num_processes, server_options.process_id)
    timeout_s = server_options.join_timeout_s
    hosts = hosts_of(*asked) or detected_hosts(timeout_s)
    if hosts.index:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # the leader lets running requests finish, and then says so
        say(f"process {hosts.index} of {hosts.count}, follows {hosts.leader}:{hosts.port}")
        try:
            follow(engine_options, Replica(hosts, timeout_s, _left_alone))
        except OctavoError as error:
            _left_alone(str(error))
        except Exception as error:
            log.exception("a follower failed")
            _left_alone(f"the process failed: {type(error).__name__}")
        return 0
    replicas: list[Replica] = []

    def launch(report: Report) -> ModelHandle:
        report("wait for processes", 0, 1)
        replicas.append(Replica(hosts, timeout_s, _left_alone))
        return _started(engine_options, report, replicas[0])

    code = run(launch, server_options)
    if code or not replicas:
        leave(code)  # JAX would wait for the others, which this process's end ends
    replicas[0].leave()
    return code


def _left_alone(why: str) -> None:
    say(f"error: {why}")
    leave(1)
