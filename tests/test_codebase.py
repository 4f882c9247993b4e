"""What the design promises about the code itself: who imports whom, how big, how light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pepr_profiler"
CSRC = ROOT / "csrc"

# The house (docs/design.md): a package imports only what stands before it. `_core` is below all.
HOUSE = (
    *("_core", "errors", "record", "units"),
    *("sensors", "trace", "daemon_client", "recording", "energy", "summary", "check"),
    *("store", "study", "report", "daemon", "block", "pepr", "commands", "__init__", "__main__"),
)
NEVER = {"report": {"recording", "store"}}  # besides: these stand before it

# The folders of csrc: a file includes only its own folder and those that stand before it.
NATIVE_HOUSE = ("system", "sensors", "sampling", "recording", "python")

MODULES = sorted(PACKAGE.rglob("*.py"))
NATIVE = sorted([*CSRC.rglob("*.h"), *CSRC.rglob("*.cpp")])


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def part_of(module: str) -> str:
    """The part of the house that a module belongs to: `trace` for pepr_profiler.trace.lane."""
    return [*module.split("."), "__init__"][1]


def dotted(path: Path) -> str:
    names = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def called(call: ast.Call) -> str:
    return ast.unparse(call.func)


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of every module of ours that is imported, wherever it is written."""
    known = {dotted(module) for module in MODULES} | {"pepr_profiler._core"}
    package = dotted(path) if path.name == "__init__.py" else dotted(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            around = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(around if node.level else []), *filter(None, [node.module])])
            # `from package import module` imports the module, `from module import name` does not.
            # The version is the root's, which is imported anyway and loads nothing.
            whole = [f"{base}.{n.name}" for n in node.names if n.name != "__version__"]
            names = [name if name in known else base for name in whole]
        elif isinstance(node, ast.Call) and re.search("import_module$|__import__$", called(node)):
            # A computed name tells at least the package that it begins with.
            name = ast.unparse(node.args[0]).strip("f'\"").partition(".{")[0]
            names = [package + name if name.startswith(".") else name]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name.startswith("pepr_profiler"))


def test_a_package_imports_only_what_stands_before_it() -> None:
    wrong = []
    for path in MODULES:
        importer = part_of(dotted(path))
        for line, imported in imports_of(path):
            part = part_of(imported)
            known = {part, importer} <= set(HOUSE)
            if (
                not known
                or part in NEVER.get(importer, ())
                or HOUSE.index(part) > HOUSE.index(importer)
            ):
                wrong.append(f"{relative(path)}:{line} imports {imported}")
    assert wrong == []


def test_the_house_has_every_package_and_nothing_else() -> None:
    parts = {part_of(dotted(path)) for path in MODULES} - {"data"}
    assert parts | {"_core"} == set(HOUSE)


def test_the_design_describes_every_module_of_the_house() -> None:
    page = (ROOT / "docs" / "design.md").read_text()
    house = page[page.index("## The house") : page.index("## Contract")]
    missing = [relative(p) for p in MODULES if p.stem[:2] != "__" and p.name not in house]
    assert missing == []


def includes_of(path: Path) -> Iterator[tuple[str, bool]]:
    """Each include of a file, and whether it is one of our own."""
    for line in path.read_text().splitlines():
        if match := re.match(r'\s*#\s*include\s+(["<])([^">]+)', line):
            yield match[2], match[1] == '"' or (CSRC / match[2]).exists()


def test_native_files_include_only_their_own_folder_and_those_before_it() -> None:
    wrong = []
    for path in NATIVE:
        folder = path.relative_to(CSRC).parts[0]
        allowed = NATIVE_HOUSE[: NATIVE_HOUSE.index(folder) + 1]
        for included, own in includes_of(path):
            if own and included.partition("/")[0] not in allowed:
                wrong.append(f"{relative(path)} includes {included}")
    assert wrong == []
    assert {path.parent.name for path in NATIVE} == set(NATIVE_HOUSE)


def test_only_the_bindings_know_python_and_only_nvml_its_driver() -> None:
    for path in NATIVE:
        text = path.read_text()
        if path.parent.name != "python":
            assert "pybind11" not in text and "Python.h" not in text, relative(path)
        if not path.stem.startswith("nvml"):
            assert "nvml.h" not in {name for name, _ in includes_of(path)}, relative(path)


