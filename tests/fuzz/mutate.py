"""Damage to files: of any bytes, and of JSON, packed text and zip archives by their structure."""

import bz2
import gzip
import io
import json
import lzma
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

Files = dict[str, bytes]

NUMBERS = (
    0,
    1,
    2,
    3,
    7,
    8,
    255,
    256,
    0xFFFF,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**60,
    2**63 - 1,
    2**64 - 1,
)
WORDS = (
    "",
    "..",
    "../outside",
    "/tmp/outside",
    "a/b",
    "a\nb\x1b[31m",
    "\0",
    "\ud800",
    "é中😀",
    "NaN",
    "-1",
    "<f8",
    "object",
    "|O",
    "bfloat16",
    "{{ 7 * 7 }}",
    "file:///etc/passwd",
    "x" * 5000,
)
JSON_VALUES = (
    None,
    True,
    False,
    [],
    {},
    [[]],
    0.5,
    -0.5,
    1e308,
    float("nan"),
    float("inf"),
    -1,
    *NUMBERS,
    *WORDS,
)
DEEP = 100_000
_PACKERS = {
    b"\x1f\x8b": (gzip.decompress, gzip.compress),
    b"BZ": (bz2.decompress, bz2.compress),
    b"\xfd7": (lzma.decompress, lzma.compress),
}


def mutate(files: Files, rng: random.Random) -> Files:
    """The files with one to four pieces of damage."""
    files = dict(files)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        name = rng.choice(sorted(files))
        if rng.random() < 0.04:
            _whole_file(files, name, rng)
        else:
            files[name] = damage(files[name], rng, list(files.values()))
        if not files:
            break
    return files


def _whole_file(files: Files, name: str, rng: random.Random) -> None:
    other = rng.choice(sorted(files))
    choice = rng.randrange(3)
    if choice == 0:
        del files[name]
    elif choice == 1:
        files[name] = b""
    else:
        files[name] = files[other]


def damage(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """Damage to one file; by its structure, more often than not, where it has one that is known."""
    if rng.random() < 0.75:
        for magic, (unpack, pack) in _PACKERS.items():
            if data.startswith(magic):
                try:
                    return pack(damage(unpack(data), rng, others))
                except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError):
                    break
        if data.startswith(b"PK"):
            return _zip(data, rng, others)
        if data[:1] in b"{[" and data:
            return _json_text(data, rng)
    return rng.choice(_BYTES)(bytearray(data), rng, others)


def _flip(data: bytearray, rng: random.Random, others: list[bytes]) -> bytes:
    for _ in range(rng.choice((1, 1, 4, 30))):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def _number(data: bytearray, rng: random.Random, others: list[bytes]) -> bytes:
    """Some number written over, little- or big-endian, in the first half KB more often than elsewhere."""
    width = rng.choice((1, 2, 4, 4, 8, 8))
    value = rng.choice((*NUMBERS, len(data), len(data) + 1, len(data) - 8)) % (1 << 8 * width)
    reach = len(data) if rng.random() < 0.5 else min(len(data), 512)
    at = rng.randrange(max(reach - width, 1))
    at -= at % rng.choice((1, width))
    data[at : at + width] = value.to_bytes(width, rng.choice(("little", "little", "big")))
    return bytes(data)


def _decimal(data: bytearray, rng: random.Random, others: list[bytes]) -> bytes:
    """A run of digits replaced by another number."""
    places = [i for i, byte in enumerate(data) if chr(byte).isdigit()]
    if not places:
        return _flip(data, rng, others)
    start = rng.choice(places)
    end = start
    while end < len(data) and chr(data[end]).isdigit():
        end += 1
    value = rng.choice((*map(str, NUMBERS), "-1", "1e999", "0x10", "9" * 5000))
    return bytes(data[:start]) + value.encode() + bytes(data[end:])


def _cut(data: bytearray, rng: random.Random, others: list[bytes]) -> bytes:
    return bytes(data[: rng.randrange(len(data) + 1)])


def _remove(data: bytearray, rng: random.Random, others: list[bytes]) -> bytes:
    start = rng.randrange(len(data) + 1)
    del data[start : start + rng.choice((1, 2, 4, 8, 100))]
    return bytes(data)


