"""GIF bytes to sampled, cropped uint8 frames, and back to compact images.

Pillow decodes (its rendering of disposal and palettes is the reference here); Albumentations crops, resizes and, where
asked, changes pixels. Only sampled frames are converted to RGB. A file that cannot be used ends in `GifRejected`, whose
reason is fit for a rejects table.

Choices made where the format, or its decoders, disagree:

- Frame delays of 10 ms or less, or absent, count as 100 ms, as Chromium, Firefox and WebKit show them.
- Transparent pixels are shown on `BACKGROUND`.
- The canvas is the one of the header, enlarged to the first frame where that is larger; what later frames draw outside
  it is cut off, as Chromium does.
- A frame whose data breaks off, and all that follow it, are not used; the rest is, with status "truncated".
"""

import os
import re
import time
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from itertools import accumulate, islice
from pathlib import Path
from typing import Literal, NamedTuple, TypedDict

import cv2
import numpy as np
from PIL import GifImagePlugin, Image, ImageSequence

# Albumentations asks PyPI for its newest version on import, and warns, unless told not to before it is imported.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
import albumentations as A

BACKGROUND = (255, 255, 255)  # what shows through transparent pixels: white, as a web page does
SHORTEST_DELAY_MS = 10  # delays up to this one are not honoured by browsers ...
DEFAULT_DELAY_MS = 100  # ... which show such frames this long

_BLOCK_MARKER = re.compile(rb"[\x21\x2c\x3b]")  # extension, image, trailer


