"""Zeus's PowerMonitor: processes that poll power, integrated over windows of wall-clock time."""

import time

from serving import serve


class Tool:
    def __init__(self, rate_hz):
        from zeus.monitor import PowerMonitor

        period_s = None if rate_hz is None else 1 / rate_hz
        self._monitor = PowerMonitor(update_period=period_s)
        self._begins = {}

    def begin(self, name):
        self._begins[name] = time.time()

    def end(self, name):
        found = self._monitor.get_energy(self._begins.pop(name), time.time())
        if found is None:
            raise ValueError("get_energy() returned None: no power readings")
        return {f"gpu:{index}": joules for index, joules in found.items()}

    def close(self):
        self._monitor.stop()


if __name__ == "__main__":
    serve(Tool)
