"""Pixels of GIFs against the specification written as loops and against FFmpeg; those of WebP, PNG and videos too."""

import random
import re
import shutil
import subprocess
import tracemalloc
import zlib
from io import BytesIO
from itertools import product

import numpy as np
import pytest
from PIL import Image, ImageDraw

from helpers.gifs import kinds
from helpers.gifs.decode import GifRejected, Limits, decode
from tests.gifs import reference
from tests.gifs.test_gifs import PALETTE, WHITE, frame_block, gif, lzw, noisy_gif, palette_bytes, u16

SIZE = 6
LOCAL = [(1, 2, 3), (40, 50, 60), (90, 80, 70), (255, 0, 255)]


def block(rng: random.Random, box, disposal, transparent, local, interlaced) -> bytes:
    """A frame of random pixels; disposal None: without a graphic control extension."""
    pixels = [rng.randrange(4) for _ in range(box[2] * box[3])]
    control = b"" if disposal is None else b"!\xf9\x04" + bytes([disposal << 2 | transparent]) + b"\x05\0\3\0"
    flags = bytes([0x81 * local | 0x40 * interlaced])
    return control + b"," + u16(*box) + flags + palette_bytes(LOCAL) * local + lzw(pixels)


def corner_cases() -> dict[str, bytes]:
    """Three frames each: every pair of disposals with and without transparency, by where the first frame lies."""
    rng, cases = random.Random(0), {}
    boxes = {"whole": (0, 0, SIZE, SIZE), "offset": (2, 1, 3, 4), "beyond": (3, 3, 5, 2)}
    for (place, box), one, two, flags in product(
        boxes.items(), (None, 0, 1, 2, 3), (None, 0, 1, 2, 3), product((False, True), repeat=2)
    ):
        local, interlaced, background = rng.random() < 0.4, rng.random() < 0.3, rng.randrange(4)
        if place == "beyond" and one is not None and one != 1:
            continue  # the first frame enlarges the canvas: told by the disposal 1 and no extension
        blocks = [
            block(rng, box, one, flags[0], local, interlaced),
            block(rng, (1, 0, 4, 3), two, flags[1], not local, not interlaced),
            block(rng, (2, 2, 6, 3), rng.choice([None, 1, 2, 3]), rng.random() < 0.5, False, False),
        ]
        header = b"GIF89a" + u16(SIZE, SIZE) + bytes([0x81, background, 0]) + palette_bytes(PALETTE)
        cases[f"{place} {one}-{two} transparent {flags} background {background}"] = header + b"".join(blocks) + b";"
    for box, disposal in product([(0, 0, 0, 0), (2, 1, 0, 3), (1, 2, 4, 0), (7, 7, 0, 0)], (None, 1, 2, 3)):
        empty = block(rng, box, disposal, False, False, False)
        first, last = (block(rng, (1, 1, 4, 4), one, False, False, False) for one in (1, 2))
        for place in range(4):
            blocks = [first, last, first]
            blocks.insert(place, empty)
            where = "beyond, " if max(box) > SIZE else ""
            cases[f"{where}empty frame {box}, {disposal}, as number {place}"] = gif(blocks, size=(SIZE, SIZE))
    alone = block(rng, (2, 2, 2, 2), 2, False, False, False)
    cases["one frame"] = gif([alone], size=(SIZE, SIZE))
    cases["one frame, animated"] = gif([b"!\xff\x0bNETSCAPE2.0\3\1\0\0\0", alone], size=(SIZE, SIZE))
    return cases


CASES = corner_cases()


