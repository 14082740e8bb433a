"""The safety net: whatever the load, a request's tokens are those of a naive full forward.

Random arrivals, prompt lengths, chunk sizes, page pressure with preemption, prefix hits, n,
seeds, sampling parameters and aborts; plain and overlapped loop; page conservation after
every step (`world.step`).
"""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from engine.loop import Engine
from engine.programs import compute_of
from engine.request import FinishReason, Request, SamplingParams
from tests.engine.world import CONFIG, Client, Told, World, check_choice, check_device_tables, run, step, world
from tests.oracle import naive_expert_load, naive_logits

VOCAB = 97


def random_params(rng: random.Random) -> SamplingParams:
    """Greedy or seeded, with a random few of the sampler's features."""
    options: dict = {"max_tokens": rng.choice([1, 2, 12, 40, 50]), "n": rng.choice([1, 1, 1, 2, 3])}
    if rng.random() < 0.5:
        options["temperature"] = 0.0
    else:
        options |= {"temperature": rng.choice([0.3, 1.0, 1.7]), "seed": rng.randrange(-5, 2**63)}
        options |= rng.choice([{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 20, "top_p": 0.9}])
    if rng.random() < 0.3:
        options |= rng.choice(
            [
                {"repetition_penalty": 1.3},
                {"frequency_penalty": 0.7, "presence_penalty": -0.5},
                {"logit_bias": {3: 4.0, 96: 2.0, 11: -100.0}},
                {"allowed_token_ids": tuple(range(10, 60))},
            ]
        )
    if rng.random() < 0.3:
        options |= {"stop_token_ids": tuple(rng.sample(range(VOCAB), 12)), "min_tokens": rng.choice([0, 1])}
    if rng.random() < 0.2:
        options["logprobs"] = 3
    return SamplingParams(**options)


def random_request(rng: random.Random, name: str, stems: list[list[int]]) -> Request:
    """Half of the prompts share a stem, so that the prefix cache has something to find."""
    stem = rng.choice(stems) if rng.random() < 0.5 else []
    tail = [rng.randrange(VOCAB) for _ in range(rng.choice([1, 2, 3, 7, 16, 40, 75]))]
    return Request(
        request_id=name,
        prompt_token_ids=tuple(stem[: rng.randrange(len(stem) + 1)] + tail),
        params=random_params(rng),
        end_token_ids=(rng.randrange(VOCAB),),
        banned_token_ids=tuple(rng.sample(range(VOCAB), 2)) if rng.random() < 0.1 else (),
        cache_salt=rng.choice(["", "", "tenant"]),
    )


def checked_step(engine: Engine) -> bool:
    worked = step(engine)
    check_device_tables(engine)
    return worked


def run_schedule(w: World, seed: int, overlap: bool) -> list[Client]:
    """One random day of the engine. Every finished choice is checked against the oracle."""
    rng = random.Random(seed)
    engine = w.engine(
        overlap=overlap,
        max_num_batched_tokens=rng.choice([5, 16, 33, 48]),
        max_prefill_rows=rng.choice([1, 4]),
        decode_steps=rng.choice([1, 2, 3]),
        num_pages=rng.choice([48, 49, 50, 54, 200]),
        max_num_seqs=CONFIG.max_num_seqs,
        enable_prefix_caching=rng.random() < 0.8,
        state_checkpoints=w.config.state_checkpoints and rng.choice([1, 3, w.config.state_checkpoints]),
    )
    stems = [[rng.randrange(VOCAB) for _ in range(60)] for _ in range(2)]
    clients, seeds = [], {}
    to_come = rng.randrange(4, 12)
    while to_come or checked_step(engine):
        while to_come and rng.random() < 0.5:
            to_come -= 1
            request = random_request(rng, f"{seed}-{to_come}", stems)
            clients.append(Client.of(request))
            engine.submit(request, clients[-1])
            engine.read_inbox(block=False)
            mine = [s for s in engine.scheduler.sequences() if s.request is request]
            seeds |= {(request.request_id, s.index): s.seed for s in mine}
        if clients and rng.random() < 0.02:
            engine.abort(rng.choice(clients).request.request_id)
        if to_come:
            checked_step(engine)
    assert not engine.outbox and not engine.scheduler.num_held_pages
    for client in clients:
        assert set(client.finished) == set(range(client.request.params.n)), "every choice has one ending"
        for index, reason in client.finished.items():
            if reason is not FinishReason.ABORT:
                check_choice(w, client.request, seeds[client.request.request_id, index], client.tokens[index], reason)
    return clients


@pytest.mark.parametrize("block", [*range(3), *(pytest.param(block, marks=pytest.mark.slow) for block in range(3, 10))])
@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlapped"])
def test_tokens_equal_naive_forward(block: int, overlap: bool) -> None:
    w = world()
    for seed in range(block * 10, block * 10 + 10):
        run_schedule(w, seed, overlap)


