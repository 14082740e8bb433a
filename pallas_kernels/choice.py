"""Which implementation of an op serves a call: the first in the op's order that does not decline.

An implementation that was asked for by name serves or raises; there is no silent fallback.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pallas_kernels.target import Target


class KernelDeclined(ValueError):
    """The implementation asked for by name cannot serve these shapes on this chip."""


@dataclass(frozen=True)
class Implementation[Spec]:
    """One way to compute an op. `declines` says in a few words why it does not serve; None: it does."""

    name: str
    declines: Callable[[Spec, Target], str | None]
    run: Callable[..., Any]


@dataclass(frozen=True)
class Choice[Spec]:
    """The implementation for a call, and why the ones before it were passed over."""

    op: str
    implementation: Implementation[Spec]
    declined: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        why = "; ".join(f"{name}: {reason}" for name, reason in self.declined)
        return f"{self.op}: {self.implementation.name}" + (f" ({why})" if why else "")


def choose[Spec](op: str, candidates: Sequence[Implementation[Spec]], spec: Spec, target: Target) -> Choice[Spec]:
    """The choice for `spec` (an op's own frozen dataclass of shapes and dtypes) on `target`.

    Raises KernelDeclined when the implementation that the target names declines, ValueError when
    there is none of that name, RuntimeError with every reason when all decline.
    """
    asked = target.asked(op)
    if asked is not None:
        named = next((c for c in candidates if c.name == asked), None)
        if named is None:
            raise ValueError(f"{op} has no implementation {asked!r}; there are {', '.join(c.name for c in candidates)}")
        reason = named.declines(spec, target)
        if reason is not None:
            raise KernelDeclined(f"{op}: {asked} was asked for and declines: {reason}")
        return Choice(op, named)
    declined: list[tuple[str, str]] = []
    for candidate in candidates:
        reason = candidate.declines(spec, target)
        if reason is None:
            return Choice(op, candidate, tuple(declined))
        declined.append((candidate.name, reason))
    raise RuntimeError(f"{op}: every implementation declines: {declined}")


def not_on(platform: str, target: Target) -> str | None:
    """The first question of every kernel: is this its platform, and a chip it has numbers for?"""
    if target.platform != platform:
        return f"for {platform}"
    return None if target.facts is not None else f"chip {target.chip!r} is not in pallas_kernels.target.CHIPS"


def mosaic(platform: str, module: str, run: str = "run") -> Implementation[Any]:
    """A kernel of one platform, in a module with its `declines` that is imported where the platform is asked for alone:
    Mosaic takes half a second and 25 MB, which serving on a CPU need not pay."""

    def declines(spec: object, target: Target) -> str | None:
        return not_on(platform, target) or importlib.import_module(module).declines(spec, target)

    def call(*arrays: Any, **how: Any) -> Any:
        return getattr(importlib.import_module(module), run)(*arrays, **how)

    return Implementation(platform, declines, call)


def never(spec: object, target: Target) -> str | None:
    """Declines nothing: the plain JAX reference."""
    return None
