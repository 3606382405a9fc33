"""Copies of slots in host memory, made without holding up the device."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

# Copies on a device that are on their way to the host. Each takes as much memory as a state.
MAX_STAGED = 4


class HostRow:
    """A row of bytes in host memory that a copy may still be filling."""

    def __init__(self, row: Tensor, event: torch.cuda.Event | None = None) -> None:
        self._row, self._event = row, event

    def wait(self) -> Tensor:
        """The row `[row_bytes]`, complete."""
        event = self._event
        if event is not None:
            event.synchronize()
            self._event = None
        return self._row

    def copy_into(self, slot: Tensor) -> None:
        """Fill a slot; the device's later work sees it."""
        slot.copy_(self.wait(), non_blocking=True)


_staged: deque[torch.cuda.Event] = deque()
_streams: dict[torch.device, torch.cuda.Stream] = {}


def copy_to_host(slot: Tensor) -> HostRow:
    """A copy of a slot `[row_bytes]` as it is after the work that the device has been given.

    On a GPU one copy is made there, in the order of its work, so that the slot may change at once.
    Another stream then brings this copy to pinned host memory.
    """
    if slot.device.type != "cuda":
        return HostRow(slot.clone())
    while len(_staged) >= MAX_STAGED:
        _staged.popleft().synchronize()
    device = slot.device
    stream = _streams.get(device)
    if stream is None:
        stream = _streams[device] = torch.cuda.Stream(device)
    staged = slot.clone()
    stream.wait_stream(torch.cuda.current_stream(device))
    host = torch.empty(slot.shape, dtype=slot.dtype, pin_memory=True)
    event = torch.cuda.Event()
    with torch.cuda.stream(stream):
        host.copy_(staged, non_blocking=True)
        staged.record_stream(stream)
        event.record(stream)
    _staged.append(event)
    return HostRow(host, event)
