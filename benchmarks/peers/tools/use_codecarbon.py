"""CodeCarbon's offline tracker, a task for each window; kWh become J."""

from serving import serve

J_PER_KWH = 3.6e6


class Tool:
    def __init__(self, rate_hz):
        from codecarbon import OfflineEmissionsTracker

        period = {} if rate_hz is None else {"measure_power_secs": 1 / rate_hz}
        self._tracker = OfflineEmissionsTracker(
            country_iso_code="DNK",
            save_to_file=False,
            log_level="error",
            allow_multiple_runs=True,
            rapl_include_dram=False,
            **period,
        )
        self._tracker.start()

    def begin(self, name):
        self._tracker.start_task(name)

    def end(self, name):
        found = self._tracker.stop_task(name)
        if found is None:
            raise ValueError("stop_task() returned None")
        return {"gpu": found.gpu_energy * J_PER_KWH, "cpu": found.cpu_energy * J_PER_KWH}

    def close(self):
        self._tracker.stop()


if __name__ == "__main__":
    serve(Tool)
