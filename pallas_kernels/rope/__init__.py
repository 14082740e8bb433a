"""Rotary position embedding of a layer's queries and keys: `split_rotated`, and `rotate` of anything."""

from pallas_kernels.rope.api import split_rotated
from pallas_kernels.rope.reference import rotate

__all__ = ["rotate", "split_rotated"]
