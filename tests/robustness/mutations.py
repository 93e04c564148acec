"""Ways in which a file gets damaged, or is made to do damage."""

import struct
import zlib
from collections.abc import Callable
from random import Random

_HEADER_BYTES = 128
_NUMBERS_OF_MUTATIONS = (1, 1, 1, 2, 4)
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_NUMBERS = (0, 1, 2, 3, 7, 8, 15, 16, 127, 128, 255, 256, 4096, 32767, 32768, 65534, 65535)
_LARGE_NUMBERS = (*_NUMBERS, 2**24, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1)

Mutation = Callable[[Random, bytes, list[bytes]], bytes]


def mutate(rng: Random, data: bytes, others: list[bytes]) -> bytes:
    """Return a file's content after one to four mutations, some of which splice from others."""
    for _ in range(rng.choice(_NUMBERS_OF_MUTATIONS)):
        data = rng.choice(MUTATIONS)(rng, data, others)
    # Or no mutation would get past the checksums of a PNG.
    return _with_checksums(data) if rng.random() < 2 / 3 else data


def truncate(rng: Random, data: bytes, others: list[bytes]) -> bytes:
    return data[: rng.randint(0, len(data))]


def flip_bits(rng: Random, data: bytes, others: list[bytes]) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        if changed:
            changed[_place(rng, data)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def splice_header(rng: Random, data: bytes, others: list[bytes]) -> bytes:
    """Put the beginning of another file before this one's rest."""
    other, at = rng.choice(others), rng.randint(1, _HEADER_BYTES)
    return other[:at] + data[rng.choice((at, rng.randint(0, len(data)))) :]


def insert_part(rng: Random, data: bytes, others: list[bytes]) -> bytes:
    other, at = rng.choice(others), rng.randint(0, len(data))
    start, stop = _range(rng, other)
    return data[:at] + other[start:stop] + data[at:]


def duplicate_range(rng: Random, data: bytes, others: list[bytes]) -> bytes:
    start, stop = _range(rng, data)
    return data[:stop] + data[start:stop] * rng.choice((1, 1, 5)) + data[stop:]


def delete_range(rng: Random, data: bytes, others: list[bytes]) -> bytes:
    start, stop = _range(rng, data)
    return data[:start] + data[stop:]


def overwrite_range(rng: Random, data: bytes, others: list[bytes]) -> bytes:
    start, stop = _range(rng, data)
    return data[:start] + rng.choice((bytes, rng.randbytes))(stop - start) + data[stop:]


def change_number(rng: Random, data: bytes, others: list[bytes]) -> bytes:
    """Overwrite 2 or 4 bytes, most often in the header, by a number that lengths go wrong at."""
    order, code = rng.choice("<>"), rng.choice("HI")
    number = rng.choice(_NUMBERS if code == "H" else _LARGE_NUMBERS)
    field, at = struct.pack(order + code, number), _place(rng, data)
    return data[:at] + field + data[at + len(field) :]


MUTATIONS: tuple[Mutation, ...] = (
    *(truncate, splice_header, insert_part, duplicate_range, delete_range, overwrite_range),
    # These leave most of a file as it was, and so get far.
    *[flip_bits] * 4,
    *[change_number] * 6,
)


def _place(rng: Random, data: bytes) -> int:
    room = max(1, len(data))
    return rng.randrange(rng.choice((room, min(room, _HEADER_BYTES))))


def _range(rng: Random, data: bytes) -> tuple[int, int]:
    start = rng.randint(0, len(data))
    return start, min(len(data), start + rng.choice((1, 2, 4, 8, 16, rng.randint(0, len(data)))))


def _with_checksums(data: bytes) -> bytes:
    if not data.startswith(_PNG_SIGNATURE):
        return data
    changed, at = bytearray(data), len(_PNG_SIGNATURE)
    while at + 12 <= len(changed):
        (length,) = struct.unpack_from(">I", changed, at)
        end = at + 8 + length
        if end + 4 > len(changed):
            break
        struct.pack_into(">I", changed, end, zlib.crc32(changed[at + 4 : end]))
        at = end + 4
    return bytes(changed)