class GifRejected(ValueError):
    """A GIF that cannot be used; `reason` says why in one line."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Limits:
    """What a GIF may cost. Anything over a limit is rejected, most of it before any pixel is decoded."""

    max_canvas_pixels: int = 4_000_000  # width x height, with every frame that reaches outside the canvas
    max_frames: int = 2_000
    max_bytes: int = 64 * 2**20
    decode_seconds: float = 20.0  # wall clock for one GIF, looked at after every frame
    min_frames: int = 1  # 2 rejects stills, which in a fetched dataset are placeholders of deleted GIFs


class View(TypedDict):
    """The frames that stand for a GIF at one group count: row numbers into `Decoded.frames`, in order of time."""

    groups: int
    rows: list[int]


@dataclass(frozen=True)
class Decoded:
    """The sampled frames of one GIF.

    frames: uint8 [S, H, W, 3], the distinct frames that the views need, in order of time.
    frame_indices: their S numbers in the file. frame_times_ms: when each starts to be shown.
    num_frames, duration_ms: of the whole GIF (its usable part, where status is "truncated").
    views: one a group count; group counts that would repeat a smaller one's frames are left out.
    """

    frames: np.ndarray
    frame_indices: list[int]
    frame_times_ms: list[float]
    num_frames: int
    duration_ms: float
    status: Literal["ok", "truncated"]
    views: list[View]


def sample_indices(durations_ms: Sequence[float], num_groups: int, frames_per_group: int = 16) -> list[int]:
    """Frames that stand for a GIF, uniform in time: those shown at (i + 0.5) / N of its duration, N = groups x frames.

    A GIF of at most N frames gives each of them once. A frame shown for long may be given more than once.

    Args:
        durations_ms: how long each frame is shown, in ms, each above 0.
        num_groups: groups of `frames_per_group` consecutive samples, 1 or more.

    Returns:
        min(n, N) frame indices, ascending.

    Raises:
        ValueError: no frame, a duration that is not above 0, or a count below 1.
    """
    if num_groups < 1 or frames_per_group < 1:
        raise ValueError(f"num_groups and frames_per_group must be 1 or more, not {num_groups} and {frames_per_group}")
    durations = np.asarray(durations_ms, dtype=np.float64)
    if durations.ndim != 1 or not len(durations) or not (durations > 0).all():
        raise ValueError("durations_ms must be a list of one or more numbers above 0")
    samples = num_groups * frames_per_group
    if len(durations) <= samples:
        return list(range(len(durations)))
    # Both sides are multiplied by 2 N, so that a sample on the edge between two frames falls exactly there (then the
    # later frame is the one shown) and not to either side of it by rounding.
    ends = np.cumsum(durations) * (2 * samples)
    times = (2 * np.arange(samples) + 1) * durations.sum()
    return np.searchsorted(ends, times, side="right").tolist()


def decode(
    data: bytes,
    *,
    image_size: int,
    groups: Sequence[int] = (1,),
    frames_per_group: int = 16,
    limits: Limits | None = None,
    pixel_transforms: Sequence[A.BasicTransform] | None = None,
    seed: int | None = None,
) -> Decoded:
    """Decode a GIF to its sampled frames: centre crop to the short side's square, then resize.

    Resizing is bilinear while that reads every source pixel (down to half the size), by area below.

    Args:
        data: the file's bytes.
        image_size: height and width of the frames made, in pixels.
        groups: group counts to sample for, see `sample_indices`.
        pixel_transforms: Albumentations transforms of pixel values, applied after the resize. One random draw serves
            all frames of the GIF.
        seed: makes that draw repeatable.

    Raises:
        GifRejected: not a GIF, no usable frame, or over a limit.
        ValueError: an argument out of range, or a transform that changes the frames' shape or type.
    """
    limits = limits or Limits()
    groups = sorted(set(groups))
    if image_size < 1 or not groups or groups[0] < 1:
        raise ValueError(f"image_size and every group count must be 1 or more, not {image_size} and {groups}")
    deadline = time.monotonic() + limits.decode_seconds
    layout = _scan(data, limits, deadline)
    durations, truncated = layout.durations_ms, layout.truncated
    while True:
        if len(durations) < limits.min_frames:
            raise GifRejected(f"{len(durations)} frame(s), at least {limits.min_frames} wanted")
        views, indices = _views(durations, groups, frames_per_group)
        try:
            # A handful is decoded, then resized: by turns each pushes the other out of the processor's caches, and a
            # stack of full-size frames costs more in fresh memory than the calls that it saves.
            crop_and_resize = _geometry(min(layout.canvas), image_size)
            source = _rgb_frames(data, indices, layout.canvas, limits, deadline)
            frames = np.empty((len(indices), image_size, image_size, 3), dtype=np.uint8)
            for start in range(0, len(indices), 16):
                for row, frame in enumerate(list(islice(source, 16)), start):
                    frames[row] = crop_and_resize(image=frame)["image"]
            break
        except _BrokenFrame as error:
            if error.index == 0:
                raise GifRejected(f"the first frame cannot be decoded: {error.__cause__}") from error
            durations, truncated = durations[: error.index], True
    if pixel_transforms:
        frames = _transform_pixels(frames, pixel_transforms, seed)
    starts = [0, *accumulate(durations)]
    return Decoded(
        frames=frames,
        frame_indices=indices,
        frame_times_ms=[float(starts[i]) for i in indices],
        num_frames=len(durations),
        duration_ms=float(starts[-1]),
        status="truncated" if truncated else "ok",
        views=views,
    )


def read_gif(source: str | os.PathLike | bytes | Image.Image, max_bytes: int = Limits.max_bytes) -> bytes:
    """Bytes of a GIF given as a path, "archive.zip::member" (read in memory), bytes, or a Pillow image.

    A Pillow image that was opened from a GIF file gives that file's bytes; any other is encoded as a GIF.

    Raises:
        GifRejected: nothing there, an unreadable archive, or more than max_bytes.
        ValueError: a URL (fetch it first). TypeError: another kind of source.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        return _bounded(bytes(source), max_bytes)
    if isinstance(source, Image.Image):
        return _bounded(_image_bytes(source, max_bytes), max_bytes)
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"a GIF is a path, bytes or a Pillow image, not {type(source).__name__}")
    name = os.fspath(source)
    if name.startswith(("http://", "https://")):
        raise ValueError(f"{name} is a URL: download it first and give its path or bytes")
    archive, separator, member = name.partition("::")
    try:
        if separator:
            return _bounded(_zip_member(archive, member, max_bytes), max_bytes)
        with Path(name).open("rb") as file:
            return _bounded(file.read(max_bytes + 1), max_bytes)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise GifRejected(f"cannot open {error.filename}: {error.strerror}") from error


