"""The comparison of machine code, on dumps that are made up."""

from __future__ import annotations

import subprocess
import sys

import pytest
from commands import TOOLS

import compare_sass

HEAD = """
Fatbin elf code:
================
arch = sm_90a
	code for sm_90a
"""
TID = """        /*0010*/                   S2R R4, SR_TID.X ;          /* 0x0000000000047919 */
                                                               /* 0x000e620000002100 */
"""
CALL = """        /*0020*/                   CALL.REL.NOINC `(_Z4callv) ;  /* 0x00000000003c7944 */
                                                               /* 0x000fea0003c00000 */
"""
EXIT = """        /*0030*/                   EXIT ;                      /* 0x000000000000794d */
                                                               /* 0x000fea0003800000 */
"""


def function(name: str, *instructions: str) -> str:
    return f"\t\tFunction : {name}\n\t.headerflags\t@EF\n" + "".join(instructions) + "\t\t......\n"


ONE = function("_Z3onev", TID, EXIT)
TWO = function("_Z3twov", TID, CALL, EXIT)


def test_a_function_is_its_instructions_with_their_encoding():
    one, two = compare_sass.parse(HEAD + ONE + HEAD + TWO)
    assert one.name == "_Z3onev"
    assert one.code == (
        "S2R R4, SR_TID.X ; 0x0000000000047919 0x000e620000002100",
        "EXIT ; 0x000000000000794d 0x000fea0003800000",
    )
    assert two.code[1].startswith("CALL.REL.NOINC `() ;")


@pytest.mark.parametrize(
    ("new", "renamed"),
    [
        (HEAD + ONE + TWO, 0),
        (HEAD + TWO + HEAD + ONE, 0),
        (HEAD + ONE.replace("_Z3onev", "_Z5otherv") + TWO.replace("_Z4callv", "_Z1cv"), 1),
        (HEAD + ONE.replace("/*0010*/                   ", "/*0010*/ ") + TWO, 0),
    ],
)
def test_names_order_and_layout_do_not_count(tmp_path, new, renamed):
    status, out = run(tmp_path, HEAD + ONE + TWO, new)
    assert status == 0
    assert out == f"2 functions match, {renamed} of them under another name\n"


@pytest.mark.parametrize(
    ("old", "new", "lines"),
    [
        (
            HEAD + ONE + TWO,
            HEAD + ONE.replace("R4", "R5") + TWO,
            [
                "1 functions match, 0 of them under another name",
                "only in old: one(), 2 instructions",
                "  one in new has these instructions but for registers and scheduling",
                "only in new: one(), 2 instructions",
            ],
        ),
        (
            HEAD + ONE + TWO,
            HEAD + ONE.replace("TID.X", "TID.Y") + TWO,
            [
                "1 functions match, 0 of them under another name",
                "only in old: one(), 2 instructions",
                "  instruction 0 was `S2R R4, SR_TID.X ; 0x0000000000047919 0x000e620000002100`, "
                "is `S2R R4, SR_TID.Y ; 0x0000000000047919 0x000e620000002100`",
                "only in new: one(), 2 instructions",
            ],
        ),
        (
            HEAD + TWO + ONE,
            HEAD + TWO + ONE.replace("R4", "R4.reuse"),
            ["1 functions", "only in old: one()", "  instruction 0 was", "only in new: one()"],
        ),
        (
            HEAD + ONE,
            HEAD + ONE.replace("0x000e620000002100", "0x000e620000002101"),
            ["0 functions", "only in old: one()", "  one in new has these", "only in new: one()"],
        ),
        (
            HEAD + TWO + ONE,
            HEAD + ONE,
            ["1 functions match", "only in old: two(), 3 instructions"],
        ),
        (
            HEAD + ONE,
            HEAD + ONE + ONE.replace("_Z3onev", "_Z3newv"),
            ["1 functions match", "only in new: "],
        ),
        (
            HEAD + TWO,
            HEAD + TWO.replace(EXIT, ""),
            ["0 functions match", "only in old", "  one is the beginning of the", "only in new"],
        ),
    ],
)
def test_what_differs_is_named(tmp_path, old, new, lines):
    status, out = run(tmp_path, old, new)
    assert status == 1
    found = out.splitlines()
    assert len(found) == len(lines)
    assert all(line.startswith(start) for line, start in zip(found, lines, strict=True)), out


def test_a_dump_without_functions_is_no_match(tmp_path):
    status, _ = run(tmp_path, HEAD, HEAD)
    assert status == 1


def test_a_binary_needs_cuobjdump(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUOBJDUMP", raising=False)
    binary = tmp_path / "a.o"
    binary.write_bytes(b"\x7fELF...")
    with pytest.raises(SystemExit, match="no cuobjdump on PATH; set CUOBJDUMP"):
        compare_sass.dump(binary)
    tool = tmp_path / "cuobjdump"
    tool.write_text('#!/bin/sh\necho "$1 $2"\n')
    tool.chmod(0o755)
    assert compare_sass.dump(binary) == f"-sass {binary}\n"


def run(folder, old: str, new: str) -> tuple[int, str]:
    for name, text in (("old", old), ("new", new)):
        (folder / name).write_text(text)
    command = [sys.executable, TOOLS / "compare_sass.py", folder / "old", folder / "new"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout
