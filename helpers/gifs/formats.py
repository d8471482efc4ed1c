"""From the bytes of an animation to its frames: GIF, animated WebP and PNG, and videos where PyAV is installed.

Each reader first walks over the structure of a file, without decoding, and checks it against the limits; only then are
pixels drawn. All limits count work, not time: the same bytes get the same verdict on every machine.

Choices made where the formats, or their decoders, disagree:

- Frame delays of 10 ms or less, or absent, count as 100 ms, as Chromium, Firefox and WebKit show them. A video's frames
  last as long as it says.
- What no frame has drawn, or what was disposed of, shows `BACKGROUND`; so do transparent pixels.
- A GIF's canvas is the one of its header, enlarged to the first frame where that is larger; what later frames draw
  outside it is cut off, as Chromium does. Disposal 4 means 3 (some encoders were written to a draft); 5 to 7 keep.
- A frame of a GIF without width or height draws nothing and is shown as long as it says, as FFmpeg does; a GIF of
  nothing else is rejected.
- A frame whose data breaks off, and all that follow it, are not used; the rest is.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, PngImagePlugin, WebPImagePlugin

from helpers.gifs.kinds import SIGNATURE_BYTES, kind_of, refusal

BACKGROUND = (255, 255, 255)  # what shows where nothing is drawn: white, as a web page does
SHORTEST_DELAY_MS = 10  # delays up to this one are not honoured by browsers ...
DEFAULT_DELAY_MS = 100  # ... which show such frames this long
MAX_BLOCKS = 2_000_000  # sub-blocks of a GIF, chunks of a PNG or WebP; 64 MiB in the usual blocks are 262,144
DAMAGED = "the file is damaged"

_BLOCK_MARKER = re.compile(rb"[\x21\x2c\x3b]")  # extension, image, trailer


class GifRejected(ValueError):
    """A GIF that cannot be used; `reason` says why in one line."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class BrokenFrame(Exception):
    """Frame `index` cannot be decoded."""

    def __init__(self, index: int):
        super().__init__(f"frame {index}")
        self.index = index


@dataclass(frozen=True)
class Limits:
    """What a GIF may cost. Anything over a limit is rejected, most of it before any pixel is decoded."""

    max_canvas_pixels: int = 4_000_000  # width x height, with every frame that reaches outside the canvas
    max_frames: int = 2_000
    max_bytes: int = 64 * 2**20
    max_drawn_pixels: int = 2_000_000_000  # of all frames together; at one bit a pixel, max_bytes hold a quarter
    min_frames: int = 1  # 2 rejects stills, which in a fetched dataset are placeholders of deleted GIFs

    def check_bytes(self, data: bytes) -> bytes:
        """Give `data` back; raises GifRejected if it is too long."""
        if len(data) > self.max_bytes:
            raise GifRejected(f"more than {self.max_bytes} bytes")
        return data

    def check_canvas(self, width: int, height: int) -> None:
        """Raises GifRejected for a canvas without pixels or with too many."""
        if not width or not height:
            raise GifRejected(f"the canvas is empty ({width} x {height} pixels)")
        if width * height > self.max_canvas_pixels:
            raise GifRejected(f"the canvas is {width} x {height} pixels, {self.max_canvas_pixels} in all allowed")

    def check_work(self, frames: int, pixels: int, blocks: int = 0) -> None:
        """Raises GifRejected for too many frames, pixels of all frames together, or blocks."""
        if frames > self.max_frames:
            raise GifRejected(f"more than {self.max_frames} frames")
        if pixels > self.max_drawn_pixels:
            raise GifRejected(f"its frames have more than {self.max_drawn_pixels} pixels in all")
        if blocks > MAX_BLOCKS:
            raise GifRejected(f"more than {MAX_BLOCKS} blocks of data")


