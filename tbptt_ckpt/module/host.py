"""What passes between host and device: numbers, read together, and rows, sent ahead.

NOTE [One read a window]
A host that asks a device for a number waits until the device has done all that it was given, and
gives it nothing meanwhile. What a window is to know (its loss, what of it counted, the drift,
whether all is finite, whether replays were what they repeat) is therefore asked for while it runs,
and read in one copy by whoever needs the first of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_PINS = ("cuda", "xpu")  # whose memory takes copies from the host's pinned one in the background


class Number:
    """A number that was asked for, or several."""

    __slots__ = ("_numbers", "_value")

    def __init__(self, value: Any, numbers: Numbers | None = None) -> None:
        self._value, self._numbers = value, numbers  # which are to be read before there is a value

    @property
    def value(self) -> Any:
        """As `Tensor.tolist` has it; waits for the device where nobody has yet."""
        if self._numbers is not None:
            self._numbers.read()
        return self._value

    def take(self, value: Any) -> None:
        """It has been read."""
        self._value, self._numbers = value, None

    def __float__(self) -> float:
        return float(self.value)


class Numbers:
    """Those that have been asked for, until they are read."""

    def __init__(self) -> None:
        self._pending: list[tuple[Number, Tensor]] = []

    def ask(self, tensor: Tensor) -> Number:
        """What a tensor holds; read at once where nobody has to wait for it."""
        if not is_waited_for(tensor):
            return Number(tensor.tolist())
        number = Number(None, self)
        self._pending.append((number, tensor.detach()))
        return number

    def read(self) -> None:
        """Wait once for each device that was asked."""
        pending, self._pending = self._pending, []
        # What is larger lies first, so that each lies where its size divides.
        pending.sort(key=lambda each: each[1].element_size(), reverse=True)
        for device in dict.fromkeys(tensor.device for _, tensor in pending):
            here = [(number, tensor) for number, tensor in pending if tensor.device == device]
            found = torch.cat([_bytes_of(tensor) for _, tensor in here]).cpu()
            parts = torch.split(found, [tensor.nbytes for _, tensor in here])
            for (number, tensor), part in zip(here, parts, strict=True):
                number.take(part.view(tensor.dtype).view(tensor.shape).tolist())


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.resolve_conj().resolve_neg().reshape(-1).view(torch.uint8)


def is_waited_for(tensor: Tensor) -> bool:
    """Whether a device has to come to a tensor before it can be read."""
    return tensor.device.type != "cpu"


def sent(rows: Tensor, device: torch.device) -> Tensor:
    """Rows of the host on a device, which copies them while the host goes on."""
    if rows.device == device or is_waited_for(rows) or device.type not in _PINS:
        return rows.to(device)
    return rows.pin_memory().to(device, non_blocking=True)