def middle(frames: np.ndarray) -> np.ndarray:
    side = min(frames.shape[1:3])
    top, left = ((length - side) // 2 for length in frames.shape[1:3])
    return frames[:, top : top + side, left : left + side]


def test_corner_cases_equal_the_specification():
    assert len(CASES) > 200
    wrong = []
    for name, data in CASES.items():
        expected = middle(np.array(reference.decode(data), dtype=np.uint8))
        decoded = decode(data, image_size=expected.shape[1])
        if not np.array_equal(decoded.frames, expected):
            wrong.append(name)
    assert wrong == []


def test_compressed_files_equal_the_specification():
    """With codes that widen, as encoders write them: noise of 256 colours, and a drawing."""
    drawing = []
    for number in range(5):
        drawing.append(Image.new("P", (40, 40), 3))
        drawing[-1].putpalette([*range(60)])
        ImageDraw.Draw(drawing[-1]).ellipse((number, 2 * number, number + 9, 2 * number + 12), fill=7)
    buffer = BytesIO()
    drawing[0].save(buffer, "GIF", save_all=True, append_images=drawing[1:], disposal=[1, 2, 3, 2, 1], loop=0)
    for data in (noisy_gif(frames=3, size=(40, 40)), buffer.getvalue()):
        np.testing.assert_array_equal(decode(data, image_size=40).frames, np.array(reference.decode(data), np.uint8))


def ffmpeg_frames(data: bytes, width: int, height: int, folder) -> np.ndarray:
    """The frames as FFmpeg draws them, over white."""
    (folder / "a.gif").write_bytes(data)
    line = ["ffmpeg", "-v", "error", "-i", folder / "a.gif", "-fps_mode", "passthrough", "-f", "rawvideo"]
    raw = subprocess.run([*line, "-pix_fmt", "rgba", "-"], capture_output=True, check=True).stdout
    frames = np.frombuffer(raw, np.uint8).reshape(-1, height, width, 4)
    return np.where(frames[..., 3:] > 0, frames[..., :3], 255)


def with_white_background(data: bytes) -> bytes:
    """The colour that the header calls background made white: FFmpeg shows it in place of BACKGROUND."""
    place = 13 + 3 * data[11]
    return data[:place] + bytes(WHITE) + data[place + 3 :]


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="FFmpeg is not installed")
def test_corner_cases_equal_ffmpeg(tmp_path):
    """All but those that reach beyond the canvas, and those that tell no times, of which it drops frames."""
    wrong = []
    for name, data in CASES.items():
        if not name.startswith("beyond") and "None-None" not in name:
            data = with_white_background(data)
            if not np.array_equal(decode(data, image_size=SIZE).frames, ffmpeg_frames(data, SIZE, SIZE, tmp_path)):
                wrong.append(name)
    assert wrong == []


def test_real_gifs_equal_the_specification(shared_data):
    """Small ones: the loops take their time."""
    files = [f for f in sorted((shared_data / "gifs").rglob("*.gif")) if 500 < f.stat().st_size < 15_000]
    compared = 0
    for file in files:
        data = file.read_bytes()
        try:
            frames = decode(data, image_size=1).num_frames
            expected = middle(np.array(reference.decode(data), np.uint8))
        except (GifRejected, TypeError):  # no palette at all: the specification leaves it open
            continue
        decoded = decode(data, image_size=expected.shape[1])
        np.testing.assert_array_equal(decoded.frames, expected[decoded.frame_indices], err_msg=file.name)
        compared += frames == len(expected)
    assert compared >= 8


def rgba_frames(count: int = 4) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.choice([0, 255, 90], (8, 8, 4)).astype(np.uint8), "RGBA") for _ in range(count)]


def over_white(frame: np.ndarray) -> np.ndarray:
    alpha = frame[..., 3:].astype(float) / 255
    return np.rint(frame[..., :3] * alpha + 255 * (1 - alpha))


def test_animated_webp_gives_its_frames_and_times():
    frames, buffer = rgba_frames(), BytesIO()
    frames[0].save(
        buffer, "WEBP", save_all=True, append_images=frames[1:], duration=[50, 0, 200, 80], lossless=True, exact=True
    )
    decoded = decode(buffer.getvalue(), image_size=8)
    assert decoded.frame_times_ms == [0, 50, 150, 350] and decoded.duration_ms == 430
    for ours, frame in zip(decoded.frames, frames, strict=True):
        assert np.abs(ours - over_white(np.asarray(frame))).max() <= 1
    cut = decode(buffer.getvalue()[:-40], image_size=8)
    assert (cut.num_frames, cut.status) == (3, "truncated")
    np.testing.assert_array_equal(cut.frames, decoded.frames[:3])
    behind = b"".join([b"VP8 ", (4).to_bytes(4, "little"), b"\0" * 4, b"ANMF", (99).to_bytes(4, "little")])
    more = decode(buffer.getvalue() + behind, image_size=8)  # what stands behind a file's end is none of it
    assert (more.num_frames, more.status) == (4, "ok")
    np.testing.assert_array_equal(more.frames, decoded.frames)


