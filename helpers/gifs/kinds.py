"""The kinds of files that come as "GIF", told apart by their first bytes: one list for fetching and for decoding."""

from __future__ import annotations

import importlib.util
import re
from typing import Literal, NamedTuple

SIGNATURE_BYTES = 512  # of a file's start, what `kind_of` looks at

_CONVERT = "convert it: ffmpeg -i FILE FILE.gif"
_ERROR_PAGE = "an error message in place of the file?"


class Kind(NamedTuple):
    """A kind of file. name: with its article. reader: who reads it, None if nobody. help: what else to do."""

    name: str
    reader: Literal["gif", "webp", "png", "video"] | None = None
    help: str = ""


GIF = Kind("a GIF", "gif")
PNG = Kind("a PNG image", "png")
WEBP = Kind("a WebP image", "webp")
_PYAV = "or install PyAV, which reads it: pip install av, and give --force to a run that has left it out"
MP4 = Kind("an MP4 video", "video", f"{_CONVERT}, {_PYAV}")
WEBM = Kind("a WebM or Matroska video", "video", MP4.help)
EMPTY = Kind("an empty file")

_BY_START: list[tuple[bytes, Kind]] = [
    (rb"GIF8[79]a", GIF),
    (rb"\x89PNG\r\n\x1a\n", PNG),
    (rb"RIFF....WEBP", WEBP),
    (rb"RIFF....AVI ", Kind("an AVI video", help=_CONVERT)),
    (rb"....ftypavi[fs]", Kind("an AVIF image", help=_CONVERT)),
    (rb"....ftyp(heic|heix|hevc|heim|mif1|msf1)", Kind("a HEIF image", help=_CONVERT)),
    (rb"....ftyp", MP4),
    (rb"\x1aE\xdf\xa3", WEBM),
    (rb"\xff\xd8\xff", Kind("a JPEG image")),
    (rb"BM.{4}\0{4}", Kind("a BMP image")),
    (rb"II\*\0|MM\0\*", Kind("a TIFF image")),
    (rb"PK\x03\x04", Kind("a ZIP archive")),
    (rb"\x1f\x8b", Kind("gzip-compressed data")),
    (rb"%PDF-", Kind("a PDF document")),
    (rb"version https://git-lfs", Kind("a Git LFS pointer", help="fetch the file itself: git lfs pull")),
    (rb"\0{8}", Kind("a file that begins with zero bytes", help="it was damaged when it was written: fetch it again")),
]
_BY_TEXT: list[tuple[bytes, Kind]] = [
    (rb"<!doctype html|<(html|head|body)\b", Kind("an HTML page", help="an error page in place of the file?")),
    (rb"(<\?xml.*)?<svg\b", Kind("an SVG drawing")),
    (rb"<\?xml", Kind("an XML document", help=_ERROR_PAGE)),
    (rb"<", Kind("an HTML page", help="an error page in place of the file?")),
    (rb"[{\[]", Kind("JSON text", help=_ERROR_PAGE)),
]


def kind_of(start: bytes) -> Kind:
    """What a file is, from its first `SIGNATURE_BYTES` bytes (all there are, if it has fewer)."""
    if not start:
        return EMPTY
    for pattern, kind in _BY_START:
        if re.match(pattern, start, re.DOTALL):
            return kind
    text = _text(start[:SIGNATURE_BYTES])
    if text is None:
        return Kind(f"an unknown kind of file (it begins with the bytes {start[:8].hex(' ')})")
    for pattern, kind in _BY_TEXT:
        if re.match(pattern, text.lower().encode(), re.DOTALL):
            return kind
    return Kind(f"the text “{text.splitlines()[0][:40]}”" if text else "a file of blanks", help=_ERROR_PAGE)


def refusal(start: bytes) -> str | None:
    """Why a file that begins so cannot be read as an animation, and what to do; None if it can be tried."""
    kind = kind_of(start)
    if kind.reader and (kind.reader != "video" or importlib.util.find_spec("av")):
        return None
    return f"not a GIF but {kind.name}" + (f" ({kind.help})" if kind.help else "")


def _text(start: bytes) -> str | None:
    """The start of a text file without blanks around it; None if it is no text."""
    text = start.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace").strip()
    broken = sum(not (char.isprintable() or char.isspace()) or char == "\ufffd" for char in text)
    return text if broken <= 1 else None  # the last character may be cut in two
