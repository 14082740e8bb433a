"""Several processes as one replica: who takes part, and frames from the one that leads to those that follow.

One TCP connection a follower. A frame is a JSON object and the bytes of an int32 vector; every process sends a
sign of life each second, so that a silent peer is as lost as one that hung up. Knows nothing of models or devices.
The connections are not encrypted, as JAX's own between processes are not: a private network is theirs to be in.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import InvalidParam, OctavoError

SILENCE_S = 10.0  # without a sign of life a peer counts as lost
PULSE_S = 1.0
MAX_HEADER, MAX_PAYLOAD = 1 << 20, 1 << 28
PORT = 8476  # of the leader, where no flag says another
LEADER_WORKER_SET = ("LWS_LEADER_ADDRESS", "LWS_GROUP_SIZE", "LWS_WORKER_INDEX")
_SIZES = struct.Struct(">II")

Lost = Callable[[str], None]  # ends the process; called from any thread
Frame = tuple[dict[str, Any], bytes]


@dataclass(frozen=True)
class Hosts:
    """Who takes part. The leader listens on `port`, and JAX's coordinator on the next."""

    leader: str
    port: int
    count: int
    index: int  # of this process; 0 leads

    @property
    def jax_port(self) -> int:
        return self.port + 1

    @property
    def names(self) -> str:
        return f"{self.leader}:{self.port}"


def hosts_of(
    coordinator: str | None, num_processes: int | None, process_id: int | None, port: int = PORT
) -> Hosts | None:
    """From what was asked, else from LeaderWorkerSet's environment; None: neither says. Raises InvalidParam."""
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == 3:
        return _of_leader_worker_set(os.environ, port)
    if missing:
        raise InvalidParam(missing[0], f"is needed beside {', '.join(name for name in given if name not in missing)}")
    host, _, digits = str(coordinator).rpartition(":")
    if not host or not digits.isdecimal() or not 0 < int(digits) < 65535:
        raise InvalidParam("coordinator", f"must be HOST:PORT, got {coordinator!r}")
    return checked(Hosts(host.strip("[]"), int(digits), int(num_processes or 0), int(process_id or 0)))


def _of_leader_worker_set(environment: Mapping[str, str], port: int) -> Hosts | None:
    address, count, index = (environment.get(name, "") for name in LEADER_WORKER_SET)
    if not (address or count or index):
        return None
    if not address or not count.isdecimal() or not index.isdecimal():
        raise InvalidParam("coordinator", f"is not given, and {', '.join(LEADER_WORKER_SET)} do not say who takes part")
    return checked(Hosts(address, port, int(count), int(index)))


def checked(hosts: Hosts) -> Hosts:
    """Raises InvalidParam where they are not several, or this is none of them."""
    if hosts.count < 2:
        raise InvalidParam("num_processes", f"must be at least 2, got {hosts.count}")
    if not 0 <= hosts.index < hosts.count:
        raise InvalidParam("process_id", f"must be 0 to {hosts.count - 1}, got {hosts.index}")
    return hosts