@pytest.mark.parametrize("default_image", [False, True])
@pytest.mark.parametrize(("disposal", "blend"), [*product((0, 1, 2), (0, 1))])
def test_animated_png_is_drawn_by_its_specification(default_image, disposal, blend):
    """Disposal 0 keeps, 1 clears and 2 restores; blend 0 replaces and 1 draws over; a default image is no frame."""
    frames, buffer = rgba_frames(), BytesIO()
    opaque = [np.asarray(frame)[..., 3:] > 100 for frame in frames]
    pixels = [np.asarray(frame)[..., :3] for frame in frames]
    frames = [
        Image.fromarray(np.concatenate([colour * seen, 255 * seen], axis=2).astype(np.uint8))
        for colour, seen in zip(pixels, opaque, strict=True)
    ]
    still = Image.new("RGBA", (8, 8), (1, 2, 3, 255))
    first, *rest = [still, *frames] if default_image else frames
    first.save(
        buffer, "PNG", save_all=True, append_images=rest, duration=[50, 40, 200, 80], disposal=disposal, blend=blend,
        default_image=default_image,
    )  # fmt: skip
    decoded = decode(buffer.getvalue(), image_size=8)
    assert decoded.frame_times_ms == [0, 50, 90, 290] and decoded.num_frames == 4
    expected = apng_frames(buffer.getvalue())
    for ours, frame in zip(decoded.frames, expected, strict=True):
        np.testing.assert_array_equal(ours, frame)


def apng_frames(data: bytes) -> list[np.ndarray]:
    """The frames of an animated PNG whose alpha is 0 or 255, over white, composed from its own chunks."""
    chunks, place = [], 8
    while place < len(data):
        length = int.from_bytes(data[place : place + 4])
        chunks.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + length]))
        place += 12 + length
    header = next(body for kind, body in chunks if kind == b"IHDR")
    parts: list[tuple[bytes, bytes]] = []
    for kind, body in chunks:
        if kind == b"fcTL":
            parts.append((body, b""))
        elif parts and kind in (b"IDAT", b"fdAT"):
            parts[-1] = (parts[-1][0], parts[-1][1] + (body if kind == b"IDAT" else body[4:]))
    canvas, shown = np.zeros((8, 8, 4), np.uint8), []
    for number, (control, packed) in enumerate(parts):
        width, height, x, y = (int.from_bytes(control[at : at + 4]) for at in (4, 8, 12, 16))
        dispose, blend = control[24], control[25]
        part = np.asarray(Image.open(BytesIO(still_png(header, width, height, packed))).convert("RGBA"))
        before = canvas.copy()
        for j, i in product(range(height), range(width)):
            if blend == 0 or part[j, i, 3]:
                canvas[y + j, x + i] = part[j, i]
        shown.append(over_white(canvas))
        if dispose == 2 and number:
            canvas = before
        elif dispose:
            canvas[y : y + height, x : x + width] = 0
    return shown


def still_png(header: bytes, width: int, height: int, packed: bytes) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4) + kind + body + zlib.crc32(kind + body).to_bytes(4)

    size = width.to_bytes(4) + height.to_bytes(4)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size + header[8:]) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_a_still_of_another_kind_is_one_frame_as_a_still_gif_is(kind):
    buffer = BytesIO()
    Image.new("RGB", (8, 8), (10, 200, 30)).save(buffer, kind, **({"lossless": True} if kind == "WEBP" else {}))
    decoded = decode(buffer.getvalue(), image_size=8)
    assert decoded.num_frames == 1 and (decoded.frames == (10, 200, 30)).all()
    with pytest.raises(GifRejected, match=r"1 frame\(s\), at least 2 wanted"):
        decode(buffer.getvalue(), image_size=8, limits=Limits(min_frames=2))


def test_grey_of_16_bits_keeps_its_upper_byte():
    buffer = BytesIO()
    Image.fromarray(np.full((8, 8), 100 << 8, np.uint16)).save(buffer, "PNG")
    assert (decode(buffer.getvalue(), image_size=8).frames == 100).all()


