"""The pooling engine over the device of `fakes`: every text gets exactly one ending, whatever breaks."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

import pytest

from engine.errors import ContextOverflow, EngineStopped, InvalidParam, QueueFull
from engine.outbox import INTERNAL_ERROR
from engine.pooling.engine import PoolingEngine
from engine.pooling.request import PoolingRequest, TextIds
from tests.pooling.fakes import BAD, VOCAB, Client, FakeRunner, config, request

BOTH = pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlapped"])


def engine_of(**changes: object) -> PoolingEngine:
    return PoolingEngine(config(**changes), FakeRunner(), vocab_size=VOCAB)


def device(engine: PoolingEngine) -> FakeRunner:
    assert isinstance(engine.runner, FakeRunner)
    return engine.runner


def submit(engine: PoolingEngine, made: PoolingRequest) -> Client:
    client = Client(made)
    engine.submit(made, client)
    return client


def run(engine: PoolingEngine) -> None:
    """The loop by hand until nothing is left to do."""
    engine.read_inbox(block=False)
    step = engine.run_once_overlapped if engine.config.overlap else engine.run_once
    for _ in range(1000):
        if not engine._guarded(step):
            return
    raise AssertionError("the engine is still busy")


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


@BOTH
def test_texts_of_many_requests_share_steps_and_each_gets_its_own(overlap: bool) -> None:
    engine, rng = engine_of(overlap=overlap, max_queued_requests=1000), random.Random(0)
    clients = [
        submit(engine, request(f"r{i}", *(rng.randint(1, 48) for _ in range(rng.randint(1, 9))))) for i in range(40)
    ]
    run(engine)
    for client in clients:
        client.check()
    num_texts = sum(len(client.request.texts) for client in clients)
    assert len(device(engine).batches) < num_texts / 3 and not engine.has_work()
    stats = engine.stats()
    assert (stats.texts, stats.num_running, stats.num_waiting) == (num_texts, 0, 0)
    assert stats.prompt_tokens == sum(len(text.token_ids) for client in clients for text in client.request.texts)


@BOTH
@pytest.mark.parametrize("where", ["fail_launch", "fail_result"])
@pytest.mark.parametrize("number", [0, 1])
def test_a_failed_step_ends_its_texts_and_not_the_engine(where: str, number: int, overlap: bool) -> None:
    engine = engine_of(overlap=overlap)
    getattr(device(engine), where).add(number)
    clients = [submit(engine, request(f"r{i}", 40, 40, 40)) for i in range(3)]
    run(engine)
    assert all(client.done for client in clients)
    failed = [result for client in clients for result in client.found.values() if result.error]
    assert failed and all(result.error == INTERNAL_ERROR for result in failed)
    after = submit(engine, request("after", 5, 9))
    run(engine)
    after.check()
    assert not engine.has_work()


def test_a_vector_that_is_not_finite_ends_its_text_alone() -> None:
    engine = engine_of()
    bad, good = submit(engine, request("bad", 5, first=BAD)), submit(engine, request("good", 5))
    run(engine)
    good.check()
    assert bad.found[0].error == INTERNAL_ERROR and len(device(engine).batches) == 1


@BOTH
def test_an_aborted_requests_waiting_texts_are_not_computed(overlap: bool) -> None:
    engine = engine_of(overlap=overlap)
    gone, stays = submit(engine, request("gone", *[30] * 12)), submit(engine, request("stays", 30))
    engine.read_inbox(block=False)
    engine._guarded(engine.run_once_overlapped if overlap else engine.run_once)
    engine.abort("gone")
    engine.abort("nobody")
    run(engine)
    stays.check()
    assert gone.done and any(result.aborted for result in gone.found.values())
    computed = sum(len(batch.items) for batch in device(engine).batches)
    assert computed <= 4 + 4 and not engine.has_work()


def test_a_sink_that_raises_ends_its_request_alone() -> None:
    engine = engine_of()

    def broken(results: object) -> None:
        raise RuntimeError("the event loop is closed")

    engine.submit(request("broken", *[40] * 6), broken)
    neighbour = submit(engine, request("neighbour", 3))
    run(engine)
    neighbour.check()
    assert not engine.has_work() and sum(len(batch.items) for batch in device(engine).batches) < 7


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        ((), InvalidParam, "input: must not be empty"),
        ((TextIds(()),), InvalidParam, "input: must not be empty"),
        ((TextIds((1,)), TextIds(tuple(range(49)))), ContextOverflow, "has 49 tokens; this model takes 48"),
        ((TextIds((VOCAB,)),), InvalidParam, f"between 0 and {VOCAB - 1}"),
        ((TextIds((-1,)),), InvalidParam, f"between 0 and {VOCAB - 1}"),
        ((TextIds((1, 2), (0, 1)),), InvalidParam, "needs a type below 1"),
    ],
)
def test_what_is_refused_keeps_nothing(texts: tuple[TextIds, ...], error: type[Exception], message: str) -> None:
    engine = engine_of()
    with pytest.raises(error, match=message):
        submit(engine, PoolingRequest(request_id="r", texts=texts))
    assert engine._inbox.empty() and engine.stats().num_waiting == 0


def test_the_queue_is_bounded() -> None:
    """A request that finds the queue below its bound is taken whole; the next is refused until texts are done."""
    engine = engine_of(max_queued_requests=4)
    first = submit(engine, request("a", *[5] * 10))
    with pytest.raises(QueueFull, match="10 texts are waiting"):
        submit(engine, request("b", 5))
    run(engine)
    first.check()
    submit(engine, request("b", 5))


def test_an_id_in_use_is_refused() -> None:
    engine = engine_of()
    first, second = submit(engine, request("same", 5)), submit(engine, request("same", 6, 7))
    run(engine)
    first.check()
    assert [result.error for result in second.found.values()] == ["request_id same is in use"] * 2


def test_threads_drain_and_stop() -> None:
    engine = engine_of(overlap=True, max_queued_requests=10_000).start()
    clients: list[Client] = []

    def client(number: int) -> None:
        clients.extend(submit(engine, request(f"{number}-{i}", *range(1, 20))) for i in range(20))

    threads = [threading.Thread(target=client, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert engine.drain(20)
    for one in clients:
        one.check()
    with pytest.raises(EngineStopped):
        submit(engine, request("late", 1))
    engine.stop()
    assert engine.failure is None and not engine._thread.is_alive()


def test_stop_ends_what_is_left() -> None:
    engine = engine_of().start()
    device(engine).gate.clear()
    client = submit(engine, request("r", *[40] * 8))
    wait_for(lambda: engine.has_work())
    threading.Timer(0.05, device(engine).gate.set).start()
    engine.stop()
    assert client.done and any(result.aborted for result in client.found.values())


def test_a_thread_that_dies_tells_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of()

    def broken() -> None:
        raise SystemError("a bug")

    device(engine).fail_launch.add(0)
    monkeypatch.setattr(engine, "_recover", broken)
    client = submit(engine, request("r", *[40] * 8))
    engine.start()
    wait_for(lambda: client.done)
    assert {result.error for result in client.found.values()} == {INTERNAL_ERROR} and engine.failure == "SystemError"
    with pytest.raises(EngineStopped, match="SystemError"):
        submit(engine, request("late", 1))
