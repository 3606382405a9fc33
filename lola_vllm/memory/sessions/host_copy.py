"""Copies of states in host memory, made without holding up the device.

A device copies to pinned memory, which torch hands out in powers of two: 16 MiB for a state of
8.6 MiB. So only a few pinned buffers are used, again and again. A state stays in ordinary memory,
which takes what it has and no more.
"""

from __future__ import annotations

import threading
from collections import deque

import torch
from torch import Tensor

# Copies on a device that are on their way to the host. Each has a pinned buffer.
MAX_STAGED = 4


def staging_bytes(rank_bytes: int) -> int:
    """Pinned bytes of a device's buffers.

    Args:
        rank_bytes: of a state on one rank.
    """
    return MAX_STAGED * (1 << (rank_bytes - 1).bit_length())


class HostCopy:
    """A state in host memory that a copy may still be filling.

    Args:
        data: the bytes, or the pinned buffer that `event` says is filled.
        buffers: takes the buffer back.
    """

    def __init__(
        self,
        data: Tensor,
        event: torch.cuda.Event | None = None,
        buffers: list[Tensor] | None = None,
    ) -> None:
        self._data, self._event = data, event
        self._buffers = buffers
        self._lock = threading.Lock()  # a writer and the engine may wait at once

    def wait(self) -> Tensor:
        """The bytes `[rank_bytes]`, complete, in ordinary memory."""
        with self._lock:
            if self._event is not None:
                self._event.synchronize()
                self._event, buffer = None, self._data
                self._data = torch.empty_like(buffer, pin_memory=False).copy_(buffer)
                if self._buffers is not None:
                    self._buffers.append(buffer)
            return self._data

    def copy_into(self, pages: Tensor) -> None:
        """Fill a state of the pool; the device's later work sees it."""
        pages.copy_(self.wait(), non_blocking=True)


class Staging:
    """Copies of a device's states, through a few pinned buffers."""

    def __init__(self) -> None:
        self._under_way: deque[HostCopy] = deque()
        self._free: list[Tensor] = []
        self._stream: torch.cuda.Stream | None = None

    def copy(self, pages: Tensor) -> HostCopy:
        """A copy of a state `[rank_bytes]` of the pool as it is after the work that the device has
        been given."""
        while len(self._under_way) >= MAX_STAGED:
            self._under_way.popleft().wait()
        buffer = self._buffer(pages)
        copy = HostCopy(buffer, self._fill(buffer, pages), self._free)
        self._under_way.append(copy)
        return copy

    def _buffer(self, pages: Tensor) -> Tensor:
        for i, buffer in enumerate(self._free):
            if buffer.shape == pages.shape:
                return self._free.pop(i)
        return self._pinned(pages)

    def _pinned(self, pages: Tensor) -> Tensor:
        return torch.empty(pages.shape, dtype=pages.dtype, pin_memory=True)

    def _fill(self, buffer: Tensor, pages: Tensor) -> torch.cuda.Event:
        """Start the copy. The pages may change at once: a copy on the device is made first, in the
        order of its work, and another stream brings it to the host."""
        device = pages.device
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        staged = pages.clone()
        self._stream.wait_stream(torch.cuda.current_stream(device))
        event = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            buffer.copy_(staged, non_blocking=True)
            staged.record_stream(self._stream)
            event.record(self._stream)
        return event


_staging: dict[torch.device, Staging] = {}


def copy_to_host(pages: Tensor) -> HostCopy:
    """A copy of a state `[rank_bytes]` of the pool as it is after the work that the device has been
    given."""
    if pages.device.type == "cpu":
        return HostCopy(pages.clone())
    return _staging.setdefault(pages.device, Staging()).copy(pages)
