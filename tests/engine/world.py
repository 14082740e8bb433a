"""A tiny model with every kind of layer, its compiled engine, and an oracle that draws tokens by hand.

The oracle knows the sampler's specification and shares no code with it: numpy, sorts, one
sequence at a time, logits from a naive full forward.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType as Kind

from engine.config import Draft, EngineConfig
from engine.draft_model import PREFIX
from engine.executables import Executable, NoProgramCache, compile_all
from engine.loop import Engine
from engine.model.config import DeltaRule, Experts, Latent, LayerSpec, ModelConfig, Rope, StateSpace
from engine.model.params import param_specs
from engine.model.quantization import pack
from engine.model.weights.gguf import GgufCheckpoint, open_gguf
from engine.model.weights.hf import HfCheckpoint, open_hf
from engine.programs import compute_of, serving_programs, slots_of
from engine.request import FinishReason, Request, SamplingParams, TextDelta
from engine.runner import Runner
from engine.sequence import stop_token_ids
from engine.speculation import Speculation
from engine.stats import Counters
from pallas_kernels.native import library
from pallas_kernels.paged_attention.checks import check_block_tables
from pallas_kernels.target import CPU, Target
from sharding.params import init_array
from tests.model.quantized_folders import gptq, requantize_fixture
from tests.model.test_packed_gguf import load_both, write
from tests.oracle import naive_logits

FIXTURES = Path(__file__).parent.parent / "fixtures"
ROPE = Rope(tuple(10000.0 ** (-i / 8) for i in range(8)))
MODEL = ModelConfig(
    family="test",
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=16,
    layers=(LayerSpec(ROPE), LayerSpec(ROPE, window=24), LayerSpec(None)),
    max_position=512,
    attention_scale=0.7,
    attention_softcap=8.0,
    qk_norm="head",
    tie_embeddings=True,
)
MIXED = replace(
    MODEL,
    layers=(LayerSpec(ROPE, ffn="experts"), LayerSpec(ROPE, window=24), LayerSpec(None, ffn="experts")),
    experts=Experts(num_experts=6, per_token=2, intermediate_size=24, shared_size=16, shared_gate=True),
    attention_sinks=True,
)
LATENT = replace(
    MODEL,
    layers=(LayerSpec(ROPE, mixer="latent"), LayerSpec(ROPE, mixer="latent", ffn="experts")),
    num_kv_heads=MODEL.num_q_heads,
    head_dim=8 + 2 * len(ROPE.inv_freq),
    qk_norm="none",
    attention_softcap=None,  # as in every model that has latents; with it the expanded form is not used
    experts=Experts(
        num_experts=8, per_token=3, intermediate_size=16, scoring="sigmoid", correction=True, groups=4, groups_kept=2,
        group_best=2, scale=1.5,
    ),
    latent=Latent(kv_rank=16, nope_dim=8, rope_dim=2 * len(ROPE.inv_freq), value_dim=12, q_rank=20),
)  # fmt: skip
STATE_SPACE = replace(
    MODEL,
    layers=(LayerSpec(None, mixer="mamba2", ffn="none"), LayerSpec(ROPE)),
    state_space=StateSpace(num_heads=4, head_dim=8, state_dim=8, groups=2, conv_width=4),
)
DELTA = replace(
    MODEL,
    layers=(LayerSpec(None, mixer="gated_delta"), LayerSpec(ROPE)),
    attention_gate=True,
    delta_rule=DeltaRule(key_heads=2, value_heads=4, key_dim=8, value_dim=8, conv_width=4),
)
CONFIG = EngineConfig(
    dtype="float32",
    max_model_len=192,
    max_num_seqs=6,
    max_num_batched_tokens=48,
    max_prefill_rows=4,
    kv_cache_dtype="float32",
    quantization=None,
    target=Target(native=library().isa),  # as served; `states` and `packed` run on plain JAX
    page_size=4,
    num_pages=200,
    decode_steps=3,
    token_buckets=(16, 48),
    prefill_decode_buckets=(0, 6),
    decode_buckets=(2, 6),
    enable_prefix_caching=True,
    overlap=True,
    max_queued_requests=1000,
    seed=7,
    in_panels=True,
)


FEWER = replace(CONFIG, token_buckets=(48,), decode_buckets=(6,))  # programs; CONFIG has the buckets' borders
FEWEST = replace(FEWER, prefill_decode_buckets=(6,))
SHALLOW = replace(MODEL, layers=MODEL.layers[:2], tie_embeddings=False)  # so that a text does not repeat one token
DRAFT = Draft(SHALLOW, "float32", "float32", (), CONFIG.shards)
DRAFTED = replace(FEWEST, draft_tokens=3, draft=DRAFT)
RECURRENT = replace(FEWEST, state_checkpoints=6)
# Another family, of experts and latents, with a cache of another dtype.
OTHER = replace(DRAFT, model=LATENT, kv_cache_dtype="int8")
# What the equality net runs over: (model, configuration).
KINDS = {
    "float": (MODEL, CONFIG),
    "experts": (MIXED, FEWER),
    "latent": (LATENT, replace(FEWER, token_buckets=CONFIG.token_buckets)),  # one bucket absorbs, one expands
    "states": (STATE_SPACE, replace(RECURRENT, target=CPU)),
    "delta": (DELTA, RECURRENT),
    "ngram": (MODEL, replace(FEWEST, draft_tokens=3)),
    "states-ngram": (STATE_SPACE, replace(RECURRENT, draft_tokens=3)),
    "delta-ngram": (DELTA, replace(RECURRENT, draft_tokens=3)),
    "states-draft": (STATE_SPACE, replace(RECURRENT, draft_tokens=3, draft=DRAFT)),
    "draft": (SHALLOW, DRAFTED),  # by other weights
    "twin": (SHALLOW, DRAFTED),  # by the model's own
    "other": (SHALLOW, replace(DRAFTED, draft=OTHER)),
    "states-twin": (
        STATE_SPACE,
        replace(RECURRENT, target=CPU, draft_tokens=3, draft=replace(DRAFT, model=STATE_SPACE)),
    ),
    "delta-twin": (DELTA, replace(RECURRENT, draft_tokens=3, draft=replace(DRAFT, model=DELTA))),
    "packed": (MODEL, replace(FEWER, target=CPU, quantization="int8", kv_cache_dtype="int8")),
}
# And over checkpoints that stay packed as they are stored, each written into a folder.
CHECKPOINTS: dict[str, Callable[[Path], GgufCheckpoint | HfCheckpoint]] = {
    "Q4_K": lambda folder: open_gguf(write(folder / "model.gguf", {"attn_v": Kind.Q6_K}, Kind.Q4_K, vocab=97)),
    "GPTQ": lambda folder: open_hf(
        requantize_fixture(
            "llama",
            folder / "gptq",
            {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": False},
            gptq(4, 16, sym=False),
        )
    ),
    "mxfp4": lambda _: open_gguf(FIXTURES / "gguf" / "gpt_oss" / "model.gguf"),
}


@dataclass
class World:
    model: ModelConfig
    config: EngineConfig
    params: dict[str, Any]  # that the oracle computes with
    runner: Runner
    counters: Counters

    def engine(self, **changes: object) -> Engine:
        """An engine over the shared programs. `changes` may only touch what no program's shape holds."""
        self.runner.reset()
        config = replace(self.config, **changes)  # type: ignore[arg-type]
        return Engine(config, self.runner, vocab_size=self.model.vocab_size, counters=self.counters)


