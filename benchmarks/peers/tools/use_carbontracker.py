"""carbontracker, an epoch for each window. Its PUE of 1.58 is left out, so that joules compare."""

import tempfile

from serving import serve

J_PER_KWH = 3.6e6


class Tool:
    def __init__(self, rate_hz):
        from carbontracker.tracker import CarbonTracker

        interval = {} if rate_hz is None else {"update_interval": 1 / rate_hz}
        self._tracker = CarbonTracker(
            epochs=10**6,
            epochs_before_pred=0,
            verbose=0,
            log_dir=tempfile.mkdtemp(),
            **interval,
        )
        self._names = []

    def begin(self, name):
        self._names.append(name)
        self._tracker.epoch_start()

    def end(self, _):
        self._tracker.epoch_end()

    def close(self):
        thread = self._tracker.tracker
        by_kind = {}
        for part in thread.components:
            # RAPL's packages and DRAM are one component, whose energies are not told apart.
            energies_j = [J_PER_KWH * float(kwh) for kwh in part.energy_usage(thread.epoch_times)]
            by_kind[part.name] = energies_j
        self._tracker.stop()
        return {
            name: {kind: energies_j[number] for kind, energies_j in by_kind.items()}
            for number, name in enumerate(self._names)
        }


if __name__ == "__main__":
    serve(Tool)
