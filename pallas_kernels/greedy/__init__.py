"""The likeliest token of each row of logits, and whether a number of it is not finite: `greedy`."""

from pallas_kernels.greedy.api import greedy

__all__ = ["greedy"]
