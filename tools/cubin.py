"""Reads the GPU images in an object file or a library that nvcc made.

The containers are those of CUDA 12 and 13: fatbins in an ELF file, whose entries are cubins and
PTX, stored as they are or compressed with LZ4 or Zstandard. No program of the CUDA toolkit is
needed; cuobjdump is not in every one.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

FATBIN = struct.Struct("<IHHQ")  # magic, version, bytes of this header, bytes behind it
MAGIC = 0xBA55ED50
ENTRY = struct.Struct("<HHIQIIHHIIIQQQ")
PTX, CUBIN = 1, 2
LZ4_FLAG, ZSTD_FLAG = 0x2000, 0x8000
SECTIONS = struct.Struct("<HHH")  # size of a section's header, how many, which has the names
SECTION = struct.Struct("<IIQQQQ")  # name, type, flags, address, place in the file, bytes
CODE = ".text."


class Image(NamedTuple):
    """One entry of a fatbin."""

    is_ptx: bool
    capability: int  # such as 80
    content: bytes  # text, or a cubin


def images(path: Path) -> Iterator[Image]:
    """Those of all fatbins of the file, in order.

    Raises:
        ValueError: an entry is not as this module knows them.
        LookupError: an entry is compressed with Zstandard, and the machine lacks libzstd.
    """
    data = path.read_bytes()
    magic = struct.pack("<I", MAGIC)
    at = data.find(magic)
    while 0 <= at <= len(data) - FATBIN.size:
        _, version, header, size = FATBIN.unpack_from(data, at)
        end = at + header + size
        if version != 1 or header < FATBIN.size or end > len(data):  # the bytes of something else
            at = data.find(magic, at + 1)
            continue
        yield from _entries(data[at + header : end])
        at = data.find(magic, end)


def _entries(fatbin: bytes) -> Iterator[Image]:
    at = 0
    while at + ENTRY.size <= len(fatbin):
        kind, _, header, size, packed, _, _, _, capability, _, _, flags, _, whole = (
            ENTRY.unpack_from(fatbin, at)
        )
        content = fatbin[at + header : at + header + (packed or size)]
        if kind not in (PTX, CUBIN) or header < ENTRY.size:
            raise ValueError(
                f"a fatbin has an entry of kind {kind} with a header of {header} bytes"
            )
        if flags & LZ4_FLAG:
            content = unpack_lz4(content)
        elif flags & ZSTD_FLAG:
            content = _unpack_zstd(content, whole)
        if whole and len(content) != whole:
            raise ValueError(f"an image has {len(content)} bytes, its fatbin says {whole}")
        yield Image(kind == PTX, capability, content)
        at += header + size


def functions(cubin: bytes) -> Iterator[tuple[str, bytes]]:
    """Mangled names and machine code.

    Raises:
        ValueError: it is no ELF file.
    """
    if cubin[:4] != b"\x7fELF":
        raise ValueError(f"an image begins with {cubin[:4]!r}, which is no cubin")
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names_at = SECTIONS.unpack_from(cubin, 58)
    sections = [SECTION.unpack_from(cubin, table + i * size) for i in range(count)]
    names = sections[names_at][4]
    for name, _, _, _, start, length in sections:
        first = names + name
        text = cubin[first : cubin.index(b"\0", first)].decode()
        if text.startswith(CODE):
            yield text.removeprefix(CODE), cubin[start : start + length]


def unpack_lz4(packed: bytes) -> bytes:
    """A block of LZ4, without a frame around it."""
    out, at = bytearray(), 0

    def length(base: int) -> int:
        nonlocal at
        if base == 15:
            while packed[at] == 255:
                base, at = base + 255, at + 1
            base, at = base + packed[at], at + 1
        return base

    while at < len(packed):
        token = packed[at]
        at += 1
        literals = length(token >> 4)
        out += packed[at : at + literals]
        at += literals
        if at >= len(packed):  # the last sequence has no match
            break
        distance = packed[at] | packed[at + 1] << 8
        at += 2
        match = length(token & 15) + 4
        while match:  # a match may reach into itself
            piece = out[-distance:][:match]
            out += piece
            match -= len(piece)
    return bytes(out)


def _unpack_zstd(packed: bytes, size: int) -> bytes:
    try:
        library = ctypes.CDLL("libzstd.so.1")
    except OSError:
        raise LookupError(
            "libzstd.so.1 is needed to read compressed GPU code: install libzstd (Debian, Ubuntu: "
            "apt install libzstd1)"
        ) from None
    library.ZSTD_decompress.restype = ctypes.c_size_t
    library.ZSTD_decompress.argtypes = [
        *(ctypes.c_void_p, ctypes.c_size_t),
        *(ctypes.c_char_p, ctypes.c_size_t),
    ]
    out = ctypes.create_string_buffer(size)
    written = library.ZSTD_decompress(out, size, packed, len(packed))
    if written > size:  # an error code
        raise ValueError("an image is damaged: libzstd cannot unpack it")
    return out.raw[:written]