def encode_frames(frames: np.ndarray, format: Literal["png", "webp"], quality: int = 90) -> list[bytes]:
    """Compress frames one by one: uint8 [S, H, W, 3] to S files, PNG (lossless) or WebP of that quality (1 to 100).

    WebP needs about two thirds of the bytes of a JPEG of the same fidelity (measured on filmed GIFs at 224 pixels).

    Raises:
        ValueError: an unknown format, or frames of another shape or type.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"frames must be uint8 [S, H, W, 3], not {frames.dtype} {list(frames.shape)}")
    if format not in ("png", "webp"):
        raise ValueError(f'unknown frame format {format!r}: use "png" or "webp"')
    # Level 1 takes half the time of the default, and small noisy frames come out no larger.
    options = {"quality": quality, "method": 2} if format == "webp" else {"compress_level": 1}
    encoded = []
    for frame in frames:
        buffer = BytesIO()
        Image.fromarray(frame).save(buffer, format, **options)
        encoded.append(buffer.getvalue())
    return encoded


def decode_frames(encoded: Sequence[bytes]) -> np.ndarray:
    """Undo `encode_frames`: S PNG or WebP files of one size to uint8 [S, H, W, 3].

    Raises:
        ValueError: no frame, frames of different sizes, or one that is damaged (its number is named).
    """
    if not encoded:
        raise ValueError("no frames to decode")
    frames = []
    for number, data in enumerate(encoded):
        try:
            with Image.open(BytesIO(data), formats=("PNG", "WEBP")) as image:
                frames.append(np.asarray(image.convert("RGB")))
        except (OSError, SyntaxError) as error:  # Pillow reports a broken PNG chunk as a SyntaxError
            raise ValueError(f"stored frame {number} of {len(encoded)} cannot be decoded: {error}") from error
        if frames[-1].shape != frames[0].shape:
            raise ValueError(f"stored frame {number} is {frames[-1].shape[:2]}, the first is {frames[0].shape[:2]}")
    return np.stack(frames)


class _Layout(NamedTuple):
    canvas: tuple[int, int]  # width, height
    durations_ms: list[int]
    truncated: bool


class _BrokenFrame(Exception):
    """Pillow could not decode frame `index`; the cause is chained."""

    def __init__(self, index: int):
        super().__init__(f"frame {index}")
        self.index = index


def _scan(data: bytes, limits: Limits, deadline: float) -> _Layout:
    """Walk over a GIF's blocks without decoding (GIF89a specification), and check it against the limits."""
    _bounded(data, limits.max_bytes)
    if not data.startswith((b"GIF87a", b"GIF89a")):
        raise GifRejected(f"not a GIF: {_kind(data)}")
    if len(data) < 13:
        raise GifRejected("truncated inside the header")
    width, height = _u16(data, 6), _u16(data, 8)
    if not width or not height:
        raise GifRejected(f"the canvas is empty ({width} x {height} pixels)")
    if width * height > limits.max_canvas_pixels:
        raise GifRejected(f"the canvas is {width} x {height} pixels, {limits.max_canvas_pixels} in all allowed")
    drawn = (width, height)  # Pillow grows its canvas to hold every frame
    durations: list[int] = []
    delay = 0
    position = 13 + _palette_bytes(data[10])
    truncated = True  # until the trailer, or a frame, proves otherwise
    complete = True  # the data of the last frame
    while match := _BLOCK_MARKER.search(data, position):  # bytes that are no marker are skipped, as Pillow does
        position = match.start()
        if match[0] == b";":
            truncated = False
            break
        if match[0] == b"!":
            if data[position + 1 : position + 2] == b"\xf9" and position + 6 <= len(data):
                delay = _u16(data, position + 4) * 10
            position, _ = _skip_sub_blocks(data, position + 2)
            continue
        if position + 10 > len(data):
            break
        x, y, frame_width, frame_height = (_u16(data, position + offset) for offset in (1, 3, 5, 7))
        drawn = max(drawn[0], x + frame_width), max(drawn[1], y + frame_height)
        if drawn[0] * drawn[1] > limits.max_canvas_pixels:
            raise GifRejected(
                f"frame {len(durations)} makes the canvas {drawn[0]} x {drawn[1]} pixels, "
                f"{limits.max_canvas_pixels} in all allowed"
            )
        if not durations:
            width, height = drawn
        if len(durations) == limits.max_frames:
            raise GifRejected(f"more than {limits.max_frames} frames")
        if time.monotonic() > deadline:
            raise GifRejected(f"reading the file took longer than {limits.decode_seconds:g} s")
        position, complete = _skip_sub_blocks(data, position + 11 + _palette_bytes(data[position + 9]))
        durations.append(delay if delay > SHORTEST_DELAY_MS else DEFAULT_DELAY_MS)
        delay = 0
    if not complete and len(durations) > 1:  # the only frame may still decode: some writers leave off what follows it
        durations.pop()
    if not durations:
        raise GifRejected("truncated before the first frame" if truncated else "no frame in it")
    return _Layout((width, height), durations, truncated)