@dataclass(frozen=True)
class Animation:
    """What can be told of an animation before it is decoded, and how to decode it.

    canvas: width, height. durations_ms: how long each frame is shown. truncated: the file breaks off.
    draw: starts anew to yield the frames as RGB images of the canvas, each good until the next is asked for; raises
    BrokenFrame.
    """

    canvas: tuple[int, int]
    durations_ms: list[float]
    truncated: bool
    draw: Callable[[], Iterator[Image.Image]]


def open_animation(data: bytes, limits: Limits) -> Animation:
    """Look through the bytes of an animation of any kind that is read, without drawing it.

    Raises GifRejected: not such a file, nothing in it, or over a limit.
    """
    limits.check_bytes(data)
    if reason := refusal(data[:SIGNATURE_BYTES]):
        raise GifRejected(reason)
    readers = {"gif": _open_gif, "webp": _open_webp, "png": _open_png, "video": _open_video}
    return readers[kind_of(data[:SIGNATURE_BYTES]).reader](data, limits)


def _shown_ms(delay: float) -> float:
    return delay if delay > SHORTEST_DELAY_MS else DEFAULT_DELAY_MS


# GIF, by the GIF89a specification. Pillow unpacks the pixels of a frame; where they go is decided here, since Pillow
# takes the background and a disposed area from the palette, and keeps a disposal for the frames that name none.


class _GifFrame(NamedTuple):
    box: tuple[int, int, int, int]  # left, top, right, bottom
    interlaced: bool
    palette: bytes  # empty: grey levels
    transparent: int | None
    disposal: int
    code_bits: int
    blocks: slice  # of the file: the sub-blocks of compressed pixels


def _open_gif(data: bytes, limits: Limits) -> Animation:
    if len(data) < 13:
        raise GifRejected("truncated inside the header")
    width, height = _u16(data, 6), _u16(data, 8)
    limits.check_canvas(width, height)
    drawn = (width, height)
    frames: list[_GifFrame] = []
    durations: list[float] = []
    delay, disposal, transparent = 0, 0, None
    position = 13 + _palette_bytes(data[10])
    palette = data[13:position]
    pixels = blocks = 0
    truncated = True  # until the trailer proves otherwise
    complete = True  # the data of the last frame
    while match := _BLOCK_MARKER.search(data, position):  # bytes that are no marker are skipped, as Pillow does
        position = match.start()
        if match[0] == b";":
            truncated = False
            break
        if match[0] == b"!":
            if data[position + 1 : position + 2] == b"\xf9" and position + 7 <= len(data):
                delay, disposal = _u16(data, position + 4) * 10, data[position + 3] >> 2 & 7
                transparent = data[position + 6] if data[position + 3] & 1 else None
            position, _, blocks = _skip_sub_blocks(data, position + 2, blocks, limits)
            continue
        if position + 10 > len(data):
            break
        x, y, frame_width, frame_height = (_u16(data, position + offset) for offset in (1, 3, 5, 7))
        box = (x, y, x + frame_width, y + frame_height)
        drawn = max(drawn[0], box[2]), max(drawn[1], box[3])
        if drawn[0] * drawn[1] > limits.max_canvas_pixels:
            raise GifRejected(
                f"frame {len(durations)} makes the canvas {drawn[0]} x {drawn[1]} pixels, "
                f"{limits.max_canvas_pixels} in all allowed"
            )
        if not durations:
            width, height = drawn
        flags = data[position + 9]
        start = position + 10 + _palette_bytes(flags)
        local = data[position + 10 : start]
        position, complete, blocks = _skip_sub_blocks(data, start + 1, blocks, limits)
        bits = data[start] if start < len(data) else 0
        frames.append(
            _GifFrame(box, bool(flags & 64), local or palette, transparent, disposal, bits, slice(start + 1, position))
        )
        pixels += frame_width * frame_height
        limits.check_work(len(frames), pixels)
        durations.append(_shown_ms(delay))
        delay, disposal, transparent = 0, 0, None
    if not complete and len(durations) > 1:  # the only frame may still decode: some writers leave off what follows it
        durations.pop()
    if not durations:
        raise GifRejected("truncated before the first frame" if truncated else "no frame in it")
    if not pixels:
        raise GifRejected("its frames are empty (0 pixels)")
    return Animation((width, height), durations, truncated, partial(_draw_gif, data, (width, height), frames))


