"""GIF question answering: video tokens in front of a question, in a frozen language model with a trained adapter.

A sequence is [BOS] [video tokens] [question] [answer EOS]; a blind model has no video tokens. Frame embeddings pass
X-CLIP's multi-frame transformer (MIT) and a connector; gradient flows into the adapter, the connector and, where the
profile says so, the MIT. The bundle on disk holds these and nothing else.
"""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    XCLIPConfig,
    XCLIPModel,
)
from transformers.pytorch_utils import Conv1D

from helpers.config import LanguageModelConfig, Profile
from helpers.gifs import Limits, decode, read_gif
from helpers.models.connectors import build_connector
from helpers.models.xclip import (
    FrameEncoder,
    MaskedMIT,
    additive_mask,
    attention_implementation,
    load_xclip,
    portable_name,
)
from helpers.workspace import compute_dtype, find_model
from helpers.workspace import device as default_device

# peft asks transformers about checkpointing by a name that is on its way out; nobody here can mend that.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)

BUNDLE_FORMAT = 1  # raise when an older bundle can no longer be read
IGNORED = -100  # label of a token that is no part of the answer
CANDIDATE_TOKENS = 512  # candidate tokens scored behind one prefix in one row; more get a row of their own
MAX_NEW_TOKENS = 24  # an answer is a word, a number or a short phrase
COUNTS = [str(number) for number in range(1, 11)]  # TGIF-QA: predictions are clipped to 1..10
# IA3 scales the input of a feed-forward block's last layer and the output of all others (arXiv 2205.05638, section 3.3)
FEED_FORWARD_OUTPUTS = ("down_proj", "mlp.c_proj", "fc2")


class BundleError(ValueError):
    """A bundle that does not fit: files, tensors, or the models that it was trained on."""


# ---- Language model and adapter ------------------------------------------------------------------------------------


def load_language_model(
    config: LanguageModelConfig, device: torch.device, folder: str | None = None
) -> tuple[PreTrainedModel, Any]:
    """Load a causal language model (frozen) and its tokenizer, in NF4 with double quantisation or unquantised.

    `folder` stands in for the profile's model id. Raises ModelNotFound when the weights are nowhere to be had.
    """
    folder = folder or find_model(config.model, config.revision)
    dtype = compute_dtype(device)
    options: dict[str, Any] = {}
    if config.quantisation == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map={"": device}, **options)
    if config.quantisation == "nf4":
        from bitsandbytes.nn import Linear4bit

        for module in model.modules():
            if isinstance(module, Linear4bit):
                # Else a CPU with AVX512-BF16 repacks the weights lossily at the first evaluation forward.
                module.support_avx512bf16_for_cpu = False
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {config.model} has no end-of-sequence token; answers could not end")
    # Hub models bring sampling settings (temperature, top-p) that greedy and beam search would warn about.
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )
    return model.eval().requires_grad_(False), tokenizer


def adapter_config(model: PreTrainedModel, config: LanguageModelConfig) -> PeftConfig:
    """Make the PEFT configuration for `model`; target_modules ["all-linear"] means every linear layer but the head.

    Raises ValueError when a target module is not in the model.
    """
    names = {name for name, _ in model.named_modules()}
    every = config.target_modules == ["all-linear"]
    missing = [t for t in config.target_modules if not any(n == t or n.endswith(f".{t}") for n in names)]
    if missing and not every:
        linear = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
        raise ValueError(
            f"language_model.target_modules has {missing}, which {config.model} lacks; its linear layers are "
            f'{sorted(linear)}, and ["all-linear"] takes all but the head'
        )
    # GPT-2's unquantised Conv1D keeps its weight transposed
    common = {
        "task_type": TaskType.CAUSAL_LM,
        "fan_in_fan_out": any(isinstance(module, Conv1D) for module in model.modules()),
    }
    if config.adapter == "lora":
        return LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules="all-linear" if every else list(config.target_modules),
            **common,
        )
    if every:  # PEFT knows the paper's choice (keys, values, feed-forward) for the usual architectures
        return IA3Config(**common)
    return IA3Config(
        target_modules=list(config.target_modules),
        feedforward_modules=[t for t in config.target_modules if t in FEED_FORWARD_OUTPUTS],
        **common,
    )


# ---- Identity of the frozen models ---------------------------------------------------------------------------------


