"""Batches beside each other, without a server."""

import asyncio
import contextlib
import io
import threading

import pytest
import torch

from vimamba import load_run
from vimamba.data.decode import decode_image
from vimamba.errors import UserError
from vimamba.inference.answers import Asked
from vimamba.serve.app import Service
from vimamba.serve.batching import Batcher
from vimamba.serve.options import ServeOptions
from vimamba.serve.uploads import Upload


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


def test_a_lane_that_comes_from_a_batch_takes_its_part_at_once():
    """Of two lanes one is held, the other goes on: three items are no full batch, and two of five are its part."""
    both, more_wait, more_are_done = threading.Barrier(2), threading.Event(), threading.Event()
    seen = []

    def results(items, busy):
        seen.append(items)
        if len(seen) <= 2:
            both.wait(60)
            assert (more_are_done if items == [0, 1] else more_wait).wait(60)
        elif items[-1] == 6:
            more_are_done.set()
        return items

    batcher = Batcher(results, 4, 60.0, 100, lanes=2)

    async def later():
        while both.n_waiting or len(seen) < 2:
            await asyncio.sleep(0.001)
        asking = asyncio.create_task(batcher.answers([4, 5, 6]))
        await asyncio.sleep(0)
        more_wait.set()
        return await asking

    assert answered(batcher, lambda: batcher.answers([0, 1, 2, 3]), later) == [[0, 1, 2, 3], [4, 5, 6]]
    assert sorted(seen) == [[0, 1], [2, 3], [4, 5], [6]]


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


@pytest.mark.parametrize(("cores", "ahead"), [(1, False), (2, False), (8, True)])
def test_images_are_decoded_by_lanes_or_ahead_of_them(cores, ahead, trained, photographs, monkeypatch):
    """A lane for each core decodes; more cores than lanes do it meanwhile. Bad images take nobody's answer."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    service = Service(load_run(trained), ServeOptions())
    by_lane = []
    prepare = service.predictor.item
    monkeypatch.setattr(
        service.predictor, "item", lambda image: [by_lane.append(threading.current_thread().name), prepare(image)][1]
    )
    good = [Upload(name, data) for name, data in photographs.items()]
    sent = [Upload("bad", b"no image"), *good[:2], Upload("empty", b""), *good[2:]]
    asked = Asked.by(service.predictor, 1, 0.5)
    with service.memory.share() as share:
        (found,) = answered(service.batcher, lambda: service._answers(sent, asked, False, False, share))
    assert [isinstance(answer, UserError) for answer in found] == [upload not in good for upload in sent]
    alone = [asked.body(service.predictor.predict(decode_image(io.BytesIO(one.data), one.name))) for one in good]
    classes = [[line["class"] for line in body["predictions"]] for body in alone]
    assert [[line["class"] for line in body["predictions"]] for body in found if isinstance(body, dict)] == classes
    assert {name.split("_")[0] for name in by_lane} == {"images" if ahead else "model"}
