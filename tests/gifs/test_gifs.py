"""GIF decoding against hand-written files, a second renderer written as loops, and Pillow's own full conversion."""

import os
import random
import re
import subprocess
import sys
import tracemalloc
import zipfile
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import albumentations as A
import numpy as np
import pytest
from PIL import Image, ImageFile, ImageSequence, features

from helpers.gifs import decode as decoding
from helpers.gifs.decode import GifRejected, Limits, decode, decode_frames, encode_frames, read_gif, sample_indices

PALETTE = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0)]
WHITE = (255, 255, 255)


# A GIF writer of its own, so that every byte is known. Nothing is compressed: a clear code comes before codes widen.


def lzw(pixels: list[int], bits: int = 2) -> bytes:
    clear, stop, width = 1 << bits, (1 << bits) + 1, bits + 1
    codes = []
    for number, pixel in enumerate(pixels):
        if number % (clear - 2) == 0:
            codes.append(clear)
        codes.append(pixel)
    codes.append(stop)
    value = sum(code << (width * place) for place, code in enumerate(codes))
    packed = value.to_bytes((width * len(codes) + 7) // 8, "little")
    blocks = [packed[i : i + 255] for i in range(0, len(packed), 255)]
    return bytes([bits]) + b"".join(bytes([len(block)]) + block for block in blocks) + b"\0"


def u16(*values: int) -> bytes:
    return b"".join(value.to_bytes(2, "little") for value in values)


def palette_bytes(colors) -> bytes:
    return bytes(channel for color in colors for channel in color)


def frame_block(box, pixels, *, delay=10, disposal=0, transparent=None, palette=None, control=True) -> bytes:
    """An image block: box is (x, y, width, height), delay in hundredths of a second."""
    flags = disposal << 2 | (transparent is not None)
    extension = b"!\xf9\x04" + bytes([flags]) + u16(delay) + bytes([transparent or 0]) + b"\0"
    local = bytes([0x81]) + palette_bytes(palette) if palette else b"\0"
    return (extension if control else b"") + b"," + u16(*box) + local + lzw(pixels)


def gif(blocks, size=(4, 4), trailer=b";") -> bytes:
    return b"GIF89a" + u16(*size) + b"\x81\0\0" + palette_bytes(PALETTE) + b"".join(blocks) + trailer


def flat_gif(colors, delays, size=(4, 4)) -> bytes:
    """Whole frames of one colour each."""
    pixels = size[0] * size[1]
    return gif(
        [frame_block((0, 0, *size), [c] * pixels, delay=d) for c, d in zip(colors, delays, strict=True)], size=size
    )


def noisy_gif(frames=12, size=(40, 30), delays=80, seed=0) -> bytes:
    rng = np.random.default_rng(seed)
    first, *rest = (Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)) for _ in range(frames))
    buffer = BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=rest, duration=delays)
    return buffer.getvalue()


def pillow_frames(data: bytes) -> list[np.ndarray]:
    """All frames over white, cut to the first one's size and to its centre square."""
    frames = []
    with Image.open(BytesIO(data)) as image:
        width, height = image.size
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        for frame in ImageSequence.Iterator(image):
            whole = Image.new("RGBA", (width, height), (*WHITE, 255))
            whole.alpha_composite(frame.convert("RGBA").crop((0, 0, width, height)))
            frames.append(np.asarray(whole.convert("RGB"))[top : top + side, left : left + side])
    return frames


# Sampling


def loop_sample(durations, groups, frames_per_group):
    """Step through the samples one by one, in exact arithmetic."""
    samples = groups * frames_per_group
    if len(durations) <= samples:
        return list(range(len(durations)))
    chosen = []
    for i in range(samples):
        at = Fraction(2 * i + 1, 2 * samples) * sum(durations)
        frame, shown_until = 0, durations[0]
        while shown_until <= at:
            frame += 1
            shown_until += durations[frame]
        chosen.append(frame)
    return chosen


def test_sampling_equals_stepping_through_time():
    rng = random.Random(0)
    for _ in range(200):
        durations = [rng.choice([20, 30, 50, 100, 1000, 70]) for _ in range(rng.randint(1, 120))]
        groups, size = rng.choice([1, 2, 3, 4]), rng.choice([1, 3, 8, 16])
        assert sample_indices(durations, groups, size) == loop_sample(durations, groups, size)


