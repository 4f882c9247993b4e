"""This project: one run, a block of its own for each window, its components afterwards."""

import warnings

from serving import serve

from pepr_profiler import profile


class Tool:
    def __init__(self, rate_hz):
        period = {} if rate_hz is None else {"period_s": 1 / rate_hz}
        warnings.simplefilter("ignore")
        self._run = profile("session", scope="device", **period)
        self._run.__enter__()
        self._blocks = {}

    def begin(self, name):
        block = profile(name)
        block.__enter__()
        self._blocks[name] = block

    def end(self, name):
        self._blocks[name].__exit__(None, None, None)

    def close(self):
        self._run.__exit__(None, None, None)
        return {name: self._figures(block.summary) for name, block in self._blocks.items()}

    @staticmethod
    def _figures(summary):
        """Of what was measured and adds up: modelled parts and second views are left out."""
        energy_j, u_j = {}, {}
        for part in summary["energy"]["components"]:
            measured = part["provenance"] != "modelled" and not part.get("excluded")
            if part["kind"] in ("gpu", "cpu", "dram") and measured:
                name = f"{part['kind']}:{part['id'].partition(':')[2]}"
                energy_j[name], u_j[name] = part["device_j"], part["u_j"]
        return energy_j, u_j


if __name__ == "__main__":
    serve(Tool)
