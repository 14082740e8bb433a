"""The loop over the device of `fakes`: every request gets exactly one ending, whatever breaks.

Most tests drive the loop by hand; those about threads start it.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from engine.errors import ContextOverflow, EngineStopped, InvalidParam, QueueFull
from engine.loop import Engine
from engine.request import FinishReason, Request, SamplingParams
from engine.text.pieces import Pieces
from tests.engine.fakes import VOCAB, FakeRunner, config, expected_tokens, request
from tests.engine.world import Client, check_choice, run, step, world

POISON = 250  # the fake tokenizer's one token without a meaning


class FakePieces(dict[int, bytes]):
    """Token i is the letter i % 26; the poisoned one raises."""

    def __missing__(self, token: int) -> bytes:
        raise ValueError("no such piece")

    def get(self, token: int, default: bytes = b"") -> bytes:  # type: ignore[override]
        return self[token]


LETTERS = FakePieces({i: bytes([97 + i % 26]) for i in range(VOCAB) if i != POISON})


class FakeTokenizer:
    pieces = Pieces(plain=LETTERS, all=LETTERS, leading_space=False)


def text_of(tokens: Sequence[int]) -> str:
    return b"".join(LETTERS[t] for t in tokens).decode()


def engine_of(tokenizer: bool = False, **changes: object) -> Engine:
    made = config(**changes)
    return Engine(
        made,
        FakeRunner(made),
        vocab_size=VOCAB,
        tokenizer=FakeTokenizer() if tokenizer else None,  # type: ignore[arg-type]
    )


def device(engine: Engine) -> FakeRunner:
    assert isinstance(engine.runner, FakeRunner)
    return engine.runner


def submit(engine: Engine, made: Request) -> Client:
    client = Client.of(made)
    engine.submit(made, client)
    return client


def step_guarded(engine: Engine) -> bool:
    """One turn of the engine's own loop."""
    engine.read_inbox(block=False)
    worked = engine._guarded(engine.run_once_overlapped if engine.config.overlap else engine.run_once)
    engine.scheduler.check()
    return worked


def run_guarded(engine: Engine) -> None:
    for _ in range(2000):
        if not step_guarded(engine):
            return
    raise AssertionError("the engine is still busy")


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


BOTH = pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlapped"])


# -- a step that fails ------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("where", ["fail_launch", "fail_result"])
@pytest.mark.parametrize("number", [0, 1, 3])
def test_a_failed_step_ends_its_requests_and_not_the_engine(where: str, number: int, overlap: bool) -> None:
    engine = engine_of(overlap=overlap)
    getattr(device(engine), where).add(number)
    clients = [submit(engine, request(f"r{i}", 20, max_tokens=20, n=2)) for i in range(3)]
    run_guarded(engine)
    for client in clients:
        assert client.finished == {0: FinishReason.ERROR, 1: FinishReason.ERROR}
        assert client.deltas[0][-1].error == "the engine failed this request"
    assert device(engine).num_resets == 1 and not engine.outbox
    after = submit(engine, request("after", 20, max_tokens=20, seed=3))
    run_guarded(engine)
    assert after.tokens[0] == expected_tokens(after.request, 3) and after.finished == {0: FinishReason.LENGTH}


def test_a_device_that_cannot_be_reset_ends_the_thread_with_a_reason() -> None:
    engine = engine_of().start()
    device(engine).fail_launch.add(0)
    device(engine).fail_reset = True
    client = submit(engine, request("a", 5, n=2))
    wait_for(lambda: len(client.finished) == 2)
    assert client.finished == {0: FinishReason.ERROR, 1: FinishReason.ERROR}
    wait_for(lambda: not engine._thread.is_alive())
    assert engine.failure == "RuntimeError"
    with pytest.raises(EngineStopped, match="RuntimeError"):
        submit(engine, request("b", 5))
    with pytest.raises(EngineStopped, match="RuntimeError"):
        engine.call(lambda: None)
    assert engine.drain(1)


def test_what_reached_the_inbox_of_a_dying_thread_is_answered() -> None:
    engine = engine_of()
    device(engine).fail_launch.add(0)
    device(engine).fail_reset = True
    clients = [submit(engine, request("a", 5))]
    original = device(engine).launch

    def launch(plan: object) -> object:
        clients.append(submit(engine, request("late", 5)))
        return original(plan)  # type: ignore[arg-type]

    device(engine).launch = launch  # type: ignore[assignment,method-assign]
    engine.start()._thread.join(20)
    assert [client.finished for client in clients] == [{0: FinishReason.ERROR}] * 2


