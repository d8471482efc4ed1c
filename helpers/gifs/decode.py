"""GIF bytes to sampled, cropped uint8 frames, and back to compact images.

`helpers.gifs.formats` reads and draws; Albumentations crops, resizes and, where asked, changes pixels. Only sampled
frames are cropped. A file that cannot be used ends in `GifRejected`, whose reason is fit for a rejects table.
"""

import os
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from itertools import accumulate, islice
from pathlib import Path
from typing import Literal, TypedDict

import cv2
import numpy as np
import pyarrow as pa
from PIL import Image, ImageFile, ImageSequence

from helpers.gifs.formats import Animation, BrokenFrame, GifRejected, Limits, open_animation
from helpers.gifs.kinds import SIGNATURE_BYTES, kind_of

# Albumentations asks PyPI for its newest version on import, and warns, unless told not to before it is imported.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
import albumentations as A


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
    """Decode a GIF, or another animation, to its sampled frames: centre crop to a square, then resize.

    A square of at least twice the wanted size is halved until it is smaller (means of 2 x 2 pixels; of an odd side the
    last row and column go), and the rest of the way is bilinear, which then reads every pixel.

    Args:
        data: the file's bytes.
        image_size: height and width of the frames made, in pixels.
        groups: group counts to sample for, see `sample_indices`.
        pixel_transforms: Albumentations transforms of pixel values, applied after the resize. One random draw serves
            all frames of the GIF.
        seed: makes that draw repeatable.

    Raises:
        GifRejected: not a GIF, nor another kind that is read; no usable frame; or over a limit.
        ValueError: an argument out of range, or a transform that changes the frames' shape or type.
    """
    limits = limits or Limits()
    groups = sorted(set(groups))
    if image_size < 1 or not groups or groups[0] < 1:
        raise ValueError(f"image_size and every group count must be 1 or more, not {image_size} and {groups}")
    animation = open_animation(data, limits)
    durations, truncated = animation.durations_ms, animation.truncated
    crop_and_resize = _geometry(min(animation.canvas), image_size)
    while True:
        if len(durations) < limits.min_frames:
            raise GifRejected(f"{len(durations)} frame(s), at least {limits.min_frames} wanted")
        views, indices = _views(durations, groups, frames_per_group)
        try:
            # A handful is decoded, then resized: by turns each pushes the other out of the processor's caches, and a
            # stack of full-size frames costs more in fresh memory than the calls that it saves.
            source = _square_frames(animation, indices)
            frames = np.empty((len(indices), image_size, image_size, 3), dtype=np.uint8)
            for start in range(0, len(indices), 16):
                for row, frame in enumerate(list(islice(source, 16)), start):
                    frames[row] = crop_and_resize(image=frame)["image"]
            break
        except BrokenFrame as error:
            if error.index == 0:
                raise GifRejected("the first frame is damaged") from error
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

    A Pillow image that was opened from a GIF, or from another animation that is read, gives that file's bytes; any
    other is encoded without loss. One that Pillow copied, converted or resized holds one frame, whatever it was opened
    from: this is told where its `info` shows a GIF or an animation, and cannot be told where the info was cleared, of a
    TIFF, or of an image made anew from pixels.

    Raises:
        GifRejected: nothing there, an unreadable archive, more than max_bytes, or a Pillow image that is closed or is
            a copy of one frame of an animation.
        ValueError: a URL (fetch it first). TypeError: another kind of source.
    """
    limits = Limits(max_bytes=max_bytes)
    if isinstance(source, bytes | bytearray | memoryview):
        return limits.check_bytes(bytes(source))
    if isinstance(source, Image.Image):
        return limits.check_bytes(_image_bytes(source, max_bytes))
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"a GIF is a path, bytes or a Pillow image, not {type(source).__name__}")
    name = os.fspath(source)
    if name.startswith(("http://", "https://")):
        raise ValueError(f"{name} is a URL: download it first and give its path or bytes")
    archive, member = _archive_and_member(name)
    try:
        if archive:
            return limits.check_bytes(_zip_member(archive, member, max_bytes))
        with Path(name).open("rb") as file:
            return limits.check_bytes(file.read(max_bytes + 1))
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


def _square_frames(animation: Animation, indices: Sequence[int]) -> Iterator[np.ndarray]:
    """Yield the middle squares of the frames of these ascending indices, uint8 [side, side, 3]; all are drawn."""
    wanted, end, side = set(indices), indices[-1] + 1, min(animation.canvas)
    left, top = ((length - side) // 2 for length in animation.canvas)
    index = -1
    for index, frame in enumerate(islice(animation.draw(), end)):
        if index in wanted:
            yield _pixels(frame, left, top, side)
    if index + 1 < end:
        raise BrokenFrame(index + 1)


def _pixels(image: Image.Image, left: int, top: int, side: int) -> np.ndarray:
    """A square of an RGB image as uint8 [side, side, 3]: read where Pillow keeps it, not copied out first."""
    try:
        kept = np.asarray(pa.array(image).flatten()).reshape(image.height, image.width, 4)
    except ValueError:  # a picture so large that Pillow keeps it in several pieces
        return np.asarray(image.crop((left, top, left + side, top + side)))
    return cv2.cvtColor(kept[top : top + side, left : left + side], cv2.COLOR_RGBA2RGB)


@lru_cache(maxsize=512)
def _geometry(side: int, image_size: int) -> A.Compose:
    steps: list[A.BasicTransform] = [A.CenterCrop(side, side)]
    while (half := side // 2) >= image_size:
        if side % 2:
            steps.append(A.Crop(0, 0, 2 * half, 2 * half))
        steps.append(A.Resize(half, half, interpolation=cv2.INTER_AREA))  # of exactly half: a mean of 2 x 2
        side = half
    if side != image_size:
        steps.append(A.Resize(image_size, image_size, interpolation=cv2.INTER_LINEAR))
    return A.Compose(steps)


def _transform_pixels(frames: np.ndarray, transforms: Sequence[A.BasicTransform], seed: int | None) -> np.ndarray:
    changed = A.Compose(list(transforms), seed=seed)(images=frames)["images"]
    if changed.shape != frames.shape or changed.dtype != frames.dtype:
        raise ValueError(
            f"the pixel transforms made {changed.dtype} {list(changed.shape)} of {frames.dtype} {list(frames.shape)}: "
            "use only transforms that keep the frames' shape and type"
        )
    return changed


def _image_bytes(image: Image.Image, max_bytes: int) -> bytes:
    # a copy keeps what Pillow read of the animation, but of its frames only the one that was shown
    if not isinstance(image, ImageFile.ImageFile) and (marks := _marks_of_an_animation(image)):
        raise GifRejected(
            "the Pillow image is a copy of one frame of an animation: give the image that Image.open returned, or the "
            f"file's path or bytes (for this frame alone, delete {' and '.join(marks)} from the image's info)"
        )
    try:
        if image.format == "GIF" or getattr(image, "is_animated", False):
            data = _own_bytes(image, max_bytes)
            if kind_of(data[:SIGNATURE_BYTES]).reader:
                return data
        position = image.tell()
        frames = [_writable(frame) for frame in ImageSequence.Iterator(image)]
        image.seek(position)
    except ValueError as error:  # so say Pillow and Python's files
        raise GifRejected(
            "the Pillow image, or the file that it was opened from, is closed: ask before it is closed, or give the "
            "file's path or bytes"
        ) from error
    except (OSError, SyntaxError) as error:  # Pillow reports a broken PNG chunk as a SyntaxError
        raise GifRejected("the file of the Pillow image is damaged") from error
    buffer = BytesIO()
    if len(frames) == 1:
        frames[0].save(buffer, "PNG", compress_level=1)
    else:
        first, *rest = (frame.convert("RGBA") for frame in frames)  # a PNG has one palette
        first.save(buffer, "PNG", save_all=True, append_images=rest, disposal=0, blend=0, compress_level=1)
    return buffer.getvalue()


def _marks_of_an_animation(image: Image.Image) -> list[str]:
    """The keys of a Pillow image's info that its reader sets for animations, or for every GIF."""
    info = image.info
    found = {
        "loop": "loop" in info,
        "duration": info.get("duration"),
        "version": info.get("version") in (b"GIF87a", b"GIF89a"),
    }
    return [key for key, there in found.items() if there]