def _language_model_identity(model: PreTrainedModel, tokenizer: Any) -> dict[str, Any]:
    """What tells a base model from others, whatever folder or precision it was loaded from."""
    config = model.config
    tokens = tokenizer("What does the small cat do 3 times?", add_special_tokens=False).input_ids
    return {
        "architecture": f"{config.model_type}, {config.num_hidden_layers} layers of {config.hidden_size}, "
        f"vocabulary {config.vocab_size}",
        "tokens": [*tokens, tokenizer.bos_token_id, tokenizer.eos_token_id],
        "weights": model.get_input_embeddings().weight[tokens, :4].float().flatten().tolist(),
    }


def _encoder_identity(xclip: XCLIPModel) -> dict[str, Any]:
    """What tells a video encoder from others, whatever folder or precision it was loaded from."""
    vision = xclip.config.vision_config
    return {
        "architecture": f"x_clip, {vision.num_hidden_layers} layers of {vision.hidden_size}, {vision.num_frames} frames"
        f" of {vision.image_size} px in patches of {vision.patch_size}, projection {xclip.config.projection_dim}",
        "weights": xclip.visual_projection.weight.flatten()[:64].float().tolist(),
    }


def _require_same(ours: dict[str, Any], given: dict[str, Any], what: str, name: str, given_name: str) -> None:
    """Raise BundleError, naming both, unless the given base model is the one that the bundle was trained on."""
    same_text = all(ours[key] == given[key] for key in ours if key != "weights")
    # bfloat16 keeps 8 bits: a model loaded in another precision is still the same model.
    if same_text and np.allclose(ours["weights"], given["weights"], rtol=2**-8, atol=1e-6):
        return
    detail = "other weights or another tokenizer" if ours["architecture"] == given["architecture"] else ""
    raise BundleError(
        f"this bundle was trained on the {what} {name} ({ours['architecture']}); it does not fit {given_name} "
        f"({detail or given['architecture']}). Give the model that it was trained on, or train a bundle for this one."
    )


# ---- The model -----------------------------------------------------------------------------------------------------


