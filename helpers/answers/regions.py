"""Where a trained ADEM-VL looks in an image, and what hiding a region costs its answer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch

from helpers.config import AdemConfig
from helpers.corpora.tasks import require_finite_scores
from helpers.models.adem_vl.model import AdemVL
from helpers.models.adem_vl.sequences import Encoded, collate
from helpers.training.adem_vl import batch_of, encode_problems, images_for, padding_token


def _sequence(model: AdemVL, problem: Mapping[str, Any], config: AdemConfig) -> Encoded:
    """A problem's sequence up to its answer. Raises ValueError if it has no image, or is too long for the window."""
    if not problem["image"]:
        raise ValueError(f"problem {problem['pid']} has no image to look at")
    (encoded,), left_out = encode_problems(model, pd.DataFrame([problem]), config, answers=False)
    if encoded is None:
        raise ValueError(f"problem {problem['pid']} is too long to be shown: {left_out['reason'].iloc[0]}")
    return encoded


def attended(model: AdemVL, problem: Mapping[str, Any], config: AdemConfig) -> np.ndarray:
    """How much each patch adds to the answer's position: [grid, grid], summing to 1, over all blocks and scales.

    A visual position adds alpha * score * value (section 3.2 of the paper); what counts is the length of that vector
    with the image, the positions of a coarser scale spread evenly over their patches. Where no position adds anything,
    as in a model of fresh adapters, the map is even. Raises ValueError for a problem without an image, and for one that
    is too long or whose map is not finite.
    """
    rows = [(_sequence(model, problem, config), problem["image"])]
    batch = batch_of(rows, images_for(model, config), padding_token(model), left=True)
    weights = model.contributions(**{name: t.to(model.device) for name, t in batch.items() if name != "labels"})[0]
    grid, start = model.config.grid, 0
    total = np.zeros((grid, grid))
    for scale in model.config.scales:
        side = math.isqrt(scale)
        part = weights[start : start + scale].view(side, side).double().cpu().numpy()
        times = grid // side
        total += np.kron(part, np.ones((times, times))) / times**2
        start += scale
    require_finite_scores(total, f"problem {problem['pid']}")
    whole = total.sum()
    return total / whole if whole > 0 else np.full_like(total, 1 / total.size)


def worth(model: AdemVL, problem: Mapping[str, Any], config: AdemConfig, window: int = 3) -> np.ndarray:
    """What hiding the image around each patch costs the model's own answer: [grid, grid], in nats.

    A square of `window` patches a side, centred at the patch, is filled with the image's mean colour; the answer's
    log-probability with the whole image, less that with the square hidden. Negative: the answer became likelier.
    `evaluation_batch` images are seen at once. Raises ValueError for a problem without an image, and for one that is
    too long or whose scores are not finite.
    """
    sequence = _sequence(model, problem, config)
    pixels = images_for(model, config)(problem["image"])
    grid, side = model.config.grid, model.config.vision_config.patch_size
    reach = window // 2

    def told(places: range) -> torch.Tensor:
        """Log-probabilities [len(places), vocabulary] with each place hidden; the whole image for what is none."""
        shown = pixels.repeat(len(places), 1, 1, 1)
        for image, number in zip(shown, places, strict=True):
            if number < grid * grid:
                top, left = (side * max(0, place - reach) for place in divmod(number, grid))
                bottom, right = (side * (place + reach + 1) for place in divmod(number, grid))
                image[:, top:bottom, left:right] = pixels.mean((1, 2))[:, None, None]
        batch = collate([sequence] * len(places), shown, padding_token(model), left=True)
        logits = model.next_logits(**{name: t.to(model.device) for name, t in batch.items() if name != "labels"})
        scores = logits.log_softmax(-1).cpu().double()
        require_finite_scores(scores.numpy(), f"problem {problem['pid']}")
        return scores

    places, size = range(grid * grid + 1), config.evaluation_batch  # the last one is the whole image
    answer = int(told(places[-1:])[0].argmax())
    own = torch.cat([told(places[start : start + size])[:, answer] for start in range(0, len(places), size)])
    return (own[-1] - own[:-1]).view(grid, grid).numpy()
