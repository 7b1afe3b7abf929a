"""Images of many requests, looked at together."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from threading import Lock, Semaphore
from typing import Any, NamedTuple

from vimamba.errors import UserError
from vimamba.serve.options import Refused


class Waiting(NamedTuple):
    """An image before the model, and who waits for what it shows."""

    item: Any
    answer: asyncio.Future
    since: float


class Batcher:
    """A queue before one model that a few threads run, its lanes.

    A batch begins when the first image waits and a lane is free, and is looked at when it is full or the first has
    waited long enough. Lanes that were free share what waits. A lane that comes from a batch while others are busy
    takes its part of what is not answered yet and leaves the rest, so that the next lane has work at once; nor does it
    wait for more. Images whose request has gone are left out.

    Args:
        results: what the model says of items, one result each; called in a lane, and told how many lanes are busy.
        max_batch: items in a call.
        max_wait_s: seconds that the first waits for others.
        max_queue: items that may wait.
        done: told of each batch how many of its items had a result, and its seconds.
        lanes: batches that are looked at at once.
    """

    def __init__(
        self, results: Callable[[list[Any], int], list[Any]], max_batch: int, max_wait_s: float, max_queue: int,
        done: Callable[[int, float], None] = lambda size, seconds: None, lanes: int = 1,
    ):  # fmt: skip
        self.results, self.done = results, done
        self.lanes, self.busy, self.inside = lanes, 0, 0
        self.free, self.turn = Semaphore(lanes), Lock()  # of threads, which go on where a request is given up
        self.max_batch, self.max_wait_s, self.max_queue = max_batch, max_wait_s, max_queue
        self.queue: deque[Waiting] = deque()
        self.arrived = asyncio.Event()
        self.threads = ThreadPoolExecutor(lanes, "model")

    def check_room(self, count: int) -> None:
        """Refuse what there is no room for.

        Raises:
            Refused: the queue is full, or could never take so many.
        """
        if count > self.max_queue:
            raise Refused(413, f"{count} images in one request are too many; send at most {self.max_queue}")
        if len(self.queue) + count > self.max_queue:
            raise Refused(429, f"{len(self.queue)} images are waiting already; try again in a moment")

    async def answers(self, items: list[Any]) -> list[Any]:
        """What the model says of some items, in their order; a UserError for one of which it can say nothing.

        Raises:
            Refused: the queue is full.
        """
        self.check_room(len(items))
        loop, now = asyncio.get_running_loop(), time.monotonic()
        waiting = [Waiting(item, loop.create_future(), now) for item in items]
        self.queue.extend(waiting)
        self.arrived.set()
        return await asyncio.gather(*(one.answer for one in waiting))

    async def run(self) -> None:
        """Answer until cancelled."""
        await asyncio.gather(*(self._lane() for _ in range(self.lanes)))

    async def alone(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """The result of a call during which no batch is looked at."""

        def undisturbed() -> Any:
            with self.turn, ExitStack() as held:  # of two calls that have a lane each neither would get both
                for _ in range(self.lanes):
                    held.enter_context(self.free)
                return call(*arguments)

        return await asyncio.get_running_loop().run_in_executor(self.threads, undisturbed)

    async def _lane(self) -> None:
        ran = False
        while True:
            batch = await self._next_batch(ran)
            ran = bool(batch)
            if not ran:
                continue
            self.busy += 1
            self.inside += len(batch)
            start, items = time.monotonic(), [one.item for one in batch]
            call = asyncio.get_running_loop().run_in_executor(self.threads, self._in_lane, items, self.busy)
            answers = await call
            for one, answer in zip(batch, answers, strict=True):
                if not one.answer.done():
                    one.answer.set_result(answer)
            self.busy -= 1
            self.inside -= len(batch)
            if good := sum(not isinstance(answer, Exception) for answer in answers):
                self.done(good, time.monotonic() - start)

    async def _next_batch(self, ran: bool) -> list[Waiting]:
        """What a lane looks at that `ran`, or not, until now."""
        ran &= bool(self.queue)
        while not self.queue:
            self.arrived.clear()
            await self.arrived.wait()
        until = self.queue[0].since + self.max_wait_s
        while 0 < len(self.queue) < (self._part() if self.busy else self.max_batch):
            if (left := until - time.monotonic()) <= 0:
                break
            self.arrived.clear()
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.arrived.wait(), left)
        count = self._part() if self.busy and ran else -(-len(self.queue) // (self.lanes - self.busy))
        taken = [self.queue.popleft() for _ in range(min(len(self.queue), self.max_batch, count))]
        return [one for one in taken if not one.answer.done()]

    def _part(self) -> int:
        """Of what has no answer yet, a part for each lane, and one that waits for the lane that is next."""
        return min(self.max_batch, -(-(len(self.queue) + self.inside) // (self.lanes + 1)))

    def _in_lane(self, items: list[Any], busy: int) -> list[Any]:
        with self.free:
            return self._looked_at(items, busy)

    def _looked_at(self, items: list[Any], busy: int) -> list[Any]:
        """Each item's result, or what went wrong with it: one that spoils a batch is found by itself."""
        try:
            return self.results(items, busy)
        except Exception as error:
            if len(items) > 1:
                return [answer for item in items for answer in self._looked_at([item], busy)]
            return [error if isinstance(error, UserError) else Failed(error)]


class Failed(Exception):  # noqa: N818 - holds one
    """What went wrong with an item and is not the sender's to mend."""

    def __init__(self, cause: Exception):
        super().__init__(str(cause))
        self.__cause__ = cause
