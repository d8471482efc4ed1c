"""What sampling and cropping add to decoding: `helpers.gifs.decode` over bare Pillow, on the same GIFs.

Once on noisy GIFs made here, of which 16 of 40 frames are used, and once on filmed and drawn ones from the folder
SHARED_DATA (or ../shared/data), where there is one; most of those have 8 frames of 512 pixels, all of them used.

Run alone with `python -m tests.benchmarks.bench_decode`.
"""

import json
import os
import statistics
import time
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from helpers.gifs.decode import decode

WIDTH, HEIGHT, FRAMES, FILES, ROUNDS = 320, 240, 40, 3, 15


def make_gif(seed: int) -> bytes:
    """A noisy, moving GIF of the size that is usual on the web: 320 x 240, 40 frames, uneven delays, 3 to 4 MB."""
    rng = np.random.default_rng(seed)
    scene = cv2.resize(rng.integers(0, 256, (HEIGHT // 4, WIDTH // 4, 3), dtype=np.uint8), (WIDTH, HEIGHT))
    noisy = (np.roll(scene, 3 * i, axis=1) + rng.normal(0, 15, scene.shape) for i in range(FRAMES))
    first, *rest = (Image.fromarray(frame.clip(0, 255).astype(np.uint8)) for frame in noisy)
    buffer = BytesIO()
    delays = (rng.integers(4, 12, FRAMES) * 10).tolist()
    first.save(buffer, "GIF", save_all=True, append_images=rest, duration=delays, loop=0)
    return buffer.getvalue()


def bare(data: bytes, last: int) -> None:
    """Decode up to frame `last` with Pillow, and use nothing of it."""
    image = Image.open(BytesIO(data))
    for index in range(last + 1):
        image.seek(index)
        image.load()


def _seconds(function, *args, **kwargs) -> float:
    """CPU time of a call, all threads: unlike the wall clock, it leaves out what else the machine is doing."""
    start = time.process_time()
    function(*args, **kwargs)
    return time.process_time() - start


def compare(files: list[bytes], rounds: int) -> dict:
    """Time both ways in turn on each file; the ratio is the median over files and rounds."""
    ours, theirs = [], []
    for number in range(rounds + 1):
        for data in files:
            last = decode(data, image_size=224).frame_indices[-1]
            pair = _seconds(decode, data, image_size=224), _seconds(bare, data, last)
            if number:  # the first round only warms up
                ours.append(pair[0])
                theirs.append(pair[1])
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {
        "ratio": round(statistics.median(ratios), 3),
        "aim": "<= 1.25",
        "unit": "x CPU time, lower is better",
        "milliseconds": round(1e3 * statistics.median(ours), 1),
        "milliseconds_bare": round(1e3 * statistics.median(theirs), 1),
        "tenth_to_ninetieth_percentile": np.percentile(ratios, [10, 90]).round(2).tolist(),
        "gifs": f"{len(files)} of {statistics.mean(map(len, files)) / 1e6:.1f} MB",
    }


def run() -> list[dict]:
    """The made GIFs, and the real ones where they are at hand."""
    name = "decode, sample and crop 16 frames over bare Pillow decoding"
    results = [{"name": name, **compare([make_gif(seed) for seed in range(FILES)], ROUNDS)}]
    here = Path(__file__).resolve()
    shared = Path(os.environ.get("SHARED_DATA", here.parents[3] / "shared" / "data"))
    if found := sorted((shared / "gifs" / "natural").glob("*.gif")):
        results.append({"name": f"{name}, real files", **compare([path.read_bytes() for path in found], 3)})
    return results


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))
