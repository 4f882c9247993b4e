"""What a recording is asked to be: checked in one place, before anything starts."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from cli import Cli

from pepr_profiler import UsageError, profile
from pepr_profiler.recording.options import Options

BAD = [
    ({"name": ""}, "needs a name"),
    ({"name": 5}, "name=5 cannot be used"),
    ({"experiment": 5}, "experiment=5 cannot be used"),
    ({"performance": ["accuracy"]}, "cannot be used"),
    ({"cpu_power": "abc"}, "--cpu-power 'abc' cannot be read"),
    ({"cpu_power": "-5:10"}, "IDLE is below 0 W"),
    ({"cpu_power": "90:10"}, "IDLE must be below MAX"),
    ({"cpu_power": 90}, "cpu_power=90 cannot be used"),
    ({"pue": float("nan")}, "a PUE of nan is not possible"),
    ({"pue": 0.9}, "a PUE of 0.9 is not possible"),
    ({"pue": float("inf")}, "a PUE of inf is not possible"),
    ({"pue": "1.2"}, "a PUE of '1.2' is not possible"),
    ({"pue": True}, "a PUE of True is not possible"),
    ({"pue": 1e300}, "a PUE of 1e+300 is not possible"),
    ({"pue": 10**400}, "is not possible"),
    ({"period_s": 0}, "a period of 0 is not possible"),
    ({"period_s": -1}, "a period of -1 is not possible"),
    ({"period_s": float("nan")}, "a period of nan is not possible"),
    ({"period_s": 1e30}, "is not possible"),
    ({"period_s": "soon"}, "'soon' is not a duration"),
    ({"period_s": [1]}, "is not possible"),
    ({"overhead": 0}, "an overhead of '0' is not possible"),
    ({"overhead": 1.5}, "an overhead of '1.5' is not possible"),
    ({"overhead": None}, "is not possible"),
    ({"scope": "all"}, "a scope of 'all' is not possible"),
    ({"sensors": "nvml"}, "sensors='nvml' cannot be used"),
    ({"sensors": [b"nvml"]}, "cannot be used"),
    ({"sensors": None}, "sensors=None cannot be used"),
    ({"sensors": b""}, "cannot be used"),
    ({"sensors": ["replay:/x\udcff"]}, "cannot be used"),
    ({"scope": ["job"]}, "is not possible"),
    ({"region": "Atlantis"}, "no carbon intensity is known"),
    ({"region": "DK", "carbon_intensity": 5.0}, "both a region and a carbon intensity"),
    ({"carbon_intensity": -1.0}, "is not possible"),
    ({"carbon_intensity": "low"}, "is not possible"),
    ({"carbon_intensity": 1e300}, "is not possible"),
    ({"carbon_intensity": 10**400}, "is not possible"),
    ({"carbon_intensity": float("nan")}, "is not possible"),
    ({"pids": 5}, "cannot be used"),
    ({"pids": b"abc"}, "cannot be used"),
    ({"pids": ["4121"]}, "cannot be used"),
    ({"store": 5}, "cannot be used"),
    ({"store": "a\0b"}, "cannot be used"),
    ({"store": "\ud800"}, "cannot be used"),
]


@pytest.mark.parametrize(("given", "what"), BAD, ids=lambda value: str(value)[:40])
@pytest.mark.usefixtures("on_our_own")
def test_what_cannot_be_is_refused_in_code_before_anything_starts(
    given: dict[str, Any], what: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as refused:
        profile(**{"name": "x", **given})
    assert what in str(refused.value)
    assert refused.value.why and refused.value.fix
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "flags",
    [
        ("--cpu-power", "abc"),
        ("--cpu-power", "-5:10"),
        ("--pue", "nan"),
        ("--pue", "0.9"),
        ("--period", "soon"),
        ("--period", "0"),
        ("--period", "999999999h"),
        ("--overhead", "0"),
        ("--overhead", "150%"),
        ("--region", "Atlantis"),
        ("--carbon-intensity", "-1"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("verb", ["run", "attach"])
def test_a_bad_flag_is_refused_before_the_command_starts(
    cli: Cli, verb: str, flags: tuple[str, str], tmp_path: Path
) -> None:
    marker = tmp_path / "started"
    target = ["--", "touch", str(marker)] if verb == "run" else ["1"]
    result = cli(verb, *flags, *target)
    assert result.status in (2, 125), result.stderr
    assert "fix:" in result.stderr and "Traceback" not in result.stderr
    assert not marker.exists() and not cli.runs()


def test_numbers_of_any_kind_are_taken() -> None:
    numpy = pytest.importorskip("numpy")
    options = Options.checked(
        name="x", period=numpy.float32(0.5), overhead=numpy.float64(0.01), pue=numpy.float64(1.5)
    )
    assert (options.period_ns, options.overhead, options.pue) == (500_000_000, 0.01, 1.5)
    assert Options.checked(name="x", period="10ms").period_ns == 10_000_000
    exact = Options.checked(name="x", overhead=Fraction(1, 200), pue=Decimal("1.5"))
    assert (exact.overhead, exact.pue) == (0.005, 1.5)
    assert type(Options.checked(name="x", pue=numpy.int64(2)).pue) is float
