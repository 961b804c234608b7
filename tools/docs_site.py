"""Hooks for mkdocs to build this project's site; mkdocs.yml names this file.

- README.md is the first page; CONTRIBUTING.md and CHANGELOG.md are pages. Links between pages work;
  links to files that are not pages become their paths. In code an escaped bar, which GitHub's
  tables need, becomes a plain one.
- Pages are ordered: those in ORDER first, then the rest.
- The code blocks of GALLERY are run, and the picture that each writes is shown below it. So the
  library must be importable.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
# Pages outside docs/, by their names in the site.
ELSEWHERE = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
ORDER = ("usage", "choosing", "migrating", "patterns", "packed", "serving", "gallery")
ORDER += ("training", "simulator", "distributed")
FOLDERS = {"api": "API", "lab": "Lab notes"}
GALLERY = "gallery.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PICTURE = re.compile(r'\.plot\("([\w.]+\.png)"')
CODE = re.compile(r"`[^`\n]+`")
LINK = re.compile(r"(!?)\[((?:[^][]|\[[^]]*\])*)\]\(([^()\s#]*)(#[^()\s]*)?\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    docs = Path(config.docs_dir)
    guide = sorted((path.stem for path in docs.glob("*.md")), key=_place)
    nav: list[Any] = [{"sparse_fmha": "index.md"}, {"Guide": [f"{name}.md" for name in guide]}]
    for folder in sorted(docs / name for name in FOLDERS if (docs / name).is_dir()):
        names = sorted((p.name for p in folder.glob("*.md")), key=lambda n: (n != "index.md", n))
        nav.append({FOLDERS[folder.name]: [f"{folder.name}/{n}" for n in names]})
    nav.append({"Project": ["contributing.md", "changelog.md"]})
    config.nav = nav
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, source in ELSEWHERE.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text()))
    for name, content in _pictures(Path(config.docs_dir, GALLERY).read_text()).items():
        files.append(File.generated(config, f"images/{name}", content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: MkDocsConfig, files: Files) -> str:
    name = page.file.src_uri
    source = PurePosixPath(ELSEWHERE.get(name, f"docs/{name}"))
    if name == GALLERY:
        markdown = BLOCK.sub(_with_picture, markdown)
        return markdown
    parts = re.split(r"(^ *```.*?^ *```$)", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(
        part if n % 2 else LINK.sub(lambda found: _link(found, name, source, files), _bars(part))
        for n, part in enumerate(parts)
    )


def _place(stem: str) -> tuple[int, str]:
    return (ORDER.index(stem) if stem in ORDER else len(ORDER)), stem


def _bars(text: str) -> str:
    return CODE.sub(lambda code: code[0].replace(r"\|", "|"), text)


def _link(found: re.Match[str], name: str, source: PurePosixPath, files: Files) -> str:
    """A link for the site: to one of its pages, else only the path."""
    mark, text, target, anchor = found[1], found[2], found[3], found[4] or ""
    if not target or re.match(r"\w+:", target):
        return found[0]
    path = os.path.normpath(source.parent / target).replace(os.sep, "/")
    pages = {of: page for page, of in ELSEWHERE.items()}
    page = pages.get(path, path.removeprefix("docs/"))
    if files.get_file_from_path(page) is None:
        if not (ROOT / path).exists():
            return found[0]
        return f"`{path}`" if text.strip("`") == path else f"{text} (`{path}`)"
    relative = os.path.relpath(page, os.path.dirname(name) or ".").replace(os.sep, "/")
    return f"{mark}[{text}]({relative}{anchor})"


@contextlib.contextmanager
def _inside(folder: str) -> Iterator[None]:
    """contextlib.chdir, which Python 3.10 lacks."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _pictures(text: str) -> dict[str, bytes]:
    """The pictures that the blocks of the gallery write, by name."""
    found = {}
    with tempfile.TemporaryDirectory() as folder, _inside(folder):
        for block in BLOCK.finditer(text):
            exec(compile(block[1], GALLERY, "exec"), {"__name__": "gallery"})
            (name,) = PICTURE.findall(block[1])
            found[name] = Path(name).read_bytes()
    return found


def _with_picture(block: re.Match[str]) -> str:
    (name,) = PICTURE.findall(block[1])
    return f"{block[0]}\n\n![What the code writes](images/{name})"
