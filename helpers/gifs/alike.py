"""Whether two GIFs show the same: a digest of their frames, and a perceptual hash that survives another encoding.

The perceptual hash is pHash (signs of low DCT frequencies against their median, https://www.phash.org), with chroma
beside luma, since GIFs of one drawing in two colours are two GIFs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import cv2
import numpy as np

HASHED_FRAMES = 4
NEAR_BITS = 24
"""Of the 256 bits of two hashes, how many may differ in near-duplicates.

Measured at 64 pixels: copies of filmed GIFs in 32 colours, as JPEG, marked, smaller or trimmed differ by 2 to 12 bits
in the median and by 32 at most; the closest of 180,000 pairs of the built-in world, where all look alike, by 38.
"""
_SIDE = 32  # pixels of the grey picture whose frequencies are taken
_BITS = ((0, 6, 34), (1, 4, 15), (2, 4, 15))  # channel of YCrCb, frequencies a side, bits (the mean is none)
_PLAIN = 1.0  # below this deviation of the pixels in every channel, a frame shows nothing that could be compared


def frames_digest(frames: np.ndarray) -> str:
    """SHA-256 of the sampled frames, uint8 [S, H, W, 3]; a frame that is repeated counts once, however long it lasts.

    GIFs that differ in comments, palettes, compression or trailing bytes, or in which an optimiser merged equal
    frames, have the same; the same frames in another order are another GIF.
    """
    changed = [True, *(frames[1:] != frames[:-1]).any(axis=(1, 2, 3))]
    return hashlib.sha256(np.ascontiguousarray(frames[changed])).hexdigest()


def perceptual_hash(frames: np.ndarray, times_ms: Sequence[float], duration_ms: float) -> bytes:
    """64 bits of each of the `HASHED_FRAMES` frames at (i + 0.5) / n of a GIF's time; b"" if none shows anything.

    frames: uint8 [S, H, W, 3]; times_ms: when each starts to be shown.
    """
    wanted = (np.arange(HASHED_FRAMES) + 0.5) * duration_ms / HASHED_FRAMES
    bits = [_bits(frames[row]) for row in np.searchsorted(times_ms, wanted, side="right") - 1]
    return np.packbits(np.concatenate(bits)).tobytes() if any(one.any() for one in bits) else b""


def _bits(frame: np.ndarray) -> np.ndarray:
    small = cv2.resize(frame, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA)
    channels = cv2.cvtColor(small, cv2.COLOR_RGB2YCrCb).astype(np.float32)
    if channels.std(axis=(0, 1)).max() < _PLAIN:
        return np.zeros(sum(bits for _, _, bits in _BITS), dtype=bool)
    found = []
    for channel, side, bits in _BITS:
        low = cv2.dct(np.ascontiguousarray(channels[..., channel]))[:side, :side].ravel()[1 : 1 + bits]
        found.append(low > np.median(low))
    return np.concatenate(found)


def nearest_hashes(hashes: Sequence[bytes], others: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """For each hash the number of the nearest other (the first of equals) and its distance in bits, int [N] each."""
    ours, theirs = (np.frombuffer(b"".join(part), np.uint64).reshape(-1, HASHED_FRAMES) for part in (hashes, others))
    found, distances = np.zeros(len(ours), int), np.zeros(len(ours), int)
    for row, one in enumerate(ours):
        bits = np.bitwise_count(theirs ^ one).sum(axis=1, dtype=int)
        found[row] = bits.argmin()
        distances[row] = bits[found[row]]
    return found, distances
