"""The state-space recurrence of Mamba 2: `ssd`."""

from pallas_kernels.ssd.api import ssd

__all__ = ["ssd"]
