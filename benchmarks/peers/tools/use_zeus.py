"""ZeusMonitor: windows from counters, power readings where a GPU has no counter."""

from serving import serve


class Tool:
    def __init__(self, rate_hz):
        from zeus.monitor import ZeusMonitor

        if rate_hz is not None:
            raise ValueError("ZeusMonitor reads at the edges of windows: it has no rate")
        self._monitor = ZeusMonitor()

    def begin(self, name):
        # There is no framework to synchronise with, and the default insists on torch.
        self._monitor.begin_window(name, sync_execution=False)

    def end(self, name):
        found = self._monitor.end_window(name, sync_execution=False)
        kinds = {"gpu": found.gpu_energy, "cpu": found.cpu_energy, "dram": found.dram_energy}
        return {
            f"{kind}:{index}": joules
            for kind, devices in kinds.items()
            for index, joules in (devices or {}).items()
        }

    def close(self):
        if self._monitor.power_monitor is not None:
            self._monitor.power_monitor.stop()


if __name__ == "__main__":
    serve(Tool)
