"""Lines that the tables in Markdown share."""

from __future__ import annotations


def source(results: dict) -> str:
    """Where, when and of what the numbers are."""
    device = results["device"]
    where = device["name"]
    if "threads" in device:
        where += f" ({device['threads']} threads)"
    commit = (results["commit"] or "unknown")[:10] + (" with changes" if results["dirty"] else "")
    version = results["versions"]["torch"]
    return f"{where}, torch {version}, {results['timestamp'][:10]}, commit {commit}"


def measured(results: dict) -> str:
    settings = results["settings"]
    return f"median of {settings['iterations']}, {settings['l2'][0]} cache"


def lines_of(caption: str, columns: tuple[str, ...], rows: list[dict[str, str]]) -> str:
    """A line for each row, with the columns that some row has."""
    shown = [column for column in columns if any(column in row for row in rows)]
    lines = [" | ".join(shown), " | ".join("---" for _ in shown)]
    lines += [" | ".join(row.get(column, "") for column in shown) for row in rows]
    return "\n".join([caption, "", *(f"| {line} |" for line in lines)])
