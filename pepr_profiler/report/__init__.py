"""Renderers: a summary or a ranking in, text or the bytes of a file out. Nothing is printed."""

from __future__ import annotations

FORMS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "html": ("page", ("jinja2", "matplotlib"), "report"),
    "png": ("figure", ("matplotlib",), "report"),
    "svg": ("figure", ("matplotlib",), "report"),
    "pdf": ("figure", ("matplotlib",), "report"),
    "csv": ("table", (), ""),
    "tsv": ("table", (), ""),
    "parquet": ("table", ("pyarrow",), "parquet"),
    "tex": ("typeset", (), ""),
    "md": ("typeset", (), ""),
    "json": ("data", (), ""),
}
"""What `-o FILE` writes, by extension: its kind, the packages it needs, the extra that has them."""

EXPORTS = ("csv", "tsv", "json", "jsonl", "parquet", "tex", "md")
"""What `runs export FILE` writes.

These stand here and not in `export`, as the help of these options lists the forms, and `export` is
imported only when there is something to write.
"""

FIGURES = ("performance", "size", "setting")
"""What a figure of a study may show: the performance against the resource, the scores against the
size of the models, or two settings beside each other."""