# Latents come with experts, and test_llm has packed weights: the others compile for as long again.
SELDOM = [
    pytest.param(kind, marks=pytest.mark.slow)
    for kind in ("experts", "delta", "delta-ngram", "states-draft", "packed", "GPTQ", "mxfp4", "Q4_K")
]


@pytest.mark.parametrize("kind", [*SELDOM, "latent", "states", "states-ngram", "ngram"])
@pytest.mark.parametrize("block", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_tokens_of_other_kinds_equal_naive_forward(kind: str, block: int) -> None:
    """The same net over packed weights and a quantized cache: what is stored never depends on chunks or hits.

    And over recurrent states, which do depend on chunks, but only by rounding. Of checkpoints that stay packed as they
    are stored, the naive forward multiplies by the float32 weights that their format says.
    """
    for seed in range(300 + block * 6, 306 + block * 6):
        run_schedule(world(kind), seed, overlap=seed % 2 == 0)


@pytest.mark.parametrize("kind", ["ngram", "states-ngram", pytest.param("delta-ngram", marks=pytest.mark.slow)])
@pytest.mark.parametrize("overlap", [False, True])
def test_a_text_that_repeats_itself_takes_fewer_steps_and_keeps_its_tokens(kind: str, overlap: bool) -> None:
    """Few tokens allowed, so that the same ones come again; drawn with a seed, with penalties and logprobs."""
    w = world(kind)
    engine = w.engine(overlap=overlap, enable_prefix_caching=False)
    params = SamplingParams(
        temperature=0.7, seed=11, max_tokens=60, ignore_eos=True, allowed_token_ids=(3, 4, 5), logprobs=2,
        presence_penalty=0.2,
    )  # fmt: skip
    clients = [
        Client.of(Request(request_id=f"loop-{i}", prompt_token_ids=(3, 4, 5) * (i + 1), params=params))
        for i in range(3)
    ]
    engine.scheduler.speculation = Told(itertools.repeat(w.config.draft_tokens))  # type: ignore[misc]
    before = engine.stats()
    for client in clients:
        engine.submit(client.request, client)
    run(engine)
    after = engine.stats()
    proposed = after.draft_tokens - before.draft_tokens
    accepted = after.accepted_draft_tokens - before.accepted_draft_tokens
    assert 0 < accepted < proposed
    for client in clients:
        check_choice(w, client.request, 11, client.tokens[0], client.finished[0])
        assert [t for d in client.deltas[0] for t in d.token_ids] == client.tokens[0] and len(client.tokens[0]) == 60
        logprobs = [one for d in client.deltas[0] for one in d.logprobs or ()]
        assert [one.token_id for one in logprobs] == client.tokens[0]


@pytest.mark.parametrize("overlap", [False, True])
def test_what_verifying_steps_leave_of_a_state_is_found_by_the_next_turn(overlap: bool) -> None:
    """Each turn starts behind the answer before it, most of whose proposals were refused or taken in part."""
    w = world("states-ngram")
    engine = w.engine(overlap=overlap)
    engine.scheduler.speculation = Told(itertools.repeat(w.config.draft_tokens))  # type: ignore[misc]
    params = SamplingParams(temperature=0.8, seed=5, max_tokens=30, ignore_eos=True, allowed_token_ids=(3, 4, 5, 6))
    prompt, before = (3, 4, 5, 6, 3, 4, 5), engine.stats()
    for turn in range(4):
        client = Client.of(Request(request_id=f"turn-{turn}", prompt_token_ids=prompt, params=params))
        engine.submit(client.request, client)
        run(engine)
        check_choice(w, client.request, 5, client.tokens[0], client.finished[0])
        if turn:
            known = len(prompt) - 2  # the last two were not in the state, or not yet asked about
            assert known - 3 * w.config.page_size <= client.deltas[0][0].num_cached_tokens <= known
        prompt = (*prompt, *client.tokens[0], 3)
    after = engine.stats()
    accepted = after.accepted_draft_tokens - before.accepted_draft_tokens
    assert 0 < accepted < after.draft_tokens - before.draft_tokens


def test_wrong_proposals_change_nothing() -> None:
    """Histories of other tokens: what is proposed is wrong, and the output must be right all the same."""
    w = world("ngram")
    engine = w.engine(overlap=False)
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    client = Client.of(Request(request_id="spoilt", prompt_token_ids=tuple(range(30)), params=params))
    engine.submit(client.request, client)
    history = next(i for i, a in enumerate(w.runner._slots) if a.shape == (7, w.config.max_model_len))
    before = engine.stats()
    for _ in range(500):
        engine.read_inbox(block=False)
        w.runner._slots = [a.at[:].set(a % 2) if i == history else a for i, a in enumerate(w.runner._slots)]
        if not engine.run_once():
            break
    assert engine.stats().draft_tokens > before.draft_tokens
    check_choice(w, client.request, 0, client.tokens[0], client.finished[0])


def test_expert_load_counts_the_tokens_of_sequences_alone() -> None:
    """Several prompts in chunks and decoding together: idle rows and padding chose nothing."""
    w = world("latent")
    engine = w.engine(overlap=True, enable_prefix_caching=False, max_num_batched_tokens=16)
    prompts = [tuple((7 * i + n) % VOCAB for i in range(n)) for n in (3, 21, 40)]
    params = SamplingParams(temperature=0.0, max_tokens=9)
    clients = [Client.of(Request(request_id=f"load-{len(p)}", prompt_token_ids=p, params=params)) for p in prompts]
    for client in clients:
        engine.submit(client.request, client)
    before = 0 if w.counters.expert_tokens is None else w.counters.expert_tokens
    run(engine)
    fed = [[*c.request.prompt_token_ids, *c.tokens[0][:-1]] for c in clients]  # the last token is drawn, and not fed
    wanted = sum(naive_expert_load(w.model, w.params, tokens) for tokens in fed)
    found = engine.stats().expert_tokens
    assert found is not None and np.array_equal(found - before, wanted)


@pytest.mark.slow  # nothing else of the short run compiles this kind
def test_the_oracle_sees_a_quantized_cache() -> None:
    w = world("packed")
    kept = naive_logits(w.model, w.params, range(60), compute_of(w.model, w.config).kv)
    exact = naive_logits(w.model, w.params, range(60))
    assert 1e-2 < abs(kept - exact).max() < 1


def test_schedules_reach_the_hard_cases() -> None:
    """The net is only as good as what falls into it: preemption, prefix hits and aborts must occur."""
    w = world()
    before = w.counters.num_preemptions, w.counters.prefix_hits_tokens
    endings = [r for seed in range(200, 215) for c in run_schedule(w, seed, True) for r in c.finished.values()]
    assert w.counters.num_preemptions > before[0] and w.counters.prefix_hits_tokens > before[1]
    assert {FinishReason.STOP, FinishReason.LENGTH, FinishReason.ABORT} <= set(endings)


def test_a_hit_continues_from_a_checkpoint_and_the_net_catches_a_wrong_one() -> None:
    """A prompt that extends another one, whose states are first right and then another sequence's."""
    w = world("states")
    engine = w.engine(overlap=False)
    before = w.counters.prefix_hits_tokens
    for name, length in (("first", 41), ("right", 60), ("wrong", 50)):
        if name == "wrong":
            rows = engine.config.checkpoint_rows
            assert rows is not None
            w.runner._kv = [a.at[rows.start :].set(a[:1]) if len(a) == w.config.num_states else a for a in w.runner._kv]
        params = SamplingParams(temperature=1.7, seed=5, max_tokens=40)
        request = Request(request_id=name, prompt_token_ids=tuple(range(length)), params=params)
        client = Client.of(request)
        engine.submit(request, client)
        engine.read_inbox(block=False)
        while checked_step(engine):
            pass
        if name == "wrong":
            with pytest.raises(AssertionError):
                check_choice(w, request, 5, client.tokens[0], client.finished[0])
        else:
            check_choice(w, request, 5, client.tokens[0], client.finished[0])
    assert w.counters.prefix_hits_tokens - before == 40 + 40


def test_a_second_turn_continues_from_the_answer() -> None:
    """What was decoded leaves a state too: of the last page border that the answer reached, and of no other."""
    w = world("states")
    engine = w.engine(overlap=True)
    params = SamplingParams(temperature=1.7, seed=5, max_tokens=40)
    before, prompt = w.counters.prefix_hits_tokens, tuple(range(41))
    for turn in ("first", "second"):
        request = Request(request_id=turn, prompt_token_ids=prompt, params=params)
        client = Client.of(request)
        engine.submit(request, client)
        run(engine)
        check_choice(w, request, 5, client.tokens[0], client.finished[0])
        assert len(engine.scheduler.cache._states) == {"first": 2, "second": 3}[turn]
        prompt = (*prompt, *client.tokens[0], 1, 2, 3)
    assert w.counters.prefix_hits_tokens - before == 41 + 40 - 1


def test_the_net_catches_a_wrong_page() -> None:
    """Let a running sequence's block table name another page once: the tokens must be found wrong."""
    w = world()
    engine = w.engine(overlap=False)
    request = Request(
        request_id="broken",
        prompt_token_ids=tuple(range(40)),
        params=SamplingParams(temperature=0.0, max_tokens=30),
    )
    client = Client.of(request)
    engine.submit(request, client)
    step(engine)
    tables = next(i for i, a in enumerate(w.runner._slots) if a.shape == (7, 48))
    slots = list(w.runner._slots)
    slots[tables] = slots[tables].at[:, 8].set(slots[tables][:, 3])
    w.runner._slots = slots
    with pytest.raises(ValueError, match=r"has page .* at entries 3 and 8"):
        check_device_tables(engine)
    while engine.run_once():
        pass
    with pytest.raises(AssertionError):
        check_choice(w, request, 0, client.tokens[0], client.finished[0])
