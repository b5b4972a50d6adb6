"""What a picture's file may cost before anybody decodes it: seen in its structure alone, in a few milliseconds.

Pixels and bytes do not bound the time. A JPEG may draw the same pixels in a hundred thousand scans of 53 bytes each,
and a decoder in Python may be kept busy with millions of empty chunks.
"""

from __future__ import annotations

#: Of a JPEG. A progressive one has about ten, a phone's picture has a second one and a preview inside.
MAX_SCANS = 50
#: Chunks of a PNG, segments of a JPEG. A PNG of the largest allowed size in pieces of 8 KB has 2500.
MAX_PIECES = 20_000

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8"
_START_OF_SCAN = b"\xff\xda"


def too_costly(data: bytes) -> str:
    """Why this file would be decoded for far longer than its size lets expect; empty when it would not."""
    if data.startswith(_PNG):
        return "" if _chunks(data) <= MAX_PIECES else f"has more than {MAX_PIECES} chunks; allowed: at most so many"
    if data.startswith(_JPEG):
        # Inside a scan the byte 0xff is always followed by a zero or a restart mark, so every hit begins a scan.
        scans = data.count(_START_OF_SCAN)
        if scans > MAX_SCANS:
            return f"has {scans} scans; allowed: at most {MAX_SCANS}"
        if _segments(data) > MAX_PIECES:
            return f"has more than {MAX_PIECES} segments; allowed: at most so many"
    return ""


def _chunks(data: bytes) -> int:
    count, at = 0, len(_PNG)
    while at < len(data) and count <= MAX_PIECES:
        at += 12 + int.from_bytes(data[at : at + 4], "big")
        count += 1
    return count


def _segments(data: bytes) -> int:
    """Up to the first scan; a byte between two of them counts as one, because decoders look at each."""
    count, at = 0, len(_JPEG)
    while at < len(data) and count <= MAX_PIECES:
        marked = data[at] == 0xFF and data[at + 1 : at + 2] not in (b"\xff", b"\x00", b"")
        if marked and data[at + 1] == _START_OF_SCAN[1]:
            break
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big") if marked else 1
        count += 1
    return count
