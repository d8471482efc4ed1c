"""What two GIFs show: equal however the file is written, near where a copy was changed a little, never near by form."""

import contextlib
from io import BytesIO
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from helpers.corpora.shapes import make_world, write_gif
from helpers.gifs.alike import NEAR_BITS, frames_digest, nearest_hashes, perceptual_hash
from helpers.gifs.decode import GifRejected, decode

SIZE = 64


def gif_of(pictures: list[np.ndarray], durations: list[int] | int = 100, colours: int = 256) -> bytes:
    images = [Image.fromarray(picture).quantize(colours, dither=Image.Dither.NONE) for picture in pictures]
    images[0].save(out := BytesIO(), "GIF", save_all=True, append_images=images[1:], duration=durations)
    return out.getvalue()


def commented(data: bytes) -> bytes:
    """The GIF with a comment block (GIF89a specification, 24) in front of its first block."""
    start = 13 + (3 << ((data[10] & 7) + 1) if data[10] & 128 else 0)
    return data[:start] + b"\x21\xfe\x05hello\x00" + data[start:]


def digest(data: bytes) -> str:
    return frames_digest(decode(data, image_size=SIZE, groups=[1, 2]).frames)


def hashed(data: bytes) -> bytes:
    decoded = decode(data, image_size=SIZE, groups=[1, 2])
    return perceptual_hash(decoded.frames, decoded.frame_times_ms, decoded.duration_ms)


def bits_apart(one: bytes, other: bytes) -> int:
    return (int.from_bytes(one) ^ int.from_bytes(other)).bit_count()


def pictures(number: int, seed: int = 0) -> list[np.ndarray]:
    noise = np.random.default_rng(seed).integers(0, 256, (number, 5, 7, 3), dtype=np.uint8)
    return [np.asarray(Image.fromarray(small).resize((90, 70), Image.Resampling.BICUBIC)) for small in noise]


@pytest.fixture(scope="module")
def world() -> list[bytes]:
    files = []
    for scene in make_world(2026, 120, "train")[0]:
        write_gif(scene, out := BytesIO())
        files.append(out.getvalue())
    return files


def test_the_digest_is_of_what_is_shown_not_of_the_file():
    shown = pictures(5)
    data = gif_of(shown)
    same = [commented(data), data + b"\n", gif_of(shown, 250), gif_of([shown[0], *shown])]
    assert {digest(one) for one in same} == {digest(data)}
    others = [gif_of(shown[::-1]), gif_of(shown[:4]), gif_of([*shown[:4], 255 - shown[4]])]
    assert len({digest(data), *map(digest, others)}) == 4


def test_no_two_gifs_of_the_built_in_world_show_the_same_or_nearly(world):
    assert len({digest(data) for data in world}) == len(world)
    hashes = [hashed(data) for data in world]
    assert min(bits_apart(a, b) for a, b in combinations(hashes, 2)) > NEAR_BITS


def test_changed_copies_are_near():
    for seed in range(8):
        shown = pictures(9, seed)
        smaller = [np.asarray(Image.fromarray(one).resize((64, 50))) for one in shown]
        blocky = []
        for one in shown:
            Image.fromarray(one).save(out := BytesIO(), "JPEG", quality=60)
            blocky.append(np.asarray(Image.open(out)))
        for copy in (gif_of(smaller), gif_of(blocky), gif_of(shown, colours=64), gif_of(shown, 70)):
            assert bits_apart(hashed(gif_of(shown)), hashed(copy)) <= NEAR_BITS
        assert bits_apart(hashed(gif_of(shown)), hashed(gif_of(pictures(9, seed + 100)))) > NEAR_BITS


def test_frames_that_show_nothing_are_no_ones_near_duplicate():
    black, red = (np.full((64, 64, 3), colour, dtype=np.uint8) for colour in ((0, 0, 0), (200, 0, 0)))
    assert hashed(gif_of([black])) == hashed(gif_of([red])) == b""


def test_nearest_equals_a_plain_loop():
    rng = np.random.default_rng(3)
    ours, theirs = ([rng.bytes(32) for _ in range(n)] for n in (9, 7))
    found, bits = nearest_hashes(ours, theirs)
    for one, number, distance in zip(ours, found, bits, strict=True):
        every = [bits_apart(one, other) for other in theirs]
        assert (distance, number) == (min(every), every.index(min(every)))


def test_filmed_gifs_are_near_their_copies_only(shared_data):
    hashes = {}
    for path in sorted((shared_data / "gifs" / "natural").rglob("*.gif"))[:30]:
        with contextlib.suppress(GifRejected):
            hashes[path.name] = hashed(path.read_bytes())
    near = [pair for pair in combinations(filter(None, hashes.values()), 2) if bits_apart(*pair) <= NEAR_BITS]
    assert hashes and len(near) <= 2, [name for name, own in hashes.items() if any(own in pair for pair in near)]
