"""A replica of several processes: the leader's runner tells the others what to launch, and they do.

Every process runs the same programs over one mesh of all devices, in the same order; only the leader schedules,
reads tokens and serves.
"""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from engine.config import EngineConfig
from engine.errors import InvalidParam, OctavoError
from engine.executables import Executable
from engine.hosts import LEADER_WORKER_SET, PORT, Hosts, Lost, Peer, check_free, checked, gather, join, send_all
from engine.runner import Runner

MAX_HOST_NAME = 256  # bytes, as POSIX has it


def detected_hosts(timeout_s: float) -> Hosts:
    """Who takes part as JAX's own detection of clusters says, which joins them too. Raises InvalidParam."""
    try:
        _initialize(timeout_s)
    except (ValueError, RuntimeError) as error:
        raise InvalidParam(
            "coordinator", f"is not given; {', '.join(LEADER_WORKER_SET)} are not set, and JAX finds no cluster that "
            f"it knows (a TPU slice, SLURM, Open MPI, Kubernetes): {str(error).splitlines()[0]}",
        ) from None  # fmt: skip
    name = np.zeros(MAX_HOST_NAME, np.uint8)
    mine = socket.gethostname().encode()
    name[: len(mine)] = np.frombuffer(mine, np.uint8)
    leader = bytes(multihost_utils.broadcast_one_to_all(name)).rstrip(b"\0").decode()
    return checked(Hosts(leader, PORT, jax.process_count(), jax.process_index()))


def _initialize(timeout_s: float, *whom: Any) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from the server
    jax.distributed.initialize(*whom, initialization_timeout=round(timeout_s), shutdown_timeout_seconds=10)


class Replica:
    """This process's part of it: connected, with JAX over the devices of all."""

    def __init__(self, hosts: Hosts, timeout_s: float, lost: Lost) -> None:
        """Waits for everybody. Raises OctavoError that names who is missing after `timeout_s`."""
        self.hosts = hosts
        self.peers = [join(hosts, timeout_s, lost)] if hosts.index else gather(hosts, timeout_s, lost)
        if not jax.distributed.is_initialized():  # where JAX detected the cluster itself it is
            if self.leads:
                check_free(hosts.jax_port, "JAX's coordinator")  # jaxlib 0.12 may die of a port that is taken
            _initialize(timeout_s, f"{hosts.leader}:{hosts.jax_port}", hosts.count, hosts.index)

    @property
    def leads(self) -> bool:
        return self.hosts.index == 0

    def agree(self, config: EngineConfig) -> EngineConfig:
        """With as many pages as every process has room for. Raises OctavoError where they differ in more."""
        if config.shards.num_devices != jax.device_count():
            raise InvalidParam(
                "sharding", f"uses {config.shards.num_devices} of {jax.device_count()} devices; several processes "
                "need one that uses all of them",
            )  # fmt: skip
        if config.shards.count("layers") > 1:
            raise InvalidParam("sharding", "cuts layers into stages, which several processes cannot do yet")
        if config.num_groups > 1:
            raise InvalidParam("sharding", "divides requests into groups, which several processes cannot do yet")
        if not self.leads:
            self.peers[0].send({"op": "config", "num_pages": config.num_pages, "fields": _fields(config)})
            return replace(config, num_pages=self.peers[0].receive()[0]["num_pages"])
        pages = [config.num_pages]
        for peer in self.peers:
            theirs, _ = peer.receive()
            wrong = [name for name, value in _fields(config).items() if theirs["fields"].get(name) != value]
            if wrong:
                raise OctavoError(f"{peer.name} is configured otherwise: {_difference(config, theirs, wrong[0])}")
            pages.append(theirs["num_pages"])
        send_all(self.peers, {"op": "agreed", "num_pages": min(pages)})
        return replace(config, num_pages=min(pages))

    def leading(self, *parts: Any) -> Runner:
        """`Runner(*parts)`, of which the others repeat every launch."""
        return _LeadingRunner(self.peers, *parts)

    def follow(self, runner: Runner) -> None:
        """Launch what the leader launches, until it says that it leaves."""
        launch: dict[str, Callable[[str, np.ndarray], object]] = {
            "step": lambda name, vector: runner.step(runner.executables[name], vector),
            "configure": lambda _, vector: runner.configure(vector),
            "reset": lambda *_: runner.reset(),
        }
        while True:
            message, payload = self.peers[0].receive()
            if message["op"] == "leave":
                return
            launch[message["op"]](message.get("program", ""), np.frombuffer(payload, np.int32))

    def leave(self) -> None:
        """The leader's last words: the others end without an error."""
        for peer in self.peers:
            peer.leave()
            peer.send({"op": "leave"})


class _LeadingRunner(Runner):
    def __init__(self, peers: list[Peer], *parts: Any) -> None:
        self._peers: list[Peer] = []  # the others' runners reset themselves when they are made
        super().__init__(*parts)
        self._peers = peers

    def reset(self) -> None:
        send_all(self._peers, {"op": "reset"})
        super().reset()

    def configure(self, vector: np.ndarray) -> None:
        send_all(self._peers, {"op": "configure"}, vector.tobytes())
        super().configure(vector)

    def step(self, executable: Executable, vector: np.ndarray) -> list[jax.Array]:
        send_all(self._peers, {"op": "step", "program": executable.name}, vector.tobytes())
        return super().step(executable, vector)


def _fields(config: EngineConfig) -> dict[str, str]:
    return {f.name: repr(getattr(config, f.name)) for f in dataclasses.fields(config) if f.name != "num_pages"}


def _difference(config: EngineConfig, theirs: dict[str, Any], name: str) -> str:
    there = str(theirs["fields"].get(name))
    return f"{name} is {_fields(config)[name][:200]} here and {there[:200]} there"
