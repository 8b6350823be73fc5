"""Files that call themselves pictures and mean no good: name -> (what makes its bytes, what is said of it)."""

import io
import struct
import zlib

from PIL import Image


def png(width, height, *, pixels=b"", extra=b""):
    """A PNG file with this size in its head, whatever its pixels are."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", zlib.compress(pixels, 9)) + chunk(b"IEND", b"")


def text_bomb():
    """A tiny picture whose comment unpacks to 50 MB."""
    body = b"zTXt" + b"c\0\0" + zlib.compress(bytes(50_000_000), 9)
    return png(
        4, 4, pixels=bytes(4 * 13), extra=struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    )


def hundred_megapixels():
    file = io.BytesIO()
    Image.new("L", (10_000, 10_000)).save(file, "PNG")
    return file.getvalue()


HOSTILE = {
    "text.png": (lambda: b"no picture at all", "is no whole picture of a known kind (PNG, JPEG, "),
    "empty.png": (lambda: b"", "is no whole picture"),
    "hundred-megapixels.png": (hundred_megapixels, "it has 100,000,000 pixels, more than 50,000,000"),
    "bomb.png": (lambda: png(60_000, 60_000, pixels=bytes(50_000_000)), "3600000000 pixels"),
    "text-bomb.png": (text_bomb, "is no whole picture"),
    "cut.png": (lambda: png(64, 64, pixels=bytes(300)), "is no whole picture"),
    "unusual.ppm": (lambda: b"P6 1 1 255\n\0\0\0", "is no whole picture"),
    "program.eps": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage", "is no whole"),
}
