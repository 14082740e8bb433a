"""What the choice of a matmul depends on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MatmulSpec:
    """Static facts of a call."""

    tokens: int
    k: int
    n: int
    dtype: str  # of x
    weight_dtype: str
    transposed: bool = False
    panel: int = 0  # columns of a panel; 0: the weight is not in panels
