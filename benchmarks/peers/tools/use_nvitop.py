"""nvitop's ResourceMetricCollector: mean power of a tag, times its duration."""

import re

from serving import serve


class Tool:
    def __init__(self, rate_hz):
        from nvitop import Device, ResourceMetricCollector

        interval = {} if rate_hz is None else {"interval": 1 / rate_hz}
        devices = Device.all()
        if not devices:
            raise ValueError("nvitop sees no GPU")
        self._collector = ResourceMetricCollector(devices, **interval)

    def begin(self, name):
        self._collector.activate(tag=name)

    def end(self, name):
        found = self._collector.collect()
        self._collector.deactivate(tag=name)
        seconds = found[f"{name}/duration (s)"]
        powers_w = {
            match[1]: watts
            for key, watts in found.items()
            if (match := re.search(r"gpu:(\d+)\)?/power_usage \(W\)/mean$", key))
        }
        if not powers_w:
            raise ValueError("no power among what was collected")
        return {f"gpu:{index}": watts * seconds for index, watts in powers_w.items()}

    def close(self):
        pass


if __name__ == "__main__":
    serve(Tool)
