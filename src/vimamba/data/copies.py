"""Images that are in both halves under different names."""

from __future__ import annotations

import hashlib
from collections import defaultdict

from vimamba.data.samples import FileSamples, size_of
from vimamba.errors import escaped

MOST = 100_000  # images among which copies are looked for; in more of them every size is met, and all would be read


def copies_across(train: FileSamples, val: FileSamples) -> list[str]:
    """A line on held-out files whose bytes are those of a file to learn from, or none."""
    if len(train) + len(val) > MOST:
        return []
    by_size: dict[int, list[int]] = defaultdict(list)
    for index, size in enumerate(map(size_of, train.paths.tolist())):
        by_size[size].append(index)
    digests: dict[bytes, str] = {}
    pairs: list[tuple[str, str]] = []
    read: set[int] = set()
    for index, size in enumerate(map(size_of, val.paths.tolist())):
        if size <= 0 or size not in by_size:
            continue
        if size not in read:
            read.add(size)
            digests.update({_digest(train.name(i)): train.name(i) for i in by_size[size]})
        digest = _digest(val.name(index))
        if digest and digest in digests:
            pairs.append((val.name(index), digests[digest]))
    if not pairs:
        return []
    first = " = ".join(map(escaped, pairs[0]))
    return [
        f"{len(pairs)} of the {len(val)} held-out images are copies of images to learn from ({first}): "
        "the accuracy will be flattered by them"
    ]


def _digest(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return hashlib.blake2b(file.read()).digest()
    except OSError:  # which decoding will report
        return b""
