"""What storing frames as WebP costs in embedding space, at the quality of the Kaggle profile.

Run alone with `python -m tests.benchmarks.bench_webp`. Frames of the built-in world through the shipped encoder: at 64
pixels WebP loses more than at the 224 pixels of the large profiles, so this is a pessimistic figure.
"""

import json
from io import BytesIO

import numpy as np
import torch
import torch.nn.functional as F

from helpers.config import load_profile
from helpers.corpora.shapes import make_world, write_gif
from helpers.gifs.decode import decode, decode_frames, encode_frames
from helpers.models.xclip import FrameEncoder, load_xclip


@torch.no_grad()
def run(gifs: int = 40) -> dict:
    """Mean cosine of frame embeddings from WebP frames and from lossless ones, 16 frames of each GIF."""
    quality = load_profile("kaggle").data.frame_quality
    encoder = FrameEncoder(load_xclip("tiny/xclip"), "tiny/xclip")
    cosines = []
    for scene in make_world(seed=11, gifs=gifs, prefix="webp")[0]:
        file = BytesIO()
        write_gif(scene, file)
        frames = decode(file.getvalue(), image_size=encoder.image_size).frames[:16]
        stored = decode_frames(encode_frames(frames, "webp", quality))
        count = len(frames)
        padded = np.zeros((2, 16, *frames.shape[1:]), np.uint8)
        padded[0, :count], padded[1, :count] = frames, stored
        lossless, lossy = encoder(torch.from_numpy(padded), torch.tensor([count, count]))[:, :count]
        cosines += F.cosine_similarity(lossless, lossy, dim=-1).tolist()
    return {
        "name": f"cosine of embeddings of WebP {quality} frames to those of lossless frames",
        "ratio": round(float(np.mean(cosines)), 4),
        "aim": ">= 0.99",
        "unit": "mean cosine, higher is better",
        "worst_percent": round(float(np.percentile(cosines, 1)), 4),
        "frames": len(cosines),
    }


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))
