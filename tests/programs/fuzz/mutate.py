"""What may happen to the bytes of a file. Each mutation takes what a sound file holds and a source of chance.

Blind ones change any bytes. The others know how a kind of file is built, and leave the rest of it right (lengths,
checksums), so that what they change is not refused at the door.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence
from typing import Any

from tests.programs.hostile_files import CONTENTS, VALUES, changed, places

Mutation = Callable[[bytes, random.Random], bytes]
NUMBERS = (
    0,
    1,
    2,
    3,
    7,
    127,
    128,
    255,
    256,
    32767,
    32768,
    65535,
    65536,
    10**6,
    2**24,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**63 - 1,
    2**64 - 1,
)
# Text that ends on pages, in names and on consoles.
MARK = "<img src=x onerror=alert(1)>"
TEXTS = (
    MARK,
    "\"'><script>alert(1)</script>",
    "\x1b[31mred",
    "\u202etxt.exe",
    "=HYPERLINK(1)",
    "../../etc/passwd",
    "a\nb",
    "\ud83d\ude00" * 9,
    "<video>" * 40,
    "<mask_0>" * 9,
    "x" * 70_000,
    "",
    " ",
    "\u0000",
    "\ufeff",
    "nan",
    "-0",
    "1e999",
    "0x10",
    "\u0661",
    "%s%n{0}",
    "</s>",
    "/dev/zero",
    "file:x",
    "NaN",
    "None",
)
TOKENS = (
    b"null",
    b"-1",
    b"1e999",
    b"NaN",
    b"-Infinity",
    b"[[",
    b"]",
    b"{",
    b"}",
    b'""',
    b'"',
    b",",
    b":",
    b"\\u0000",
    b"9" * 400,
    b"0.1e-400",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\r",
    b"\n\n",
    b"\t",
    b"\0",
    b"true",
    b"'",
    b";",
    b"&",
    b"#",
    b"//",
    b"1_000",
    "\u2028".encode(),
    b"\\ud800",
    b"1.5",
    b"--",
    b"NaT",
)


def _span(data: bytes, chance: random.Random, most: int = 64) -> tuple[int, int]:
    start = chance.randrange(len(data) + 1)
    return start, min(len(data), start + chance.choice((1, 2, 4, 8, most, chance.randint(1, max(1, len(data) // 2)))))


# Blind.


def flip(data: bytes, chance: random.Random) -> bytes:
    if not data:
        return data
    at = chance.randrange(min(len(data), chance.choice((64, 512, 1 << 40))))
    return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]


def cut(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.choice((chance.randrange(len(data) + 1), max(0, len(data) - chance.randint(1, 64))))]


def without(data: bytes, chance: random.Random) -> bytes:
    start, end = _span(data, chance)
    return data[:start] + data[end:]


def twice(data: bytes, chance: random.Random) -> bytes:
    start, end = _span(data, chance)
    return data[:end] + data[start:end] * chance.choice((1, 1, 40)) + data[end:]


def zeros(data: bytes, chance: random.Random) -> bytes:
    start, end = _span(data, chance)
    return data[:start] + bytes([chance.choice((0, 0, 255))]) * (end - start) + data[end:]


def noise(data: bytes, chance: random.Random) -> bytes:
    start, end = _span(data, chance)
    return data[:start] + chance.randbytes(end - start) + data[end:]


def moved(data: bytes, chance: random.Random) -> bytes:
    start, end = _span(data, chance)
    rest = data[:start] + data[end:]
    at = chance.randrange(len(rest) + 1)
    return rest[:at] + data[start:end] + rest[at:]


def number(data: bytes, chance: random.Random) -> bytes:
    """A whole number in binary, of any width and order, most often near the beginning."""
    code = chance.choice((">B", ">H", "<H", ">I", "<I", ">Q", "<Q"))
    size = struct.calcsize(code)
    at = chance.randrange(min(max(1, len(data)), chance.choice((64, 1024, 1 << 40))))
    value = chance.choice(NUMBERS) % (1 << 8 * size)
    return data[:at] + struct.pack(code, value) + data[at + size :]


def behind(data: bytes, chance: random.Random) -> bytes:
    return data + chance.choice((b"\0" * 4096, chance.randbytes(99), data, b"\n", b"\xff" * 7))


BLIND: tuple[Mutation, ...] = (flip, flip, cut, without, twice, zeros, noise, moved, number, number, behind)


# Text, JSON, tables.


def token(data: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(data) + 1)
    return data[:start] + chance.choice(TOKENS) + data[start + chance.choice((0, 1, 3)) :]


def value(data: bytes, chance: random.Random) -> bytes:
    """Another number or text where one is."""
    found = list(re.finditer(rb'-?\b\d[\d.eE+-]*|(?<=["=,\t&;:])[^"\n,\t&;:]{1,200}(?=["\n,\t&;:])', data))
    if not found:
        return data
    at = chance.choice(found)
    new = chance.choice([str(n) for n in NUMBERS] + ["-1", "1.5", "1e308", "nan", "inf", "1e-320", *TEXTS])
    return data[: at.start()] + new.encode("utf-8", "surrogatepass") + data[at.end() :]


def lines(data: bytes, chance: random.Random) -> bytes:
    """Lines lost, doubled, in another order, joined, with other ends."""
    every = data.splitlines(keepends=True)
    how = chance.randrange(6)
    if not every or how == 5:
        return data.replace(b"\n", chance.choice((b"\r\n", b"\r", b"\n\n", b"\x0b", b"\x1e", b"")))
    at = chance.randrange(len(every))
    if how == 0:
        del every[at]
    elif how == 1:
        every.insert(at, every[at])
    elif how == 2:
        chance.shuffle(every)
    elif how == 3:
        every[at] = every[at].rstrip(b"\r\n")
    else:
        every = every[:at]
    return b"".join(every)


def content(data: bytes, chance: random.Random) -> bytes:
    """Something else altogether, or the same in another encoding."""
    return CONTENTS[chance.choice(sorted(CONTENTS))](data.decode("utf-8", "replace"))


def field(data: bytes, chance: random.Random) -> bytes:
    """Another value in a field of JSON, or of one line of JSONL; or without the field."""
    every = data.splitlines() if data.count(b"\n{") else [data]
    at = chance.randrange(len(every))
    try:
        whole = json.loads(every[at])
    except (ValueError, RecursionError):  # it was changed already
        return data
    where = list(places(whole))
    if not where:
        return data
    new = chance.choice((*VALUES, *TEXTS, ...))
    place = chance.choice(where)
    every[at] = json.dumps(changed(whole, place, None if new is ... else new, remove=new is ...)).encode()
    return b"\n".join(every) + b"\n"


TEXT: tuple[Mutation, ...] = (value, value, lines, token, token, flip, cut, without, twice, noise, content)
JSON: tuple[Mutation, ...] = (field, field, field, *TEXT)


# Boxes of films, chunks of sounds and pictures, packets, archives.


def _boxes(data: bytes, start: int, end: int, depth: int = 0) -> list[tuple[int, int]]:
    """(start, end) of the boxes of an MP4, also those inside others."""
    found = []
    while start + 8 <= end and len(found) < 500:
        size = int.from_bytes(data[start : start + 4], "big")
        if not 8 <= size <= end - start:
            break
        found.append((start, start + size))
        if data[start + 4 : start + 8] in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"udta") and depth < 8:
            found += _boxes(data, start + 8, start + size, depth + 1)
        start += size
    return found


def _pieces(data: bytes) -> list[tuple[int, int]]:
    """(start, end) of what a file is made of: boxes, chunks, packets, pages, segments."""
    if data[4:8] == b"ftyp":
        return _boxes(data, 0, len(data))
    if data[:4] == b"RIFF":
        return _riff(data)
    if data[:4] == b"OggS":
        starts = [found.start() for found in re.finditer(b"OggS", data)]
    elif data[:1] == b"G" and data[188:189] == b"G":
        starts = list(range(0, len(data), 188))
    elif data[:2] == b"\xff\xd8":
        starts = [found.start() for found in re.finditer(rb"\xff[\xc0-\xcf\xd8-\xfe]", data)]
    elif data[:1] == b"\xff":
        starts = [found.start() for found in re.finditer(rb"\xff[\xf2-\xfb]", data)]
    elif data[:4] == b"\x1aE\xdf\xa3":
        starts = [
            0,
            *(
                found.start()
                for found in re.finditer(
                    rb"\x18S\x80g|\x15I\xa9f|\x16T\xaek|\xae|\x1fC\xb6u|\xa3|\x1cS\xbbk|\x86|\x63\xa2", data
                )
            ),
        ]
    else:
        starts = list(range(0, len(data), max(1, len(data) // 20)))
    return list(zip(starts, [*starts[1:], len(data)], strict=False))


def _riff(data: bytes) -> list[tuple[int, int]]:
    found, at = [], 12
    while at + 8 <= len(data):
        end = min(len(data), at + 8 + int.from_bytes(data[at + 4 : at + 8], "little"))
        found.append((at, end))
        at = end + end % 2
    return found


def piece(data: bytes, chance: random.Random) -> bytes:
    """A part lost, doubled, moved, of another length or kind, or with a number changed early in it."""
    found = _pieces(data)
    if not found:
        return data
    start, end = chance.choice(found)
    part, how = data[start:end], chance.randrange(7)
    if how == 0:
        return data[:start] + data[end:]
    if how == 1:
        return data[:end] + part + data[end:]
    if how == 2:
        at = chance.choice(found)[0]
        rest = data[:start] + data[end:]
        return rest[:at] + part + rest[at:]
    if how == 3:
        return (
            data[:start]
            + struct.pack(chance.choice((">I", "<I")), chance.choice(NUMBERS) % 2**32)
            + part[4:]
            + (data[end:])
        )
    if how == 4:
        return (
            data[:start]
            + part[:4]
            + chance.choice((b"free", b"moov", b"data", b"\xff\xff\xff\xff", bytes(4)))
            + (part[8:] + data[end:])
        )
    return (
        data[:start] + chance.choice(BLIND)(part, chance) + data[end:]
        if how == 5
        else (data[:start] + number(part, chance) + data[end:])
    )


def chunk(data: bytes, chance: random.Random) -> bytes:
    """A chunk of a PNG changed, its checksum right again."""
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        return piece(data, chance)
    chunks, at = [], 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : end]))
        at = end + 4
    if not chunks:
        return data
    place, how = chance.randrange(len(chunks)), chance.randrange(6)
    kind, body = chunks[place]
    if how == 0:
        del chunks[place]
    elif how == 1:
        chunks.insert(chance.randrange(len(chunks)), (kind, body))
    elif how == 2:
        names = (b"IDAT", b"PLTE", b"tRNS", b"iCCP", b"eXIf", b"zTXt", b"acTL", b"gAMA", b"IHDR", b"IEND", b"abcd")
        chunks[place] = (chance.choice(names), body)
    elif how == 3 and kind == b"IDAT":
        pixels = zlib.decompressobj().decompress(body, 1 << 20)
        chunks[place] = (kind, zlib.compress(chance.choice(BLIND)(pixels, chance)))
    else:
        chunks[place] = (kind, chance.choice((number, flip, noise, cut, behind))(body, chance))
    return data[:8] + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def member(data: bytes, chance: random.Random) -> bytes:
    """A member of a zip (a torch file, arrays of NumPy, labels) changed, doubled, left out or renamed."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [(name, archive.read(name)) for name in archive.namelist()]
    except Exception:  # it was changed already
        return piece(data, chance)
    if not members:
        return data
    small = [at for at, (name, _) in enumerate(members) if name.endswith((".pkl", "version", "byteorder"))]
    place = chance.choice(small) if small and chance.random() < 0.7 else chance.randrange(len(members))
    (name, body), how = members[place], chance.randrange(8)
    if how == 0:
        del members[place]
    elif how == 1:
        members.append((name, body))
    elif how == 2:
        members[place] = (chance.choice(("../x", "/etc/x", "", "a\\b", "x" * 300, name + "/", name[:-1])), body)
    elif how == 3 and name.endswith(".npy"):
        members[place] = (name, header(body, chance))
    else:
        members[place] = (name, chance.choice((*BLIND, opcode))(body, chance))
    file = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w") as archive:
        warnings.simplefilter("ignore")
        for name, body in members:
            archive.writestr(name or "empty", body)
    return file.getvalue()


