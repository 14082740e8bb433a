"""Logits of every token of a text, for research and evals, through the serving path's own forward.

Outside the closed set: its one program is compiled on first use.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.batch import StepKey, idle_vector, step_layout
from engine.errors import ContextOverflow, InvalidParam
from engine.executables import NoProgramCache, compile_one
from engine.loop import Engine
from engine.programs import logits_program
from engine.runner import Runner
from sharding.mesh import mesh_of

CHUNK_TOKENS = 128  # a chunk's logits are held at once: tokens x vocabulary x 4 bytes


class TokenLogits:
    """float32 [tokens, vocab] for a list of token ids; borrows pages from the pool meanwhile."""

    def __init__(self, engine: Engine) -> None:
        if not isinstance(engine.runner, Runner):
            raise TypeError("logits need a runner with a model")
        self.engine, self.runner = engine, engine.runner
        config = engine.config
        self.chunk = next((size for size in config.token_buckets if size >= CHUNK_TOKENS), config.token_buckets[-1])
        self.layout = step_layout(config, StepKey(self.chunk, 0))
        self.executable = compile_one(
            logits_program(self.runner.model, config, self.chunk, mesh_of(config.shards)), NoProgramCache()
        )

    def __call__(self, token_ids: Sequence[int]) -> np.ndarray:
        config = self.engine.config
        if not 0 < len(token_ids) <= config.max_model_len:
            raise ContextOverflow("token_ids", f"must be 1 to {config.max_model_len} tokens, got {len(token_ids)}")
        if not 0 <= min(token_ids) <= max(token_ids) < self.engine.vocab_size:
            raise InvalidParam("token_ids", f"must be between 0 and {self.engine.vocab_size - 1}")
        return self.engine.call(lambda: self._all(list(token_ids)))

    def _all(self, token_ids: list[int]) -> np.ndarray:
        pool = self.engine.scheduler.cache.pool
        needed = -(-len(token_ids) // self.engine.config.page_size)
        if needed > pool.num_available:
            raise ContextOverflow("token_ids", f"need {needed} KV pages, {pool.num_available} are free")
        pages = pool.take(needed)
        try:
            starts = range(0, len(token_ids), self.chunk)
            return np.concatenate([self._chunk(token_ids, start, pages) for start in starts])
        finally:
            pool.release(pages)

    def _chunk(self, token_ids: list[int], start: int, pages: list[int]) -> np.ndarray:
        part = token_ids[start : start + self.chunk]
        vector, fields = self.layout.pack()
        idle = idle_vector(self.engine.config, self.layout)[self.layout.size :]  # of the other groups
        fields["tokens"][: len(part)] = part
        fields["q_len"][0], fields["position"][0] = len(part), start
        fields["block_table"][0, : len(pages)] = pages
        if "state_source" in fields and start:
            fields["state_source"][0] = fields["slot"][0]  # the idle slot's, which the chunk before it left
        return self.runner.token_logits(self.executable, np.concatenate([vector, idle]))[: len(part)]