def _skip_sub_blocks(data: bytes, position: int) -> tuple[int, bool]:
    """Position after a chain of sub-blocks (each: length, bytes; 0 ends it), and whether the end was there."""
    end = len(data)
    while position < end:
        length = data[position]
        if length == 255:  # nearly all are full: take runs of them at once
            run = data[position : position + 256 * 256 : 256]
            position += 256 * (len(run) - len(run.lstrip(b"\xff")))
            continue
        position += length + 1
        if not length:
            return position, True
    return end, False


def _palette_bytes(flags: int) -> int:
    return 3 << ((flags & 7) + 1) if flags & 128 else 0


def _u16(data: bytes, position: int) -> int:
    return data[position] | data[position + 1] << 8


def _kind(data: bytes) -> str:
    """What a file that is no GIF seems to be, by its first bytes."""
    if not data:
        return "an empty file"
    for name, found in {
        "a JPEG image": data.startswith(b"\xff\xd8\xff"),
        "a PNG image": data.startswith(b"\x89PNG\r\n\x1a\n"),
        "a WebP image": data[:4] == b"RIFF" and data[8:12] == b"WEBP",
        "an MP4 video": data[4:8] == b"ftyp",
        "a WebM or Matroska video": data.startswith(b"\x1aE\xdf\xa3"),
        "a ZIP archive": data.startswith(b"PK\x03\x04"),
        "gzip-compressed data": data.startswith(b"\x1f\x8b"),
    }.items():
        if found:
            return name
    text = data[:1024].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body")) or b"<html" in text:
        return "an HTML page (an error page in place of the file?)"
    if text.startswith(b"<?xml"):
        return "an XML document (an error message in place of the file?)"
    if text.startswith((b"{", b"[")):
        return "JSON text (an error message in place of the file?)"
    return f"it starts with {data[:8]!r}"


def _bounded(data: bytes, max_bytes: int) -> bytes:
    if len(data) > max_bytes:
        raise GifRejected(f"more than {max_bytes} bytes")
    return data


def _views(durations: Sequence[float], groups: Sequence[int], frames_per_group: int) -> tuple[list[View], list[int]]:
    """The distinct views for ascending group counts, and the frame indices that their rows refer to."""
    samples = {}
    for count in groups:
        samples[count] = sample_indices(durations, count, frames_per_group)
        if len(durations) <= count * frames_per_group:  # every frame is in it: more groups show the same
            break
    indices = sorted(set().union(*samples.values()))
    row = {index: number for number, index in enumerate(indices)}
    return [View(groups=count, rows=[row[i] for i in chosen]) for count, chosen in samples.items()], indices


