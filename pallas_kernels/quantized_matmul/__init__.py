"""x @ w for a weight that stays packed: `quantized_matmul`."""

from pallas_kernels.quantized_matmul.api import quantized_matmul

__all__ = ["quantized_matmul"]
