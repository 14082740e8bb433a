"""Processes of one replica find each other, and notice who is gone. Sockets on this machine; no JAX."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from engine import hosts as module
from engine.errors import InvalidParam, OctavoError
from engine.hosts import Hosts, Peer, check_free, gather, hosts_of, join, send_frame
from tests.ports import free_ports


def connected() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return socket.create_connection(server.getsockname()), server.accept()[0]


def later(work: Callable[[], object]) -> list[BaseException]:
    """In a thread; what it raises is in the list when it has ended."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except OctavoError as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return raised


class Pair:
    """A leader and a follower, connected; `lost` is what each said."""

    def __init__(self) -> None:
        self.lost: dict[str, list[str]] = {"leader": [], "follower": []}
        port, joined = free_ports(), []
        wait = later(lambda: joined.append(join(Hosts("127.0.0.1", port, 2, 1), 5, self.lost["follower"].append)))
        (self.follower,) = gather(Hosts("127.0.0.1", port, 2, 0), 5, self.lost["leader"].append)
        until(lambda: joined, wait)
        self.leader: Peer = joined[0]

    def close(self) -> None:
        for peer in (self.leader, self.follower):
            peer.leave()
        for peer in (self.leader, self.follower):
            with contextlib.suppress(OSError):
                peer._sock.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.close()


def until(holds: Callable[[], object], raised: list[BaseException] | None = None) -> None:
    deadline_s = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline_s and not raised, raised
        time.sleep(0.005)


def test_frames_arrive_in_order_with_their_vectors(pair: Pair) -> None:
    for i in range(50):
        pair.follower.send({"op": "step", "program": str(i)}, bytes(range(i)) * 1000)
    for i in range(50):
        assert pair.leader.receive() == ({"op": "step", "program": str(i)}, bytes(range(i)) * 1000)
    pair.leader.send({"op": "config"})
    assert pair.follower.receive()[0] == {"op": "config"}
    assert pair.lost == {"leader": [], "follower": []}


def test_who_hangs_up_is_lost_and_who_says_so_is_not() -> None:
    pair = Pair()
    pair.leader._sock.shutdown(socket.SHUT_RDWR)  # the follower's end
    until(lambda: pair.lost["leader"])
    assert pair.lost["leader"][0].startswith("process 1 is gone")
    polite = Pair()
    polite.follower.leave()
    polite.follower.send({"op": "leave"})
    assert polite.leader.receive()[0] == {"op": "leave"}
    polite.follower._sock.shutdown(socket.SHUT_RDWR)
    time.sleep(0.2)
    assert polite.lost == {"leader": [], "follower": []}


def test_who_is_silent_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SILENCE_S", 0.2)
    ours, theirs = connected()
    lost: list[str] = []
    Peer(ours, "process 3", lost.append)
    until(lambda: lost)
    theirs.close()
    assert lost[0].startswith("process 3 is gone (timed out")


def test_signs_of_life_keep_a_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SILENCE_S", 0.5)
    monkeypatch.setattr(module, "PULSE_S", 0.05)
    pair = Pair()
    time.sleep(1.0)
    assert pair.lost == {"leader": [], "follower": []}
    pair.close()


def test_a_missing_process_is_named() -> None:
    port = free_ports()
    waiting = later(lambda: join(Hosts("127.0.0.1", port, 3, 2), 5, print))
    with pytest.raises(OctavoError, match=rf"process 1 of 3 did not come to 127.0.0.1:{port} within 0.5 s"):
        gather(Hosts("127.0.0.1", port, 3, 0), 0.5, print)
    until(lambda: waiting)
    assert "ended before all 3 were there" in str(waiting[0])
    with pytest.raises(OctavoError, match=r"process 0, which leads, was not at 127.0.0.1:\d+ within 0.3 s"):
        join(Hosts("127.0.0.1", port, 3, 2), 0.3, print)


def test_a_port_that_a_server_or_a_client_has_is_not_free() -> None:
    ours, theirs = connected()
    with ours, theirs, socket.create_server(("127.0.0.1", 0)) as server:
        for taken in (server, ours):
            port = taken.getsockname()[1]
            with pytest.raises(OctavoError, match=rf"cannot listen on port {port} for a test: .*in use"):
                check_free(port, "a test")
    check_free(free_ports(), "a test")


def test_strangers_are_ignored_and_wrong_numbers_refused() -> None:
    port, joined = free_ports(), []
    raised = later(lambda: joined.append(gather(Hosts("127.0.0.1", port, 2, 0), 5, print)))
    for junk in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 8, b""):
        until(lambda junk=junk: _sent(port, junk))
    ours = join(Hosts("127.0.0.1", port, 2, 1), 5, print)
    until(lambda: joined, raised)
    for peer in (ours, *joined[0]):
        peer.leave()
        peer._sock.close()
    port = free_ports()
    later(lambda: join(Hosts("127.0.0.1", port, 4, 1), 2, print))
    with pytest.raises(OctavoError, match="process 1 was started as one of 4, this one as the first of 2"):
        gather(Hosts("127.0.0.1", port, 2, 0), 5, print)


def _sent(port: int, junk: bytes) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as sock:
            sock.sendall(junk)
            return True
    except OSError:
        return False


def test_two_that_say_they_are_the_same() -> None:
    port = free_ports()
    for _ in range(2):
        later(lambda: join(Hosts("127.0.0.1", port, 3, 1), 3, print))
    with pytest.raises(OctavoError, match="two processes say that they are process 1 of 3"):
        gather(Hosts("127.0.0.1", port, 3, 0), 5, print)


def test_large_frames_of_strangers_are_not_read() -> None:
    ours, theirs = connected()
    send_frame(theirs, {"op": "octavo", "pad": "x" * 5000})
    with pytest.raises(ValueError, match="not a frame"):
        module.receive_frame(ours, most=1024)
    ours.close()
    theirs.close()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("a:1", 2, None), "process_id: is needed beside coordinator, num_processes"),
        (("a", 2, 0), "coordinator: must be HOST:PORT, got 'a'"),
        (("a:70000", 2, 0), "coordinator: must be HOST:PORT"),
        (("a:1", 1, 0), "num_processes: must be at least 2, got 1"),
        (("a:1", 2, 2), "process_id: must be 0 to 1, got 2"),
    ],
)
def test_wrong_flags_are_named(asked: tuple, message: str) -> None:
    with pytest.raises(InvalidParam) as caught:
        hosts_of(*asked)
    assert message in str(caught.value)


def test_flags_and_leader_worker_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hosts_of("[::1]:90", 4, 3) == Hosts("::1", 90, 4, 3)
    assert hosts_of(None, None, None) is None, "JAX is asked then"
    given = {"LWS_LEADER_ADDRESS": "lead.ns", "LWS_GROUP_SIZE": "8", "LWS_WORKER_INDEX": "5"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
        if name != "LWS_WORKER_INDEX":
            with pytest.raises(InvalidParam, match="coordinator: is not given, and LWS_LEADER_ADDRESS"):
                hosts_of(None, None, None)
    assert hosts_of(None, None, None) == Hosts("lead.ns", 8476, 8, 5)
