"""What all pages share: one HTML file, no network, every text escaped, light, dark and on paper."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import resources
from typing import TYPE_CHECKING, Any

from pepr_profiler import __version__
from pepr_profiler.units import format_quantity

if TYPE_CHECKING:
    from jinja2 import Environment


def clip(text: str, longest: int = 160) -> str:
    """`text` for a page: at most `longest` characters, what cannot be shown made visible."""
    kept = text if len(text) <= longest else text[: longest - 1] + "…"
    return "".join(c if c.isprintable() or c in "\n\t" else "�" for c in kept)


def render(template: str, *, scripts: Sequence[str], **values: Any) -> str:
    """A template with the page's style and scripts, which alone may run (its policy says so)."""
    code = [_asset(name) for name in scripts]
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for text in code
    )
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src {hashes}; "
        "base-uri 'none'; form-action 'none'"
    )
    return (
        _environment()
        .get_template(template)
        .render(
            css=_asset("page.css"),
            scripts=code,
            policy=policy,
            version=__version__,
            made_on=datetime.now(timezone.utc).strftime("%Y-%m-%d"),
            **values,
        )
    )


def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader("pepr_profiler.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    made.filters["clip"] = clip
    made.filters["data"] = embedded
    made.filters["quantity"] = format_quantity
    return made


def embedded(value: Any) -> Any:
    """JSON that may stand in a script element: nothing in it ends it or begins a comment."""
    from markupsafe import Markup

    text = json.dumps(value, allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)  # no character that HTML knows is left


def _asset(name: str) -> str:
    return (resources.files("pepr_profiler.report") / "templates" / name).read_text("utf-8")
