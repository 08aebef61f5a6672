"""Generates camera frames: real baseline JPEGs, written coefficient by coefficient, without an image library."""

from __future__ import annotations

from random import Random

WIDTH, HEIGHT = 1280, 720

#: Huffman tables with a single code length, so that the code of a symbol is its index in the table. JPEG forbids a code
#: of only ones (ITU-T T.81, annex C). These tables do not need it: they use 12 of 16 codes (DC) and 4 of 8 codes (AC).
_DC_SYMBOLS = bytes(range(12))
_DC_BITS = 4
_AC_SYMBOLS = bytes((0x00, 0x01, 0x02, 0x03))
"""End of block, and a coefficient of 1, 2 or 3 bits without zeros before it."""
_AC_BITS = 3
#: The quantization step of all coefficients. The DC value of a uniform block is (brightness - 128) x 8 / step, so with
#: a step of 8 it is brightness - 128.
_STEP = 8


def frame(camera: int) -> bytes:
    """Return a JPEG frame of a camera: a yard with one vehicle, greyscale, `WIDTH` x `HEIGHT` pixels, about 100 KB.

    The same camera number always gives the same frame.
    """
    random = Random(camera)  # noqa: S311  a scene, not a secret
    textures = ["".join(_coefficient(random.randint(-6, 6)) for _ in range(8)) + f"{0:03b}" for _ in range(64)]
    columns, rows = WIDTH // 8, HEIGHT // 8
    left, top = random.randrange(columns - 40), random.randrange(rows // 2, rows - 16)
    pieces: list[str] = []
    before = 0
    for row in range(rows):
        for column in range(columns):
            in_vehicle = left <= column < left + 32 and top <= row < top + 14
            brightness = 60 + 10 * (camera % 3) if in_vehicle else 220 - row if row < rows // 3 else 110 + row // 2
            level = brightness - 128
            pieces.append(_magnitude(level - before, _DC_BITS))
            pieces.append(random.choice(textures))
            before = level
    bits = "".join(pieces)
    bits += "1" * (-len(bits) % 8)
    scan = int(bits, 2).to_bytes(len(bits) // 8).replace(b"\xff", b"\xff\x00")
    return _HEAD + scan + b"\xff\xd9"


def _magnitude(value: int, code_bits: int) -> str:
    """Return the code of a value's bit length, then the value (T.81, F.1.2.1). A negative value is reduced by 1."""
    size = abs(value).bit_length()
    code = f"{size:0{code_bits}b}"
    return code if size == 0 else code + f"{value if value > 0 else value + (1 << size) - 1:0{size}b}"


def _coefficient(value: int) -> str:
    """Return the code of one AC coefficient. 0 is replaced by 1, because JPEG codes zeros only as runs."""
    return _magnitude(value or 1, _AC_BITS)


def _segment(marker: int, payload: bytes) -> bytes:
    return b"\xff" + bytes((marker,)) + (len(payload) + 2).to_bytes(2) + payload


def _huffman(table: int, bits: int, symbols: bytes) -> bytes:
    """Return a Huffman table in which every code has `bits` bits."""
    return bytes((table, *(len(symbols) if length == bits else 0 for length in range(1, 17)))) + symbols


_HEAD = b"".join(
    (
        b"\xff\xd8",
        _segment(0xE0, b"JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"),
        _segment(0xDB, b"\x00" + bytes((_STEP,)) * 64),
        _segment(0xC0, b"\x08" + HEIGHT.to_bytes(2) + WIDTH.to_bytes(2) + b"\x01\x01\x11\x00"),
        _segment(0xC4, _huffman(0x00, _DC_BITS, _DC_SYMBOLS) + _huffman(0x10, _AC_BITS, _AC_SYMBOLS)),
        _segment(0xDA, b"\x01\x01\x00\x00\x3f\x00"),
    )
)
