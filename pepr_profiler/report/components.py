"""A component of a run as reports name it, from what a summary says of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pepr_profiler.energy.sources import KINDS
from pepr_profiler.units import format_provenance, format_quantity, format_with_u


def counted(energy: Mapping[str, Any]) -> str:
    """The key of what is counted of each component of a summary's energy."""
    return "device_j" if energy.get("scope") == "device" else "job_j"


def kind_of(component: Mapping[str, Any]) -> str:
    """The kind of a component, one of `energy.sources.KINDS`."""
    return component["kind"] if component.get("kind") in KINDS else "other"


def label_of(component: Mapping[str, Any]) -> str:
    """What distinguishes a component from others of its kind: its label, else its id's own part."""
    return format_provenance(
        component.get("label") or str(component.get("id", "")).partition(":")[2]
    )


def component_name(component: Mapping[str, Any], *, column: int = 0) -> str:
    """A component as reports call it: "gpu:0 H100", "cpu package-0"; in a job with its node.

    The name of its kind, where it is not in the label, has at least `column` cells.
    """
    kind, label = str(component.get("kind")), label_of(component)
    host = f" {component['host']}" if component.get("host") else ""
    named = label.startswith(kind) or kind == "other"
    return f"{label}{host}" if named else f"{kind:<{column}} {label}{host}"


def energy_text(
    figure: Mapping[str, Any],
    key: str = "energy_j",
    *,
    like: tuple[float | None, float | None] | None = None,
) -> str:
    """The energy of a phase or a total with its ±; "≥ 450 J" where a device is missing in it."""
    energy_j = figure.get(key)
    if figure.get("partial") and energy_j is not None:
        return f"≥ {format_quantity(energy_j, 'J')}"
    return format_with_u(energy_j, figure.get("u_j"), "J", like=like)
