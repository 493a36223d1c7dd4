"""GGUF files that lie: the malformed kinds of llama.cpp's tests, written anew, and mutants."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator

HUGE = 2**64 - 1
U32, I32, STRING, ARRAY = 4, 5, 8, 9
F32, I8, I64 = 0, 24, 27


def text(value: str | bytes, length: int | None = None) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def key(name: str, kind: int, value: bytes, length: int | None = None) -> bytes:
    return text(name, length) + struct.pack("<I", kind) + value


def tensor(
    name: str, sizes: list[int], kind: int = F32, offset: int = 0, n: int | None = None
) -> bytes:
    count = len(sizes) if n is None else n
    shape = b"".join(struct.pack("<Q", s % 2**64) for s in sizes)
    return text(name) + struct.pack("<I", count) + shape + struct.pack("<IQ", kind, offset % 2**64)


def gguf(
    keys: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_tensors: int | None = None,
    n_keys: int | None = None,
    alignment: int = 32,
) -> bytes:
    keys, tensors = keys or [], tensors or []
    counts = (
        len(tensors) if n_tensors is None else n_tensors,
        len(keys) if n_keys is None else n_keys,
    )
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data


def some_keys() -> list[bytes]:
    """One of each type of value."""
    scalars = [(0, "<B", 7), (1, "<b", -7), (2, "<H", 7), (3, "<h", -7), (U32, "<I", 7),
               (I32, "<i", -7), (6, "<f", 0.5), (7, "<B", 1), (10, "<Q", 7), (11, "<q", -7),
               (12, "<d", 0.5)]  # fmt: skip
    found = [key(f"scalar.{kind}", kind, struct.pack(form, v)) for kind, form, v in scalars]
    found += [
        key(f"array.{kind}", ARRAY, struct.pack("<IQ", kind, 3) + struct.pack(form, v) * 3)
        for kind, form, v in scalars
    ]
    found.append(key("text", STRING, text("猫")))
    found.append(
        key("texts", ARRAY, struct.pack("<IQ", STRING, 3) + text("a") + text("") + text(b"\xff"))
    )
    return found


def align(value: int, kind: int = U32) -> bytes:
    return key("general.alignment", kind, struct.pack("<I", value))


def two(alignment: int = 32) -> list[bytes]:
    """Two F32 tensors of 3 × 8 and of 8."""
    return [tensor("a", [8, 3]), tensor("b", [8], offset=96 + -96 % alignment)]


DATA = bytes(range(128))

# name: (file, words that the error must have; None: a good file)
KINDS: dict[str, tuple[bytes, str | None]] = {
    "header bad magic": (gguf(magic=b"FUGG"), "does not begin with GGUF"),
    "header bad version 0": (gguf(version=0), "version 0"),
    "header bad version 1": (gguf(version=1), "version 1"),
    "header bad version future": (gguf(version=4), "version 4"),
    "header bad n tensors": (gguf(n_tensors=HUGE), "18,446,744,073,709,551,615 tensors"),
    "header bad n kv": (gguf(n_keys=HUGE), "18,446,744,073,709,551,615 keys"),
    "header empty": (gguf(), None),
    "kv bad key size": (gguf([key("k", U32, bytes(4), HUGE)]), "key 0 claims"),
    "kv empty key": (gguf([key("", U32, bytes(4))]), "key 0 is empty"),
    "kv bad type": (gguf([key("k", 13, bytes(4))]), "'k' has the unknown type 13"),
    "kv duplicate key": (gguf([key("k", U32, bytes(4))] * 2), "key 'k' is there twice"),
    "kv bad align": (gguf([align(13)]), "general.alignment is 13"),
    "kv wrong type align": (gguf([align(13, I32)]), "general.alignment is i32"),
    "kv success": (gguf(some_keys()), None),
    "tensors bad name size": (gguf(tensors=[tensor("n" * 64, [8])]), "claims 64 bytes"),
    "tensors bad n dims": (gguf(tensors=[tensor("t", [1] * 5)]), "5 dimensions"),
    "tensors bad shape": (gguf(tensors=[tensor("t", [-1])]), "impossible shape"),
    "tensors zero dim": (gguf(tensors=[tensor("t", [8, 0])]), None),
    "tensors ne too big": (gguf(tensors=[tensor("t", [2**33 - 4] * 2)]), "impossible shape"),
    "tensors nbytes too big": (gguf(tensors=[tensor("t", [1534000000] * 2, I64)]), "ends at byte"),
    "tensors nbytes pad wrap": (gguf(tensors=[tensor("t", [4, 2**30 - 1, 2**30 + 1])]), "ends at byte"),
    "tensors bad type": (gguf(tensors=[tensor("t", [8], 43)]), "unknown type 43"),
    "tensors bad offset": (gguf(tensors=[tensor("t", [8], offset=-1)]), "lies at offset"),
    "tensors duplicate name": (gguf(tensors=[tensor("t", [8])] * 2), "'t' is there twice"),
    "tensors bad align": (gguf([align(13)], two()), "general.alignment is 13"),
    "tensors inconsistent align": (gguf(tensors=[tensor("a", [3]), tensor("b", [8], offset=12)], data=DATA), "'b' lies at offset 12, not 32"),
    "tensors success": (gguf(tensors=two(), data=DATA), None),
    "tensors custom align": (gguf([align(1)], two(1), DATA, alignment=1), None),
    "data not enough data": (gguf(tensors=two(), data=DATA[:-1]), "'b' ends at byte"),
    "data bad align": (gguf([align(13)], two(), DATA), "general.alignment is 13"),
    "data inconsistent align": (gguf(some_keys(), [tensor("a", [3]), tensor("b", [8], offset=12)], DATA), "'b' lies at offset 12, not 32"),
    "data mem size overflow": (gguf(tensors=[tensor("a", [2**63 - 64], I8), tensor("b", [2**63 - 64], I8, 2**63 - 64)], data=bytes(32)), "ends at byte"),
    "data success": (gguf(some_keys(), two(), DATA), None),
    "data custom align": (gguf([align(128)], two(128), DATA + bytes(128), alignment=128), None),
    # Not in that list: what a reader in Python should also survive.
    "nothing": (b"", "does not begin with GGUF"),
    "half a header": (gguf()[:20], "20 bytes"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "an array of arrays": (gguf([key("k", ARRAY, struct.pack("<IQ", ARRAY, 1))]), "'k' has the unknown type 9"),
    "an array longer than the file": (gguf([key("k", ARRAY, struct.pack("<IQ", U32, 2**62))]), "ends within the value of 'k'"),
    "strings longer than the file": (gguf([key("k", ARRAY, struct.pack("<IQ", STRING, 2**61))]), "strings (at most"),
    "a string longer than the file": (gguf([key("k", STRING, text("", 2**40))]), "'k' claims 1,099,511,627,776 bytes"),
    "a key that is no text": (gguf([key("k", U32, bytes(4)).replace(b"k", b"\xff")]), "key 0 is not UTF-8"),
    "alignment 0": (gguf([align(0)]), "general.alignment is 0"),
    "a removed type": (gguf(tensors=[tensor("t", [32], 31)]), "unknown type 31"),
    "half a block": (gguf(tensors=[tensor("t", [48], 2)], data=DATA), "no multiple of Q4_0's 32"),
    "a removed second offset": (gguf(tensors=[tensor("a", [8]), tensor("b", [8])], data=DATA), "'b' lies at offset 0, not 32"),
}  # fmt: skip


def at_the_limits() -> Iterator[bytes]:
    """As many strings, keys and tensors as are read at all: nothing is wrong, but all is too much."""
    many = b"".join(text(f"{i % 9999:04}") for i in range(9999)) * 200
    yield gguf([key("k", ARRAY, struct.pack("<IQ", STRING, 9999 * 200) + many)])
    yield gguf([key(f"k{i}", U32, bytes(4)) for i in range(20_000)])
    yield gguf(tensors=[tensor(f"t{i}", [0]) for i in range(50_000)])


def mutants(whole: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """Changed copies of a good file, mostly within its header: bytes, integers, lengths, cuts."""
    random_ = random.Random(seed)
    edges = [0, 1, 2**8 - 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, HUGE]
    header = min(len(whole), 24_000)
    for _ in range(count):
        data = bytearray(whole)
        for _ in range(random_.choice((1, 1, 1, 2, 5))):
            limit = header if random_.random() < 0.9 else len(data)
            at = (
                random_.randrange(min(24, limit))
                if random_.random() < 0.2
                else random_.randrange(limit)
            )
            kind = random_.randrange(6)
            if kind == 0:
                data[at % len(data)] ^= 1 << random_.randrange(8)
            elif kind == 1:
                data[at : at + 8] = struct.pack("<Q", random_.choice(edges))
            elif kind == 2:
                data[at : at + 4] = struct.pack("<I", random_.choice(edges) % 2**32)
            elif kind == 3:
                del data[at : at + random_.choice((1, 4, 8, 100))]
            elif kind == 4:
                data[at:at] = random_.randbytes(random_.choice((1, 4, 8, 100)))
            else:
                del data[random_.randrange(len(data)) :]
            if not data:
                data = bytearray(b"G")
        yield bytes(data)
