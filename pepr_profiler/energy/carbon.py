"""Grid carbon intensity by country, and the CO2e of an energy, with year and source.

The table is Ember's, through Our World in Data (CC BY 4.0); data/README.md says how it was made.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypedDict

from pepr_profiler.errors import UsageError
from pepr_profiler.units import J_PER_KWH, check_pue, shown

TYPE_CHECKING = False  # typing takes 0.5 MB
if TYPE_CHECKING:
    from typing import Any, TypeVar

    _F = TypeVar("_F", bound=Callable[..., Any])


class Carbon(TypedDict):
    """The `carbon` object of a summary."""

    g_co2e: float
    intensity_g_per_kwh: float
    pue: float
    source: str
    year: int | None


_HIGHEST_G_PER_KWH = 100_000.0
"""Peat, the dirtiest fuel, is near 1,200 (IPCC 2006 factors at a third of efficiency)."""


@dataclass(frozen=True)
class GridIntensity:
    """gCO2e per kWh of a grid, who says so and for which year (None for a value given by hand)."""

    g_per_kwh: float
    year: int | None
    source: str
    region: str | None = None
    iso3: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.g_per_kwh <= _HIGHEST_G_PER_KWH:  # NaN is neither
            raise UsageError(
                f"a carbon intensity of {self.g_per_kwh:g} g/kWh is not possible",
                why=f"it must be a finite number from 0 to {_HIGHEST_G_PER_KWH:g}",
                fix="give grams of CO2e per kWh, for example --carbon-intensity 56",
            )

    @classmethod
    def given(cls, g_per_kwh: float) -> GridIntensity:
        """An intensity that the user states."""
        return cls(g_per_kwh, year=None, source="given")


def lookup(region: str) -> GridIntensity:
    """The newest yearly intensity of a country, by ISO-2 or ISO-3 code or name, in any case.

    UsageError names close matches for a region that the table does not have.
    """
    by_key = _table()
    key = _key(region)
    found = by_key.get(key)
    if found is not None:
        return found
    # Four letters or fewer are a mistyped code: every other code would be "close".
    import difflib  # only now: every summary loads this module

    close = difflib.get_close_matches(key, [k for k in by_key if len(k) > 3], n=3, cutoff=0.7)
    names = list(dict.fromkeys(f"{by_key[k].region} ({by_key[k].iso3})" for k in close))
    raise UsageError(
        f"no carbon intensity is known for region {region!r}",
        why=f"close matches: {', '.join(names)}"
        if names
        else "the table has countries only, by name or ISO 3166 code (no states, no cloud zones)",
        fix="give a country such as --region DK, or the grid's own value: "
        "--carbon-intensity G_PER_KWH",
    )


def estimate(energy_j: float, *, intensity: GridIntensity, pue: float) -> Carbon:
    """The carbon of `energy_j` joules of IT energy: energy x PUE x intensity.

    Linear in the energy, so u(g_co2e) = g_co2e x u(energy_j) / energy_j, with the same k; the
    intensity and the PUE are taken as stated, without an uncertainty of their own.
    """
    check_pue(pue)
    region = f", {intensity.region}" if intensity.region else ""
    return Carbon(
        g_co2e=energy_j / J_PER_KWH * pue * intensity.g_per_kwh,
        intensity_g_per_kwh=intensity.g_per_kwh,
        pue=pue,
        source=intensity.source + region,
        year=intensity.year,
    )


@functools.cache
def _table() -> dict[str, GridIntensity]:
    """Every key that finds a country: both codes, the name and the aliases."""
    by_key: dict[str, GridIntensity] = {}
    for row in _rows("grid_intensity.csv"):
        entry = GridIntensity(
            float(row["g_per_kwh"]),
            int(row["year"]),
            source=row["source"],
            region=row["name"],
            iso3=row["iso3"],
        )
        for column in ("iso3", "iso2", "name"):
            by_key[_key(row[column])] = entry
    aliases = {row["alias"]: by_key[row["iso3"].lower()] for row in _rows("country_aliases.csv")}
    return aliases | by_key  # a name of the table wins over an alias of the same spelling


def _rows(name: str) -> Iterable[dict[str, str]]:
    """The rows of a table in data/, by the names of its columns."""
    import csv
    from importlib import resources

    text = (resources.files("pepr_profiler") / "data" / name).read_text(encoding="utf-8")
    return csv.DictReader(text.splitlines())


def _key(text: str) -> str:
    """One spelling for the ways to write a name: no case, accents, punctuation or article."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    words = re.findall(r"[a-z0-9]+", re.sub(r"['.]", "", plain.replace("&", " and ")))
    key = " ".join(word for word in words if word != "the")
    return re.sub(r"^st ", "saint ", key)


def intensity_of(region: str | None, carbon_intensity: float | None) -> dict[str, Any]:
    """The grid intensity that was asked for, as run.json has it; one of the two is given.

    Raises UsageError if it is unknown or asked for twice.
    """
    if region is not None and carbon_intensity is not None:
        raise UsageError(
            "both a region and a carbon intensity are given",
            why="either says how much carbon a kWh costs",
            fix="keep one of --region and --carbon-intensity",
        )
    if carbon_intensity is None:
        return dict(vars(lookup(str(region))))
    try:
        return dict(vars(GridIntensity.given(float(carbon_intensity))))
    except (TypeError, ValueError, OverflowError):
        raise UsageError(
            f"a carbon intensity of {shown(carbon_intensity)} is not possible",
            why="a number is expected",
            fix="give grams of CO2e per kWh, for example carbon_intensity=56",
        ) from None
