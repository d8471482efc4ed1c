"""One call: ask a trained bundle a question about a GIF."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from helpers.corpora.tasks import COUNTS, asks_for_count, option_orders, require_finite_scores, round_count
from helpers.gifs.decode import Limits, decode, decode_frames, encode_frames, read_gif
from helpers.models.gif_qa.bundle import load_bundle, load_encoder, read_bundle
from helpers.models.gif_qa.model import GifQAModel
from helpers.models.gif_qa.window import WRITTEN_TOKENS
from helpers.models.parts import inference
from helpers.models.xclip import FrameEncoder
from helpers.workspace.machine import compute_dtype

HIDDEN_AT_ONCE = 16  # of a GIF's frames, each hidden in a row of its own


@dataclass(frozen=True)
class Answer:
    """An answer and what it rests on.

    text; confidence: its probability (among the options, among the counts 1 to 10, or of the whole text if open);
    alternatives: other answers with their probabilities, best first; relevance: for each sampled frame, how many nats
    the answer's log-probability falls when that frame is hidden; hidden: what is answered then; frame_times_ms: when
    each of these frames starts.
    """

    text: str
    confidence: float
    alternatives: list[tuple[str, float]]
    relevance: list[float] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    frame_times_ms: list[float] = field(default_factory=list)


class GifQA:
    """A trained bundle with its video encoder: ask a question about a GIF."""

    def __init__(self, model: GifQAModel, encoder: FrameEncoder | None) -> None:
        self.model = model
        self.encoder = encoder
        self._lock = threading.Lock()  # a page may ask again before the first answer is there

    @classmethod
    def from_pretrained(
        cls,
        bundle: Path | str,
        language_model: str | None = None,
        video_model: str | None = None,
        device: torch.device | None = None,
    ) -> GifQA:
        """Load a bundle and its frozen base models (by id, or from the given ids or folders).

        Raises BundleError for a broken bundle or other base models, ModelNotFound when weights are missing.
        """
        model = load_bundle(bundle, language_model, device=device)
        if not model.video:
            return cls(model, None)
        encoder = load_encoder(read_bundle(bundle), video_model)
        return cls(model, encoder.to(model.device, compute_dtype(model.device)))

    def sample(
        self, gif: str | Path | bytes | Image.Image, image_size: int | None = None
    ) -> tuple[np.ndarray, list[float]]:
        """Frames of a GIF that the model sees, uint8 [N, S, S, 3], and when each starts, in ms.

        image_size: S in pixels, for a picture of them; by default what the encoder takes, compressed as the frames were
        that the model was trained on. Raises GifRejected for a file that is no usable GIF.
        """
        profile = self.model.profile
        names = ("max_canvas_pixels", "max_frames", "max_bytes")
        limits = Limits(**{name: getattr(profile.data, name) for name in names})
        decoded = decode(
            read_gif(gif, limits.max_bytes),
            image_size=image_size or self.encoder.image_size,
            groups=[profile.evaluation.groups],
            frames_per_group=self.encoder.frames_per_group,
            limits=limits,
        )
        rows = decoded.views[-1]["rows"]
        frames = np.ascontiguousarray(decoded.frames[rows])
        if image_size is None:
            frames = decode_frames(encode_frames(frames, profile.data.frame_format, profile.data.frame_quality))
        return frames, [decoded.frame_times_ms[row] for row in rows]

    def encode(self, gif: str | Path | bytes | Image.Image) -> tuple[Tensor, list[float]]:
        """Frame embeddings [N, D] (fp16, as cached) of a GIF's sampled frames, and when each starts, in ms.

        Raises GifRejected for a file that is no usable GIF.
        """
        sampled, times = self.sample(gif)
        size, device = self.encoder.frames_per_group, self.model.device
        frames = torch.from_numpy(sampled).to(device)
        groups = frames.split(size)
        lengths = torch.tensor([len(group) for group in groups], device=device)
        padded = nn.utils.rnn.pad_sequence([*groups, frames.new_zeros(size, *frames.shape[1:])], batch_first=True)[:-1]
        with torch.inference_mode():
            embeddings = self.encoder(padded, lengths)
        valid = torch.cat([row[:n] for row, n in zip(embeddings, lengths.tolist(), strict=True)])
        return valid.half(), times

    def answer(
        self,
        gif: str | Path | bytes | Image.Image | None,
        question: str,
        options: Sequence[str] | None = None,
        task: str | None = None,
    ) -> Answer:
        """Answer a question about a GIF; `gif=None` tells what the model says without seeing any.

        With options: the most likely one, as in multiple-choice tasks, whatever their order; they stand in the prompt
        where the bundle's profile says so. A count (task "count", or a question that
        starts with "how many times"): the rounded expectation over the numbers 1 to 10. Else: free text, with the
        beams as alternatives. Relevance is by occlusion: the frame is masked out of the multi-frame transformer and of
        the prompt (what its message told other frames inside the encoder stays). Raises ValueError for an empty
        question, less than two options, what is too long for the window (TooLong) or scores that are not finite
        (ScoreError), GifRejected for a file that is no usable GIF.
        """
        question, options = check_question(question, options)
        count = not options and (task == "count" or (task is None and asks_for_count(question)))
        with self._lock, inference(self.model):
            return self._answer(gif, question, COUNTS if count else options, count)

    def _answer(self, gif: Any, question: str, candidates: list[str], count: bool) -> Answer:
        model = self.model
        told = f"the question {question!r}"
        evaluation, listed = model.profile.evaluation, None
        if candidates and not count and evaluation.options_in_prompt:
            listed = option_orders(question, candidates, evaluation.seed)[0]
        prompt = model.encode_prompt(question, listed)
        frames, times = None, []
        if model.video:
            dim = model.base["encoder"]["projection_dim"]
            frames, times = self.encode(gif) if gif is not None else (torch.zeros(1, dim), [])
        video = model.video_input(None if frames is None else frames[None], [len(times)])
        closed = bool(candidates)
        behind = [len(model.encode_answer(text)) for text in candidates] or [WRITTEN_TOKENS]
        window = model.window()
        room = len(prompt) + int(window.video(np.array(len(times)))) + max(behind)
        window.require_room(room, f"the question {shorten(question, 80)!r}")
        if not closed:
            beams = max(5, model.profile.evaluation.num_beams)
            best = model.decode([prompt], video, model.profile.evaluation.num_beams, 1)[0]
            candidates = list(dict.fromkeys([*best, *model.decode([prompt], video, beams, beams)[0]]))
        scores = self._log_probabilities(prompt, candidates, video, closed, told)[0]
        probabilities = np.exp(scores)
        chosen = _choose(probabilities, count) if closed else 0
        others = [i for i in np.argsort(-scores, kind="stable") if i != chosen]
        relevance, hidden = [], []
        if times:
            seen = video[1] & ~torch.eye(len(times), dtype=torch.bool, device=video[1].device)
            shown = video[0].expand(len(times), -1, -1)
            parts = list(zip(shown.split(HIDDEN_AT_ONCE), seen.split(HIDDEN_AT_ONCE), strict=True))
            asked = candidates if closed else [candidates[chosen]]
            parts_told = f"{told} with a frame hidden"
            without = np.concatenate(
                [self._log_probabilities(prompt, asked, part, closed, parts_told) for part in parts]
            )
            relevance = (scores[chosen] - without[:, chosen if closed else 0]).tolist()
            if closed:
                hidden = [candidates[_choose(row, count)] for row in np.exp(without)]
            else:
                beams = model.profile.evaluation.num_beams
                hidden = [text for part in parts for [text] in model.decode([prompt] * len(part[0]), part, beams, 1)]
        return Answer(
            text=candidates[chosen],
            confidence=float(probabilities[chosen]),
            alternatives=[(candidates[i], float(probabilities[i])) for i in others],
            relevance=relevance,
            hidden=hidden,
            frame_times_ms=times,
        )

    def _log_probabilities(
        self, prompt: list[int], candidates: list[str], video: tuple[Tensor, Tensor] | None, closed: bool, told: str
    ) -> np.ndarray:
        """Log-probabilities [B, K] of the candidates for each row of `video`; a closed set sums to 1.

        Raises ScoreError, naming `told`, if one is not finite.
        """
        tokens = [self.model.encode_answer(text) for text in candidates]
        rows = 1 if video is None else len(video[0])
        scores = np.stack([result[:, 0] for result in self.model.score_tokens([prompt] * rows, [tokens] * rows, video)])
        require_finite_scores(scores, told)
        if closed:
            scores = scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)
        return scores


def check_question(question: str, options: Sequence[str] | None) -> tuple[str, list[str]]:
    """The question and its options without spaces around them; ValueError in plain words if they cannot be asked."""
    question = question.strip()
    if not question:
        raise ValueError("the question is empty; type one, for example: what is the cat doing?")
    options = [option.strip() for option in options or []]
    if options and (len(options) < 2 or not all(options)):
        raise ValueError("give two or more options, none of them empty, or none at all")
    if options and len(set(options)) < len(options):
        raise ValueError("two options are the same; every option must be a different answer")
    return question, options


def _choose(probabilities: np.ndarray, count: bool) -> int:
    """Which candidate is the answer, by the rule of the evaluation: TGIF-QA scores counts by squared error."""
    if not count:
        return int(probabilities.argmax())
    return round_count(float(probabilities @ np.arange(1, len(COUNTS) + 1))) - 1
