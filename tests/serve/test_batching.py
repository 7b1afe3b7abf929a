"""Batches beside each other, without a server."""

import asyncio
import contextlib
import threading

import pytest

from vimamba.serve.batching import Batcher


def answered(batcher, *calls):
    """What calls of a running batcher give, all begun at once."""

    async def together():
        running = asyncio.create_task(batcher.run())
        found = await asyncio.wait_for(asyncio.gather(*(call() for call in calls)), 60)
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
        return found

    return asyncio.run(together())


def test_lanes_look_at_two_batches_at_once_and_share_what_waits():
    meeting, seen = threading.Barrier(2, timeout=60), []

    def results(items, busy):
        meeting.wait()  # until the other lane is here too
        seen.append((len(items), busy))
        return [2 * item for item in items]

    batcher = Batcher(results, 8, 0.2, 100, lanes=2)
    assert answered(batcher, lambda: batcher.answers([1, 2, 3, 4, 5, 6])) == [[2, 4, 6, 8, 10, 12]]
    assert sorted(seen) == [(3, 1), (3, 2)]


@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_nothing_else_runs_beside_a_call_alone(lanes):
    running, lock = [], threading.Lock()

    def entered(name):
        with lock:
            assert "alone" not in running
            assert name != "alone" or not running
            running.append(name)
        threading.Event().wait(0.02)
        with lock:
            running.remove(name)
        return name

    batcher = Batcher(lambda items, busy: [entered("batch")] * len(items), 1, 0.0, 100, lanes=lanes)
    calls = [lambda: batcher.answers(["image"]), lambda: batcher.alone(entered, "alone")] * 6
    assert answered(batcher, *calls) == [["batch"], "alone"] * 6
