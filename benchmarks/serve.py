"""A server under load: time of a request, throughput beside the predictor in a loop, lost and mixed answers, memory.

`python benchmarks/serve.py [--seconds 600]` serves a model in a process of its own, and asks it from clients in this
one, each with one request after the other. A share of the requests is bad, in five ways. The model is untrained and its
images are noise, of which each has another answer. Memory is what the kernel counts as the server's own (RssAnon). The
clients share the server's cores: they are one thread, whose own time is told too. Free of it, and of whatever else
runs on the machine, are the milliseconds of a core that the server and the loop need for each image.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from vimamba import load_run
from vimamba.benchmark import machine, report
from vimamba.benchmark.script import script
from vimamba.data.transforms import Preprocessing
from vimamba.tasks.weights import ModelCard, save_model

CLASSES, IMAGES = 10, 64
WARM_S = 20.0  # after which memory and times count
LONGEST_S = 60.0  # that a client waits
CLOSE = 2e-5  # of a probability: the same model in batches of other sizes
TARGETS = {"p99 / p50": 5.0, "throughput / loop": 0.8, "growth MB": 50.0}
BAD = {b"": 422, b"not an image": 422, b"\x89PNG\r\n\x1a\n" + bytes(200): 422, b"\0" * 2_000_000: 413}


class Asked(NamedTuple):
    """A request that was answered: when, how long it took, how many images, and what was wrong."""

    when: float
    seconds: float
    good: bool
    fault: str


def main() -> None:
    """Serve, ask, print, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vim_nano", help="a model's name")
    parser.add_argument("--size", type=int, default=56, help="height and width of its images, pixels")
    parser.add_argument("--clients", type=int, default=32, help="that ask at once")
    parser.add_argument("--bad", type=float, default=0.05, help="share of bad requests")
    parser.add_argument("--seconds", type=float, default=60.0, help="after the first, which count nothing")
    parser.add_argument("--max_batch", type=int, default=16, help="of serve, and of the predictor")
    parser.add_argument("--max_wait_ms", type=float, default=5.0, help="of serve")
    parser.add_argument("--workers", type=int, default=1, help="of serve")
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args()
    if options.json:
        report.check_writable(options.json, "--json")
    facts = machine.describe("cpu")
    print(machine.heading(facts) + "\n")
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "model.safetensors"
        write_model(run, options.model, options.size)
        files = noise(options.size)
        loop, needs, expected = in_a_loop(run, files, options.max_batch)
        row = under_load(run, files, expected, options)
    row |= {"loop images/s": loop, "throughput / loop": row["images/s"] / loop}
    row |= {"loop's core ms": needs, "loop / server": needs / row["server's core ms"]}
    for name, value in row.items():
        target = f" (target {TARGETS[name]:g})" if name in TARGETS else ""
        print(f"{name:18} {value if isinstance(value, int | dict) else format(value, '.4g')}{target}")
    if options.json:
        asked = {name: value for name, value in vars(options).items() if name != "json"}
        options.json.write_text(json.dumps({"machine": facts, "results": [asked | row]}, indent=1) + "\n")


def write_model(path: Path, name: str, size: int) -> None:
    """An untrained model."""
    torch.manual_seed(0)
    prep = Preprocessing((size, size), 3, (0.5,) * 3, (0.5,) * 3, crop_pct=1.0)
    card = ModelCard(name, {}, [f"class {i}" for i in range(CLASSES)], prep)
    model = card.build()
    with torch.no_grad():  # logits of an untrained model hardly differ
        model.get_classifier().weight.mul_(50)
    save_model(path, model, card)


def noise(size: int) -> list[bytes]:
    """Pictures of other statistics each, in files."""
    drawn, files = np.random.RandomState(0), []
    for _ in range(IMAGES):
        low, high = sorted(drawn.randint(0, 256, 2))
        pixels = drawn.randint(low, high + 1, (size, size, 3)) * drawn.rand(3)
        file = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(file, "jpeg")
        files.append(file.getvalue())
    return files


def in_a_loop(run: Path, files: list[bytes], batch: int) -> tuple[float, float, list[dict[str, float]]]:
    """Images a second of the predictor alone, decoding included, milliseconds of a core for each, and what it says."""
    predictor = load_run(run)
    opened = [Image.open(io.BytesIO(file)) for file in files]
    expected = [dict(result.top(CLASSES)) for result in predictor.predict(opened, batch)]
    count, start, own = 0, time.perf_counter(), time.process_time()
    while (passed := time.perf_counter() - start) < 10:
        predictor.predict([Image.open(io.BytesIO(file)) for file in files], batch)
        count += len(files)
    return count / passed, 1000 * (time.process_time() - own) / count, expected


