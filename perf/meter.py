"""Energy of calls on a GPU, by NVML's counter. Needs torch and the driver alone."""

from __future__ import annotations

import ctypes
import importlib
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

Call = Callable[[], object]

TRIALS, WARMUP = 5, 10
IDLE_SECONDS, BUSY_SECONDS = 2.0, 5.0
"""Windows of a trial: before the calls, and of the calls."""
SETTLE_SECONDS = 1.0
"""Rest before the idle window: the power of the trial before is gone by then."""
TURN_SECONDS = 0.01
"""Time between two looks at the counter, or one call, if that takes longer. A value is as old as that, or as the time between two updates, if that is
shorter: windows of 5 s are off by 0.2 % for fast calls, and by 2 % at most."""
STILL_SECONDS = 2.0
"""A counter that shows nothing new for so long does not work."""


# The counter


class Energy(Protocol):
    """A running total of energy."""

    name: str

    def millijoules(self) -> int:
        """The total; it is renewed from time to time, and may start anew."""


class _Driver:
    """The calls of pynvml that :class:`Counter` makes, to the library that comes with the driver: a machine that has a GPU and torch may have no
    pynvml. Signatures: nvml.h.

    Raises:
        OSError: no driver is installed.
    """

    class NVMLError(Exception):
        """What NVML says of a call that failed."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libnvidia-ml.so.1")
        self._library.nvmlErrorString.restype = ctypes.c_char_p

    def _checked(self, code: int) -> None:
        if code:
            raise self.NVMLError(self._library.nvmlErrorString(code).decode())

    def nvmlInit(self) -> None:
        self._checked(self._library.nvmlInit_v2())

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> ctypes.c_void_p:
        handle = ctypes.c_void_p()
        self._checked(self._library.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle)))
        return handle

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: ctypes.c_void_p) -> int:
        millijoules = ctypes.c_ulonglong()
        self._checked(self._library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules)))
        return millijoules.value


def _nvml() -> Any:
    """pynvml, or what stands in for it.

    Raises:
        ValueError: neither is there.
    """
    try:
        return importlib.import_module("pynvml")
    except ImportError:
        pass
    try:
        return _Driver()
    except OSError:
        raise ValueError(
            "measuring energy needs NVML's library: pip install nvidia-ml-py; or name a GPU with --gpu, and its energy is modelled"
        ) from None


class Counter:
    """NVML's total of a GPU's energy since the driver was loaded, renewed every 20 to 100 ms; Volta and newer.

    Raises:
        ValueError: the library is not installed, or the driver does not let it read the counter.
    """

    def __init__(self, device: int = 0) -> None:
        self._nvml = _nvml()
        properties = torch.cuda.get_device_properties(device)
        self.name = properties.name
        with self._explained():
            self._nvml.nvmlInit()
            # torch and NVML number GPUs differently
            self._handle = self._nvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
        self.millijoules()

    def millijoules(self) -> int:
        with self._explained():
            return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except self._nvml.NVMLError as error:
            raise ValueError(
                f"the energy counter of {self.name} cannot be read ({error}): it takes a Volta or newer, a driver that is loaded, and the right "
                "to read it; or name a GPU with --gpu, and its energy is modelled"
            ) from error


# Measuring


class Trial(NamedTuple):
    """Of one inference: seconds and joules; and the power at rest before, W."""

    seconds: float
    joules: float
    idle_w: float

    @property
    def net_joules(self) -> float:
        """Joules above those at rest."""
        return self.joules - self.idle_w * self.seconds


@dataclass(frozen=True)
class Measured:
    """Medians of the trials, an inference: time, energy, energy net of idle; the smallest and the largest energy of a trial."""

    trials: tuple[Trial, ...]

    @property
    def seconds(self) -> float:
        return statistics.median(t.seconds for t in self.trials)

    @property
    def joules(self) -> float:
        return statistics.median(t.joules for t in self.trials)

    @property
    def net_joules(self) -> float:
        return statistics.median(t.net_joules for t in self.trials)

    @property
    def low_joules(self) -> float:
        return min(t.joules for t in self.trials)

    @property
    def high_joules(self) -> float:
        return max(t.joules for t in self.trials)


@dataclass(frozen=True)
class Meter:
    """Reads a counter between calls.

    Args:
        counter: of the GPU that the calls run on.
        device: torch's name of it.
        synchronize: waits until the GPU has done all calls.
        clock, sleep: seconds, and their passing.
    """

    counter: Energy
    device: str = "cuda"
    synchronize: Callable[[], None] = torch.cuda.synchronize
    clock: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], None] = time.sleep

    def measure(self, call: Call, progress: Callable[[int, int], None] | None = None) -> Measured:
        """Energy of ``call``, by trials that are each a rest, an idle window, calls to warm up, and a window of calls.

        Raises:
            ValueError: the counter stands still or runs backwards.
        """
        self._repeat(call, WARMUP)  # compiles
        started = self.clock()
        self._repeat(call, WARMUP)
        calls = max(1, int(TURN_SECONDS * WARMUP / (self.clock() - started)))
        trials = []
        for done in range(1, TRIALS + 1):
            self.sleep(SETTLE_SECONDS)
            joules, seconds, _ = self._window(lambda: self.sleep(TURN_SECONDS), IDLE_SECONDS)
            idle = joules / seconds
            self._repeat(call, WARMUP)
            joules, seconds, turns = self._window(lambda: self._repeat(call, calls), BUSY_SECONDS)
            trials.append(Trial(seconds / (turns * calls), joules / (turns * calls), idle))
            if progress is not None:
                progress(done, TRIALS)
        return Measured(tuple(trials))

    def joules(self, call: Call, seconds: float) -> float:
        """Joules of a call, those at rest included, in one window; the GPU is warm.

        Raises:
            ValueError: the counter stands still or runs backwards.
        """
        joules, _, turns = self._window(lambda: self._repeat(call, WARMUP), seconds)
        return joules / (turns * WARMUP)

    def _repeat(self, call: Call, times: int) -> None:
        for _ in range(times):
            call()
        self.synchronize()

    def _window(self, turn: Call, least: float) -> tuple[float, float, int]:
        """Joules, seconds and turns between two updates of the counter that are ``least`` seconds apart or more."""
        for _ in range(2):  # a counter that wraps or starts anew does so once in hours
            started, before, _ = self._update(turn)
            turns = 0
            while self.clock() - started < least:
                turn()
                turns += 1
            ended, after, more = self._update(turn)
            if after >= before:
                return (after - before) / 1e3, ended - started, turns + more
        raise ValueError(f"the energy counter of {self.counter.name} runs backwards; name a GPU with --gpu instead")

    def _update(self, turn: Call) -> tuple[float, int, int]:
        """Takes turns until the counter is renewed: when that was seen, its millijoules, and the turns."""
        started, before, turns = self.clock(), self.counter.millijoules(), 0
        while (now := self.counter.millijoules()) == before:
            if turns and self.clock() - started > STILL_SECONDS:
                raise ValueError(
                    f"the energy counter of {self.counter.name} stands still; name a GPU with --gpu instead"
                )
            turn()
            turns += 1
        return self.clock(), now, turns
