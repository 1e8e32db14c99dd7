"""Seeded damage and malice: to bytes, to JSON values, to headers of safetensors files, to archives."""

import io
import json
import math
import struct
import tarfile
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

HOSTILE_TEXTS = (
    "", " ", "x" * 5000, "../../../etc/passwd", "/etc/passwd", "/dev/zero", "a\0b", "\x1b]0;PWNED\x07\x1b[2J",
    "a\nforged", "\u202egpj.exe", "\ud800", "; touch PWNED #", "$(touch PWNED)", "query.members.npy",
    "{}", "~", "%s%n", "-1", "1e400", "NaN", "None", "true", "http://127.0.0.1:9/x", "pipe:touch PWNED",
    "[1-9]", "*", "F64", "I8",
)  # fmt: skip
HOSTILE_NUMBERS = (
    0, 1, -1, 2, 7, 255, 256, 2**31 - 1, 2**31, -(2**31), 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, -(2**63),
    10**30, 10**400, 0.5, 1.0, -0.0, 1e-320, 1e308, float("nan"), float("inf"), -float("inf"),
)  # fmt: skip
HOSTILE_BYTES = (
    b"",
    b"\0",
    b"\xff" * 9,
    b"\x1b[2J",
    b"PK\3\4",
    b"\x80\4\x95",
    b"{" * 3000,
    b"[" * 3000,
    b"\xef\xbb\xbf",
)


