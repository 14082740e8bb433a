"""Rows sorted by expert times their experts' weights: `grouped_matmul`."""

from pallas_kernels.grouped_matmul.api import grouped_matmul

__all__ = ["grouped_matmul"]
