"""The documentation site: make docs. Everything in it is in this repository; nothing is fetched."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import click
from docutils import nodes
from docutils.parsers.rst import Directive

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import pepr_profiler  # noqa: E402
from pepr_profiler.commands import COMMANDS, cli  # noqa: E402

project = "pepr-profiler"
version = release = pepr_profiler.__version__
copyright = "the pepr-profiler authors, Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
root_doc = "index"

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence", "deflist"]

html_theme = "furo"
html_title = f"pepr-profiler {release}"
html_copy_source = False
html_show_sphinx = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
templates_path: list[str] = []

default_role = "code"  # what our docstrings have between backticks

autodoc_member_order = "bysource"
autodoc_type_aliases = {"npt.ArrayLike": "numpy.typing.ArrayLike"}
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
python_use_unqualified_type_names = True

# Types of the standard library and of numpy are named and not linked: a build looks up nothing
# outside the repository.
nitpick_ignore_regex = [
    ("py:.*", r"(collections|pathlib|typing|types|datetime|os|enum|json)(\..*)?"),
    (
        "py:.*",
        r"(Any|Path|Callable|Iterable|Iterator|Mapping|Sequence|NoneType|Self|TracebackType)",
    ),
    ("py:.*", r"(NDArray|np|npt|numpy)(\..*)?"),
    ("py:.*", r"(int|float|str|bytes|bool|dict|list|tuple|set|object|None|ValueError|OSError)"),
    ("py:.*", r"(Exception|BaseException|RuntimeError|KeyError|TypeError)"),
    # Aliases, and what of ours is not in the reference.
    ("py:.*", r"(.*\.)?(Floats|Mask|MinMax|Run|Bounds|Store|Source|EnergyCurve)"),
]

# The repository's pages link to files of the repository; on the site, those are these pages.
PAGES = {
    "docs/design.md": "design.md",
    "docs/measurement.md": "measurement.md",
    "docs/daemon.md": "daemon.md",
}


WHOLE = {"contributing": "CONTRIBUTING.md", "changelog": "CHANGELOG.md"}
"""Pages that lie at the top of the repository, and what stands for them here."""


def link_to_pages(app: Any, name: str, source: list[str]) -> None:
    if name in WHOLE:
        app.env.note_dependency(str(ROOT / WHOLE[name]))
        source[0] = (ROOT / WHOLE[name]).read_text()
        for path, page in PAGES.items():
            source[0] = source[0].replace(f"]({path})", f"]({page})")


class Command(Directive):
    """`.. command:: NAME`: what `pepr-profile NAME --help` prints, with its subcommands."""

    required_arguments = 0
    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0] if self.arguments else ""
        context = click.Context(cli, info_name="pepr-profile", **cli.context_settings)
        command: click.Command = cli
        if name:
            command = cli.get_command(context, name) or sys.exit(f"no command {name}")
            context = click.Context(command, info_name=name, parent=context)
        return list(self._helps(command, context))

    def _helps(self, command: click.Command, context: click.Context) -> list[nodes.Node]:
        text = inspect.cleandoc(command.get_help(context))
        found: list[nodes.Node] = [nodes.literal_block(text, text, language="text")]
        if isinstance(command, click.Group) and command is not cli:
            for name in command.list_commands(context):
                inner = command.get_command(context, name)
                assert inner is not None
                below = click.Context(inner, info_name=name, parent=context)
                title = nodes.rubric("", "", nodes.literal("", below.command_path))
                found += [title, *self._helps(inner, below)]
        return found


def setup(app: Any) -> None:
    app.add_directive("command", Command)
    app.connect("source-read", link_to_pages)
    page = (ROOT / "docs" / "cli.md").read_text()
    missing = [name for name in COMMANDS if f"{{command}} {name}" not in page]
    if missing:
        sys.exit(f"docs/cli.md has no section for {', '.join(missing)}")