class GifQAModel(nn.Module):
    """A frozen language model with an adapter, and (unless blind) an MIT and a connector in front of it.

    Attributes: language_model (PEFT), tokenizer, mit and connector (None if blind), video (False: blind), profile,
    base (what the bundle says about the frozen models).
    """

    def __init__(
        self,
        language_model: PeftModel,
        tokenizer: Any,
        profile: Profile,
        base: dict[str, Any],
        mit: MaskedMIT | None = None,
        connector: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.language_model = language_model
        self.tokenizer = tokenizer
        self.profile = profile
        self.base = base
        self.mit = mit
        self.connector = connector
        self.video = connector is not None
        self.start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id

    @classmethod
    def build(cls, profile: Profile, device: torch.device | None = None, video: bool = True) -> GifQAModel:
        """Build an untrained model: frozen base models, fresh adapter and connector (seeded by training.seed).

        `video=False` makes the blind model. Raises ModelNotFound when weights are missing.
        """
        device = device or default_device()
        language_model, tokenizer = load_language_model(profile.language_model, device)
        base = {
            "language_model": {
                "model": portable_name(profile.language_model.model),
                "revision": profile.language_model.revision,
                "identity": _language_model_identity(language_model, tokenizer),
            }
        }
        xclip = load_xclip(profile.encoder.model, profile.encoder.revision) if video else None
        if xclip is not None:
            base["encoder"] = {
                "model": portable_name(profile.encoder.model),
                "revision": profile.encoder.revision,
                "key": FrameEncoder(xclip, profile.encoder.model, profile.encoder.revision).key,
                "identity": _encoder_identity(xclip),
                "vision_config": xclip.config.vision_config.to_diff_dict(),
                "projection_dim": xclip.config.projection_dim,
            }
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(profile.training.seed)
            adapted = get_peft_model(language_model, adapter_config(language_model, profile.language_model))
            model = cls(adapted, tokenizer, profile, base)
            if xclip is not None:
                model._attach_video(MaskedMIT(xclip), xclip.config.projection_dim)
        return model.to(device)

    def _attach_video(self, mit: MaskedMIT, video_dim: int) -> None:
        embedding = self.language_model.get_input_embeddings().weight
        self.mit = mit.float().requires_grad_(self.profile.connector.train_mit)
        self.connector = build_connector(
            self.profile.connector,
            video_dim,
            embedding.shape[1],
            frames_per_group=mit.position_embedding.shape[1],
            output_rms=embedding.float().pow(2).mean().sqrt().item(),
        )
        self.video = True

    @property
    def device(self) -> torch.device:
        """Where the language model is."""
        return self.language_model.get_input_embeddings().weight.device

    @property
    def encoder_key(self) -> str | None:
        """Key of the encoder whose features this model takes; None for a blind model."""
        return self.base["encoder"]["key"] if self.video else None

    def check_features(self, encoder_key: str) -> None:
        """Raise BundleError, naming both, when features of `encoder_key` are not the ones this model was made for."""
        if self.video and encoder_key != self.encoder_key:
            raise BundleError(
                f"this model takes features of the encoder {self.encoder_key}, but these are of {encoder_key}; cache "
                "features with the model's own encoder, or train a bundle on these"
            )

    def gradient_checkpointing_enable(self) -> None:
        """In training, compute the language model's activations again for the backward pass instead of keeping them."""
        self.language_model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})

    # ---- Text --------------------------------------------------------------------------------------------------

    def encode_prompt(self, question: str, options: Sequence[str] | None = None) -> list[int]:
        """Token ids of BOS and the prompt; options, where given, are listed behind the question."""
        listed = f"{question}\nOptions: {'; '.join(options)}" if options else question
        text = self.profile.language_model.prompt.replace("{question}", listed)
        return [self.start, *self.tokenizer(text, add_special_tokens=False).input_ids]

    def encode_answer(self, answer: str) -> list[int]:
        """Token ids of " answer" and the terminator (EOS); an empty answer is the terminator alone."""
        text = answer.strip()
        tokens = self.tokenizer(f" {text}", add_special_tokens=False).input_ids if text else []
        return [*tokens, self.tokenizer.eos_token_id]

    # ---- Sequences ---------------------------------------------------------------------------------------------

    def _frames(self, frames: Any, lengths: Any) -> tuple[Tensor, Tensor] | None:
        """Frame embeddings as fp32 [B, N, D] on the device, with their mask [B, N]; None for a blind model."""
        if not self.video:
            return None
        if frames is None or lengths is None:
            raise ValueError("this model takes video: give frames [B, N, D] and lengths [B]")
        frames = torch.as_tensor(frames).to(self.device, torch.float32)
        lengths = torch.as_tensor(lengths).to(self.device)
        dim = self.base["encoder"]["projection_dim"]
        if frames.ndim != 3 or frames.shape[2] != dim or lengths.shape != frames.shape[:1]:
            raise ValueError(
                f"frames must be [B, N, {dim}] with lengths [B] for {self.encoder_key}; "
                f"got {list(frames.shape)} and {list(lengths.shape)}"
            )
        return frames, torch.arange(frames.shape[1], device=self.device) < lengths[:, None]

    def _video_tokens(self, frames: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, n, H] of all groups of each GIF in order of time, with their mask [B, n]."""
        batch, count, dim = frames.shape
        size = self.mit.position_embedding.shape[1]
        groups = max(1, math.ceil(count / size))
        padding = groups * size - count
        frames = F.pad(frames, (0, 0, 0, padding)).view(batch * groups, size, dim)
        mask = F.pad(mask, (0, padding)).view(batch * groups, size)
        tokens, pooled = self.mit(frames, mask)
        tokens, token_mask = self.connector(frames, tokens, pooled, mask)
        return tokens.reshape(batch, -1, tokens.shape[-1]), token_mask.reshape(batch, -1)

    def _sequence(
        self, input_ids: Tensor, attention_mask: Tensor, video: tuple[Tensor, Tensor] | None, left: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Pack [BOS] [video tokens] [rest of the text] of each row without gaps.

        Returns embeddings [B, S, H], their mask [B, S], and `order` [B, S]: which column of input_ids each came from
        (negative: a video token). Padding is on the right, or with `left` on the left.
        """
        embeddings = self.language_model.get_input_embeddings()(input_ids)
        # Sorting by rank puts BOS (0) first, then video (1), then text (2), with padding at one end; it is stable.
        padding = -1 if left else 3
        rank = torch.where(attention_mask.cumsum(1) <= 1, 0, 2).masked_fill(attention_mask == 0, padding)
        if video is not None:
            tokens, mask = self._video_tokens(*video)
            embeddings = torch.cat([tokens.to(embeddings.dtype), embeddings], dim=1)
            rank = torch.cat([torch.where(mask, 1, padding), rank], dim=1)
        rank, order = rank.sort(dim=1, stable=True)
        mask = rank != padding
        length = int(mask.sum(1).max())
        self._require_room(length)
        kept = slice(-length, None) if left else slice(length)
        order, mask = order[:, kept], mask[:, kept]
        packed = embeddings.gather(1, order[..., None].expand(-1, -1, embeddings.shape[-1]))
        return packed, mask, order - (rank.shape[1] - input_ids.shape[1])

    def _require_room(self, length: int) -> None:
        limit = getattr(self.language_model.config, "max_position_embeddings", None)
        if limit is not None and length > limit:
            raise ValueError(f"a sequence of {length} tokens (video and text) is over the language model's {limit}")

    def _hidden(self, embeddings: Tensor, mask: Tensor, position_ids: Tensor) -> Tensor:
        """Last hidden states [B, S, H], without the head."""
        backbone = self.language_model.get_base_model().base_model
        return backbone(
            inputs_embeds=embeddings, attention_mask=mask, position_ids=position_ids, use_cache=False
        ).last_hidden_state

    def _logits(self, hidden: Tensor) -> Tensor:
        head = self.language_model.get_output_embeddings()
        return head(hidden.to(head.weight.dtype)).float()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        frames: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Loss of the answers.

        input_ids [B, L]: prompt and answer of each row; attention_mask [B, L]; labels [B, L]: the answer's token ids,
        -100 elsewhere; frames [B, N, D] (padded) and lengths [B]: frame embeddings, ignored by a blind model.
        Returns loss (mean cross-entropy in nats over all answer tokens) and logits [M, V] of the M answer tokens, in
        row-major order. Raises ValueError for a batch without an answer token or with frames of another encoder.
        """
        embeddings, mask, order = self._sequence(input_ids, attention_mask, self._frames(frames, lengths))
        targets = labels.gather(1, order.clamp(min=0)).masked_fill(~mask | (order < 0), IGNORED)[:, 1:]
        answers = targets != IGNORED
        hidden = self._hidden(embeddings, mask.long(), (mask.cumsum(1) - 1).clamp(min=0))
        logits = self._logits(hidden[:, :-1][answers])
        if not len(logits):
            raise ValueError("labels hold no answer token: every label is -100")
        return {"loss": F.cross_entropy(logits, targets[answers]), "logits": logits}

    # ---- Answers -----------------------------------------------------------------------------------------------

    @contextmanager
    def _inference(self) -> Iterator[None]:
        training = self.training
        self.eval()
        try:
            with torch.inference_mode():
                yield
        finally:
            self.train(training)

    def _prefix(self, prompts: Sequence[Sequence[int]], video: tuple[Tensor, Tensor] | None, left: bool = False):
        """Pack prompts (token ids, BOS first) with their video tokens: embeddings [B, S, H] and mask [B, S]."""
        width = max(len(prompt) for prompt in prompts)
        ids = torch.tensor([[*p, *[self.start] * (width - len(p))] for p in prompts], device=self.device)
        mask = torch.tensor([[1] * len(p) + [0] * (width - len(p)) for p in prompts], device=self.device)
        embeddings, mask, _ = self._sequence(ids, mask, video, left)
        return embeddings, mask

    def _decode(
        self, prompts: Sequence[Sequence[int]], video: tuple[Tensor, Tensor] | None, num_beams: int, returned: int
    ) -> list[list[str]]:
        embeddings, mask = self._prefix(prompts, video, left=True)
        self._require_room(embeddings.shape[1] + MAX_NEW_TOKENS)
        tokens = self.language_model.generate(
            inputs_embeds=embeddings,
            attention_mask=mask.long(),
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            num_beams=num_beams,
            num_return_sequences=returned,
        )
        texts = [text.strip() for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]
        return [texts[i : i + returned] for i in range(0, len(texts), returned)]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        frames: Any = None,
        lengths: Any = None,
        num_beams: int = 1,
    ) -> list[str]:
        """Open-ended answers by greedy (num_beams=1) or beam search.

        prompts: token ids from `encode_prompt`; frames [B, N, D] and lengths [B] (0: nothing is shown), tensors or
        arrays, ignored by a blind model.
        """
        with self._inference():
            return [texts[0] for texts in self._decode(prompts, self._frames(frames, lengths), num_beams, 1)]

    def score(
        self,
        prompts: Sequence[Sequence[int]],
        candidates: Sequence[Sequence[str]],
        frames: Any = None,
        lengths: Any = None,
    ) -> list[np.ndarray]:
        """Log-probabilities of candidate answers; each prompt is computed once for all of its candidates.

        Returns for each prompt [K, 2]: summed and per token, in nats, the terminator included.
        """
        tokens = [[self.encode_answer(text) for text in texts] for texts in candidates]
        with self._inference():
            return self._score(prompts, tokens, self._frames(frames, lengths))

    def _score(
        self,
        prompts: Sequence[Sequence[int]],
        candidates: Sequence[Sequence[Sequence[int]]],
        video: tuple[Tensor, Tensor] | None,
    ) -> list[np.ndarray]:
        """Scores [K, 2] of tokenised candidates for each prompt, however many there are."""
        results = [np.zeros((len(tokens), 2)) for tokens in candidates]
        rows: list[tuple[int, list[int]]] = []
        for prompt, tokens in enumerate(candidates):
            room = 0
            for index, candidate in enumerate(tokens):
                if room < len(candidate):
                    rows.append((prompt, []))
                    room = max(CANDIDATE_TOKENS, len(candidate))
                rows[-1][1].append(index)
                room -= len(candidate)
        for start in range(0, len(rows), len(prompts)):  # no more rows at once than the caller gave prompts
            part = rows[start : start + len(prompts)]
            which = [prompt for prompt, _ in part]
            sums = self._score_rows(
                [prompts[i] for i in which],
                [[candidates[i][k] for k in members] for i, members in part],
                None if video is None else tuple(tensor[which] for tensor in video),
            )
            for (i, members), values in zip(part, sums, strict=True):
                results[i][members, 0] = values
        for result, tokens in zip(results, candidates, strict=True):
            result[:, 1] = result[:, 0] / [len(candidate) for candidate in tokens]
        return results

    def _score_rows(
        self,
        prompts: Sequence[Sequence[int]],
        candidates: Sequence[Sequence[Sequence[int]]],
        video: tuple[Tensor, Tensor] | None,
    ) -> list[np.ndarray]:
        """Summed log-probabilities of each row's candidates, in one pass.

        All candidates of a row stand behind its prefix in one sequence. A mask lets each see the prefix and itself
        only, and each counts its positions from the prefix's end: the same as one sequence a candidate.
        """
        prefix, prefix_mask = self._prefix(prompts, video)
        batch, start = prefix_mask.shape
        lengths = prefix_mask.sum(1).tolist()
        self._require_room(max(n + len(c) for n, row in zip(lengths, candidates, strict=True) for c in row))
        # A candidate's last token is predicted but never read, so it needs no place in the sequence.
        read = [[token for c in row for token in c[:-1]] for row in candidates]
        width = max(len(row) for row in read)
        tokens, segment, offset = (np.full((batch, width), fill) for fill in (self.start, -1, 0))
        sources, targets, owners = [], [], []  # which position predicts which token, and for which candidate
        for i, row in enumerate(candidates):
            last, place = lengths[i] - 1, 0
            for k, candidate in enumerate(row):
                size = len(candidate) - 1
                span = slice(place, place + size)
                tokens[i, span], segment[i, span], offset[i, span] = candidate[:-1], k, range(size)
                sources += [(i, last), *((i, start + p) for p in range(place, place + size))]
                targets += candidate
                owners += [(i, k)] * len(candidate)
                place += size
        tokens, segment, offset = (torch.as_tensor(a, device=self.device) for a in (tokens, segment, offset))

        embeddings = torch.cat([prefix, self.language_model.get_input_embeddings()(tokens)], dim=1)
        positions = torch.cat([(prefix_mask.cumsum(1) - 1).clamp(min=0), prefix_mask.sum(1, keepdim=True) + offset], 1)
        total = start + width
        segments = torch.cat([segment.new_full((batch, start), -1), segment], dim=1)  # -1: prefix or padding
        seen = torch.zeros(batch, total, dtype=torch.bool, device=self.device)
        seen[:, :start] = prefix_mask
        own = (segments[:, :, None] == segments[:, None, :]) & (segments >= 0)[:, None, :]
        allowed = (seen[:, None, :] | own).tril()
        hidden = self._hidden(embeddings, additive_mask(allowed, embeddings.dtype)[:, None], positions)

        rows, columns = torch.tensor(sources, device=self.device).T
        target = torch.tensor(targets, device=self.device)
        values = [  # in parts: a vocabulary of 128,256 makes the logits by far the largest tensor
            self._logits(hidden[r, c]).log_softmax(-1).gather(1, t[:, None])[:, 0]
            for r, c, t in zip(rows.split(1024), columns.split(1024), target.split(1024), strict=True)
        ]
        sums = [np.zeros(len(row)) for row in candidates]
        for (i, k), value in zip(owners, torch.cat(values).tolist(), strict=True):
            sums[i][k] += value
        return sums

    def best_answer(
        self, prompts: Sequence[Sequence[int]], vocabulary: Sequence[str], frames: Any = None, lengths: Any = None
    ) -> list[str]:
        """The word of a closed vocabulary with the highest summed log-probability, for each prompt.

        Exact without scoring every word: a score only falls as tokens are added, so the log-probability of its first
        token bounds a word's score. Words are scored in order of that bound until no bound is above the best score.
        """
        tokens = [self.encode_answer(word) for word in vocabulary]
        first = torch.tensor([word[0] for word in tokens], device=self.device)
        with self._inference():
            video = self._frames(frames, lengths)
            prefix, mask = self._prefix(prompts, video)
            hidden = self._hidden(prefix, mask.long(), (mask.cumsum(1) - 1).clamp(min=0))
            last = hidden[torch.arange(len(mask), device=self.device), mask.sum(1) - 1]
            bounds, order = self._logits(last).log_softmax(-1)[:, first].sort(dim=1, descending=True, stable=True)
            bounds, order = bounds.double().cpu().numpy(), order.cpu().numpy()
            best = [(-math.inf, 0)] * len(prompts)  # score and word of each prompt
            done = [0] * len(prompts)  # words scored of each prompt, in order of their bounds
            while True:
                # Rounding may put a score a hair above its bound.
                batches = {
                    i: [
                        int(w)
                        for w, b in zip(order[i, d : d + 32], bounds[i, d : d + 32], strict=True)
                        if b >= best[i][0]
                    ]
                    for i, d in enumerate(done)
                }
                batches = {i: words for i, words in batches.items() if words}
                if not batches:
                    return [vocabulary[word] for _, word in best]
                which = list(batches)
                scores = self._score(
                    [prompts[i] for i in which],
                    [[tokens[w] for w in batches[i]] for i in which],
                    None if video is None else tuple(tensor[which] for tensor in video),
                )
                for i, values in zip(which, scores, strict=True):
                    done[i] += len(batches[i])
                    k = int(values[:, 0].argmax())
                    best[i] = max(best[i], (float(values[k, 0]), batches[i][k]), key=lambda pair: pair[0])

    # ---- Bundle ------------------------------------------------------------------------------------------------

    def save_bundle(self, folder: Path | str, info: dict[str, Any] | None = None) -> Path:
        """Write the trained parts to `folder`, at once or not at all; a bundle already there is replaced.

        adapter_model.safetensors and adapter_config.json (stock PEFT loads them), connector.safetensors (connector.*
        and mit.*; not for a blind model), bundle.json (base models, encoder key, profile, video, and `info`, for
        example {"metrics": {...}}). Raises ValueError when `info` has a key that the bundle itself writes.
        """
        folder = Path(folder)
        profile = self.profile.model_dump(mode="json", exclude={"adem"})
        for section in ("language_model", "encoder"):
            profile[section]["model"] = portable_name(profile[section]["model"])
        facts = {"format": BUNDLE_FORMAT, "video": self.video, **copy.deepcopy(self.base), "profile": profile}
        if clash := facts.keys() & (info or {}).keys():
            raise ValueError(f"info holds {sorted(clash)}, which save_bundle writes itself")
        staging = folder.with_name(f".{folder.name}.{os.getpid()}")
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        save_file(_adapter_tensors(self.language_model), staging / "adapter_model.safetensors")
        config = copy.deepcopy(self.language_model.peft_config["default"])
        config.base_model_name_or_path = self.base["language_model"]["model"]
        config.revision = self.base["language_model"]["revision"]
        config.inference_mode = True
        for name in ("target_modules", "feedforward_modules"):
            if isinstance(getattr(config, name, None), set):  # a set would be written in another order every time
                setattr(config, name, sorted(getattr(config, name)))
        config.save_pretrained(staging)
        if self.video:
            save_file(self._video_tensors(), staging / "connector.safetensors")
        (staging / "bundle.json").write_text(json.dumps(facts | (info or {}), indent=2) + "\n", encoding="utf-8")
        old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
        if folder.exists():
            folder.rename(old)
        staging.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
        return folder

    def _video_tensors(self) -> dict[str, Tensor]:
        parts = {"connector": self.connector, "mit": self.mit}
        return {
            f"{part}.{name}": tensor.detach().cpu().contiguous()
            for part, module in parts.items()
            for name, tensor in module.state_dict().items()
        }


def _adapter_tensors(language_model: PeftModel) -> dict[str, Tensor]:
    # save_embedding_layers="auto" would ask the hub whether the embedding was resized
    tensors = get_peft_model_state_dict(language_model, save_embedding_layers=False)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _load_strictly(path: Path, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Read a safetensors file that must hold exactly the expected names and shapes, or raise BundleError."""
    if not path.is_file():
        raise BundleError(f"{path} is missing; a bundle holds it, copy the whole folder")
    tensors = load_file(path)
    faults = [f"missing: {name}" for name in sorted(expected.keys() - tensors.keys())]
    faults += [f"not expected: {name}" for name in sorted(tensors.keys() - expected.keys())]
    faults += [
        f"{name} is {list(tensors[name].shape)}, expected {list(expected[name].shape)}"
        for name in sorted(expected.keys() & tensors.keys())
        if tensors[name].shape != expected[name].shape
    ]
    if faults:
        more = f" and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise BundleError(f"{path} does not fit this model: {'; '.join(faults[:8])}{more}")
    return tensors