@BOTH
def test_a_faulty_row_ends_only_its_request(overlap: bool) -> None:
    engine = engine_of(overlap=overlap)
    device(engine).faulty.add("bad")
    clients = [submit(engine, request(name, 9, max_tokens=12, seed=1)) for name in ("good", "bad", "fine")]
    run_guarded(engine)
    good, bad, fine = clients
    assert bad.finished == {0: FinishReason.ERROR} and "not finite" in (bad.deltas[0][-1].error or "")
    for client in (good, fine):
        assert client.tokens[0] == expected_tokens(client.request, 1)


# -- text -------------------------------------------------------------------------------------


def stop_after(made: Request, count: int, seed: int) -> str:
    """The text of output tokens [count - 3, count): a stop string that ends with token `count`."""
    return text_of(expected_tokens(made, seed)[count - 3 : count])


@BOTH
def test_a_stop_string_ends_the_choice_and_frees_its_pages(overlap: bool) -> None:
    plain = request("a", 9, max_tokens=40, seed=2)
    assert POISON not in expected_tokens(plain, 2)
    stop = stop_after(plain, 10, 2)
    engine = engine_of(tokenizer=True, overlap=overlap)
    client = submit(engine, request("a", plain.prompt_token_ids, max_tokens=40, seed=2, stop=(stop,)))
    other = submit(engine, request("b", 9, max_tokens=40, seed=2))
    while not client.finished:
        assert step_guarded(engine)
    for _ in range(2):
        step_guarded(engine)
    assert {s.request.request_id for s in engine.scheduler.sequences()} <= {"b"}
    full = text_of(expected_tokens(plain, 2))
    assert client.finished == {0: FinishReason.STOP}
    assert "".join(d.text for d in client.deltas[0]) == full[: full.index(stop)]
    assert client.deltas[0][-1].stop_reason == stop
    assert client.tokens[0] == expected_tokens(plain, 2)[: full.index(stop) + 3]
    run_guarded(engine)
    assert other.tokens[0] == expected_tokens(other.request, 2) and not engine.scheduler.cache.pool.num_held


@BOTH
def test_a_fault_in_one_text_ends_that_choice_alone(overlap: bool) -> None:
    seed = next(s for s in range(1000) if POISON in expected_tokens(request("bad", 9, max_tokens=20), s)[3:15])
    engine = engine_of(tokenizer=True, overlap=overlap)
    bad = submit(engine, request("bad", 9, max_tokens=20, seed=seed))
    good = submit(engine, request("good", 9, max_tokens=20, seed=1))
    run_guarded(engine)
    assert bad.finished == {0: FinishReason.ERROR}
    assert good.finished == {0: FinishReason.LENGTH} and good.tokens[0] == expected_tokens(good.request, 1)
    assert device(engine).num_resets == 0 and not engine.outbox


def test_without_tokenizer_there_is_no_text() -> None:
    engine = engine_of()
    client = submit(engine, request("a", 5, max_tokens=4))
    run_guarded(engine)
    assert {d.text for d in client.deltas[0]} == {""} and len(client.tokens[0]) == 4


# -- admission --------------------------------------------------------------------------------


def test_queue_is_bounded_in_choices() -> None:
    engine = engine_of(max_queued_requests=5)
    submit(engine, request("a", 5, n=3))
    submit(engine, request("b", 5, n=2))
    with pytest.raises(QueueFull) as error:
        submit(engine, request("c", 5))
    assert error.value.retry_after_s > 0 and engine.stats().num_waiting == 5
    step_guarded(engine)  # admits at most four
    submit(engine, request("c", 5))
    run_guarded(engine)
    assert engine.stats().num_waiting == 0 and engine._num_submitted == 0


@pytest.mark.parametrize(
    ("made", "param"),
    [
        (request("a", [VOCAB]), "prompt"),
        (request("a", [-1]), "prompt"),
        (request("a", [1], stop_token_ids=(VOCAB,)), "stop_token_ids"),
        (request("a", [1], logit_bias={VOCAB: 1.0}), "logit_bias"),
        (request("a", [1], allowed_token_ids=(0, -3)), "allowed_token_ids"),
        (request("a", [1], stop_token_ids=tuple(range(30)), end=(40, 41, 42)), "stop_token_ids"),
        (request("a", [1], stop=("x",)), "stop"),
        (request("a", [1], allowed_token_ids=(5, 6), min_tokens=1, stop_token_ids=(5,), end=(6,)), "allowed_token_ids"),
        (
            Request(request_id="a", prompt_token_ids=(1,), params=SamplingParams(), banned_token_ids=(VOCAB,)),
            "bad_words",
        ),
    ],
)
def test_bad_requests_are_refused_by_name(made: Request, param: str) -> None:
    engine = engine_of()
    with pytest.raises(InvalidParam) as error:
        submit(engine, made)
    assert error.value.param == param and engine._inbox.empty() and engine.stats().num_waiting == 0


