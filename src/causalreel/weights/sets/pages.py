"""The B-tree of an LMDB file (format 1, as LMDB 0.9 writes it on 64-bit machines), read without the library.

The library maps the file and follows the numbers in it wherever they lead, so that a damaged file ends the process.
Here every page is looked at before it is used: a file costs what its tree is deep, and what is wrong is a ValueError.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

MAGIC = 0xBEEFC0DE
BRANCH, LEAF, OVERFLOW, META = 0x01, 0x02, 0x04, 0x08
BIG = 0x01
"""Of a node: its data is on pages of its own."""
SUB = 0x02 | 0x04
"""Of a node: a database of its own, or several values of one key."""
DEPTH = 32
HEADER = 16
"""Bytes before a page's content."""
NOTHING = (1 << 64) - 1
"""Page number of an empty tree's root."""


def is_lmdb(path: Path) -> bool:
    """Whether a file begins as an LMDB does, whatever its name."""
    with path.open("rb") as file:
        return file.read(HEADER + 4)[HEADER:] == struct.pack("<I", MAGIC)


class Pages:
    """An LMDB file's main database: `get` by key. Use it as a context."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO = path.open("rb")
        self._size = path.stat().st_size
        try:
            self._page, self.entries, self._root = self._newest_meta()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Pages:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def get(self, key: bytes, *, most: int) -> bytes | None:
        """The value of a key, None if there is none; ValueError if it has more than `most` bytes."""
        number = self._root
        for _ in range(DEPTH if number != NOTHING else 0):
            page = self._read(number)
            flags = struct.unpack_from("<H", page, 10)[0]
            nodes = self._nodes(page, number)
            if flags & LEAF:
                at = _bisect(page, nodes, key, self, first=0)
                if at < 0 or self._key(page, nodes[at]) != key:
                    return None
                return self._value(page, nodes[at], most)
            if not flags & BRANCH or not nodes:
                raise self._damaged(f"page {number} is none of a tree")
            low, high, top = struct.unpack_from("<HHH", page, nodes[max(0, _bisect(page, nodes, key, self, first=1))])
            number = low | high << 16 | top << 32
        if number != NOTHING:
            raise self._damaged(f"its tree is deeper than {DEPTH}")
        return None

    # ---- pages and nodes

    def _newest_meta(self) -> tuple[int, int, int]:
        """-> page size, entries and root page of the newer of the two first pages."""
        first = self._meta(0)
        if first is None:
            raise ValueError(f"{self.path} is not an LMDB file of 64-bit LMDB 0.9: its first page is none of its")
        metas = [first, self._meta(first[1])]
        _, page, entries, root, last = max(meta for meta in metas if meta is not None and meta[1] == first[1])
        if (last + 1) * page > self._size:
            raise ValueError(
                f"{self.path} is damaged or was cut off: {self._size:,} bytes, its pages take {(last + 1) * page:,}"
            )
        return page, entries, root

    def _meta(self, at: int) -> tuple[int, int, int, int, int] | None:
        """-> transaction, page size, entries, root and last page; None if there is no such page."""
        self._file.seek(at)
        page = self._file.read(HEADER + 136)
        if len(page) < HEADER + 136 or not struct.unpack_from("<H", page, 10)[0] & META:
            return None
        magic, version, _, _ = struct.unpack_from("<IIQQ", page, HEADER)
        size = struct.unpack_from("<I", page, HEADER + 24)[0]
        if magic != MAGIC or version != 1 or not 256 <= size <= 1 << 16 or size & (size - 1):
            return None
        entries, root = struct.unpack_from("<QQ", page, HEADER + 24 + 48 + 32)
        last, transaction = struct.unpack_from("<QQ", page, HEADER + 24 + 96)
        return transaction, size, entries, root, last

    def _read(self, number: int) -> bytes:
        if not 2 <= number < self._size // self._page:
            raise self._damaged(f"it names page {number}, the file has {self._size // self._page}")
        self._file.seek(number * self._page)
        page = self._file.read(self._page)
        if struct.unpack_from("<Q", page)[0] != number:
            raise self._damaged(f"page {number} is not where it should be")
        return page

    def _nodes(self, page: bytes, number: int) -> tuple[int, ...]:
        """Places of a page's nodes, in the order of their keys."""
        lower, upper = struct.unpack_from("<HH", page, 12)
        if not HEADER <= lower <= upper <= len(page) or lower & 1:
            raise self._damaged(f"page {number} has impossible bounds")
        return struct.unpack_from(f"<{(lower - HEADER) // 2}H", page, HEADER)

    def _key(self, page: bytes, node: int) -> bytes:
        if node + 8 > len(page):
            raise self._damaged("a node lies outside its page")
        length = struct.unpack_from("<H", page, node + 6)[0]
        if node + 8 + length > len(page):
            raise self._damaged("a key lies outside its page")
        return page[node + 8 : node + 8 + length]

    def _value(self, page: bytes, node: int, most: int) -> bytes:
        low, high, flags, key = struct.unpack_from("<HHHH", page, node)
        size, at = low | high << 16, node + 8 + key
        if flags & SUB:
            raise self._damaged("a key has several values or is a database of its own")
        if size > most:
            raise self._damaged(f"a value of {size:,} bytes, at most {most:,} are expected")
        if not flags & BIG:
            if at + size > len(page):
                raise self._damaged("a value lies outside its page")
            return page[at : at + size]
        if at + 8 > len(page):
            raise self._damaged("a value lies outside its page")
        first = struct.unpack_from("<Q", page, at)[0]
        head = self._read(first)
        pages = struct.unpack_from("<I", head, 12)[0]
        if not struct.unpack_from("<H", head, 10)[0] & OVERFLOW or pages * self._page < HEADER + size:
            raise self._damaged(f"page {first} does not begin a value of {size:,} bytes")
        self._file.seek(first * self._page + HEADER)
        found = self._file.read(size)
        if len(found) < size:
            raise self._damaged("a value reaches over the end of the file")
        return found

    def _damaged(self, how: str) -> ValueError:
        return ValueError(f"{self.path} is damaged: {how}")


def _bisect(page: bytes, nodes: tuple[int, ...], key: bytes, pages: Pages, *, first: int) -> int:
    """The last node whose key is at most `key`, or `first` - 1; the key of a branch's first node is not read."""
    low, high = first, len(nodes)
    while low < high:
        middle = (low + high) // 2
        if pages._key(page, nodes[middle]) <= key:
            low = middle + 1
        else:
            high = middle
    return low - 1
