"""README's examples run, links lead somewhere, and the documents that a contributor expects are there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

EXAMPLE = re.compile(r"^<!-- ci: run -->[ \t]*\n+```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")


def documents() -> list[Path]:
    """The Markdown files of the repository."""
    folders = [
        ROOT / name for name in ("docs", "benchmarks", "sample_configs", "config_schema", "ops", "profiler", "engine")
    ]
    return sorted([*ROOT.glob("*.md"), *(file for folder in folders for file in folder.rglob("*.md"))])


def examples(text: str) -> list[str]:
    """The Python blocks that stand under ``<!-- ci: run -->``."""
    return EXAMPLE.findall(text)


def broken_links(document: Path, root: Path) -> list[str]:
    """Relative links of a document to what is not there, or lies outside of the repository."""
    found = []
    for link in LINK.findall(document.read_text(encoding="utf-8")):
        target = link.split("#")[0]
        if not target or re.match(r"[a-z]+:", target):
            continue
        path = (document.parent / target).resolve()
        if not path.is_relative_to(root) or not path.exists():
            found.append(f"{document.relative_to(root)}: {link}")
    return found


README = ROOT / "README.md"
EXAMPLES = examples(README.read_text(encoding="utf-8")) if README.is_file() else []


def test_readme_has_an_example_that_is_run():
    assert EXAMPLES, "README.md needs a ```python block under a line `<!-- ci: run -->`"


@pytest.mark.parametrize("code", EXAMPLES)
def test_readme_example_runs(code, smollm2_dir, minilm_dir):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip(), "an example that prints nothing shows nothing"


def test_examples_are_told_from_other_blocks():
    mark, block = "<!-- ci: run -->\n", "```python\n{}```\n"
    text = block.format("no\n") + mark + block.format("yes = 1\nprint(yes)\n") + mark + "\n" + block.format("too\n")
    assert examples(text) == ["yes = 1\nprint(yes)\n", "too\n"]


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "docs/structure.md"])
def test_document_is_there(name):
    assert (ROOT / name).is_file()


@pytest.mark.parametrize("document", documents(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(document):
    assert not broken_links(document, ROOT)


def test_broken_links_are_found(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "there.md").touch()
    page = tmp_path / "docs" / "page.md"
    page.write_text(
        "[a](../there.md#x) [b](gone.md) [c](../../out.md) [d](https://x.org/y) [e](#here)", encoding="utf-8"
    )
    assert broken_links(page, tmp_path) == ["docs/page.md: gone.md", "docs/page.md: ../../out.md"]


def test_changelog_opens_with_what_is_unreleased():
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == "[Unreleased]"


def test_no_file_knows_where_it_was_written():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    place = str(ROOT).encode()
    assert not [str(file) for file in files if file.is_file() and place in file.read_bytes()]