@pytest.mark.parametrize(
    "module",
    [
        "pepr_profiler",
        "pepr_profiler.commands.run",
        "pepr_profiler.block",
        "pepr_profiler.daemon.server",
    ],
)
def test_import_is_light(module: str) -> None:
    """These are loaded before the child starts, by the program that is measured, or for ever."""
    heavy = ["numpy", "rich", "torch", "pyarrow", "sqlite3"]
    if "daemon" not in module:
        heavy.append("psutil")
    program = f"import sys, {module}; print(*(name for name in {heavy} if name in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


def test_importing_the_package_starts_and_loads_nothing() -> None:
    program = "import sys; before = set(sys.modules); import pepr_profiler; " + (
        "print(*(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert set(done.stdout.split()) <= {"pepr_profiler", "__future__"}


def test_native_files_begin_with_what_they_are_for() -> None:
    """A source with a header of its own leaves it to that."""
    silent = [
        relative(path)
        for path in NATIVE
        if not re.match("// .*[a-z]", path.read_text())
        and (path.suffix == ".h" or not path.with_suffix(".h").exists())
    ]
    assert silent == []


@pytest.mark.parametrize("path", NATIVE, ids=relative)
def test_native_files_stay_small(path: Path) -> None:
    limit = 150 if path.suffix == ".h" else 300
    assert len(path.read_text().splitlines()) <= limit, f"{relative(path)}: split it"


def calls_of(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield node.lineno, called(node)
        elif isinstance(node, ast.Raise) and node.exc and "SystemExit" in ast.unparse(node.exc):
            yield node.lineno, "raise SystemExit"
        elif isinstance(node, ast.ImportFrom) and node.module == "sys":
            yield from ((node.lineno, f"sys.{name.name}") for name in node.names)


def test_only_commands_print_and_exit() -> None:
    speaking = {"print", "click.echo", "sys.exit", "exit", "quit", "input", "raise SystemExit"}
    speaking |= {"sys.stdout.write", "sys.stderr.write", "sys.stdout", "sys.stderr"}
    loud = [
        f"{relative(path)}:{line} {call}"
        for path in MODULES
        if part_of(dotted(path)) not in {"commands", "__main__"}
        for line, call in calls_of(path)
        if call in speaking
    ]
    assert loud == []


def test_no_error_is_swallowed_whole() -> None:
    bare = [
        f"{relative(path)}:{node.lineno}"
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or ast.unparse(node.type) in {"Exception", "BaseException"})
        and all(isinstance(statement, ast.Pass) for statement in node.body)
    ]
    bare += [
        f"{relative(path)}:{number}"
        for path in MODULES
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(r"\bsuppress\(.*\b(Base)?Exception\b", line)
    ]
    assert bare == []


def files_of_the_project() -> list[Path]:
    """What git tracks or would; without git, what lies in the project's own folders."""
    done = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0 and done.stdout:
        return [ROOT / name for name in done.stdout.split("\0") if name]
    folders = ("pepr_profiler", "csrc", "docs", "tests", "examples", "benchmarks")
    return [path for folder in folders for path in (ROOT / folder).rglob("*")]


def test_no_file_names_a_path_of_the_machine_it_was_written_on() -> None:
    # Split, so that this file is not one of those it looks for.
    homes = re.compile("/(?:" + "home|Users|work" + r")/[A-Za-z0-9_.-]+|/" + r"root/[A-Za-z0-9_.]")
    named = []
    for path in files_of_the_project():
        if not path.is_file() or path.suffix in {".so", ".pyc", ".png", ".arrows"}:
            continue
        text = path.read_text(errors="replace")
        named += [f"{relative(path)}: {match[0]}" for match in homes.finditer(text)]
    assert named == []


def test_no_two_public_classes_share_a_name() -> None:
    names: dict[str, list[str]] = {}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                names.setdefault(node.name, []).append(relative(path))
    for name in re.findall(r"^class (\w+)", (PACKAGE / "_core.pyi").read_text(), re.MULTILINE):
        names.setdefault(name, []).append("the core")
    assert {name: paths for name, paths in names.items() if len(paths) > 1} == {}


def test_the_entry_knows_every_command_by_name() -> None:
    """It cannot import them where our own code does not load, and then runs the command itself."""
    from pepr_profiler.__main__ import _OTHERS
    from pepr_profiler.commands import COMMANDS

    assert {"run", *_OTHERS} == set(COMMANDS)