@pytest.mark.parametrize(("container", "codec"), [("mp4", "mpeg4"), ("webm", "libvpx")])
def test_videos_give_their_frames_and_times_where_pyav_is_installed(container, codec):
    av = pytest.importorskip("av", reason="PyAV is not installed")
    buffer, levels = BytesIO(), [30, 90, 150, 210, 60, 120]
    with av.open(buffer, "w", format=container) as file:
        stream = file.add_stream(codec, rate=20)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for level in levels:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), level, np.uint8), format="rgb24")))
        file.mux(stream.encode())
    data = buffer.getvalue()
    decoded = decode(data, image_size=32)
    assert decoded.frame_times_ms == pytest.approx([0, 50, 100, 150, 200, 250], abs=1)
    assert decoded.duration_ms == pytest.approx(300, abs=1)
    assert np.abs(decoded.frames.mean((1, 2, 3)) - levels).max() < 6
    for limits in (Limits(max_frames=5), Limits(max_canvas_pixels=64 * 48 - 1), Limits(max_drawn_pixels=64 * 48 * 5)):
        with pytest.raises(GifRejected, match=r"more than 5 frames|the canvas is 64 x 48|more than 15360 pixels"):
            decode(data, image_size=32, limits=limits)
    with pytest.raises(GifRejected, match="damaged"):
        decode(data[:40], image_size=32)


def test_videos_without_pyav_are_told_the_command(monkeypatch):
    monkeypatch.setattr(kinds.importlib.util, "find_spec", lambda name: None)
    for start in (b"\0\0\0\x18ftypmp42", b"\x1aE\xdf\xa3\x01"):
        with pytest.raises(GifRejected, match=r"video .*ffmpeg -i FILE FILE\.gif.*pip install av, .*--force"):
            decode(start, image_size=8)


def frames_or_reason(data: bytes) -> tuple:
    try:
        decoded = decode(data, image_size=8, limits=Limits(max_canvas_pixels=20_000, max_frames=50))
    except GifRejected as error:
        return ("rejected", error.reason)
    return decoded.status, decoded.num_frames, decoded.frames.tobytes()


SENTENCES = [
    r"not a GIF but .+",
    r"the canvas is (empty \()?\d+ x \d+ pixels.*",
    r"frame \d+ makes the canvas \d+ x \d+ pixels, \d+ in all allowed",
    r"more than \d+ (frames|bytes|blocks of data)",
    r"its frames have more than \d+ pixels in all",
    r"truncated (inside the header|before the first frame)",
    r"no frame in it",
    r"the first frame is damaged",
    r"the file is damaged",
]


def test_mutants_end_in_frames_or_a_sentence_of_ours_twice_the_same():
    rng, frames = random.Random(7), rgba_frames()
    sources = [noisy_gif(frames=4, size=(9, 7)), *list(CASES.values())[:3]]
    for kind in ("WEBP", "PNG"):
        buffer = BytesIO()
        frames[0].save(buffer, kind, save_all=True, append_images=frames[1:], duration=60)
        sources.append(buffer.getvalue())
    seen = set()
    for _ in range(600):
        data = bytearray(rng.choice(sources))
        for _ in range(rng.choice([1, 2, 8])):
            data[rng.randrange(len(data))] = rng.choice([0, 255, *b"!,;", rng.randrange(256)])
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        outcome = frames_or_reason(bytes(data))
        assert outcome == frames_or_reason(bytes(data))
        if outcome[0] == "rejected":
            assert any(re.fullmatch(sentence, outcome[1]) for sentence in SENTENCES), outcome[1]
        seen.add(outcome[0])
    assert seen == {"ok", "truncated", "rejected"}


def test_a_comment_of_millions_of_blocks_costs_no_memory(monkeypatch):
    """Pillow would keep each sub-block as an object of its own: 785 MB for 9 million."""
    data = gif([b"!\xfe" + b"\x01a" * 300_000 + b"\0", frame_block((0, 0, 4, 4), [1] * 16)])
    tracemalloc.start()
    decoded = decode(data, image_size=4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (decoded.num_frames, decoded.frames[0, 0, 0].tolist()) == (1, list(PALETTE[1]))
    assert peak < len(data)
    monkeypatch.setattr("helpers.gifs.formats.MAX_BLOCKS", 200_000)
    with pytest.raises(GifRejected, match="more than 200000 blocks of data"):
        decode(data, image_size=4)


def test_the_work_of_all_frames_is_limited():
    data = noisy_gif(frames=12, size=(40, 30))
    assert decode(data, image_size=8, limits=Limits(max_drawn_pixels=12 * 1200)).num_frames == 12
    with pytest.raises(GifRejected, match="its frames have more than 14399 pixels in all"):
        decode(data, image_size=8, limits=Limits(max_drawn_pixels=12 * 1200 - 1))