def test_overflow_is_refused_at_submission() -> None:
    engine = engine_of()
    with pytest.raises(ContextOverflow):
        submit(engine, request("a", 64, max_tokens=1))


def test_a_request_id_in_use_is_refused_and_the_first_goes_on() -> None:
    engine = engine_of()
    first = submit(engine, request("a", 5, max_tokens=4, seed=1))
    second = submit(engine, request("a", 6, max_tokens=4, n=2))
    run_guarded(engine)
    assert first.tokens[0] == expected_tokens(first.request, 1)
    assert second.finished == {0: FinishReason.ERROR, 1: FinishReason.ERROR}
    assert "in use" in (second.deltas[0][0].error or "")


# -- endings ----------------------------------------------------------------------------------


@BOTH
def test_abort_tells_each_unfinished_choice_once(overlap: bool) -> None:
    for steps in range(8):
        engine = engine_of(overlap=overlap)
        client = submit(engine, request("a", 9, n=3, max_tokens=30))
        engine.read_inbox(block=False)
        for _ in range(steps):
            step_guarded(engine)
        engine.abort("a")
        engine.abort("a")
        engine.abort("nobody")
        run_guarded(engine)
        assert client.finished == dict.fromkeys(range(3), FinishReason.ABORT)
        assert not engine.outbox and not engine.scheduler.cache.pool.num_held