def _repeat(data: bytearray, rng: random.Random, others: list[bytes]) -> bytes:
    start = rng.randrange(len(data) + 1)
    part = bytes(data[start : start + rng.choice((1, 4, 16, 200))])
    return bytes(data[:start]) + part * rng.choice((2, 3, 50)) + bytes(data[start:])


def _splice(data: bytearray, rng: random.Random, others: list[bytes]) -> bytes:
    other = rng.choice(others)
    return bytes(data[: rng.randrange(len(data) + 1)]) + other[rng.randrange(len(other) + 1) :]


def _insert(data: bytearray, rng: random.Random, others: list[bytes]) -> bytes:
    at = rng.randrange(len(data) + 1)
    piece = rng.choice(
        (b"\0", b"\xff" * 8, b"\n", b"[" * DEEP, b'{"a":' * 3000, b"\xed\xa0\x80", rng.randbytes(16))
    )
    return bytes(data[:at]) + piece + bytes(data[at:])


_BYTES: tuple[Callable[[bytearray, random.Random, list[bytes]], bytes], ...] = (
    *(_flip, _flip, _number, _number, _number, _decimal, _cut, _remove, _repeat, _splice, _insert),
)


def _zip(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
    except (zipfile.BadZipFile, zlib.error, OSError, ValueError, EOFError, NotImplementedError, RuntimeError):
        return _flip(bytearray(data), rng, others)
    if not members:
        return data
    name, out = rng.choice(sorted(members)), io.BytesIO()
    members[name] = (
        _npy_header(members[name], rng) if rng.random() < 0.5 else damage(members[name], rng, others)
    )
    if rng.random() < 0.1:
        members[rng.choice(("../outside.npy", "x.npy", "__class__.npy"))] = members.pop(name)
    with zipfile.ZipFile(out, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for key, value in members.items():
            archive.writestr(key, value)
    return out.getvalue()


def npy(descr: str, shape: tuple[int, ...], body: bytes = b"") -> bytes:
    """A .npy file that claims this dtype and shape, whatever its body holds."""
    header = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header + body


def _npy_header(data: bytes, rng: random.Random) -> bytes:
    descr = rng.choice(("<f4", "<f8", "|O", "<U1000000", "|V0", "<i8", "<m8[ns]", "|b1"))
    shape = tuple(rng.choice(NUMBERS) for _ in range(rng.randrange(4)))
    return npy(descr, shape, data[128:])


def _json_text(data: bytes, rng: random.Random) -> bytes:
    """JSON, or a line of it, with a node changed."""
    try:
        return _dump(_json(json.loads(data), rng), rng)
    except (ValueError, RecursionError):
        pass
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    try:
        lines[at] = _dump(_json(json.loads(lines[at]), rng), rng)
    except (ValueError, RecursionError):
        return _flip(bytearray(data), rng, [data])
    return b"\n".join(lines)


def _dump(value: Any, rng: random.Random) -> bytes:
    data = json.dumps(value).encode()
    marks = {b'"@deep"': b"[" * DEEP + b"]" * DEEP, b'"@long"': b"9" * 5000, b'"@float"': b"1e999"}
    for mark, text in marks.items():
        data = data.replace(mark, text)
    return data


def _nodes(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything below."""
    found, left = [], [value]
    while left:
        node = left.pop()
        pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, child in pairs:
            found.append((node, key))
            left.append(child)
    return found


def _json(value: Any, rng: random.Random) -> Any:
    nodes = _nodes(value)
    anything = rng.choice((*JSON_VALUES, "@deep", "@long", "@float"))
    if not nodes or rng.random() < 0.03:
        return anything
    # The first levels of a large table are where its sense is.
    node, key = rng.choice(nodes[: max(len(nodes) // 8, 12)] if rng.random() < 0.5 else nodes)
    other, other_key = rng.choice(nodes)
    action = rng.randrange(6)
    if action <= 2:
        node[key] = anything
    elif action == 3:
        del node[key]
    elif action == 4:
        node[key] = json.loads(json.dumps(other[other_key]))
    elif isinstance(node, dict):
        node[rng.choice((*WORDS, "type", str(other_key)))] = node.pop(key)
    else:
        node.extend(json.loads(json.dumps(node)) * rng.choice((1, 3)))
    return value
