"""Writes the table of supported transformers in docs/integrations_diffusers.md from the code.

python tools/support_table.py
"""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "integrations_diffusers.md"
HEAD = "| class | axes | processors that are replaced | presets |\n| --- | --- | --- | --- |\n"


def table() -> str:
    from sparse_fmha.integrations._diffusion_models import MODELS
    from sparse_fmha.integrations._diffusion_presets import known

    lines = []
    for name, row in sorted(MODELS.items()):
        presets = [preset.name for preset in known().values() if name in preset.models]
        cells = (row.processors, presets)
        names = (", ".join(f"`{each}`" for each in cell) or "none published" for cell in cells)
        lines.append(f"| `{name}` | {row.axes} | {' | '.join(names)} |\n")
    return HEAD + "".join(lines)


def written(page: str) -> str:
    """The page with the table of today.

    Raises:
        ValueError: it has none, or several.
    """
    made, count = re.subn(re.escape(HEAD) + r"(?:\|.*\n)*", lambda _: table(), page)
    if count != 1:
        raise ValueError(f"the page must have one table that begins with {HEAD!r}, got {count}")
    return made


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
