"""CPU kernels in C++, called through XLA's foreign function interface: there where the build had a compiler."""

from pallas_kernels.native.library import Library, library

__all__ = ["Library", "library"]