def read_bundle(folder: Path | str) -> dict[str, Any]:
    """Read bundle.json. Raises BundleError when there is none or it is of another format."""
    path = Path(folder) / "bundle.json"
    if not path.is_file():
        raise BundleError(f"{folder} is no bundle: it has no bundle.json")
    facts = json.loads(path.read_text(encoding="utf-8"))
    if facts.get("format") != BUNDLE_FORMAT:
        raise BundleError(f"{path} has format {facts.get('format')}; this code reads {BUNDLE_FORMAT}")
    return facts


def _empty_mit(encoder: dict[str, Any]) -> MaskedMIT:
    """An MIT of the encoder's shape without weights: a bundle brings its own."""
    with torch.device("meta"):
        config = XCLIPConfig(vision_config=encoder["vision_config"], projection_dim=encoder["projection_dim"])
        config._attn_implementation = attention_implementation()
        return MaskedMIT(XCLIPModel(config)).to_empty(device="cpu")


def load_bundle(
    folder: Path | str,
    language_model: str | None = None,
    video_model: str | None = None,
    device: torch.device | None = None,
) -> GifQAModel:
    """Load a trained model (evaluation mode, nothing trainable).

    language_model, video_model: id or folder to take the frozen models from, instead of what the bundle names. The
    video encoder itself is not part of the model; `video_model` is only checked. Raises BundleError when either is
    another model than the bundle was trained on (naming both), or a tensor is missing, extra or of another shape.
    """
    folder = Path(folder)
    facts = read_bundle(folder)
    profile = Profile.model_validate(facts["profile"])
    device = device or default_device()
    base = {name: facts[name] for name in ("language_model", "encoder") if name in facts}
    ours = base["language_model"]
    found = find_model(language_model or ours["model"], None if language_model else ours["revision"])
    model, tokenizer = load_language_model(profile.language_model, device, found)
    given = _language_model_identity(model, tokenizer)
    _require_same(ours["identity"], given, "language model", ours["model"], language_model or found)
    if video_model is not None and facts["video"]:
        _load_encoder(facts, video_model)

    config = PeftConfig.from_pretrained(str(folder))
    config.base_model_name_or_path = None  # PEFT would warn that it is a folder now; the models were compared above
    adapted = get_peft_model(model, config)
    tensors = _load_strictly(folder / "adapter_model.safetensors", _adapter_tensors(adapted))
    set_peft_model_state_dict(adapted, tensors)
    result = GifQAModel(adapted, tokenizer, profile, base)
    if facts["video"]:
        result._attach_video(_empty_mit(base["encoder"]), base["encoder"]["projection_dim"])
        tensors = _load_strictly(folder / "connector.safetensors", result._video_tensors())
        for part in ("connector", "mit"):
            own = {name.split(".", 1)[1]: tensor for name, tensor in tensors.items() if name.startswith(f"{part}.")}
            getattr(result, part).load_state_dict(own, strict=True)
    return result.to(device).eval().requires_grad_(False)