def under_load(run: Path, files: list[bytes], expected: list[dict[str, float]], options: Any) -> dict[str, Any]:
    """What clients saw, and what it took."""
    words = [f"--{name}={getattr(options, name)}" for name in ("max_batch", "max_wait_ms", "workers")]
    command = [sys.executable, "-m", "vimamba", "serve", str(run), "--port", "0", "--max_upload_mb", "1", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        port = int(re.findall(r":(\d+) ", process.stdout.readline())[0])
        start, asked = time.monotonic(), []  # type: tuple[float, list[Asked]]
        until = start + WARM_S + options.seconds

        async def clients() -> tuple[int, float]:
            asking = [ask(port, files, expected, options.bad, until, i, asked) for i in range(options.clients)]
            together = asyncio.gather(*asking)
            await asyncio.sleep(WARM_S)
            warm, used = memory(process.pid), core_seconds(process.pid)
            await together
            return memory(process.pid) - warm, core_seconds(process.pid) - used

        own = time.process_time()
        grown, used = asyncio.run(clients())
        own = (time.process_time() - own) / (time.monotonic() - start)
        process.send_signal(signal.SIGTERM)
    counted = [one for one in asked if one.when > start + WARM_S]
    times = np.array([one.seconds for one in counted if one.good])
    faults = [one.fault for one in asked if one.fault]
    p50, p99 = np.percentile(times, [50, 99])
    return {
        "requests": len(asked), "bad requests": sum(not one.good for one in asked),
        "lost": sum(fault.startswith("lost") for fault in faults), "mixed": faults.count("mixed"),
        "kinds of fault": {fault: faults.count(fault) for fault in {*faults}},
        "p50 ms": 1000 * p50, "p99 ms": 1000 * p99, "p99 / p50": p99 / p50, "images/s": len(times) / options.seconds,
        "server's core ms": 1000 * used / len(times), "clients' cores": own,
        "growth MB": grown / 1e6, "exit status": process.returncode,
    }  # fmt: skip


async def ask(
    port: int, files: list[bytes], expected: list[dict[str, float]], bad: float, until: float, seed: int,
    asked: list[Asked],
) -> None:  # fmt: skip
    """One client: a request after the other on one connection, again on a new one where that ended."""
    draw, connection = random.Random(seed), None
    while time.monotonic() < until:
        good, which = draw.random() >= bad, draw.randrange(len(files))
        body = files[which] if good else draw.choice([*BAD, files[which][: len(files[which]) // 2]])
        start, fault = time.monotonic(), ""
        try:
            connection = connection or await asyncio.open_connection("127.0.0.1", port)
            status, answer, ends = await asyncio.wait_for(posted(*connection, body), LONGEST_S)
            if status != (200 if good else BAD.get(body, 422)):
                fault = f"status {status}"
            elif good and mixed(answer, expected[which]):
                fault = "mixed"
        except (OSError, EOFError, asyncio.TimeoutError, ValueError) as error:
            ends, fault = True, f"lost ({type(error).__name__})"
        asked.append(Asked(start, time.monotonic() - start, good, fault))
        if ends and connection:
            connection[1].close()
            connection = None


async def posted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes) -> tuple[int, Any, bool]:
    """Status and JSON of the answer to a request, and whether its connection ends with it."""
    head = b"POST /predict?top=%d HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % (CLASSES, len(body))
    writer.write(head + body)
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(re.findall(rb"content-length: (\d+)", head)[0])
    return int(head.split()[1]), json.loads(await reader.readexactly(length)), b"connection: close" in head


def mixed(answer: dict[str, Any], expected: dict[str, float]) -> bool:
    """Whether an answer is not that of its image."""
    found = {one["class"]: one["probability"] for one in answer["predictions"]}
    return found.keys() != expected.keys() or any(abs(found[name] - expected[name]) > CLOSE for name in found)


def family(pid: int) -> list[str]:
    """A process and those that it started."""
    return [str(pid), *Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def core_seconds(pid: int) -> float:
    """Seconds of a core that they used so far."""
    stats = [Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split() for one in family(pid)]
    return sum(int(stat[11]) + int(stat[12]) for stat in stats) / os.sysconf("SC_CLK_TCK")


def memory(pid: int) -> int:
    """Bytes of them."""
    total = 0
    for one in family(pid):
        found = re.findall(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{one}/status").read_text())
        total += 1024 * int(found[0])
    return total


if __name__ == "__main__":
    script(main)