def gain(name: str) -> np.float32:
    """States outweigh the last token's own embedding."""
    return np.float32(4 if name.endswith(("ssm_out", "delta_out")) else 1)


def fading(name: str) -> np.float32:
    """States last for tens of tokens."""
    return np.float32(3 if name.endswith("dt_bias") else 0)


@cache
def world(kind: str = "float") -> World:
    if kind in CHECKPOINTS:
        return _stored_world(CHECKPOINTS[kind])
    model, config = KINDS[kind]
    params = random_params(model, config, 3)
    held = dict(params)
    if config.draft is not None:
        drafting = random_params(config.draft.model, config.of_draft(config.draft), 3 if kind.endswith("twin") else 4)
        held |= {PREFIX + name: array for name, array in drafting.items()}
    return _world(model, config, held, params)


def random_params(model: ModelConfig, config: EngineConfig, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    params = {
        name: jax.device_put(pack(spec, made, config.quantization, config.laid_for))
        for name, spec in param_specs(model, jnp.dtype(jnp.float32)).items()
        for made in [init_array(spec, rng) * gain(name) - fading(name)]
    }
    if model.tie_embeddings:
        params["embed"] *= 4.0
    return params


def _stored_world(open_in: Callable[[Path], GgufCheckpoint | HfCheckpoint]) -> World:
    """Its oracle computes in float32 with the weights that the format says."""
    with tempfile.TemporaryDirectory() as folder:
        both = load_both(open_in(Path(folder)), FEWEST.laid_for)
    config = replace(FEWEST, stored=tuple(both.packings.items()))
    return _world(both.opened.config, config, both.packed, jax.device_put(both.wide))


def _world(model: ModelConfig, config: EngineConfig, params: dict[str, Any], wide: dict[str, Any]) -> World:
    counters = Counters()
    runner = Runner(model, config, params, compiled(model, config), counters)
    runner.warm_up()
    return World(model, config, wide, runner, counters)


@cache
def compiled(model: ModelConfig, config: EngineConfig) -> dict[str, Executable]:
    return compile_all(serving_programs(model, config), NoProgramCache(), lambda phase, done, of: None)


@dataclass
class Client:
    """Collects what the engine sends for one request."""

    request: Request
    tokens: list[list[int]]
    deltas: list[list[TextDelta]]
    finished: dict[int, FinishReason]

    @classmethod
    def of(cls, request: Request) -> Client:
        n = request.params.n
        return cls(request, [[] for _ in range(n)], [[] for _ in range(n)], {})

    def __call__(self, deltas: list[TextDelta]) -> None:
        for delta in deltas:
            if delta.index in self.finished:
                raise AssertionError(f"{self.request.request_id}[{delta.index}] got news after its ending")
            self.tokens[delta.index] += delta.token_ids
            self.deltas[delta.index].append(delta)
            if delta.finish_reason is not None:
                self.finished[delta.index] = delta.finish_reason


class Told(Speculation):
    """Each step proposes as many tokens as `ways` says next."""

    def __init__(self, ways: Iterable[int]) -> None:
        super().__init__(DRAFTED.draft_tokens)
        self.ways = iter(ways)

    def drafts(self, num_seqs: int) -> int:
        return next(self.ways) if num_seqs else 0


def step(engine: Engine) -> bool:
    """Take in what was submitted, run one step of the configured loop, check the books."""
    engine.read_inbox(block=False)
    worked = engine.run_once_overlapped() if engine.config.overlap else engine.run_once()
    engine.scheduler.check()
    return worked


def check_device_tables(engine: Engine) -> None:
    """The block tables on the device name pages of the pool, no page twice in a row, and those of the books."""
    running, size = engine.scheduler.running, engine.config.page_size
    if not running:
        return
    runner = engine.runner
    assert isinstance(runner, Runner)
    structure = jax.tree.structure(slots_of(runner.model, runner.config))
    slots = jax.tree.unflatten(structure, list(runner._slots))
    first = runner.config.max_num_seqs + 1  # rows of a group
    rows = np.asarray(slots.block_tables)[[first * seq.group + seq.slot for seq in running]]
    sent = [seq.num_sent_pages for seq in running]
    check_block_tables(rows, np.asarray(sent) * size, engine.config.num_pages, size)
    for seq, row in zip(running, rows, strict=True):
        assert row[: seq.num_sent_pages].tolist() == seq.pages[: seq.num_sent_pages]


def run(engine: Engine, max_steps: int = 5000) -> None:
    """Until nothing is left to do."""
    for _ in range(max_steps):
        if not step(engine):
            return
    raise AssertionError("the engine is still busy")


def check_choice(w: World, request: Request, seed: int, tokens: list[int], reason: FinishReason) -> None:
    """Every token is what the oracle draws after the ones before it, and the ending is right."""
    prompt, params = list(request.prompt_token_ids), request.params
    full = prompt + tokens
    layout = compute_of(w.model, w.config).kv
    rows = naive_logits(w.model, w.params, full, layout if layout.quantized else None)
    for i, token in enumerate(tokens):
        length = len(prompt) + i
        scores = oracle_scores(rows[length - 1].astype(np.float64), request, seed, full[:length])
        assert scores[token] >= scores.max() - 1e-3, (request.request_id, i, token, int(scores.argmax()))
        is_stop = token in stop_token_ids(request) and i >= params.min_tokens
        assert not is_stop or i == len(tokens) - 1, "tokens after a stop token"
    if reason is FinishReason.STOP:
        assert tokens[-1] in stop_token_ids(request)
    elif reason is FinishReason.LENGTH:
        assert len(tokens) == params.max_tokens or len(full) == CONFIG.max_model_len


def oracle_scores(logits: np.ndarray, request: Request, seed: int, before: list[int]) -> np.ndarray:
    """What is maximised to draw the token after `before`: processed logits, tempered, filtered, with noise."""
    params, vocab = request.params, len(logits)
    x = logits.copy()
    if params.allowed_token_ids is not None:
        x[[t for t in range(vocab) if t not in params.allowed_token_ids]] = -np.inf
    x[list(request.banned_token_ids)] = -np.inf
    prompt_len = len(request.prompt_token_ids)
    if len(before) - prompt_len < params.min_tokens:
        x[list(stop_token_ids(request))] = -np.inf
    for token, bias in params.logit_bias.items():
        x[token] += bias
    output = before[prompt_len:]
    for token in set(before):
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    for token in set(output):
        x[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    if params.temperature == 0:
        return x
    x = oracle_filter(x / params.temperature, params)
    words = jnp.asarray([seed >> 32, seed & 0xFFFFFFFF], jnp.uint32)
    key = jax.random.fold_in(jax.random.wrap_key_data(words, impl="threefry2x32"), len(before))
    return x + np.asarray(jax.random.gumbel(key, (vocab,), jnp.float32), np.float64)


def oracle_filter(x: np.ndarray, params: SamplingParams) -> np.ndarray:
    """min-p, top-k and top-p by sorting."""
    x = np.where(np.exp(x - x.max()) >= params.min_p, x, -np.inf)
    order = np.argsort(-x, kind="stable")
    if params.top_k > 0:
        x[order[params.top_k :]] = -np.inf
    if params.top_p < 1:
        p = np.exp(x - x.max())[order]
        mass_before = np.cumsum(p) - p
        x[order[mass_before >= params.top_p * p.sum()]] = -np.inf
    return x
