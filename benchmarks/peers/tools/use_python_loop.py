"""What a careful programmer writes to record the sensors that we record: one thread with absolute
deadlines, files kept open, nothing looked up twice, a CSV file that is flushed each second.
"""

import csv
import os
import resource
import tempfile
import threading
import time
from pathlib import Path

from serving import serve

POWERCAP = Path("/sys/class/powercap")
GAUGES_NS = 200_000_000


class Tool:
    def __init__(self, rate_hz):
        import pynvml

        pynvml.nvmlInit()
        self._energy_mj = pynvml.nvmlDeviceGetTotalEnergyConsumption
        self._utilisation = pynvml.nvmlDeviceGetUtilizationRates
        self._memory = pynvml.nvmlDeviceGetMemoryInfo
        self._fields = pynvml.nvmlDeviceGetFieldValues
        self._powers = [pynvml.NVML_FI_DEV_POWER_INSTANT, pynvml.NVML_FI_DEV_POWER_AVERAGE]
        count = pynvml.nvmlDeviceGetCount()
        self._boards = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
        self._names = [f"gpu:{index}" for index in range(count)]
        self._counters, self._ranges_j = [], [0.0] * count
        seen = {"cpu": 0, "dram": 0}
        for zone in sorted(POWERCAP.glob("intel-rapl:*")):
            name = (zone / "name").read_text().strip()
            kind = "cpu" if name.startswith("package") else name
            if kind in seen:  # neither cores, which lie inside a package, nor psys around them
                self._names.append(f"{kind}:{seen[kind]}")
                seen[kind] += 1
                self._counters.append(os.open(zone / "energy_uj", os.O_RDONLY))
                self._ranges_j.append(int((zone / "max_energy_range_uj").read_text()) * 1e-6)
        self._period_ns = round(1e9 / (rate_hz or 10.0))
        self._begins = {}
        self._gauges, self._gauges_due_ns = [], 0
        threading.Thread(target=self._loop, daemon=True).start()

    def _read(self):
        """A row: energies of GPUs (mJ), RAPL (uJ), of each GPU utilisation, memory and powers, five
        times a second, CPU, RSS."""
        now_ns = time.monotonic_ns()
        row = [now_ns, *map(self._energy_mj, self._boards)]
        row += [int(os.pread(counter, 32, 0)) for counter in self._counters]
        if now_ns >= self._gauges_due_ns:
            self._gauges_due_ns = now_ns + GAUGES_NS
            gauges = []
            for board in self._boards:
                instant, average = self._fields(board, self._powers)
                gauges += (
                    self._utilisation(board).gpu,
                    self._memory(board).used,
                    instant.value.uiVal,
                    average.value.uiVal,
                )
            self._gauges = gauges  # whole: windows read in another thread
        row += self._gauges
        used = resource.getrusage(resource.RUSAGE_SELF)
        row += (used.ru_utime + used.ru_stime, used.ru_maxrss)
        return row

    def _loop(self):
        deadline_ns = flushed_ns = time.monotonic_ns()
        with tempfile.NamedTemporaryFile("w", suffix=".csv", newline="") as file:
            write = csv.writer(file).writerow
            while True:
                write(self._read())
                now_ns = time.monotonic_ns()
                if now_ns - flushed_ns >= 1_000_000_000:
                    file.flush()
                    flushed_ns = now_ns
                deadline_ns += self._period_ns
                if deadline_ns <= now_ns:  # late, or stopped for a while: no burst
                    missed = (now_ns - deadline_ns) // self._period_ns + 1
                    deadline_ns += missed * self._period_ns
                time.sleep((deadline_ns - now_ns) * 1e-9)

    def _energies_j(self):
        row, boards = self._read(), len(self._boards)
        energies_mj = row[1 : 1 + boards]
        energies_uj = row[1 + boards : 1 + boards + len(self._counters)]
        return [mj * 1e-3 for mj in energies_mj] + [uj * 1e-6 for uj in energies_uj]

    def begin(self, name):
        self._begins[name] = self._energies_j()

    def end(self, name):
        before, after = self._begins.pop(name), self._energies_j()
        # A RAPL counter that is less than it was has been around once; a GPU's is not seen to.
        return {
            name: after_j - before_j + (range_j if after_j < before_j else 0.0)
            for name, before_j, after_j, range_j in zip(
                self._names, before, after, self._ranges_j, strict=True
            )
        }

    def close(self):
        pass


if __name__ == "__main__":
    serve(Tool)