def test_sampling_on_the_edge_between_two_frames_takes_the_later_one():
    assert sample_indices([30] * 32, 1, 16) == list(range(1, 32, 2))
    assert sample_indices([30] * 96, 3, 16) == list(range(1, 96, 2))


def test_sampling_is_uniform_in_time_not_in_index():
    durations = [900] + [10] * 10
    assert sample_indices(durations, 1, 10).count(0) == 9  # the first frame is shown nine tenths of the time
    assert sample_indices([100] * 11, 1, 10) == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]


@pytest.mark.parametrize(
    ("durations", "groups", "size"), [([], 1, 16), ([10, 0], 1, 16), ([10], 0, 16), ([10], 1, 0), ([[10]], 1, 16)]
)
def test_sampling_refuses_what_has_no_meaning(durations, groups, size):
    with pytest.raises(ValueError, match="must be"):
        sample_indices(durations, groups, size)


def test_views_times_and_frames_agree():
    delays = [3, 50, 7, 7, 20, 3, 3, 90, 5, 11] * 3  # hundredths of a second
    colors = [i % 4 for i in range(30)]
    decoded = decode(flat_gif(colors, delays), image_size=4, groups=(3, 1, 2), frames_per_group=8)
    durations = [10 * d for d in delays]
    assert decoded.num_frames == 30
    assert decoded.duration_ms == sum(durations)
    assert [view["groups"] for view in decoded.views] == [1, 2, 3]
    for view in decoded.views:
        sampled = [decoded.frame_indices[row] for row in view["rows"]]
        assert sampled == loop_sample(durations, view["groups"], 8)
    used = {i for count in (1, 2, 3) for i in loop_sample(durations, count, 8)}
    assert decoded.frame_indices == sorted(used)
    assert decoded.frame_times_ms == [sum(durations[:i]) for i in decoded.frame_indices]
    for index, frame in zip(decoded.frame_indices, decoded.frames, strict=True):
        assert (frame == PALETTE[colors[index]]).all()


@pytest.mark.parametrize(
    ("frames", "kept"), [(3, [(1, 3)]), (8, [(1, 8)]), (9, [(1, 8), (2, 9)]), (20, [(1, 8), (2, 16), (3, 20)])]
)
def test_group_counts_that_show_the_same_frames_are_kept_once(frames, kept):
    decoded = decode(flat_gif([0] * frames, [10] * frames), image_size=4, groups=(1, 2, 3), frames_per_group=8)
    assert [(view["groups"], len(view["rows"])) for view in decoded.views] == kept


def test_short_and_absent_delays_are_shown_as_browsers_do():
    whole = (0, 0, 4, 4)
    data = gif(
        [
            frame_block(whole, [0] * 16, delay=0),
            frame_block(whole, [1] * 16, delay=1),
            frame_block(whole, [2] * 16, delay=2),
            frame_block(whole, [3] * 16, control=False),
            frame_block(whole, [0] * 16, delay=50),
        ]
    )
    decoded = decode(data, image_size=4)
    assert decoded.frame_times_ms == [0, 100, 200, 220, 320]
    assert decoded.duration_ms == 820


# Rendering


def test_frames_equal_full_sequential_conversion_by_pillow():
    data = noisy_gif(frames=20, size=(40, 30))
    expected = pillow_frames(data)
    decoded = decode(data, image_size=30, groups=(1, 2), frames_per_group=8)
    assert decoded.frames.dtype == np.uint8
    for index, frame in zip(decoded.frame_indices, decoded.frames, strict=True):
        np.testing.assert_array_equal(frame, expected[index])


def test_what_reaches_outside_the_canvas_is_cut_off():
    data = gif([frame_block((0, 0, 4, 4), [0] * 16), frame_block((2, 2, 4, 4), [1] * 16)])
    expected = np.full((4, 4, 3), PALETTE[0])
    expected[2:, 2:] = PALETTE[1]
    np.testing.assert_array_equal(decode(data, image_size=4).frames[1], expected)


