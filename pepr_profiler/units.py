"""Numbers with units: how a quantity, its uncertainty and a duration are written and read.

Inside the code everything is SI (J, W, s, g, bytes; instants and periods in integer ns). Prefixes,
kWh and percent exist only in what a person reads, and are made here.
"""

from __future__ import annotations

import math
import re

from pepr_profiler.errors import UsageError

NS_PER_S = 1_000_000_000
J_PER_WH = 3_600.0
J_PER_KWH = 3_600_000.0

UNKNOWN = "unknown"

_PREFIXES = {-9: "n", -6: "µ", -3: "m", 0: "", 3: "k", 6: "M", 9: "G", 12: "T", 15: "P"}
_SCALES = {"n": 1e-9, "u": 1e-6, "µ": 1e-6, "μ": 1e-6, "m": 1e-3, "": 1.0}
_SCALES |= {"k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_NS = {"ns": 1, "us": 10**3, "µs": 10**3, "μs": 10**3, "ms": 10**6, "s": 10**9, "": 10**9}
_NS |= {"m": 60 * 10**9, "min": 60 * 10**9, "h": 3600 * 10**9}
_NUMBER = r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)"
_LOWEST, _HIGHEST = min(_PREFIXES), max(_PREFIXES)
# Beyond this many digits a reader gains nothing, however small the uncertainty is.
_MAX_DIGITS = 6


def format_quantity(value: float | None, unit: str) -> str:
    """`value` with an SI prefix and four significant digits: 151000, "J" -> "151.0 kJ".

    None, NaN and infinities are "unknown", never 0. Bytes ("B") take decimal prefixes and are
    whole below 1 kB; grams go to tonnes instead of Mg.
    """
    if value is None or not math.isfinite(value):
        return UNKNOWN
    if value == 0 or (unit == "B" and abs(value) < 999.5):
        return f"{round(value)} {unit}"
    # The rounded number picks the prefix: 999.96 J is 1.000 kJ, not 1000.0 J.
    exponent = int(f"{value:.3e}".rpartition("e")[2])
    if not _LOWEST - 3 <= exponent < _HIGHEST + 6:  # else hundreds of digits
        return f"{value:.3e} {unit}"
    power = _prefix_power(exponent)
    decimals = max(0, 3 - (exponent - power))
    return f"{_scaled(value, power):.{decimals}f} {_prefixed(unit, power)}"


def format_with_u(
    value: float | None,
    u: float | None,
    unit: str,
    *,
    like: tuple[float | None, float | None] | None = None,
) -> str:
    """`value` ± `u` in one prefix: 371612, 9300, "J" -> "371.6 ± 9.3 kJ".

    `u` keeps two significant digits and the value the same decimals (GUM 7.2.6), but the value
    never more than six digits: a smaller u is rounded up to the last one. An unknown u is "?",
    an unknown value "unknown". `like` is a (value, u) whose prefix and decimals are taken over,
    so that a column lines up, unless they would make a known number look like 0.
    """
    if value is None or not math.isfinite(value):
        return UNKNOWN
    if u is None or not math.isfinite(u):
        number, _, prefixed = format_quantity(value, unit).partition(" ")
        return f"{number} ± ? {prefixed}"
    power, decimals = _layout(value, u)
    if like is not None and all(x is not None and math.isfinite(x) for x in like):
        shared = _layout(*like)  # type: ignore[arg-type]  # both were just seen to be floats
        last_digit = 10.0 ** (shared[0] - shared[1])
        if all(x == 0 or abs(x) >= last_digit for x in (value, u)):
            power, decimals = shared
    step = 10.0 ** (power - decimals)
    shown_u = max(u, step) if u > 0 else 0.0
    return (
        f"{_fixed(_scaled(value, power), decimals)} ± {_fixed(_scaled(shown_u, power), decimals)} "
        f"{_prefixed(unit, power)}"
    )


def format_duration(duration_s: float | None) -> str:
    """A duration as a person says it: "420 ms", "3.42 s", "14 min 07 s", "2 h 05 min", "3 d 04 h".

    Three significant digits below a minute, two units above; unknown for None and NaN.
    """
    if duration_s is None or not math.isfinite(duration_s):
        return UNKNOWN
    sign = "-" if duration_s < 0 else ""
    duration_s = abs(duration_s)
    if duration_s == 0:
        return "0 s"
    if duration_s < 59.95:  # what would round to "60.0 s" is "1 min 00 s"
        exponent = int(f"{duration_s:.2e}".rpartition("e")[2])
        power = min(0, _prefix_power(exponent))
        decimals = max(0, 2 - (exponent - power))
        return f"{sign}{_scaled(duration_s, power):.{decimals}f} {_prefixed('s', power)}"
    seconds = round(duration_s)
    if seconds < 3600:
        return f"{sign}{seconds // 60} min {seconds % 60:02d} s"
    minutes = round(duration_s / 60)
    if minutes < 24 * 60:
        return f"{sign}{minutes // 60} h {minutes % 60:02d} min"
    hours = round(duration_s / 3600)
    return f"{sign}{hours // 24} d {hours % 24:02d} h"


