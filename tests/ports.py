"""Ports that a test gives to the servers it starts."""

from __future__ import annotations

import random

from engine.errors import OctavoError
from engine.hosts import check_free

BELOW_CLIENTS = range(20000, 30000)  # from 32768 on Linux gives ports to clients, at any time


def free_ports(count: int = 1) -> int:
    """The first of so many ports in a row that nobody uses. Random: tests run side by side."""
    while True:
        first = random.SystemRandom().choice(BELOW_CLIENTS)
        try:
            for port in range(first, first + count):
                check_free(port, "a test")
        except OctavoError:
            continue
        return first
