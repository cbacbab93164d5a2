"""Byte counts as people write and read them."""

from __future__ import annotations

import re
from decimal import Decimal

from tbptt_ckpt.arguments import Finite, checked
from tbptt_ckpt.errors import ArgumentError, shown

_UNITS = {
    "b": 1,
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", start=1)},
    **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", start=1)},
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)\s*", re.IGNORECASE | re.ASCII)


@checked
def format_bytes(num_bytes: Finite) -> str:
    """Bytes for people: '512 B', '12.3 MiB', '-1.0 GiB'; units are powers of two."""
    sign, size = ("-", -num_bytes) if num_bytes < 0 else ("", num_bytes)
    if round(size) < 1024:
        return f"{sign}{round(size)} B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        size /= 1024
        # Compared as printed, so that no size reads "1024.0 KiB".
        if round(size, 1) < 1024 or unit == "TiB":
            break
    return f"{sign}{size:.1f} {unit}"


def parse_bytes(value: int | str, name: str = "size") -> int:
    """Bytes from an int or from text such as "512MiB", "1.5 GiB", "200 MB" or "4096".

    KiB, MiB, GiB and TiB are powers of two, KB, MB, GB and TB powers of ten; case does
    not matter. A fraction of a byte is cut off.

    Args:
        value: What the user wrote.
        name: The argument it was written for, named in the message.

    Raises:
        ArgumentError: Anything else, negative sizes and NaN included.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    factor = _UNITS.get(match[2].lower() or "b") if match else None
    if match is None or factor is None:
        raise ArgumentError(
            f"{name}={shown(value)} is not a size: write bytes as an integer of at least 0, or "
            f'text with a unit such as "512MiB", "1.5GiB" or "200MB" '
            f"(B, KiB, MiB, GiB, TiB, or KB, MB, GB, TB)"
        )
    return int(Decimal(match[1]) * factor)
