"""JPEGs made by hand, for tests of what decoding foreign ones may cost."""

from __future__ import annotations

import struct


def of_scans(width: int, height: int, scans: int, *, head: int = 0xC2) -> bytes:
    """A progressive grey JPEG of a few bytes a scan; its coded pixels are cut short, and decoders fill them in."""

    def part(kind: int, body: bytes) -> bytes:
        return bytes([0xFF, kind]) + struct.pack(">H", len(body) + 2) + body

    tables = part(0xDB, b"\0" + bytes([1] * 64)) + b"".join(
        part(0xC4, bytes([kind, 1, *[0] * 15, value])) for kind, value in ((0x00, 0), (0x10, 0))
    )
    first, further = (part(0xDA, bytes([1, 1, 0, *span, 0])) + b"\x1f\x14\x9e" for span in ((0, 0), (1, 63)))
    size = part(head, struct.pack(">BHHB3B", 8, height, width, 1, 1, 0x11, 0))
    return b"\xff\xd8" + tables + size + first + (scans - 1) * further + b"\xff\xd9"
