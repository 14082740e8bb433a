"""Products with weights as they are: `matmul`."""

from pallas_kernels.matmul.api import matmul

__all__ = ["matmul"]