def _load_encoder(facts: dict[str, Any], video_model: str | None) -> FrameEncoder:
    """Load the bundle's video encoder from `video_model` or where the bundle says, checked to be the same."""
    ours = facts["encoder"]
    xclip = load_xclip(video_model or ours["model"], None if video_model else ours["revision"])
    given = _encoder_identity(xclip)
    _require_same(ours["identity"], given, "video encoder", ours["model"], video_model or ours["model"])
    return FrameEncoder(xclip, ours["model"], ours["revision"])


# ---- One call ------------------------------------------------------------------------------------------------------


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
        encoder = _load_encoder(read_bundle(bundle), video_model)
        return cls(model, encoder.to(model.device, compute_dtype(model.device)))

    def sample(
        self, gif: str | Path | bytes | Image.Image, image_size: int | None = None
    ) -> tuple[np.ndarray, list[float]]:
        """Frames of a GIF that the model sees, uint8 [N, S, S, 3], and when each starts, in ms.

        image_size: S in pixels; by default what the encoder takes. Raises helpers.gifs.GifRejected for a file that is
        no usable GIF.
        """
        profile = self.model.profile
        names = ("max_canvas_pixels", "max_frames", "max_bytes", "decode_seconds")
        limits = Limits(**{name: getattr(profile.data, name) for name in names})
        decoded = decode(
            read_gif(gif, limits.max_bytes),
            image_size=image_size or self.encoder.image_size,
            groups=[profile.evaluation.groups],
            frames_per_group=self.encoder.frames_per_group,
            limits=limits,
        )
        rows = decoded.views[-1]["rows"]
        return np.ascontiguousarray(decoded.frames[rows]), [decoded.frame_times_ms[row] for row in rows]

    def encode(self, gif: str | Path | bytes | Image.Image) -> tuple[Tensor, list[float]]:
        """Frame embeddings [N, D] (fp16, as cached) of a GIF's sampled frames, and when each starts, in ms.

        Raises helpers.gifs.GifRejected for a file that is no usable GIF.
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

        With options: the most likely one, as in multiple-choice tasks. A count (task "count", or a question that
        starts with "how many times"): the rounded expectation over the numbers 1 to 10. Else: free text, with the
        beams as alternatives. Relevance is by occlusion: the frame is masked out of the multi-frame transformer and of
        the prompt (what its message told other frames inside the encoder stays). Raises ValueError for an empty
        question or less than two options, GifRejected for a file that is no usable GIF.
        """
        question, options = check_question(question, options)
        count = not options and (task == "count" or (task is None and asks_for_count(question)))
        with self._lock, self.model._inference():
            return self._answer(gif, question, COUNTS if count else options, count)

    def _answer(self, gif: Any, question: str, candidates: list[str], count: bool) -> Answer:
        model = self.model
        listed = candidates if candidates and not count and model.profile.evaluation.options_in_prompt else None
        prompt = model.encode_prompt(question, listed)
        frames, times = None, []
        if model.video:
            dim = model.base["encoder"]["projection_dim"]
            frames, times = self.encode(gif) if gif is not None else (torch.zeros(1, dim), [])
        video = model._frames(None if frames is None else frames[None], [len(times)])
        closed = bool(candidates)
        if not closed:
            beams = max(5, model.profile.evaluation.num_beams)
            best = model._decode([prompt], video, model.profile.evaluation.num_beams, 1)[0]
            candidates = list(dict.fromkeys([*best, *model._decode([prompt], video, beams, beams)[0]]))
        scores = self._log_probabilities(prompt, candidates, video, closed)[0]
        probabilities = np.exp(scores)
        chosen = _choose(probabilities, count) if closed else 0
        others = [i for i in np.argsort(-scores, kind="stable") if i != chosen]
        relevance, hidden = [], []
        if times:
            seen = video[1] & ~torch.eye(len(times), dtype=torch.bool, device=video[1].device)
            parts = list(zip(video[0].expand(len(times), -1, -1).split(16), seen.split(16), strict=True))
            asked = candidates if closed else [candidates[chosen]]
            without = np.concatenate([self._log_probabilities(prompt, asked, part, closed) for part in parts])
            relevance = (scores[chosen] - without[:, chosen if closed else 0]).tolist()
            if closed:
                hidden = [candidates[_choose(row, count)] for row in np.exp(without)]
            else:
                beams = model.profile.evaluation.num_beams
                hidden = [text for part in parts for [text] in model._decode([prompt] * len(part[0]), part, beams, 1)]
        return Answer(
            text=candidates[chosen],
            confidence=float(probabilities[chosen]),
            alternatives=[(candidates[i], float(probabilities[i])) for i in others],
            relevance=relevance,
            hidden=hidden,
            frame_times_ms=times,
        )

    def _log_probabilities(
        self, prompt: list[int], candidates: list[str], video: tuple[Tensor, Tensor] | None, closed: bool
    ) -> np.ndarray:
        """Log-probabilities [B, K] of the candidates for each row of `video`; a closed set sums to 1."""
        tokens = [self.model.encode_answer(text) for text in candidates]
        rows = 1 if video is None else len(video[0])
        scores = np.stack([result[:, 0] for result in self.model._score([prompt] * rows, [tokens] * rows, video)])
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


def asks_for_count(question: str) -> bool:
    """Whether a question is TGIF-QA's repetition count by its wording."""
    return question.strip().lower().startswith("how many times")


def _choose(probabilities: np.ndarray, count: bool) -> int:
    """Which candidate is the answer, by the rule of the evaluation: TGIF-QA scores counts by squared error."""
    if not count:
        return int(probabilities.argmax())
    expectation = float(probabilities @ np.arange(1, len(COUNTS) + 1))
    return min(max(math.floor(expectation + 0.5), 1), len(COUNTS)) - 1
