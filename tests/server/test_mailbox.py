"""What the engine's thread puts in comes out on the loop: all of it, in order, and never so much that others wait."""

from __future__ import annotations

import asyncio
import threading

from server.session import Mailbox


async def test_a_burst_arrives_in_order_and_in_parts() -> None:
    mailbox, queues = Mailbox(asyncio.get_running_loop()), [asyncio.Queue[list[int]]() for _ in range(100)]

    def burst() -> None:
        for number in range(3):
            for queue in queues:
                mailbox.put(queue, [number])

    thread = threading.Thread(target=burst)
    thread.start()
    thread.join()
    arrived = []
    while not arrived or arrived[-1] < 300:
        await asyncio.sleep(0)
        arrived.append(sum(queue.qsize() for queue in queues))
    turns = [count for count in [0, *arrived] if count]
    most = max(after - before for before, after in zip([0, *turns], turns, strict=False))
    assert most <= Mailbox.AT_ONCE < 300, "the loop has its turn between"
    assert [[queue.get_nowait() for _ in range(3)] for queue in queues] == [[[0], [1], [2]]] * 100


async def test_mail_that_comes_while_some_is_being_handed_out_is_not_forgotten() -> None:
    mailbox, queue = Mailbox(asyncio.get_running_loop()), asyncio.Queue[list[int]]()
    for number in range(Mailbox.AT_ONCE + 1):
        mailbox.put(queue, [number])
    await asyncio.sleep(0)
    mailbox.put(queue, [-1])
    async with asyncio.timeout(5):
        assert [(await queue.get())[0] for _ in range(Mailbox.AT_ONCE + 2)] == [*range(Mailbox.AT_ONCE + 1), -1]