class Peer:
    """A connection to another process: frames out from any thread, frames in one at a time."""

    def __init__(self, sock: socket.socket, name: str, lost: Lost) -> None:
        self.name = name
        self._sock = sock
        self._lost = lost
        self._closing = False
        self._lock = threading.Lock()
        self._frames: queue.SimpleQueue[Frame] = queue.SimpleQueue()
        sock.settimeout(SILENCE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for work in (self._listen, self._pulse):
            threading.Thread(target=work, name=f"octavo-peer-{name}", daemon=True).start()

    def send(self, message: Mapping[str, Any], payload: bytes = b"") -> None:
        try:
            with self._lock:
                send_frame(self._sock, message, payload)
        except OSError as error:
            self._hung_up(error)

    def receive(self) -> Frame:
        return self._frames.get()

    def leave(self) -> None:
        """What the other side does from now on is its own business."""
        self._closing = True

    def _listen(self) -> None:
        try:
            while True:
                message, payload = receive_frame(self._sock)
                if message["op"] == "leave":
                    self.leave()
                if message["op"] != "alive":
                    self._frames.put((message, payload))
        except (OSError, ValueError) as error:
            self._hung_up(error)

    def _pulse(self) -> None:
        while not self._closing:
            self.send({"op": "alive"})
            time.sleep(PULSE_S)

    def _hung_up(self, error: Exception) -> None:
        self._sock.close()
        if not self._closing:
            self._closing = True
            self._lost(f"{self.name} is gone ({str(error) or type(error).__name__})")


def send_frame(sock: socket.socket, message: Mapping[str, Any], payload: bytes = b"") -> None:
    header = json.dumps(message).encode()
    sock.sendall(_SIZES.pack(len(header), len(payload)) + header + payload)


def receive_frame(sock: socket.socket, most: int = MAX_HEADER) -> Frame:
    """Raises OSError when the other side hangs up or is silent, ValueError for what is no frame."""
    header, payload = _SIZES.unpack(_exactly(sock, _SIZES.size))
    if header > most or payload > (MAX_PAYLOAD if most == MAX_HEADER else 0):
        raise ValueError("not a frame")
    message = json.loads(_exactly(sock, header))
    if not isinstance(message, dict) or not isinstance(message.get("op"), str):
        raise ValueError("not a frame")
    return message, _exactly(sock, payload)


def _exactly(sock: socket.socket, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        part = sock.recv(min(count - len(parts), 1 << 20))
        if not part:
            raise ConnectionError("it hung up")
        parts += part
    return bytes(parts)


def gather(hosts: Hosts, timeout_s: float, lost: Lost) -> list[Peer]:
    """The leader's side: every follower's connection. Raises OctavoError that names who did not come in time."""
    deadline_s = time.monotonic() + timeout_s
    found: dict[int, socket.socket] = {}
    try:
        server = socket.create_server((hosts.leader, hosts.port))
    except OSError as error:
        raise OctavoError(f"cannot listen on {hosts.names}: {error.strerror or error}") from None
    with contextlib.ExitStack() as opened:
        opened.enter_context(server)
        while len(found) < hosts.count - 1:
            server.settimeout(max(0.01, deadline_s - time.monotonic()))
            try:
                sock = opened.enter_context(server.accept()[0])
            except TimeoutError:
                raise OctavoError(_absent(hosts, found, timeout_s)) from None
            index = _greeted(sock, hosts, found)
            if index is None:
                sock.close()
            else:
                found[index] = sock
        for sock in found.values():
            send_frame(sock, {"op": "welcome"})
        opened.pop_all()
    server.close()
    return [Peer(found[index], f"process {index}", lost) for index in sorted(found)]


def check_free(port: int, what: str) -> None:
    """Raises OctavoError where nobody can listen on all interfaces at `port`, for `what`."""
    both = socket.has_dualstack_ipv6()
    try:
        socket.create_server(
            ("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both
        ).close()
    except OSError as error:
        raise OctavoError(f"cannot listen on port {port} for {what}: {error.strerror or error}") from None


def _absent(hosts: Hosts, found: Mapping[int, Any], timeout_s: float) -> str:
    absent = [str(index) for index in range(1, hosts.count) if index not in found]
    which = f"process {absent[0]}" if len(absent) == 1 else f"processes {', '.join(absent)}"
    return f"{which} of {hosts.count} did not come to {hosts.names} within {timeout_s:g} s"


def _greeted(sock: socket.socket, hosts: Hosts, found: Mapping[int, Any]) -> int | None:
    """Which follower this is; None for what is none of ours. Raises OctavoError where one is started wrongly."""
    sock.settimeout(5.0)
    try:
        message, _ = receive_frame(sock, most=1024)
    except (OSError, ValueError):
        return None
    index, count = message.get("index"), message.get("count")
    if message["op"] != "octavo" or not isinstance(index, int):
        return None
    if count != hosts.count or not 0 < index < hosts.count:
        raise OctavoError(f"process {index} was started as one of {count}, this one as the first of {hosts.count}")
    if index in found:
        raise OctavoError(f"two processes say that they are process {index} of {hosts.count}")
    return index


def join(hosts: Hosts, timeout_s: float, lost: Lost) -> Peer:
    """A follower's side: the connection to the leader, once everybody is there. Raises OctavoError."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            sock = socket.create_connection((hosts.leader, hosts.port), timeout=max(0.1, timeout_s))
            break
        except OSError as error:
            if time.monotonic() > deadline_s:
                raise OctavoError(
                    f"process 0, which leads, was not at {hosts.names} within {timeout_s:g} s: {error}"
                ) from None
            time.sleep(0.2)
    try:
        sock.settimeout(timeout_s + SILENCE_S)
        send_frame(sock, {"op": "octavo", "index": hosts.index, "count": hosts.count})
        receive_frame(sock)
    except (OSError, ValueError) as error:
        sock.close()
        raise OctavoError(f"process 0 at {hosts.names} ended before all {hosts.count} were there: {error}") from None
    return Peer(sock, "process 0", lost)


def send_all(peers: Sequence[Peer], message: Mapping[str, Any], payload: bytes = b"") -> None:
    for peer in peers:
        peer.send(message, payload)