def _skip_sub_blocks(data: bytes, position: int, blocks: int, limits: Limits) -> tuple[int, bool, int]:
    """Pass a chain of sub-blocks (each: length, bytes; 0 ends it).

    Returns the position after it, whether its end was there, and how many blocks there are up to here.
    """
    end = len(data)
    while position < end:
        length = data[position]
        if length == 255:  # nearly all are full: take runs of them at once
            run = data[position : position + 256 * 256 : 256]
            full = len(run) - len(run.lstrip(b"\xff"))
            position += 256 * full
            blocks += full
            continue
        position += length + 1
        blocks += 1
        if blocks > MAX_BLOCKS:
            limits.check_work(0, 0, blocks)
        if not length:
            return position, True, blocks
    return end, False, blocks


def _palette_bytes(flags: int) -> int:
    return 3 << ((flags & 7) + 1) if flags & 128 else 0


def _u16(data: bytes, position: int) -> int:
    return data[position] | data[position + 1] << 8


def _draw_gif(data: bytes, canvas: tuple[int, int], frames: Sequence[_GifFrame]) -> Iterator[Image.Image]:
    screen = Image.new("RGB", canvas, BACKGROUND)
    for index, frame in enumerate(frames):
        left, top, right, bottom = frame.box
        try:
            pixels = Image.frombytes(
                "L", (right - left, bottom - top), data[frame.blocks], "gif", frame.code_bits, frame.interlaced
            )
        except ValueError as error:
            raise BrokenFrame(index) from error
        mask = None
        if frame.transparent is not None:
            mask = pixels.point([255 * (value != frame.transparent) for value in range(256)])
        if frame.palette:
            pixels.putpalette(frame.palette)
        clipped = (min(left, canvas[0]), min(top, canvas[1]), min(right, canvas[0]), min(bottom, canvas[1]))
        before = screen.crop(clipped) if frame.disposal in (3, 4) else None
        screen.paste(pixels.convert("RGB"), (left, top), mask)
        yield screen
        if frame.disposal == 2:
            screen.paste(BACKGROUND, clipped)
        elif before is not None:
            screen.paste(before, clipped)


# Animated WebP and PNG. Pillow draws the one, and unpacks the frames of the other.


