"""Links, anchors and paths of the pages are there, and so are the pages that code names."""

import functools
import re
import subprocess

import pages
import pytest
from pages import PAGES, ROOT

# Of paths in prose, by their end; lab notes name files as they were called at their date.
PATH = re.compile(r"`((?:[\w.-]+/)*[\w.-]+\.(?:py|md|h|cpp|cu|def|cmake|toml|sh))`")
PLACEHOLDER = re.compile(r"NAME|ARCH|PASS")
PAGE = re.compile(r"\bdocs/[\w/-]+\.md\b")
names = [str(page.relative_to(ROOT)) for page in PAGES]


@functools.cache
def files() -> list[str]:
    """All files of the project."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_links(page):
    wrong = []
    for link in pages.links_of(page):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in pages.anchors_of(target)):
            wrong.append(link)
    assert not wrong


@pytest.mark.parametrize("page", [p for p in PAGES if p.parent.name != "lab"], ids=lambda p: p.name)
def test_paths(page):
    named = {n for n in PATH.findall(pages.prose_of(page)) if not PLACEHOLDER.search(n)}
    assert not {n for n in named if not any(f"/{f}".endswith(f"/{n}") for f in files())}


def test_pages_that_the_code_names():
    """In comments, docstrings and messages."""
    sources = [
        f for f in files() if f.endswith((".py", ".h", ".cpp", ".cu", ".def", ".toml", ".md"))
    ]
    named = {n: f for f in sources for n in PAGE.findall((ROOT / f).read_text())}
    assert len(named) >= 8
    assert not {n: f for n, f in named.items() if not (ROOT / n).exists()}


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_a_page_is_reached_from_the_readme(page):
    seen, todo = set(), [ROOT / "README.md"]
    while todo:
        one = todo.pop()
        if one in seen or one.suffix != ".md":
            continue
        seen.add(one)
        paths = (link.partition("#")[0] for link in pages.links_of(one))
        todo += [(one.parent / p).resolve() for p in paths if p and not re.match(r"\w+:", p)]
    assert page in seen or page.parent.name == "images"


def test_anchors():
    page = ROOT / "docs" / "benchmarks.md"
    assert {"benchmarks", "dense-and-causal-attention"} <= pages.anchors_of(page)


def test_terms_of_the_kernel_page_are_in_the_glossary():
    terms = set(re.findall(r"(?<!\*)\*([\w ]+)\*(?!\*)", pages.prose_of(ROOT / "docs/kernel.md")))
    (glossary,) = re.findall(
        r"^## Glossary\n(.*?)^## ", (ROOT / "docs/design.md").read_text(), re.DOTALL | re.MULTILINE
    )
    assert len(terms) > 8
    assert not {t for t in terms - {"italics"} if t.removesuffix("s") not in glossary}