def _rgb_frames(
    data: bytes, indices: Sequence[int], canvas: tuple[int, int], limits: Limits, deadline: float
) -> Iterator[np.ndarray]:
    """Yield the frames of these ascending indices, uint8 [height, width, 3]; others are drawn but not converted."""
    wanted = set(indices)
    image = None
    for index in range(indices[-1] + 1):
        try:
            if image is None:
                image = GifImagePlugin.GifImageFile(BytesIO(data))
            image.seek(index)
            image.load()
            frame = _rgb(image, canvas) if index in wanted else None
        except MemoryError:
            raise  # the machine's state, not the file's: its size was checked
        except Exception as error:  # damaged files raise nearly every kind in Pillow
            raise _BrokenFrame(index) from error
        if time.monotonic() > deadline:
            raise GifRejected(f"decoding took longer than {limits.decode_seconds:g} s (at frame {index})")
        if frame is not None:
            yield frame


def _rgb(image: Image.Image, canvas: tuple[int, int]) -> np.ndarray:
    """The middle square of the current frame's canvas, transparent pixels on BACKGROUND: uint8 [side, side, 3]."""
    side = min(canvas)
    left, top = ((length - side) // 2 for length in canvas)
    if image.size != (side, side):  # first, so that nothing is done to what is cut away
        image = image.crop((left, top, left + side, top + side))
    # Pillow's has_transparency_data fails where a grey GIF's second frame is in mode P without a palette object.
    if image.mode == "RGBA" or "transparency" in image.info:
        layer = image.convert("RGBA")
        if layer.getchannel("A").getextrema() != (255, 255):
            image = Image.new("RGB", layer.size, BACKGROUND)
            image.paste(layer, mask=layer)
        else:
            image = layer
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


@lru_cache(maxsize=512)
def _geometry(side: int, image_size: int) -> A.Compose:
    interpolation = cv2.INTER_LINEAR if side <= 2 * image_size else cv2.INTER_AREA
    return A.Compose([A.CenterCrop(side, side), A.Resize(image_size, image_size, interpolation=interpolation)])


def _transform_pixels(frames: np.ndarray, transforms: Sequence[A.BasicTransform], seed: int | None) -> np.ndarray:
    changed = A.Compose(list(transforms), seed=seed)(images=frames)["images"]
    if changed.shape != frames.shape or changed.dtype != frames.dtype:
        raise ValueError(
            f"the pixel transforms made {changed.dtype} {list(changed.shape)} of {frames.dtype} {list(frames.shape)}: "
            "use only transforms that keep the frames' shape and type"
        )
    return changed


def _image_bytes(image: Image.Image, max_bytes: int) -> bytes:
    # Pillow drops `fp` once a frame is loaded, but keeps the file of an animation open as `_fp`.
    file = getattr(image, "fp", None) or getattr(image, "_fp", None)
    if isinstance(image, GifImagePlugin.GifImageFile) and file is not None:
        position = file.tell()
        file.seek(0)
        data = file.read(max_bytes + 1)
        file.seek(position)
        return data
    position = image.tell()
    frames = [_writable(frame) for frame in ImageSequence.Iterator(image)]
    image.seek(position)
    buffer = BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def _writable(frame: Image.Image) -> Image.Image:
    """A copy of a frame in a mode that Pillow can write to a GIF."""
    if frame.mode in ("1", "L", "P", "RGB", "RGBA"):
        return frame.copy()
    return frame.convert("RGBA" if frame.has_transparency_data else "RGB")


def _zip_member(archive: str, member: str, max_bytes: int) -> bytes:
    stat = os.stat(archive)
    try:
        # The process is part of the key: processes that share an open file also share its position.
        opened = _open_zip(archive, stat.st_mtime_ns, stat.st_size, os.getpid())
        with opened.open(member) as file:
            return file.read(max_bytes + 1)
    except KeyError as error:
        raise GifRejected(f"{member} is not in {archive}") from error
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, zlib.error) as error:
        raise GifRejected(f"{member} cannot be read from {archive}: {error}") from error


@lru_cache(maxsize=4)
def _open_zip(archive: str, mtime_ns: int, size: int, process: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(archive)
