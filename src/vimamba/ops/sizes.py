"""What the ops, the backends and the counting of FLOPs must agree on."""

from __future__ import annotations

CHUNK = 64
"""Steps between the states that a scan saves for its backward pass; kChunk in cpu/kernels.h, compared when it loads."""

FLOPS_OF_UPDATE = 9
"""Operations of one state update, as the Mamba authors count (mamba_ssm's selective scan, "9 * B * L * D * N")."""

INTEGER_MAX = 127
"""The largest 8-bit integer that a quantised number is; as large a negative one is its negative."""


def chunks(length: int) -> int:
    """How many states a scan over `length` steps saves."""
    return (length + CHUNK - 1) // CHUNK