def opcode(data: bytes, chance: random.Random) -> bytes:
    """Another instruction in a pickle."""
    codes = (
        b"c__builtin__\neval\n",
        b"cos\nsystem\n",
        b"R",
        b"b",
        b".",
        b"N",
        b"(",
        b"t",
        b"}",
        b"u",
        b"s",
        b"Q",
        b"\x95" + b"\xff" * 8,
        b"K\xff",
        b"M\xff\xff",
        b"J\xff\xff\xff\x7f",
        b"\x8a\xff" + b"\xff" * 255,
        b"h\0",
        b"q\0",
        b"j\xff\xff\xff\x7f",
        b"I99999\n",
        b"F1e999\n",
        b"X\xff\xff\xff\xff",
        b"2",
        b"0",
        b"1",
        b"]",
        b"a",
        b"\x8c\x01\xff",
        b"(" * 5000,
        b"]" * 5000,
    )
    at = chance.randrange(len(data) + 1)
    return data[:at] + chance.choice(codes) + data[at + chance.choice((0, 1, 2)) :]


def header(data: bytes, chance: random.Random) -> bytes:
    """The text at the head of a safetensors file or an array of NumPy changed, its length right again."""
    if data[:6] == b"\x93NUMPY":
        size = struct.unpack("<H", data[8:10])[0]
        text = chance.choice((value, token, flip))(data[10 : 10 + size], chance)[:65535]
        return data[:8] + struct.pack("<H", len(text)) + text + data[10 + size :]
    if len(data) < 8 or (size := struct.unpack("<Q", data[:8])[0]) > len(data) - 8:
        return data
    text = chance.choice((field, field, value, token, flip))(data[8 : 8 + size], chance)
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


MEDIA: tuple[Mutation, ...] = (*BLIND, piece, piece, piece, piece)
PNG: tuple[Mutation, ...] = (chunk, chunk, chunk, *BLIND)
ARCHIVE: tuple[Mutation, ...] = (member, member, member, *BLIND)
WEIGHTS: tuple[Mutation, ...] = (header, header, header, *BLIND)
# The only mutations after which whatever is read must be what was read before.
CUTS: tuple[Mutation, ...] = (cut,)
FLIPS: tuple[Mutation, ...] = (flip,)


def apply(data: bytes, family: Sequence[Mutation], plan: Sequence[tuple[int, int]]) -> tuple[bytes, str]:
    """What a plan of (which of the family, seed) pairs makes of a file, and how that is called."""
    names = []
    for which, seed in plan:
        one = family[which % len(family)]
        names.append(f"{one.__name__} {seed}")
        with contextlib.suppress(Exception):  # what an earlier change broke may leave nothing to change so
            data = one(data, random.Random(seed))
    return data, ", ".join(names)


def worst_values() -> tuple[Any, ...]:
    """What an option of a command line is given."""
    return (*(str(n) for n in NUMBERS), "-1", "1.5", "nan", "inf", "-inf", "1e999", *TEXTS)
