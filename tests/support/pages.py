"""The project's pages of Markdown: their code blocks, links and headings.

A line `<!-- KIND: why -->` before a fence says how its block is checked; pages show no comments.
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")],
    key=lambda path: path.relative_to(ROOT).parts,
)
FENCE = re.compile(
    r"(?:^<!-- (?P<kind>[^:\n]+): (?P<why>[^\n]+) -->\n)?^(?P<indent> *)```(?P<language>\w*)\n"
    r"(?P<code>.*?)^ *```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    page: Path
    line: int  # of its first line of code
    language: str
    code: str
    kind: str | None  # what the comment before it says, and why
    why: str | None

    def __str__(self):
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(
            page,
            text.count("\n", 0, found.start("code")) + 1,
            found["language"],
            re.sub(f"^{found['indent']}", "", found["code"], flags=re.MULTILINE),
            found["kind"],
            found["why"],
        )
        for found in FENCE.finditer(text)
    ]


def prose_of(page: Path) -> str:
    """The page without its code blocks, whose brackets are no links."""
    return FENCE.sub("", page.read_text())


def links_of(page: Path) -> list[str]:
    """The targets of links and pictures."""
    prose = re.sub(r"`[^`\n]+`", "", prose_of(page))
    return re.findall(r"\]\(([^()\s]+)\)", prose)


def anchors_of(page: Path) -> set[str]:
    """What GitHub and mkdocs make of the page's headings."""
    found: set[str] = set()
    for title in re.findall(r"^#{1,6} (.+)$", prose_of(page), re.MULTILINE):
        shown = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).lower()
        slug = re.sub(r"[^\w\- ]", "", shown).replace(" ", "-")
        found.add(next(s for s in (slug, *(f"{slug}-{i}" for i in range(1, 99))) if s not in found))
    return found