def _open_webp(data: bytes, limits: Limits) -> Animation:
    size, animated, durations, end = None, False, [], 12
    length = int.from_bytes(data[4:8], "little") + 8
    data = data[:length]  # what stands behind the file's end is none of it
    for kind, start, stop in _chunks(data, 12, 8, "little", limits):
        body = data[start : min(stop, start + 16)]
        if kind == b"VP8X" and len(body) >= 10:
            animated = bool(body[0] & 2)
            size = int.from_bytes(body[4:7], "little") + 1, int.from_bytes(body[7:10], "little") + 1
        elif kind == b"VP8 " and len(body) >= 10:
            size = size or (_u16(body, 6) & 0x3FFF, _u16(body, 8) & 0x3FFF)
        elif kind == b"VP8L" and len(body) >= 5:
            packed = int.from_bytes(body[1:5], "little")
            size = size or ((packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1)
        if stop > len(data):
            break
        end = stop + (stop - start) % 2
        if kind == b"ANMF" and animated and len(body) >= 16:
            durations.append(_shown_ms(int.from_bytes(body[12:15], "little")))
        elif kind in (b"VP8 ", b"VP8L") and not animated:
            durations = [DEFAULT_DELAY_MS]
        if size:
            limits.check_work(len(durations), len(durations) * size[0] * size[1])
    if size is None or not durations:
        raise GifRejected("truncated before the first frame")
    limits.check_canvas(*size)
    whole = b"RIFF" + (end - 8).to_bytes(4, "little") + data[8:end]
    draw = partial(_draw_webp, whole, size, len(durations))
    return Animation(size, durations, length > len(data), draw)


class _PngFrame(NamedTuple):
    box: tuple[int, int, int, int]  # left, top, width, height
    disposal: int  # 0 keeps, 1 clears, 2 restores
    over: bool  # blended over what is there, not put in its place
    parts: list[slice]  # of the file: its compressed pixels


def _open_png(data: bytes, limits: Limits) -> Animation:
    size, animated, truncated = None, False, True
    header, colours, still, frames, durations = b"", [], [], [], []
    for kind, start, stop in _chunks(data, 8, 12, "big", limits):
        if stop + 4 > len(data):
            if kind == b"fdAT" and len(frames) > 1:  # the first may still decode
                frames.pop()
            break
        if kind == b"IHDR" and stop - start == 13:
            size = int.from_bytes(data[start : start + 4]), int.from_bytes(data[start + 4 : start + 8])
            limits.check_canvas(*size)
            header = data[start + 8 : stop]
        elif kind in (b"PLTE", b"tRNS"):
            colours.append((kind, data[start:stop]))
        elif kind == b"acTL":
            animated = True
        elif kind == b"fcTL" and stop - start == 26 and size:
            width, height, x, y = (int.from_bytes(data[start + at : start + at + 4]) for at in (4, 8, 12, 16))
            numerator, denominator = (int.from_bytes(data[start + at : start + at + 2]) for at in (20, 22))
            frames.append(_PngFrame((x, y, width, height), data[start + 24], data[start + 25] == 1, []))
            durations.append(_shown_ms(1000 * numerator / (denominator or 100)))
            limits.check_work(len(frames), len(frames) * size[0] * size[1])
        elif kind == b"IDAT":  # before any frame it is a still, for whoever knows no animations
            still.append(slice(start, stop))
            if len(frames) == 1:
                frames[0].parts.append(still[-1])
        elif kind == b"fdAT" and frames:
            frames[-1].parts.append(slice(start + 4, stop))
        elif kind == b"IEND":
            truncated = False
            break
    if size is None or not still:
        raise GifRejected("truncated before the first frame")
    if not animated or not frames:
        frames, durations = [_PngFrame((0, 0, *size), 0, False, still)], [DEFAULT_DELAY_MS]
    if len(frames) > 1 and not frames[-1].parts:
        frames.pop()
    draw = partial(_draw_png, data, size, header, colours, frames)
    return Animation(size, durations[: len(frames)], truncated, draw)


def _draw_png(
    data: bytes, canvas: tuple[int, int], header: bytes, colours: list[tuple[bytes, bytes]], frames: list[_PngFrame]
) -> Iterator[Image.Image]:
    """Compose the frames by the PNG specification: Pillow draws the first one over the still that is none of them."""
    screen = Image.new("RGBA", canvas)
    for index, (box, disposal, over, parts) in enumerate(frames):
        left, top, width, height = box
        if not width or not height or left + width > canvas[0] or top + height > canvas[1]:
            raise BrokenFrame(index)
        size = width.to_bytes(4) + height.to_bytes(4)
        chunks = [(b"IHDR", size + header), *colours, (b"IDAT", b"".join(data[part] for part in parts)), (b"IEND", b"")]
        still = b"\x89PNG\r\n\x1a\n" + b"".join(
            len(body).to_bytes(4) + kind + body + zlib.crc32(kind + body).to_bytes(4) for kind, body in chunks
        )
        with _damage_told(index):
            pixels = PngImagePlugin.PngImageFile(BytesIO(still))
            if pixels.mode.startswith("I"):  # grey of 16 bits, which Pillow would cut off at 255
                pixels = Image.fromarray((np.asarray(pixels) >> 8).astype(np.uint8))
            pixels = pixels.convert("RGBA")
        before = screen.crop((left, top, left + width, top + height))
        screen.paste(Image.alpha_composite(before, pixels) if over else pixels, (left, top))
        yield _on_background(screen)
        if disposal == 2 and index:  # before the first frame there is nothing to restore
            screen.paste(before, (left, top))
        elif disposal in (1, 2):
            screen.paste((0, 0, 0, 0), (left, top, left + width, top + height))


def _chunks(data: bytes, position: int, around: int, order: str, limits: Limits) -> Iterator[tuple[bytes, int, int]]:
    """Yield type, start and end of the content of each chunk of a RIFF or PNG file; the end may lie behind the file's.

    around: bytes of a chunk that are not content. RIFF ("little") has the type first, and contents of even length.
    """
    blocks = 0
    while position + 8 <= len(data):
        blocks += 1
        limits.check_work(0, 0, blocks)
        one, two = data[position : position + 4], data[position + 4 : position + 8]
        kind, length = (one, two) if order == "little" else (two, one)
        size = int.from_bytes(length, order)
        yield kind, position + 8, position + 8 + size
        position += around + size + (size % 2 if order == "little" else 0)


def _draw_webp(data: bytes, canvas: tuple[int, int], count: int) -> Iterator[Image.Image]:
    image = None
    for index in range(count):
        with _damage_told(index):
            image = image or WebPImagePlugin.WebPImageFile(BytesIO(data))
            image.seek(index)
            frame = image.convert("RGBA")
        if frame.size != canvas:
            raise BrokenFrame(index)
        yield _on_background(frame)


@contextmanager
def _damage_told(index: int) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise  # the machine's state, not the file's: its size was checked
    except Exception as error:  # damaged files raise nearly every kind in Pillow
        raise BrokenFrame(index) from error


def _on_background(layer: Image.Image) -> Image.Image:
    screen = Image.new("RGB", layer.size, BACKGROUND)
    screen.paste(layer, mask=layer)
    return screen


# Videos. They are decoded twice: their packets do not tell reliably which frames are shown, and when.


def _open_video(data: bytes, limits: Limits) -> Animation:
    canvas: tuple[int, int] | None = None
    times: list[float] = []
    last, truncated = 0.0, False
    try:
        for frame, rate in _video_frames(data, limits):
            canvas = canvas or (frame.width, frame.height)
            usual = 1 / float(rate) if rate else DEFAULT_DELAY_MS / 1000
            last = float(frame.duration * frame.time_base) if frame.duration and frame.time_base else usual
            times.append(frame.time if frame.time is not None else (times[-1] + usual if times else 0.0))
            limits.check_work(len(times), len(times) * canvas[0] * canvas[1])
    except BrokenFrame:
        truncated = True
    if canvas is None:
        raise GifRejected(DAMAGED if truncated else "no frame in it")
    durations = [1000 * (b - a) for a, b in pairwise(times)] + [1000 * last]
    durations = [duration if duration > 0 else DEFAULT_DELAY_MS for duration in durations]
    return Animation(canvas, durations, truncated, partial(_draw_video, data, canvas, limits))


def _video_frames(data: bytes, limits: Limits) -> Iterator[tuple[Any, Any]]:
    """Yield each frame of the first video stream, as PyAV's VideoFrame, with the stream's usual frame rate."""
    import av  # optional: `refusal` has looked for it

    count = 0
    try:
        container = "mp4" if data[4:8] == b"ftyp" else "matroska"
        with av.open(BytesIO(data), format=container) as file:
            stream = file.streams.video[0]
            limits.check_canvas(stream.codec_context.width, stream.codec_context.height)
            stream.codec_context.thread_count = 1  # the GIFs are shared out to processes already
            for frame in file.decode(stream):
                limits.check_canvas(frame.width, frame.height)
                yield frame, stream.average_rate
                count += 1
    except (av.error.FFmpegError, IndexError) as error:  # IndexError: sound alone
        raise BrokenFrame(count) from error


def _draw_video(data: bytes, canvas: tuple[int, int], limits: Limits) -> Iterator[Image.Image]:
    for frame, _ in _video_frames(data, limits):
        yield frame.to_image(width=canvas[0], height=canvas[1])
