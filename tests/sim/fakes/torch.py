"""As much of torch as a GPU load needs; its one GPU is a wave that a simulated board follows.

PEPR_SIM_GPU is "FILE EPOCH_NS IDLE_W BUSY_W". Each multiplication takes a millisecond of the GPU.
"""

from __future__ import annotations

import os
import struct
import time
from types import SimpleNamespace

_file, _epoch_ns, _idle_w, _busy_w = os.environ["PEPR_SIM_GPU"].split()
_WORK_S = 1e-3
_queued = [0]
float32 = None


def _step(power_w: str) -> None:
    with open(_file, "ab") as file:  # noqa: PTH123
        t_s = (time.monotonic_ns() - int(_epoch_ns)) * 1e-9
        file.write(struct.pack("dd", t_s, float(power_w)))


class cuda:  # noqa: N801 - as torch calls it
    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def get_device_properties(_device: object) -> SimpleNamespace:
        return SimpleNamespace(uuid="00000000-0000-4000-8000-000000000000")

    @staticmethod
    def synchronize(_device: object) -> None:
        time.sleep(_queued[0] * _WORK_S)
        if _queued[0]:
            _step(_idle_w)
        _queued[0] = 0


def device(kind: str, index: int) -> str:
    return f"{kind}:{index}"


def randn(shape: tuple[int, ...], **_options: object) -> list[int]:
    return [0] * shape[0]


def empty(*_shape: object, **_options: object) -> None:
    return None


def matmul(_a: object, _b: object, *, out: object) -> None:
    del out
    if not _queued[0]:
        _step(_busy_w)
    _queued[0] += 1
