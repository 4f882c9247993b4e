"""The pages are right: the tutorial prints what it shows, and links lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TUTORIAL = ROOT / "docs" / "tutorial.md"
PAPER = ROOT / "docs" / "howto" / "paper.md"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md")])
PAGES = [page for page in PAGES if "_build" not in page.parts]


def sessions(page: str) -> list[tuple[str, str]]:
    """Each command of a page's console blocks ($, continued after >), and what it shows."""
    found: list[tuple[str, str]] = []
    for block in re.findall(r"^```console\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        for session in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            lines = session.split("\n")
            end = next(i for i, line in enumerate(lines) if i and not line.startswith("> "))
            command = "\n".join([lines[0], *(line[2:] for line in lines[1:end])])
            found.append((command, "\n".join(lines[end:]).strip("\n")))
    return found


def files(page: str) -> dict[str, str]:
    """The programs that a page asks the reader to save."""
    pattern = r"^```\{code-block\} python\n:name: (\S+)\n\n(.*?)^```$"
    return dict(re.findall(pattern, page, re.MULTILINE | re.DOTALL))


def follow(page: str, folder: Path) -> list[tuple[str, str, str]]:
    """Runs a page's commands in a folder: each with what the page shows and what it printed."""
    for name, program in files(page).items():
        (folder / name).write_text(program)
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PEPR_")}
    kept["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), kept["PATH"]])
    kept["PYTHONPATH"] = os.pathsep.join([str(ROOT), kept.get("PYTHONPATH", "")]).strip(os.pathsep)
    kept |= {"PEPR_STORE": str(folder / "store"), "PEPR_DAEMON": "off"}
    followed = []
    for command, shown in sessions(page):
        done = subprocess.run(
            ["sh", "-c", command], cwd=folder, env=kept, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        followed.append((command, shown, (done.stdout or done.stderr).strip("\n")))
    return followed


VARIES = (
    (r"(?m)^  (missing|warning|progress)\b(.*\n)((   .*\n)*)", ""),  # the machine and its load
    (r"^ +# \d+–\d+ +any of these ranks.*$", ""),  # only where rows cannot be distinguished
    (r"^ +0\.1–0\.2 +the interval.*$", ""),
    (r"(\d\.\d{3}) \d\.\d{3}–\d\.\d{3}", r"\1"),
    (r"-[0-9a-f]{6}\b", "-ID"),
    (r"\d{4}-\d\d-\d\dT\d\d:\d\d", "WHEN"),
    (r"[▁-▏]+", ""),
    (r" \*$", ""),
    (r"[<>]?\d+([.,–]\d+)*", "0"),
    (r"\b0 min\b", ""),
    (r" +± 0", ""),  # none where all draws agree, or a lopsided interval
    (r"\b[mkµMn](J|W|Wh|s|B)\b", r"\1"),
    (r"[ \t]+", " "),
)


def plain(text: str) -> list[list[str]]:
    """Paragraphs of sorted lines, without what is another number each time."""
    for pattern, instead in VARIES:
        text = re.sub(pattern, instead, text + "\n", flags=re.MULTILINE).rstrip("\n")
    return [
        sorted(line.strip() for line in paragraph.split("\n"))
        for paragraph in re.split(r"\n\s*\n", text)
        if paragraph.strip()
    ]


@pytest.mark.timeout(900)
def test_the_tutorial_shows_what_its_commands_print(tmp_path: Path) -> None:
    followed = follow(TUTORIAL.read_text(), tmp_path)
    if "estimated" not in followed[0][2]:
        pytest.skip("the page is of a machine without sensors")
    assert len(followed) > 5
    for command, shown, printed in followed:
        assert plain(printed) == plain(shown), command
    assert "PePR" in (tmp_path / "widths.html").read_text()


def test_the_papers_analysis_shows_what_its_commands_print(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    followed = follow(PAPER.read_text(), tmp_path)
    assert len(followed) > 5
    for command, shown, printed in followed:
        assert printed == shown, command
    for name in ("classes.pdf", "sizes.pdf", "settings.pdf"):
        assert (tmp_path / name).read_bytes().startswith(b"%PDF")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue  # elsewhere: make linkcheck
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_that_pages_name_are_there(page: Path) -> None:
    named = re.findall(r"`((?:docs|csrc|tests|benchmarks|examples|tools|pepr_profiler)/[\w./-]+)`",
                       page.read_text())  # fmt: skip
    assert [name for name in named if not ("NAME" in name or (ROOT / name).exists())] == []


if __name__ == "__main__":  # python tests/test_docs.py [PAGE]: writes a page's outputs anew
    import tempfile

    path = Path(sys.argv[1]) if len(sys.argv) > 1 else TUTORIAL
    page = path.read_text()
    with tempfile.TemporaryDirectory() as folder:
        for command, shown, printed in follow(page, Path(folder)):
            prompt = "$ " + command.replace("\n", "\n> ") + "\n"
            before = prompt + (shown + "\n" if shown else "")
            assert before in page, before
            # Who else worked on the machine is no reader's business.
            quiet = re.sub(r"(?m)^  warning .*\n((   .*\n)*)", "", printed + "\n").rstrip("\n")
            page = page.replace(before, prompt + (quiet + "\n" if quiet else ""))
    path.write_text(page)