def _own_bytes(image: ImageFile.ImageFile, max_bytes: int) -> bytes:
    """The file that an image was opened from; nothing where it cannot be had."""
    # Pillow drops `fp` once a frame is loaded, but keeps the file of most animations open as `_fp`.
    if file := getattr(image, "fp", None) or getattr(image, "_fp", None):
        position = file.tell()
        file.seek(0)
        data = file.read(max_bytes + 1)
        file.seek(position)
        return data
    try:
        with open(image.filename, "rb") as file:
            return file.read(max_bytes + 1)
    except OSError:  # it had no name, or is gone: the frames are still there
        return b""


def _writable(frame: Image.Image) -> Image.Image:
    """A copy of a frame in a mode that Pillow can write to a PNG."""
    if frame.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        return frame.copy()
    return frame.convert("RGBA" if frame.has_transparency_data else "RGB")


def _archive_and_member(name: str) -> tuple[str, str]:
    """Take "archive.zip::member" apart; "" and the name for a file. Folders and files may have "::" in their names."""
    if "::" not in name or os.path.lexists(name):
        return "", name
    splits = [(name[: found.start()], name[found.start() + 2 :]) for found in re.finditer("(?=::)", name)]
    return next((split for split in splits if os.path.isfile(split[0])), splits[0])


def _zip_member(archive: str, member: str, max_bytes: int) -> bytes:
    stat = os.stat(archive)
    try:
        # The process is part of the key: processes that share an open file also share its position.
        opened = _open_zip(archive, stat.st_mtime_ns, stat.st_size, os.getpid())
        with opened.open(member) as file:
            return file.read(max_bytes + 1)
    except KeyError as error:
        raise GifRejected(f"{member} is not in {archive}") from error
    except RuntimeError as error:  # NotImplementedError among them
        raise GifRejected(f"{member} cannot be read from {archive}: it is encrypted, or packed as few are") from error
    except (zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise GifRejected(f"{member} cannot be read from {archive}: the archive is damaged") from error


@lru_cache(maxsize=4)
def _open_zip(archive: str, mtime_ns: int, size: int, process: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(archive)
