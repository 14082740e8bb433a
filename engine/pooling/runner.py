"""Owns a pooling model's parameters on the device. Turns batches into vectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import Array

from engine.executables import Executable
from engine.pooling.batch import batch_layout, build, lattice, padding_id_of
from engine.pooling.config import PoolingConfig
from engine.pooling.programs import PoolingModel
from engine.pooling.waiting import Batch
from engine.stats import Counters


@dataclass(frozen=True)
class Pending:
    """A launched step whose vectors are on their way to the host."""

    batch: Batch
    output: Array  # float32 [rows, numbers]

    def result(self) -> np.ndarray:
        """float32 [texts, numbers]; waits for the step."""
        return np.asarray(self.output)[: len(self.batch.items)]


class PoolingRunner:
    """The device's side of `PoolingEngine`."""

    def __init__(
        self,
        model: PoolingModel,
        config: PoolingConfig,
        params: Mapping[str, Any],
        executables: Mapping[str, Executable],
        counters: Counters,
    ) -> None:
        self._config = config
        self._params = jax.tree.leaves(dict(params))
        self._executables = executables
        self._counters = counters
        self._padding_id = padding_id_of(model)
        self._layouts = {key: batch_layout(key) for key in lattice(config)}

    def warm_up(self) -> None:
        """Run every program once, so that the first request pays for nothing."""
        for key, layout in self._layouts.items():
            jax.block_until_ready(self._executables[key.name](self._params, [np.zeros(layout.size, np.int32)]))

    def launch(self, batch: Batch) -> Pending:
        """Start a step; returns before the device is done."""
        key = batch.key
        texts = [item.text for item in batch.items]
        vector = build(key, self._layouts[key], self._padding_id, texts)
        ((output,),) = self._executables[key.name](self._params, [vector])
        counters = self._counters
        counters.steps[key.name] = counters.steps.get(key.name, 0) + 1
        counters.tokens_used += batch.num_tokens
        counters.tokens_padded += key.tokens - batch.num_tokens
        return Pending(batch, output)
