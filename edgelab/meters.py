"""Meters of this machine: float32 products, the disk, watts, the battery. Each says what it read, or why it could not.

Nothing here is guessed: a number that the system does not give is None with the reason, which is shown where the number would stand.
"""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from edgelab.device import engineering

DISK_BYTES = 256 << 20


def float_peak(size: int = 1024, repeats: int = 5) -> float:
    """Operations per second of a float32 matrix product, the best of several."""
    a, b = (np.random.default_rng(s).standard_normal((size, size), np.float32) for s in (0, 1))
    best = np.inf
    for _ in range(repeats + 1):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def disk_bandwidth(folder: str | Path | None = None, size: int = DISK_BYTES) -> tuple[float | None, str]:
    """(bytes per second that a file of `size` bytes is read with, how), or (None, why it is not known).

    The file is written, forced to the disk, and the system is told to forget it; then it is read twice. Where the first time is
    about as fast as the second, the system's cache answered it, and there is nothing to report of the disk.
    """
    if not hasattr(os, "posix_fadvise"):
        return None, "this system has no way to empty its cache of one file (posix_fadvise)"
    folder = Path(folder or os.environ.get("EDGELAB_TMP") or tempfile.gettempdir())
    block = np.random.default_rng(0).bytes(1 << 20)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix="edgelab-disk-") as f:
            for _ in range(size >> 20):
                f.write(block)
            f.flush()
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            cold, warm = _read_file(f.name), _read_file(f.name)
    except OSError as error:
        return None, f"no file could be written in {folder} ({error.strerror or error})"
    if cold > 0.6 * warm:
        return (
            None,
            f"{engineering(cold, 'B/s')} came from the system's cache, not from the disk: {folder} lies in memory, or a layer below caches",
        )
    return (
        cold,
        f"a file of {size >> 20} MiB in {folder}, the system's cache emptied of it; again from that cache {engineering(warm, 'B/s')}",
    )


def _read_file(name: str) -> float:
    buffer, total = bytearray(4 << 20), 0
    fd = os.open(name, os.O_RDONLY)
    try:
        start = time.perf_counter()
        while got := os.readv(fd, [buffer]):
            total += got
        return total / (time.perf_counter() - start)
    finally:
        os.close(fd)


RAPL = Path("/sys/class/powercap/intel-rapl:0")


def power_reader(rapl: Path = RAPL) -> tuple[Callable[[Callable[[], object]], float] | None, str]:
    """(a function that runs another one and returns the watts meanwhile, what it reads), or (None, why there is none)."""
    counter, limit = rapl / "energy_uj", rapl / "max_energy_range_uj"
    if not rapl.exists():
        return None, f"{rapl} does not exist: no RAPL here (a virtual machine, another processor or system)"
    try:
        int(counter.read_text())
        wraps = int(limit.read_text()) if limit.exists() else 0
    except (OSError, ValueError) as error:
        return None, f"{counter} cannot be read ({getattr(error, 'strerror', None) or error}); most systems let only root read it"

    def watts(run: Callable[[], object]) -> float:
        before, start = int(counter.read_text()), time.perf_counter()
        run()
        joules = (int(counter.read_text()) - before) / 1e6
        if joules < 0:  # the counter began again
            joules += wraps / 1e6
        return max(joules / (time.perf_counter() - start), 1e-3)

    return watts, "RAPL, the whole processor"


def battery_wh(supplies: Path = Path("/sys/class/power_supply")) -> tuple[float | None, str]:
    """(watt-hours of the battery when full, where that is read), or (None, why it is not known)."""
    import psutil

    state = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    for battery in sorted(supplies.glob("BAT*")) if supplies.is_dir() else ():
        try:
            if (full := battery / "energy_full").exists():
                return int(full.read_text()) / 1e6, str(full)
            if (charge := battery / "charge_full").exists():
                return int(charge.read_text()) * int((battery / "voltage_min_design").read_text()) / 1e12, str(charge)
        except (OSError, ValueError):
            continue
    if state is None:
        return None, "psutil finds no battery"
    return None, f"psutil says {state.percent:.0f} % and nothing of its capacity"