def test_a_larger_first_frame_enlarges_the_canvas():
    pixels = [(x + y) % 4 for y in range(6) for x in range(6)]
    data = gif([frame_block((0, 0, 6, 6), pixels)])
    expected = np.array([PALETTE[index] for index in pixels]).reshape(6, 6, 3)
    np.testing.assert_array_equal(decode(data, image_size=6).frames[0], expected)


@pytest.mark.parametrize("size", [(12, 4), (4, 12)])
def test_crop_comes_before_resize(size):
    """Red outside the centre square would bleed into its edge if the whole frame were resized."""
    pixels = [int(4 <= max(x, y) < 8) for y in range(size[1]) for x in range(size[0])]
    data = gif([frame_block((0, 0, *size), pixels)], size=size)
    for image_size in (2, 3, 4, 9):
        frames = decode(data, image_size=image_size).frames
        assert frames.shape == (1, image_size, image_size, 3)
        assert (frames == PALETTE[1]).all()


@pytest.mark.parametrize("factor", [2, 4])
def test_halving_averages_all_source_pixels(factor):
    data = noisy_gif(frames=2, size=(24, 24))
    expected = np.stack(pillow_frames(data)).reshape(2, 24 // factor, factor, 24 // factor, factor, 3).mean((2, 4))
    assert np.abs(decode(data, image_size=24 // factor).frames - expected).max() <= 1


@pytest.mark.parametrize(("side", "size"), [(23, 11), (24, 8), (26, 9), (29, 7), (11, 16)])
def test_resizing_is_means_of_two_by_two_and_then_bilinear(side, size):
    """Written as loops: pixel centres at (i + 0.5) / n, and the last row and column of an odd side left out."""

    def bilinear(pixels: np.ndarray, length: int) -> np.ndarray:
        at = np.clip((np.arange(length) + 0.5) * len(pixels) / length - 0.5, 0, len(pixels) - 1)
        low = np.minimum(np.floor(at).astype(int), max(len(pixels) - 2, 0))
        share = (at - low)[:, None, None]
        return pixels[low] * (1 - share) + pixels[low + 1] * share

    data = noisy_gif(frames=1, size=(side, side))
    pixels = np.stack(pillow_frames(data))[0].astype(float)
    halvings = 0
    while (half := len(pixels) // 2) >= size:
        even = pixels[: 2 * half, : 2 * half]
        pixels = (even[::2, ::2] + even[1::2, ::2] + even[::2, 1::2] + even[1::2, 1::2]) / 4
        halvings += 1
    if len(pixels) != size:
        pixels = bilinear(bilinear(pixels, size).swapaxes(0, 1), size).swapaxes(0, 1)
    assert np.abs(decode(data, image_size=size).frames[0] - pixels).max() <= 1 + 0.5 * halvings


# Pixel transforms


CHAIN = [A.RandomBrightnessContrast(0.5, 0.5, p=1), A.HueSaturationValue(p=1), A.GaussNoise((0.2, 0.3), p=1)]


def test_pixel_transforms_draw_once_for_all_frames():
    still = decode(flat_gif([1] * 5, [10] * 5, size=(16, 16)), image_size=16, pixel_transforms=CHAIN, seed=3).frames
    assert len(np.unique(still[0].reshape(-1, 3), axis=0)) > 10  # the noise is there
    for frame in still[1:]:
        np.testing.assert_array_equal(frame, still[0])


def test_pixel_transforms_repeat_with_the_seed_and_differ_without():
    data = noisy_gif(frames=3)
    first, again, other = (decode(data, image_size=16, pixel_transforms=CHAIN, seed=seed).frames for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert (first != decode(data, image_size=16).frames).any()


@pytest.mark.parametrize("transform", [A.Resize(8, 8), A.ToFloat(255)])
def test_pixel_transforms_must_keep_shape_and_type(transform):
    with pytest.raises(ValueError, match="keep the frames' shape and type"):
        decode(noisy_gif(frames=2), image_size=16, pixel_transforms=[transform])


# Broken input


def picture(kind: str) -> bytes:
    out = BytesIO()
    Image.new("RGB", (8, 8)).save(out, kind)
    return out.getvalue()


HEADER = b"GIF89a" + u16(4, 4) + b"\x81\0\0" + palette_bytes(PALETTE)
WHOLE = (0, 0, 4, 4)
BAD = {
    "empty file": (b"", "an empty file"),
    "html": (b"\n<!DOCTYPE html><html><body>404</body></html>", "an HTML page"),
    "jpeg": (picture("JPEG"), "a JPEG image"),
    "bmp": (picture("BMP"), "a BMP image"),
    "avif": (picture("AVIF") if features.check("avif") else b"\0\0\0\x20ftypavif", "an AVIF image (convert it: ffmpeg"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "a Git LFS pointer (fetch"),
    "text": (b"Not Found", "the text “Not Found” (an error message"),
    "zeros": (bytes(700), "begins with zero bytes"),
    "unknown": (b"\x01\x02\x80\x81\xff", "an unknown kind of file (it begins with the bytes 01 02 80 81 ff)"),
    "half a header": (b"GIF89a\x04\x00", "truncated inside the header"),
    "header only": (HEADER, "truncated before the first frame"),
    "no frame": (HEADER + b";", "no frame"),
    "bomb in the header": (b"GIF89a" + u16(65000, 65000) + b"\x81\0\0" + HEADER[13:], "65000 x 65000"),
    "bomb in a frame": (gif([frame_block(WHOLE, [0] * 16), frame_block((65000, 65000, 4, 4), [0] * 16)]), "frame 1"),
    "zero width": (gif([frame_block(WHOLE, [0] * 16)], size=(0, 4)), "canvas is empty"),
    "zero height": (gif([frame_block(WHOLE, [0] * 16)], size=(4, 0)), "canvas is empty"),
    "empty frames": (gif([frame_block((0, 0, 0, 4), []), frame_block((1, 1, 3, 0), [])]), "its frames are empty"),
    "too few pixels": (gif([frame_block(WHOLE, [0] * 5)]), "the first frame is damaged"),
    "descriptor cut off": (HEADER + b",\0\0\0", "truncated before the first frame"),
    "first frame cut off": (gif([frame_block(WHOLE, [0] * 16)], trailer=b"")[:-8], "the first frame is damaged"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_rejected_with_the_reason(case):
    data, reason = BAD[case]
    with pytest.raises(GifRejected) as caught:
        decode(data, image_size=8)
    assert reason in caught.value.reason
    assert "\n" not in caught.value.reason


def test_canvas_is_checked_before_anything_is_decoded(monkeypatch):
    monkeypatch.setattr(Image, "frombytes", lambda *_: pytest.fail("decoded"))
    for case in ("bomb in the header", "bomb in a frame", "zero width", "header only"):
        with pytest.raises(GifRejected):
            decode(BAD[case][0], image_size=8)


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (Limits(max_canvas_pixels=1199), "40 x 30 pixels, 1199 in all allowed"),
        (Limits(max_frames=11), "more than 11 frames"),
        (Limits(max_bytes=1000), "more than 1000 bytes"),
        (Limits(min_frames=13), "12 frame(s), at least 13 wanted"),
    ],
)
def test_limits(limits, reason):
    with pytest.raises(GifRejected) as caught:
        decode(noisy_gif(frames=12, size=(40, 30)), image_size=8, limits=limits)
    assert reason in caught.value.reason


def test_limits_are_inclusive():
    data = noisy_gif(frames=12, size=(40, 30))
    limits = Limits(max_canvas_pixels=1200, max_frames=12, max_bytes=len(data), min_frames=12)
    assert decode(data, image_size=8, limits=limits).num_frames == 12


def test_a_still_is_used_unless_more_frames_are_wanted():
    still = flat_gif([2], [0])
    decoded = decode(still, image_size=4, groups=(1, 2))
    assert (decoded.num_frames, decoded.status, decoded.views) == (1, "ok", [{"groups": 1, "rows": [0]}])
    with pytest.raises(GifRejected, match=r"1 frame\(s\), at least 2"):
        decode(still, image_size=4, limits=Limits(min_frames=2))


def whole_frames(data: bytes) -> int:
    """How many frames Pillow can load before the file breaks off."""
    with Image.open(BytesIO(data)) as image:
        for number in range(1000):
            try:
                image.seek(number)
                image.load()
            except (OSError, EOFError, IndexError):
                return number
    raise AssertionError


@pytest.mark.parametrize("share", [0.2, 0.6, 0.97])
def test_a_truncated_file_gives_its_whole_frames(share):
    data = noisy_gif(frames=12)
    cut = data[: int(len(data) * share)]
    decoded, whole = decode(cut, image_size=30), decode(data, image_size=30)
    assert decoded.status == "truncated"
    assert whole.status == "ok"
    assert 1 < decoded.num_frames == whole_frames(cut) < 12
    np.testing.assert_array_equal(decoded.frames, whole.frames[: decoded.num_frames])
    assert decoded.duration_ms == 80 * decoded.num_frames
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_a_frame_cut_off_is_not_counted_even_where_it_is_not_sampled():
    data = gif([frame_block(WHOLE, [1] * 16)] * 40, trailer=b"")
    for groups in (1, 2, 3):
        decoded = decode(data[:-5], image_size=4, groups=(groups,))
        assert (decoded.num_frames, decoded.status, decoded.duration_ms) == (39, "truncated", 3900)


def test_a_file_without_its_trailer_keeps_all_frames():
    data = noisy_gif(frames=5)
    assert data.endswith(b";")
    decoded = decode(data[:-1], image_size=8)
    assert (decoded.num_frames, decoded.status) == (5, "truncated")


def test_frames_from_a_damaged_one_on_are_not_used():
    """The damage shows only while decoding; sampling is done anew over what is left."""
    good, damaged = frame_block(WHOLE, [1] * 16), frame_block(WHOLE, [1] * 3)
    decoded = decode(gif([good] * 9 + [damaged] + [good] * 10), image_size=4, frames_per_group=8)
    assert (decoded.num_frames, decoded.status, decoded.duration_ms) == (9, "truncated", 900)
    assert decoded.frame_indices == loop_sample([100] * 9, 1, 8)
    with pytest.raises(GifRejected, match="at least 10"):
        decode(gif([good] * 9 + [damaged]), image_size=4, limits=Limits(min_frames=10))


def test_random_damage_ends_in_frames_or_a_reason():
    rng = random.Random(0)
    sources = [
        noisy_gif(frames=4, size=(9, 7)),
        flat_gif([0, 1, 2, 3], [5, 0, 3, 9]),
        *(data for data, _ in BAD.values()),
    ]
    outcomes = set()
    for _ in range(1500):
        data = bytearray(rng.choice(sources) or b"\0")
        for _ in range(rng.choice([1, 2, 8])):
            data[rng.randrange(len(data))] = rng.choice([0, 255, *b"!,;", rng.randrange(256)])
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        try:
            decoded = decode(bytes(data), image_size=8, limits=Limits(max_canvas_pixels=100_000))
        except GifRejected as error:
            outcomes.add("rejected")
            assert error.reason
        else:
            outcomes.add(decoded.status)
            assert decoded.frames.shape == (len(decoded.frame_indices), 8, 8, 3)
    assert outcomes == {"ok", "truncated", "rejected"}


# Pillow keeps a disposal for the frames that name none, and takes the background from the palette.
OTHER_THAN_PILLOW = {"dispose_bgnd.gif", "dispose_bgnd_rgba.gif"}
REJECTED_CASES = {"decompression_bomb.gif", "decompression_bomb_extents.gif", "zero_width.gif"}


def test_decoder_cases_end_in_frames_or_a_reason(shared_data):
    files = sorted((shared_data / "gifs" / "decoder_cases").glob("*.gif"))
    assert len(files) >= 40
    rejected = set()
    for file in files:
        data = read_gif(file)
        try:
            decoded = decode(data, image_size=16, groups=(1, 2, 3))
        except GifRejected:
            rejected.add(file.name.removeprefix("Tests__images__"))
            continue
        expected = pillow_frames(data)
        assert decoded.num_frames == len(expected), file.name
        if file.name.removeprefix("Tests__images__") in OTHER_THAN_PILLOW:
            continue
        side = len(expected[0])
        exact = decode(data, image_size=side)
        for index, frame in zip(exact.frame_indices, exact.frames, strict=True):
            np.testing.assert_array_equal(frame, expected[index], err_msg=f"{file.name} frame {index}")
    assert rejected == REJECTED_CASES


@pytest.mark.parametrize(("name", "frames", "seconds"), [("gifs_1.gif", 45, 2.7), ("gifs_2.gif", 76, 7.6)])
def test_real_gifs(shared_data, name, frames, seconds):
    data = read_gif(shared_data / "gifs" / "natural" / name)
    decoded = decode(data, image_size=225, groups=(1, 2, 3))
    assert (decoded.num_frames, decoded.duration_ms) == (frames, 1000 * seconds)
    expected = pillow_frames(data)
    for index, frame in zip(decoded.frame_indices, decoded.frames, strict=True):
        np.testing.assert_array_equal(frame, expected[index])


def test_arguments_out_of_range():
    for arguments in ({"image_size": 0}, {"image_size": 8, "groups": ()}, {"image_size": 8, "groups": (0, 1)}):
        with pytest.raises(ValueError, match="1 or more"):
            decode(flat_gif([0], [1]), **arguments)


# Reading


def test_reading_from_path_bytes_and_archive(tmp_path):
    data = noisy_gif(frames=2)
    path = tmp_path / "a.gif"
    path.write_bytes(data)
    with zipfile.ZipFile(tmp_path / "set.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inner/a.gif", data)
        archive.writestr("../outside.gif", data)
    before = sorted(tmp_path.parent.rglob("*"))
    for source in (path, str(path), data, f"{tmp_path}/set.zip::inner/a.gif", f"{tmp_path}/set.zip::../outside.gif"):
        assert read_gif(source) == data
    assert sorted(tmp_path.parent.rglob("*")) == before


def test_a_forked_process_opens_the_archive_anew(tmp_path):
    """Forked processes share the position of a file that was open before, and would read each other's bytes."""
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr("a.gif", b"content")
    source = f"{tmp_path}/set.zip::a.gif"
    assert read_gif(source) == read_gif(source) == b"content"
    opened = decoding._open_zip.cache_info().misses
    if not (child := os.fork()):
        right = False
        try:
            right = read_gif(source) == b"content" and decoding._open_zip.cache_info().misses == opened + 1
        finally:
            os._exit(0 if right else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert decoding._open_zip.cache_info().misses == opened


def test_a_replaced_archive_is_read_anew(tmp_path):
    for content in (b"first", b"second one"):
        with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
            archive.writestr("a.gif", content)
        assert read_gif(f"{tmp_path}/set.zip::a.gif") == content


def test_reading_is_bounded(tmp_path):
    (tmp_path / "big.gif").write_bytes(bytes(2000))
    with zipfile.ZipFile(tmp_path / "set.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("big.gif", bytes(2000))
    for source in (tmp_path / "big.gif", bytes(2000), f"{tmp_path}/set.zip::big.gif"):
        with pytest.raises(GifRejected, match="more than 1999 bytes"):
            read_gif(source, max_bytes=1999)
        assert len(read_gif(source, max_bytes=2000)) == 2000


def test_a_huge_member_is_not_read_whole(tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.gif", bytes(30_000_000))
    tracemalloc.start()
    with pytest.raises(GifRejected, match="more than 1000 bytes"):
        read_gif(f"{tmp_path}/set.zip::bomb.gif", max_bytes=1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3_000_000


def test_what_cannot_be_read_is_rejected_by_name(tmp_path):
    (tmp_path / "not.zip").write_bytes(b"nothing")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr("a.gif", b"a" * 500)
    damaged = bytearray((tmp_path / "set.zip").read_bytes())
    damaged[100] ^= 1  # inside the stored bytes of a.gif
    (tmp_path / "damaged.zip").write_bytes(damaged)
    for source, reason in [
        (tmp_path / "none.gif", "none.gif: No such file"),
        (tmp_path, "Is a directory"),
        (f"{tmp_path}/none.zip::a.gif", "none.zip: No such file"),
        (f"{tmp_path}/not.zip::a.gif", "the archive is damaged"),
        (f"{tmp_path}/set.zip::b.gif", "b.gif is not in"),
        (f"{tmp_path}/damaged.zip::a.gif", "damaged.zip: the archive is damaged"),
    ]:
        with pytest.raises(GifRejected, match=reason):
            read_gif(source)


def test_wrong_kinds_of_source():
    with pytest.raises(ValueError, match="is a URL: download it first"):
        read_gif("https://example.org/a.gif")
    with pytest.raises(TypeError, match="not int"):
        read_gif(7)


def test_pillow_image_of_a_gif_gives_the_files_own_bytes(tmp_path):
    data = noisy_gif(frames=5)
    (tmp_path / "a.gif").write_bytes(data)
    for source in (tmp_path / "a.gif", BytesIO(data)):
        with Image.open(source) as image:
            assert read_gif(image) == data
            image.seek(2)
            image.load()
            shown = image.convert("RGB").tobytes()
            assert read_gif(image) == data
            assert image.tell() == 2
            assert image.convert("RGB").tobytes() == shown
            if isinstance(source, BytesIO):
                source.seek(17)
                assert read_gif(image) == data
                assert source.tell() == 17  # whoever owns the file finds it where it was


def test_closed_and_copied_pillow_images_are_told(tmp_path):
    data = noisy_gif(frames=5)
    (tmp_path / "a.gif").write_bytes(data)
    with Image.open(tmp_path / "a.gif") as image:
        for copy in (image.copy(), image.convert("RGB")):
            with pytest.raises(GifRejected, match="a copy of one frame of an animation: give the image"):
                read_gif(copy)
        del copy.info["duration"], copy.info["version"]
        assert decode(read_gif(copy), image_size=8).num_frames == 1
    buffer = BytesIO(data)
    of_closed_file, still = Image.open(buffer), Image.new("RGB", (4, 4))
    buffer.close()
    still.close()
    for closed in (image, of_closed_file, still):
        with pytest.raises(GifRejected, match=r"is closed: .* give the file's path or bytes"):
            read_gif(closed)


@pytest.mark.parametrize("save", [{}, {"loop": 0}, {"duration": 70}])
@pytest.mark.parametrize("change", ["copy", "convert", "resize", "crop"])
def test_a_copied_frame_is_told_by_whatever_its_info_keeps(save, change):
    """Also where the file names neither times nor repetitions."""
    first, *rest = (Image.new("L", (6, 6), level) for level in (0, 90, 200))
    buffer = BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=rest, **save)
    arguments = {"convert": ("RGB",), "resize": ((3, 3),), "crop": ((0, 0, 4, 4),)}
    with Image.open(buffer) as image:
        assert image.n_frames == 3
        copy = getattr(image, change)(*arguments.get(change, ()))
    with pytest.raises(GifRejected, match="a copy of one frame of an animation: give the image") as error:
        read_gif(copy)
    for key in re.search(r"delete (.+) from the image's info", str(error.value))[1].split(" and "):
        del copy.info[key]
    assert decode(read_gif(copy), image_size=3).num_frames == 1


def save_animation(file, format: str) -> list[np.ndarray]:
    """Write three frames of thousands of colours, shown 50, 200 and 80 ms, and return them."""
    frames = [np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8) for seed in range(3)]
    first, *rest = map(Image.fromarray, frames)
    lossless = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100, "subsampling": "4:4:4"}}.get(format, {})
    first.save(file, format, save_all=True, append_images=rest, duration=[50, 200, 80], **lossless)
    return frames


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
@pytest.mark.parametrize("loaded", [False, True])
def test_pillow_image_of_another_animation_gives_the_files_own_bytes(format, loaded, tmp_path):
    path = tmp_path / "a.gif"  # as it is served
    save_animation(path, format)
    with Image.open(path) as image:
        if loaded:
            image.seek(1)
            image.load()
        assert read_gif(image) == path.read_bytes()
        assert image.tell() == loaded


def test_an_animation_whose_bytes_are_gone_keeps_its_colours_and_times():
    """Pillow lets go of a stream once it has loaded a frame of a WebP file."""
    buffer = BytesIO()
    frames = save_animation(buffer, "WEBP")
    image = Image.open(buffer)
    image.load()
    decoded = decode(read_gif(image), image_size=64)
    np.testing.assert_array_equal(decoded.frames, frames)
    assert decoded.frame_times_ms == [0, 50, 250] and decoded.duration_ms == 330


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_an_animation_that_is_not_read_from_its_bytes_is_taken_frame_by_frame(tmp_path):
    save_animation(tmp_path / "a.avif", "AVIF")
    with Image.open(tmp_path / "a.avif") as image:
        expected = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]
        decoded = decode(read_gif(image), image_size=64)
    np.testing.assert_array_equal(decoded.frames, expected)
    assert decoded.frame_times_ms == [0, 50, 250]


@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_a_photograph_keeps_its_colours(ending, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / f"a.{ending}")
    with Image.open(tmp_path / f"a.{ending}") as image:
        opened = np.asarray(image)
        image.putpixel((3, 3), (1, 2, 3))  # what the person sees counts, not the file
        decoded = decode(read_gif(image), image_size=64).frames[0]
    assert (decoded[3, 3] == (1, 2, 3)).all()
    assert (decoded != opened).any(-1).sum() == 1
    np.testing.assert_array_equal(decode(read_gif(Image.fromarray(pixels)), image_size=64).frames[0], pixels)


def test_grey_of_16_bits_is_scaled(tmp_path):
    levels = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16) + 37
    Image.fromarray(levels).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        decoded = decode(read_gif(image), image_size=16).frames[0]
    np.testing.assert_array_equal(decoded[..., 0], levels // 256)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "CMYK", "LA", "I;16"])
def test_other_pillow_images_are_encoded(mode):
    image = Image.new(mode, (6, 6))
    decoded = decode(read_gif(image), image_size=6)
    expected = Image.new("RGBA", (6, 6), (*WHITE, 255))
    expected.alpha_composite(image.convert("RGBA"))
    np.testing.assert_array_equal(decoded.frames[0], np.asarray(expected.convert("RGB")))


def test_other_animations_keep_their_frames_and_times():
    colors = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    first, *rest = (Image.new("RGB", (6, 6), color) for color in colors)
    buffer = BytesIO()
    first.save(buffer, "PNG", save_all=True, append_images=rest, duration=[50, 200, 80])
    with Image.open(buffer) as image:
        image.seek(1)
        decoded = decode(read_gif(image), image_size=6)
        assert image.tell() == 1
    assert decoded.frame_times_ms == [0, 50, 250]
    assert decoded.duration_ms == 330
    for frame, color in zip(decoded.frames, colors, strict=True):
        assert (frame == color).all()


# Stored frames


def test_png_frames_come_back_exactly():
    frames = np.random.default_rng(0).integers(0, 256, (3, 9, 7, 3), dtype=np.uint8)
    np.testing.assert_array_equal(decode_frames(encode_frames(frames, "png")), frames)


def test_webp_frames_come_back_nearly_and_smaller_with_less_quality():
    x = np.linspace(0, 255, 64)
    frames = np.stack([np.stack(np.broadcast_arrays(x, x[:, None], 255 - x), -1)] * 2).astype(np.uint8)
    high, low = encode_frames(frames, "webp", 95), encode_frames(frames, "webp", 30)
    assert len(low[0]) < len(high[0])
    lost, lost_more = (np.abs(decode_frames(encoded).astype(int) - frames).mean() for encoded in (high, low))
    assert 0 < lost < lost_more < 5
    assert lost < 2


def test_stored_frames_are_checked():
    frames = np.zeros((1, 8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match='unknown frame format \'gif\': use "png" or "webp"'):
        encode_frames(frames, "gif")
    with pytest.raises(ValueError, match="uint8"):
        encode_frames(frames.astype(np.float32), "png")
    good = encode_frames(frames, "png")
    with pytest.raises(ValueError, match="no frames"):
        decode_frames([])
    with pytest.raises(ValueError, match="stored frame 1 of 2"):
        decode_frames([good[0], good[0][:40]])
    with pytest.raises(ValueError, match="stored frame 1 is"):
        decode_frames([good[0], *encode_frames(np.zeros((1, 9, 9, 3), np.uint8), "png")])


def test_import_is_silent_and_asks_no_server():
    no_network = "import socket; socket.socket.connect = None; socket.getaddrinfo = None"
    quicker = "import sys; sys.modules['torch'] = None"  # Albumentations imports torch only where there is one
    code = f"{no_network}; {quicker}; import helpers.gifs.decode"
    environment = {k: v for k, v in os.environ.items() if k != "NO_ALBUMENTATIONS_UPDATE"}
    root = Path(decoding.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