def hostile(rng: Random, depth: int = 0) -> Any:
    """A value that may not be what a reader expects."""
    kind = rng.randrange(7 if depth < 2 else 4)
    if kind == 0:
        return rng.choice((None, True, False))
    if kind == 1:
        return rng.choice(HOSTILE_TEXTS)
    if kind in (2, 3):
        return rng.choice(HOSTILE_NUMBERS)
    if kind == 4:
        return [hostile(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 5:
        return {rng.choice(HOSTILE_TEXTS): hostile(rng, depth + 1) for _ in range(rng.randrange(4))}
    nested: Any = []
    for _ in range(rng.choice((3, 90))):
        nested = [nested] if rng.random() < 0.5 else {"a": nested}
    return nested


def damage(rng: Random, data: bytes) -> bytes:
    """Bytes with one to four mistakes: flipped, overwritten, cut out, doubled, cut off, put in."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        size = len(changed)
        at = rng.randrange(size) if size else 0
        length = min(rng.choice((1, 2, 4, 8, 16, 100, 600)), size - at)
        kind = rng.randrange(9)
        if kind == 0 and size:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and size:
            changed[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, 0x0A, 0x22, rng.randrange(256)))
        elif kind == 2:
            changed[at : at + length] = bytes(length)
        elif kind == 3:
            changed[at : at + length] = rng.randbytes(length)
        elif kind == 4:
            del changed[at : at + length]
        elif kind == 5:
            changed[at:at] = changed[at : at + length] * rng.choice((1, 1, 30))
        elif kind == 6:
            del changed[at:]
        elif kind == 7:
            changed[at:at] = rng.choice(HOSTILE_BYTES)
        else:
            number = struct.pack(rng.choice("<>") + "q", rng.choice((0, 1, -1, 2**31, 2**40, 2**63 - 1, -(2**63))))
            changed[at : at + 8] = number[: max(0, size - at)]
    return bytes(changed)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything within a JSON value."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from places(value[key])


def _near(rng: Random, value: Any) -> Any:
    """A value of the same kind that says something else."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice((value + 1, value - 1, -value, value * 2**32, float(value), str(value), bool(value)))
    if isinstance(value, float):
        return rng.choice((value * 2, -value, round(value) if math.isfinite(value) else 0, str(value), 1 - value))
    if isinstance(value, str):
        cut = rng.randrange(len(value) + 1)
        return rng.choice(
            (value[:cut], value + rng.choice(HOSTILE_TEXTS), value.upper(), value[:cut] + "\x1b" + value[cut:])
        )
    if isinstance(value, list) and value:
        some = rng.choice(value)
        return rng.choice((value[1:], [*value, some], value[::-1], [some], [], value * 2))
    return hostile(rng)


def change_value(rng: Random, value: Any) -> None:
    """Change a JSON value within, at one to three places."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        found = list(places(value))
        if not found:
            return
        container, key = rng.choice(found)
        kind = rng.randrange(6)
        if kind == 0:
            del container[key]
        elif kind in (1, 2):
            container[key] = _near(rng, container[key])
        elif kind == 3:
            container[key] = hostile(rng)
        elif kind == 4 and isinstance(container, dict):
            container[rng.choice((*HOSTILE_TEXTS, str(key) + " "))] = container.pop(key)
        else:
            other, other_key = rng.choice(found)
            container[key] = json.loads(json.dumps(other.get(other_key) if isinstance(other, dict) else None))


def change_json(rng: Random, text: bytes) -> bytes:
    """JSON with another content, or mistakes of its text."""
    kind = rng.randrange(8)
    if kind < 5:
        value = json.loads(text)
        change_value(rng, value)
        return json.dumps(value).encode()
    if kind == 5:
        return damage(rng, text)
    lines = text.decode()
    if kind == 6:  # a key that stands twice, somewhere
        at = [place for place, letter in enumerate(lines) if letter == "{"]
        place = rng.choice(at) + 1
        key = rng.choice([part for part in lines.split('"')[1::2] if part.isprintable()] or ["x"])
        return (lines[:place] + f'"{key}": {json.dumps(hostile(rng))}, ' + lines[place:]).encode()
    return rng.choice(
        (
            lines.encode("utf-16"),
            b"\xef\xbb\xbf" + text,
            text + b"}",
            b"",
            b"null",
            b"[" * 50_000,
            b'{"a":' * 50_000,
            b"1" * 5000,
        )
    )


def change_safetensors(rng: Random, data: bytes) -> bytes:
    """A file of safetensors with another header, or mistakes of its bytes."""
    if rng.random() < 0.3:
        return damage(rng, data)
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    name = rng.choice([key for key in header if key != "__metadata__"])
    about = header[name]
    kind = rng.randrange(9)
    if kind == 0:
        about["dtype"] = rng.choice(
            ("F32", "F64", "F16", "BF16", "I8", "U8", "I32", "I64", "BOOL", "F8_E4M3", "C64", "X")
        )
    elif kind == 1 and about["shape"]:
        about["shape"] = rng.choice(
            (about["shape"][::-1], [*about["shape"], 1], about["shape"][1:], [2**62], [-1], [0])
        )
    elif kind == 2:
        about["data_offsets"] = rng.choice(([0, 0], [0, 2**62], about["data_offsets"][::-1], [0, len(body)], [-8, 8]))
    elif kind == 3:
        header[rng.choice(HOSTILE_TEXTS)] = header.pop(name)
    elif kind == 4:
        del header[name]
    elif kind == 5:
        other = rng.choice([key for key in header if key != "__metadata__"])
        header[name], header[other] = header[other], header[name]
    elif kind == 6 and header.get("__metadata__"):
        key = rng.choice(list(header["__metadata__"]))
        text = header["__metadata__"][key]
        header["__metadata__"][key] = _inner_text(rng, text)
    elif kind == 7:
        change_value(rng, header)
    else:
        body = damage(rng, body) if rng.random() < 0.5 else bytes(len(body))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    announced = len(text) if rng.random() < 0.95 else rng.choice((0, 7, 2**40, 2**63, len(text) + 8))
    return struct.pack("<Q", announced) + text + body


def _inner_text(rng: Random, text: str) -> str:
    """A text that may be JSON itself, changed."""
    try:
        value = json.loads(text)
    except ValueError:
        return str(_near(rng, text))
    if isinstance(value, dict | list):
        change_value(rng, value)
        return json.dumps(value)
    return str(_near(rng, text))


def change_tar(rng: Random, data: bytes) -> bytes:
    """An archive with other members, headers or bytes."""
    if rng.random() < 0.2:
        return damage(rng, data)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members: list[tuple[tarfile.TarInfo, bytes]] = []
        for info in tar:
            file = tar.extractfile(info)
            members.append((info, file.read() if file else b""))
    at = rng.randrange(len(members))
    info, content = members[at]
    kind = rng.randrange(9)
    if kind == 0:
        info.name = rng.choice([text for text in HOSTILE_TEXTS if "\ud800" not in text] + [info.name + "x", "a" * 150])
    elif kind == 1:
        info.type = rng.choice((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE))
        info.linkname, info.size, content = rng.choice(("/etc/passwd", "../../x", members[0][0].name)), 0, b""
    elif kind == 2:
        members.insert(rng.randrange(len(members)), (info, content))
    elif kind == 3:
        del members[at]
    elif kind == 4:
        rng.shuffle(members)
    elif kind == 5:
        content = damage(rng, content)
    elif kind == 6:
        info.mode, info.uid, info.mtime = 0o7777, 2**21, 2**33
        info.pax_headers = {"path": rng.choice(("/etc/passwd", info.name)), "comment": "x" * rng.choice((9, 9000))}
    elif kind == 7:
        content = rng.choice((b"", b"\0" * 600, content * 2, members[0][1]))
    if kind in (1, 5, 7):
        info.size = len(content)
        members[at] = info, content
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=rng.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))) as tar:
        for each, bytes_of in members:
            tar.addfile(each, io.BytesIO(bytes_of))
    made = buffer.getvalue()
    if kind == 8:  # a size in a header, in octal or in base 256
        place = 124 + 512 * rng.randrange(max(1, len(made) // 512))
        size = rng.choice(
            (b"77777777777\0", b"\x80" + b"\xff" * 11, b"-0000000001\0", b"00000000000\0", b"not a size!\0")
        )
        made = made[:place] + size + made[place + 12 :]
    return made


def change_text(rng: Random, text: str, words: Callable[[], str]) -> bytes:
    """Lines of a text moved, doubled, removed, indented; words replaced."""
    lines = text.splitlines()
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(lines)) if lines else 0
        kind = rng.randrange(8)
        if not lines or kind == 0:
            lines.insert(at, words())
        elif kind == 1:
            del lines[at]
        elif kind == 2:
            lines.insert(rng.randrange(len(lines)), lines[at])
        elif kind == 3:
            lines[at] = rng.choice(("  ", "\t", "# ", "- ", "? ", "&a ", "!!python/object:os.system ")) + lines[at]
        elif kind in (4, 5):
            key, colon, _ = lines[at].partition(":")
            lines[at] = f"{key}{colon} {words()}"
        elif kind == 6:
            lines[at] = lines[at].replace(":", rng.choice(("", "::", ": *a", ": !!binary", ": {", ": [")), 1)
        else:
            _, colon, value = lines[at].partition(":")
            lines[at] = f"{words()}{colon}{value}"
    made = "\n".join(lines).encode("utf-8", "surrogatepass") + b"\n"
    return rng.choice((made, made, made, made, made, damage(rng, made), text.encode("utf-16")))