def format_provenance(provenance: object) -> str:
    """A provenance in the words of reports: what summaries call modelled is estimated."""
    return "estimated" if provenance == "modelled" else str(provenance or UNKNOWN)


def known(value: float | None) -> float | None:
    """The value, or None where it is no finite number."""
    return value if value is not None and math.isfinite(value) else None


def ratio(part: float | None, whole: float | None) -> float | None:
    """What part of the whole it is; None where that is unknown."""
    part, whole = known(part), known(whole)
    return None if part is None or not whole else part / whole


def format_percent(fraction: float | None, *, unknown: str = "?") -> str:
    """A fraction in percent with one decimal."""
    return unknown if fraction is None else f"{fraction:.1%}"


def format_number(value: float | None) -> str:
    """A metric's value: four significant digits, whole numbers in full."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return UNKNOWN
    return f"{value:.4g}" if isinstance(value, float) and abs(value) < 9999.5 else f"{value:,.0f}"


def format_amount(value: float, unit: str, u: float | None = None) -> str:
    """An amount of a resource: a time, a physical quantity, money, or a number without a unit.

    It is shown with its `u` where that is known.
    """
    if u is not None and math.isfinite(u):
        prefixed = unit in ("J", "g", "B", "s")  # no other unit takes one
        return format_with_u(value, u, unit) if prefixed else f"{_with_u(value, u)} {unit}".rstrip()
    if unit == "s":
        return format_duration(value)
    if unit in ("J", "g", "B") or (not unit and value >= 9999.5):
        return format_quantity(value, unit).rstrip()
    if unit:  # a currency takes no prefix
        return f"{_plain(value)} {unit}"
    return _plain(value, zeros=False)


def _plain(value: float, *, zeros: bool = True) -> str:
    """Four significant digits without an exponent, if it is neither huge nor tiny; `zeros` are
    kept at the end.
    """
    if not math.isfinite(value):
        return UNKNOWN
    exponent = int(f"{value:.3e}".rpartition("e")[2])
    if not value or not -8 < exponent < 12:
        return f"{value:#.4g}" if zeros else f"{value:.4g}"
    text = f"{value:.{max(0, 3 - exponent)}f}"
    return text if zeros or "." not in text else text.rstrip("0").rstrip(".")


def _with_u(value: float, u: float) -> str:
    """A plain number and its u to the same digit: two of u, but at most six of the number."""
    largest = max(abs(value), u)
    if not math.isfinite(value) or not largest:
        return f"{_plain(value, zeros=False)} ± 0"
    exponent = math.floor(math.log10(largest))
    if not -8 < exponent < 12:
        return f"{value:.3e} ± {u:.1e}"
    last = 3 - exponent if not u else 1 - int(f"{u:.1e}".partition("e")[2])
    decimals = max(0, min(last, 5 - exponent))
    shown_u = max(u, 10.0**-decimals) if u else 0.0
    return f"{value:.{decimals}f} ± {shown_u:.{decimals}f}"


def parse_duration(text: str) -> int:
    """A positive duration in integer ns, from "10ms", "2s", "5m" (minutes) or "0.5" (seconds)."""
    match = re.fullmatch(rf"\s*{_NUMBER}\s*([a-zµμ]*)\s*", text)
    why = "a number and one of ns, us, ms, s, m (minutes), h is expected"
    if match and match[2] in _NS:
        duration_ns = float(match[1]) * _NS[match[2]]
        if math.isfinite(duration_ns) and round(duration_ns) > 0:
            return round(duration_ns)
        why = "it must be finite and at least 1 ns"
    raise UsageError(
        f"{text!r} is not a duration", why=why, fix="write for example 10ms, 2s, 0.5 (seconds)"
    )


def parse_range(
    text: str,
    *,
    option: str = "--range",
    form: str = "MIN:MAX",
    example: str = "151k:1.94M",
) -> tuple[float, float]:
    """Two rising numbers from "MIN:MAX"; each may end in an SI prefix and a unit: "151kJ:1.94MJ".

    The unit is for the reader: nothing is converted (so "Wh" is refused), only the prefix scales.
    `option`, `form` and `example` word the error for options of the same shape.
    """
    parts = text.split(":")
    why = f"two numbers with a colon between them are expected, {form}"
    if len(parts) == 2:
        low, high = (_parse_number(part) for part in parts)
        if low is None or high is None:
            bad = parts[0] if low is None else parts[1]
            why = f"{bad!r} is not a number with an optional SI prefix (m, k, M, G)"
        elif low < high:
            return low, high
        else:
            smaller, _, larger = form.partition(":")
            why = f"{smaller} must be below {larger}"
    raise UsageError(
        f"{option} {text!r} cannot be read", why=why, fix=f"write for example {option} {example}"
    )


def parse_cpu_power(text: str) -> tuple[float, float]:
    """Idle and full-load power of a machine in W, from "IDLE:MAX". Raises UsageError."""
    example = "12:95 (watts of the whole machine, idle and fully loaded)"
    idle_w, max_w = parse_range(text, option="--cpu-power", form="IDLE:MAX", example=example)
    if idle_w < 0:
        raise UsageError(
            f"--cpu-power {text!r} cannot be used",
            why="IDLE is below 0 W",
            fix=f"write for example --cpu-power {example}",
        )
    return idle_w, max_w


_HIGHEST_PUE = 100.0


def check_pue(pue: float) -> float:
    """A power usage effectiveness as a float. Raises UsageError unless it is from 1 to 100."""
    try:
        value = math.nan if isinstance(pue, str | bytes) else float(pue)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if isinstance(pue, bool) or not 1.0 <= value <= _HIGHEST_PUE:  # NaN is neither
        raise UsageError(
            f"a PUE of {shown(pue)} is not possible",
            why="a data centre draws at least what its machines draw, and not a hundred times that",
            fix="give 1.0 (the machines alone) or more, for example --pue 1.2",
        )
    return value


def shown(given: object) -> str:
    """What was given, for an error: `str` of a huge whole number would raise."""
    return "a huge number" if isinstance(given, int) and abs(given) > 1e300 else repr(given)[:40]


def is_utf8(text: str) -> bool:
    """Whether the text can be written as UTF-8 and given to the system: no lone half, no NUL."""
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:
        return False


def utf8_text(text: str) -> str:
    """`text` from the command line or a file name, as UTF-8 whatever the locale's encoding is.

    In an ASCII locale Python hands out the bytes of "ö" as two lone surrogates.
    """
    return text if text.isascii() else re.sub("[\udc80-\udcff]+", _as_utf8, text)


def _as_utf8(lone_halves: re.Match[str]) -> str:
    try:
        return lone_halves[0].encode("utf-8", "surrogateescape").decode()
    except UnicodeError:
        return lone_halves[0]


def parse_overhead(overhead: str | float) -> float:
    """A share of one core: "0.5%" or 0.005 -> 0.005. Raises UsageError unless in (0, 1]."""
    percent = isinstance(overhead, str) and overhead.strip().endswith("%")
    number = overhead.strip().removesuffix("%") if isinstance(overhead, str) else overhead
    try:
        share = float(number) / (100 if percent else 1)
    except (TypeError, ValueError, OverflowError):
        share = -1.0
    if not 0 < share <= 1:
        raise UsageError(
            f"an overhead of '{overhead}' is not possible",
            why="it is the share of one core that reading the sensors may take",
            fix="give more than 0% and at most 100%, for example --overhead 0.5%, in code "
            "overhead=0.005",
        )
    return share


def _parse_number(text: str) -> float | None:
    match = re.fullmatch(rf"\s*{_NUMBER}\s*([nuµμmkKMGT]?)[JWsgB]?\s*", text)
    if match is None:
        return None
    number = float(match[1]) * _SCALES[match[2]]
    return number if math.isfinite(number) else None


def _prefix_power(exponent: int) -> int:
    """The power of 1000 (as one of 10) that leaves one to three digits before the point."""
    power = exponent // 3 * 3
    return power if _LOWEST <= power <= _HIGHEST else _LOWEST if power < 0 else _HIGHEST


def _scaled(value: float, power: int) -> float:
    # Dividing by a whole power is correctly rounded; multiplying by 1e-3 is not (1.1e3 * 1e-3).
    return value / 10.0**power if power > 0 else value * 10.0**-power


def _prefixed(unit: str, power: int) -> str:
    if unit == "g" and power >= 6:
        return f"{_PREFIXES[power - 6]}t"
    return f"{_PREFIXES[power]}{unit}"


def _layout(value: float, u: float) -> tuple[int, int]:
    """The prefix's power of ten and the decimals (negative: tens, hundreds) for `value` ± `u`."""
    # The larger of the two picks the prefix, so that 0.4 ± 2300 J does not end in mJ.
    largest = max(abs(value), abs(u))
    if largest == 0:
        return 0, 0
    exponent = math.floor(math.log10(largest))
    last = exponent - 3  # the power of ten of the last digit: four digits where u is 0
    if u != 0:
        last = max(int(f"{abs(u):.1e}"[4:]) - 1, exponent - _MAX_DIGITS + 1)  # of "9.3e+03"
    # Rounding to that digit can carry into the next prefix: 999.97 ± 0.80 J stays in J, with
    # ± 8.0 it is 1.0000 ± 0.0080 kJ.
    if exponent < 308 and round(largest, -last) >= 10.0 ** (exponent + 1):
        exponent += 1
    power = _prefix_power(exponent)
    return power, power - last


def _fixed(number: float, decimals: int) -> str:
    if number > 0 and decimals >= 0:  # nearly all: rounded alike, and no -0
        return f"{number:.{decimals}f}"
    return f"{round(number, decimals) + 0.0:.{max(0, decimals)}f}"
