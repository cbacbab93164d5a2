"""Byte counts as people write and read them."""

from __future__ import annotations

import re
from decimal import Decimal

from tbptt_ckpt.arguments import Finite, checked
from tbptt_ckpt.errors import ArgumentError, shown

_UNITS = {
    "": 1,
    "b": 1,
    **{f"{prefix}{end}": 1024**n for n, prefix in enumerate("kmgt", 1) for end in ("", "ib")},
    **{f"{prefix}b": 1000**n for n, prefix in enumerate("kmgt", 1)},
}
_SIZE = re.compile(
    r"\s*((?:\d+\.?\d*|\.\d+)(?:e\+?\d{1,2})?)\s*([a-z]*)\s*", re.IGNORECASE | re.ASCII
)


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
    """Bytes from an int or from text such as "512MiB", "1.5 GiB", "8G", "200 MB", "8e9" or "4096".

    KiB, MiB, GiB and TiB, and K, M, G and T, are powers of two, KB, MB, GB and TB powers of ten;
    case does not matter. A fraction of a byte is cut off.

    Args:
        value: What the user wrote.
        name: The argument it was written for, named in the message.

    Raises:
        ArgumentError: Anything else, negative sizes and NaN included.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    factor = _UNITS.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise no_size(name, value)
    return int(Decimal(match[1]) * factor)


def no_size(name: str, value: object, also: str = "") -> ArgumentError:
    """The error for what is no size; `also` says what else would work."""
    return ArgumentError(
        f"{name}={shown(value)} is not a size: write bytes as an integer of at least 0, or text "
        f'such as "512MiB", "1.5GiB", "8G", "200MB" or "8e9"{also}'
    )
