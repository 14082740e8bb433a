"""What an encoder computes, free of any checkpoint's spelling: BERT and its kin.

Their own description beside `ModelConfig`: norms behind each half of a layer, learned positions,
no cache, every token sees every other of its text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class EncoderConfig:
    """One encoder (arXiv 1810.04805), and perhaps a classifier on its first token."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_layers: int
    num_positions: int  # rows of the table of positions
    num_types: int  # of segments: 2 where a pair of texts is told apart
    activation: Literal["gelu", "gelu_tanh", "silu"] = "gelu"
    norm_eps: float = 1e-12
    # RoBERTa counts positions from behind this id's, and tokens that are this id count for nothing.
    padding_id: int | None = None
    # pooler: tanh(dense(first)) in front of the labels (BERT); dense: the same inside the classifier (RoBERTa)
    head: Literal["none", "pooler", "dense"] = "none"
    num_labels: int = 0
    # Of the one label's logit: what the checkpoint's authors call its score.
    score: Literal["sigmoid", "identity"] = "sigmoid"

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}")
        if (self.head == "none") != (self.num_labels == 0):
            raise ValueError(f"{self.num_labels} labels with head {self.head}")
        if self.max_position < 1:
            raise ValueError(f"{self.num_positions} positions leave none behind padding id {self.padding_id}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def max_position(self) -> int:
        """Tokens of the longest text."""
        return self.num_positions - (0 if self.padding_id is None else self.padding_id + 1)
