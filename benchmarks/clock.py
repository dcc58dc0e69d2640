"""Time and peak memory of work on a CPU or a card."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import torch


def now(device: torch.device) -> float:
    """Seconds on a clock that only moves on; a card is waited for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class CardMemory:
    """Largest memory of tensors above the starting one while the block runs."""

    def __enter__(self) -> "CardMemory":
        torch.cuda.reset_peak_memory_stats()
        self.start = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *_) -> None:
        self.bytes = torch.cuda.max_memory_allocated() - self.start


class ResidentMemory:
    """Largest resident set above the starting one while the block runs, sampled every 5 ms."""

    def __enter__(self) -> "ResidentMemory":
        self.start = self.peak = _resident()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.done.wait(0.005):
            self.peak = max(self.peak, _resident())

    def __exit__(self, *_) -> None:
        self.done.set()
        self.thread.join()
        self.bytes = self.peak - self.start


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def peak_memory(device: torch.device) -> CardMemory | ResidentMemory:
    return CardMemory() if device.type == "cuda" else ResidentMemory()