@BOTH
def test_abort_storm_with_threads(overlap: bool) -> None:
    """Requests and aborts from four threads; every choice has one ending, and full ones are right."""
    engine = engine_of(overlap=overlap, num_pages=20).start()
    clients: list[Client] = []

    def storm(worker: int) -> None:
        rng = random.Random(worker)
        for i in range(40):
            made = request(
                f"{worker}-{i}", rng.randrange(1, 30), n=rng.choice([1, 2]), max_tokens=rng.randrange(34), seed=i
            )
            clients.append(submit(engine, made))
            if rng.random() < 0.5:
                time.sleep(rng.random() * 0.002)
                engine.abort(made.request_id)

    threads = [threading.Thread(target=storm, args=(w,)) for w in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert engine.drain(20)
    engine.stop()
    assert engine.failure is None and len(clients) == 160
    for client in clients:
        assert set(client.finished) == set(range(client.request.params.n))
        expected = expected_tokens(client.request, client.request.params.seed or 0)
        aborted = client.finished[0] is FinishReason.ABORT
        assert client.tokens[0] == expected[: len(client.tokens[0])] and (aborted or client.tokens[0] == expected)
    assert {FinishReason.ABORT, FinishReason.LENGTH} <= {r for c in clients for r in c.finished.values()}
    assert not engine.scheduler.cache.pool.num_held


def test_drain_finishes_the_running_and_refuses_the_new() -> None:
    engine = engine_of().start()
    client = submit(engine, request("a", 9, max_tokens=30, seed=4))
    assert engine.drain(20)
    with pytest.raises(EngineStopped, match="shutting down"):
        submit(engine, request("b", 5))
    engine.stop()
    assert client.tokens[0] == expected_tokens(client.request, 4) and not engine._thread.is_alive()


def test_drain_gives_up_in_time_and_stop_aborts_what_is_left() -> None:
    engine = engine_of()
    blocked = threading.Event()
    original = device(engine).launch

    def launch(plan: object) -> object:
        blocked.wait(20)
        return original(plan)  # type: ignore[arg-type]

    device(engine).launch = launch  # type: ignore[assignment,method-assign]
    engine.start()
    client = submit(engine, request("a", 9, max_tokens=30))
    assert not engine.drain(0.05)
    threading.Timer(0.05, blocked.set).start()
    engine.stop()
    assert client.finished == {0: FinishReason.ABORT}


def test_what_was_submitted_just_before_the_end_has_an_ending() -> None:
    engine = engine_of()
    client = submit(engine, request("a", 5))
    engine.stop()
    engine._run()  # as when the thread looks at `_stopping` right after an empty inbox
    assert client.finished == {0: FinishReason.ABORT}


def test_what_was_submitted_while_stopping_has_an_ending() -> None:
    for _ in range(50):
        engine = engine_of().start()
        clients = [submit(engine, request(f"r{i}", 5, max_tokens=1000 // 50)) for i in range(3)]
        engine.stop()
        assert all(set(client.finished) == {0} for client in clients)


# -- calls between steps ----------------------------------------------------------------------


def test_call_runs_between_steps_and_hands_over_errors() -> None:
    engine = engine_of(overlap=True).start()
    client = submit(engine, request("a", 9, max_tokens=30, seed=1))
    assert engine.call(lambda: (threading.current_thread().name, engine._pending)) == ("octavo-engine", None)
    with pytest.raises(ZeroDivisionError):
        engine.call(lambda: 1 // 0)
    assert engine.drain(20)
    engine.stop()
    assert client.tokens[0] == expected_tokens(client.request, 1)
    with pytest.raises(EngineStopped):
        engine.call(lambda: None)


def test_a_step_that_fails_under_a_call_does_not_hang_the_caller() -> None:
    engine = engine_of(overlap=True)
    device(engine).fail_result.add(0)
    client = submit(engine, request("a", 9, max_tokens=30))
    step_guarded(engine)
    assert engine._pending is not None
    answers: list[int] = []
    caller = threading.Thread(target=lambda: answers.append(engine.call(lambda: 5)))
    caller.start()
    wait_for(lambda: not engine._inbox.empty())
    engine.read_inbox(block=False)
    caller.join(20)
    assert answers == [5] and client.finished == {0: FinishReason.ERROR}


def test_stats() -> None:
    engine = engine_of()
    submit(engine, request("a", 9, max_tokens=8, n=2))
    assert (engine.stats().num_waiting, engine.stats().num_running) == (2, 0)
    step_guarded(engine)
    stats = engine.stats()
    assert stats.num_running == 2 and 0 < stats.kv_usage < 1 and stats.prompt_tokens == 9
    run_guarded(engine)
    stats = engine.stats()
    assert (stats.num_running, stats.kv_usage, stats.generation_tokens) == (0, 0.0, 16)


# -- the real device --------------------------------------------------------------------------


def test_nan_in_one_requests_pages_ends_it_alone_and_the_pages_are_good_afterwards() -> None:
    """Spoil the KV of one running request on the real device."""
    w = world()
    engine = w.engine(overlap=False)
    prompts = {"bad": tuple(range(20)), "good": tuple(range(40, 62))}
    params = SamplingParams(temperature=0.0, max_tokens=20)
    clients = {
        name: submit(engine, Request(request_id=name, prompt_token_ids=prompt, params=params))
        for name, prompt in prompts.items()
    }
    step(engine)
    seq = next(s for s in engine.scheduler.sequences() if s.request.request_id == "bad")
    pages = np.asarray(seq.pages)
    w.runner._kv = [layer.at[pages].set(np.nan) for layer in w.runner._kv]
    run(engine)
    assert clients["bad"].finished == {0: FinishReason.ERROR}
    check_choice(w, clients["good"].request, 0, clients["good"].tokens[0], FinishReason.LENGTH)
    again = submit(engine, Request(request_id="again", prompt_token_ids=prompts["bad"], params=params))
    run(engine)
    assert again.finished == {0: FinishReason.LENGTH} and again.deltas[0][0].num_cached_tokens == 0
    check_choice(w, again.request, 0, again.tokens[0], FinishReason.LENGTH)


def test_the_whole_pool_may_be_stale() -> None:
    """NaN in every free page: whoever takes them must see only what it wrote itself."""
    w = world()
    engine = w.engine(overlap=True)
    w.runner._kv = [layer.at[:].set(np.nan) for layer in w.runner._kv]
    params = SamplingParams(temperature=0.0, max_tokens=30)
    made = [Request(request_id=f"{n}", prompt_token_ids=tuple(range(n)), params=params) for n in (1, 7, 33)]
    clients = [submit(engine, one) for one in made]
    run(engine)
    for client in clients:
        check_choice(w, client.request, 0, client.tokens[0], client.finished[0])


def test_a_sink_that_raises_ends_its_request_alone() -> None:
    engine = engine_of()
    neighbour = submit(engine, request("neighbour", 3, max_tokens=6, seed=9))

    def broken(deltas: object) -> None:
        raise RuntimeError("the event loop is closed")

    engine.submit(request("broken", [1, 2, 3], max_tokens=50), broken)
    run(engine)
    assert neighbour.tokens[0] == expected_tokens(neighbour.request, 9)
    assert not engine.outbox and not engine.scheduler.cache.pool.num_held
