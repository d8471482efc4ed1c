"""GIF question answering: video tokens in front of a question, in a frozen language model with a trained adapter.

A sequence is [BOS] [video tokens] [question] [answer EOS]; in a chat, the template's tokens stand around these, and its
own token ends the answer. A blind model has no video tokens. Frame embeddings pass
X-CLIP's multi-frame transformer (MIT) and a connector; gradient flows into the adapter, the connector and, where the
profile says so, the MIT. The bundle on disk holds these and nothing else.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from helpers.config import EvaluationConfig, Profile
from helpers.corpora.tasks import require_finite_scores
from helpers.models.chat import chat_format
from helpers.models.connectors import build_connector
from helpers.models.digests import layers_digest
from helpers.models.gif_qa.window import MAX_NEW_TOKENS, Window, window_size
from helpers.models.language import (
    adapter_config,
    answer_loss,
    head_logits,
    language_model_identity,
    load_language_model,
)
from helpers.models.parts import IGNORED, BundleError, inference, on_cpu, padded_candidates, require_finite
from helpers.models.text import answer_tokens, prompt_tokens, start_token
from helpers.models.xclip import (
    FrameEncoder,
    MaskedMIT,
    additive_mask,
    encoder_identity,
    load_xclip,
    portable_name,
    same_encoder,
)
from helpers.workspace.disk import whole
from helpers.workspace.machine import device as default_device
from helpers.workspace.weights import find_model

BUNDLE_FORMAT = 1  # raise when an older bundle can no longer be read
CANDIDATE_TOKENS = 512  # candidate tokens scored behind one prefix in one row; more get a row of their own
WORDS_AT_ONCE = 32  # of a closed vocabulary, scored in one pass for each prompt


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
        self.start = start_token(tokenizer)
        self.chat = chat_format(tokenizer, profile.language_model)
        self.head = 1 if self.chat is None else len(self.chat.head)  # tokens of a prompt in front of the video

    @classmethod
    def build(cls, profile: Profile, device: torch.device | None = None, video: bool = True) -> GifQAModel:
        """Build an untrained model: frozen base models, fresh adapter and connector (seeded by training.seed).

        `video=False` makes the blind model. Raises ModelNotFound when weights are missing.
        """
        device = device or default_device()
        folder = find_model(profile.language_model.model, profile.language_model.revision)
        language_model, tokenizer = load_language_model(profile.language_model, device, folder)
        base = {
            "language_model": {
                "model": portable_name(profile.language_model.model),
                "revision": profile.language_model.revision,
                "identity": language_model_identity(language_model, tokenizer, folder),
            }
        }
        xclip = load_xclip(profile.encoder.model, profile.encoder.revision) if video else None
        if xclip is not None:
            base["encoder"] = {
                "model": portable_name(profile.encoder.model),
                "revision": profile.encoder.revision,
                "key": FrameEncoder(xclip, profile.encoder.model, profile.encoder.revision).key,
                "identity": encoder_identity(xclip),
                "vision_config": xclip.config.vision_config.to_diff_dict(),
                "projection_dim": xclip.config.projection_dim,
            }
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(profile.training.seed)
            adapted = get_peft_model(language_model, adapter_config(language_model, profile.language_model))
            model = cls(adapted, tokenizer, profile, base)
            if xclip is not None:
                model.attach_video(MaskedMIT(xclip), xclip.config.projection_dim)
        if model.chat is not None:
            base["language_model"]["chat"] = model.chat.told()
        return model.to(device)

    def attach_video(self, mit: MaskedMIT, video_dim: int) -> None:
        """Put an MIT and a fresh connector to the language model's width in front of it."""
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
        if self.video and not same_encoder(encoder_key, self.encoder_key):
            raise BundleError(
                f"this model takes features of the encoder {self.encoder_key}, but these are of {encoder_key}; cache "
                "features with the model's own encoder, or train a bundle on these"
            )

    def window(self, evaluation: EvaluationConfig | None = None) -> Window:
        """The language model's window as this model fills it; evaluation: the section to ask by, if not the own one."""
        profile = self.profile if evaluation is None else self.profile.model_copy(update={"evaluation": evaluation})
        return Window(self.tokenizer, window_size(self.language_model.config), profile)

    def gradient_checkpointing_enable(self) -> None:
        """In training, compute the language model's activations again for the backward pass instead of keeping them."""
        self.language_model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})

    # ---- Text --------------------------------------------------------------------------------------------------

    def encode_prompt(self, question: str, options: Sequence[str] | None = None) -> list[int]:
        """Token ids of BOS and the prompt; options, where given, are listed behind the question."""
        config = self.profile.language_model
        return prompt_tokens(self.tokenizer, config.prompt, question, options, config.option_style, self.chat)

    def encode_answer(self, answer: str) -> list[int]:
        """Token ids of an answer and the terminator; an empty answer is the terminator alone."""
        return answer_tokens(self.tokenizer, answer, self.chat)

    def text_of(self, prompt: Sequence[int], answer: Sequence[int] = ()) -> str:
        """What the model reads, decoded from its token ids, with a mark where the video tokens stand."""
        parts = prompt[: self.head], [*prompt[self.head :], *answer]
        mark = "[video tokens]" if self.video else ""
        return mark.join(self.tokenizer.decode(part, clean_up_tokenization_spaces=False) for part in parts)

    # ---- Sequences ---------------------------------------------------------------------------------------------

    def video_input(self, frames: Any, lengths: Any) -> tuple[Tensor, Tensor] | None:
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
        """Pack [head of the text] [video tokens] [rest of the text] of each row without gaps.

        Returns embeddings [B, S, H], their mask [B, S], and `order` [B, S]: which column of input_ids each came from
        (negative: a video token). Padding is on the right, or with `left` on the left.
        """
        embeddings = self.language_model.get_input_embeddings()(input_ids)
        # Sorting by rank puts the head (0) first, then video (1), then text (2), with padding at one end; it is stable.
        padding = -1 if left else 3
        rank = torch.where(attention_mask.cumsum(1) <= self.head, 0, 2).masked_fill(attention_mask == 0, padding)
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
        self.window().require_room(length, "a sequence")

    def _hidden(self, embeddings: Tensor, mask: Tensor, position_ids: Tensor) -> Tensor:
        """Last hidden states [B, S, H], without the head."""
        backbone = self.language_model.get_base_model().base_model
        return backbone(
            inputs_embeds=embeddings, attention_mask=mask, position_ids=position_ids, use_cache=False
        ).last_hidden_state

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
        frames: Tensor | None = None,
        lengths: Tensor | None = None,
        candidates: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Loss of the answers; with `candidates` in place of `labels`, as `_choice_loss` says.

        input_ids [B, L]: prompt and answer of each row; attention_mask [B, L]; labels [B, L]: the answer's token ids,
        -100 elsewhere; candidates [B, K, A]: token ids of the right answer and of wrong ones, -100 where there is none,
        behind input_ids, which then hold prompts alone; frames [B, N, D] (padded) and lengths [B]: frame embeddings,
        ignored by a blind model. Returns loss (mean cross-entropy in nats over all answer tokens or, by
        `training.loss`, over the rows of the mean over each one's) and logits [M, V] of the M answer tokens, in
        row-major order. Raises ValueError for a batch without an answer token or with frames of another encoder.
        """
        embeddings, mask, order = self._sequence(input_ids, attention_mask, self.video_input(frames, lengths))
        if candidates is not None:
            return self._choice_loss(embeddings, mask, candidates)
        targets = labels.gather(1, order.clamp(min=0)).masked_fill(~mask | (order < 0), IGNORED)[:, 1:]
        answers = targets != IGNORED
        hidden = self._hidden(embeddings, mask.long(), (mask.cumsum(1) - 1).clamp(min=0))
        counts = answers.sum(1) if self.profile.training.loss == "per_question" else None
        return answer_loss(head_logits(self.language_model, hidden[:, :-1][answers]), targets[answers], counts)

    def _choice_loss(self, prefix: Tensor, prefix_mask: Tensor, candidates: Tensor) -> dict[str, Tensor]:
        """Loss of rows of which some choose among candidates [B, K, A], and the candidates' scores [B, K] in nats.

        A row's loss is the mean cross-entropy of the tokens of its right answer, the first candidate. Where it has
        others, `training.choice` adds ('beside') or puts in its place ('instead') the cross-entropy of a softmax over
        the candidates' scores, the log-probabilities of whole answers. The loss is the mean over the rows or, by
        `training.loss`, over the tokens of their right answers.
        """
        training = self.profile.training
        log_probs, given = self._candidate_log_probs(prefix, prefix_mask, candidates), candidates != IGNORED
        scores, counts = log_probs.sum(2), given[:, 0].sum(1)
        likelihood, right = -scores[:, 0] / counts, scores[:, 0]
        choice = scores.masked_fill(~given.any(2), -math.inf).logsumexp(1) - right  # 0 without a wrong one
        chosen = given.any(2).sum(1) > 1
        losses = likelihood + choice if training.choice == "beside" else torch.where(chosen, choice, likelihood)
        weights = torch.ones_like(counts) if training.loss == "per_question" else counts
        return {"loss": (losses * weights).sum() / weights.sum(), "scores": scores}

    # ---- Answers -----------------------------------------------------------------------------------------------

    def packed(
        self, prompts: Sequence[Sequence[int]], video: tuple[Tensor, Tensor] | None, left: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Prompts (token ids, BOS first) with their video tokens, as the language model reads them.

        video: as of `video_input`; None for a sequence of text alone. Returns embeddings [B, S, H], their mask [B, S],
        and which of them are video tokens [B, S]. Raises TooLong for a sequence over the window.
        """
        width = max(len(prompt) for prompt in prompts)
        ids = torch.tensor([[*p, *[self.start] * (width - len(p))] for p in prompts], device=self.device)
        mask = torch.tensor([[1] * len(p) + [0] * (width - len(p)) for p in prompts], device=self.device)
        embeddings, mask, order = self._sequence(ids, mask, video, left)
        return embeddings, mask, mask & (order < 0)

    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        video: tuple[Tensor, Tensor] | None,
        num_beams: int,
        returned: int,
        new_tokens: int = MAX_NEW_TOKENS,
    ) -> list[list[str]]:
        """Texts, of `new_tokens` at most, of the `returned` best beams of each prompt; `video` as of `video_input`."""
        embeddings, mask, _ = self.packed(prompts, video, left=True)
        self._require_room(embeddings.shape[1] + new_tokens)
        tokens = self.language_model.generate(
            inputs_embeds=embeddings,
            attention_mask=mask.long(),
            max_new_tokens=new_tokens,
            do_sample=False,
            num_beams=num_beams,
            num_return_sequences=returned,
        )
        ends = torch.tensor(self.language_model.get_base_model().generation_config.eos_token_id, device=tokens.device)
        written = torch.isin(tokens, ends).cumsum(1) == 0  # a tokenizer need not call the end of a turn special
        answers = [row[own].tolist() for row, own in zip(tokens, written, strict=True)]
        texts = [text.strip() for text in self.tokenizer.batch_decode(answers, skip_special_tokens=True)]
        return [texts[i : i + returned] for i in range(0, len(texts), returned)]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        frames: Any = None,
        lengths: Any = None,
        num_beams: int = 1,
        new_tokens: int = MAX_NEW_TOKENS,
    ) -> list[str]:
        """Open-ended answers, of `new_tokens` at most, by greedy (num_beams=1) or beam search.

        prompts: token ids from `encode_prompt`; frames [B, N, D] and lengths [B] (0: nothing is shown), tensors or
        arrays, ignored by a blind model.
        """
        with inference(self):
            video = self.video_input(frames, lengths)
            return [texts[0] for texts in self.decode(prompts, video, num_beams, 1, new_tokens)]

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
        with inference(self):
            return self.score_tokens(prompts, tokens, self.video_input(frames, lengths))

    def score_tokens(
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
        """Summed log-probabilities of each row's candidates, in one pass."""
        tokens = torch.from_numpy(padded_candidates(candidates)).to(self.device)
        prefix, mask, _ = self.packed(prompts, video)
        sums = self._candidate_log_probs(prefix, mask, tokens).double().sum(2).cpu().numpy()
        return [values[: len(row)] for values, row in zip(sums, candidates, strict=True)]

    def _candidate_log_probs(self, prefix: Tensor, prefix_mask: Tensor, candidates: Tensor) -> Tensor:
        """Log-probability of each token of each row's candidates behind its prefix, float32 [B, K, A], in one pass.

        prefix [B, S, H] with its mask [B, S]; candidates [B, K, A]: token ids, `IGNORED` where there is none (0 there).
        All candidates of a row stand behind its prefix in one sequence. A mask lets each see the prefix and itself
        only, and each counts its positions from the prefix's end: the same as one sequence a candidate.
        """
        batch, start = prefix_mask.shape
        longest = candidates.shape[2]
        given = candidates != IGNORED
        ends = prefix_mask.sum(1)
        self._require_room(int((ends + given.sum(2).amax(1)).max()))
        # A candidate's last token is predicted but never read, so it needs no place in the sequence.
        read = F.pad(given[:, :, 1:], (0, 1)).flatten(1)
        width = int(read.sum(1).max())
        place = read.long().sort(dim=1, descending=True, stable=True).indices[:, :width]
        unused = ~read.gather(1, place)
        tokens = candidates.flatten(1).gather(1, place).masked_fill(unused, self.start)
        segment = (place // longest).masked_fill(unused, -1)
        offset = (place % longest).masked_fill(unused, 0)

        embeddings = torch.cat([prefix, self.language_model.get_input_embeddings()(tokens)], dim=1)
        positions = torch.cat([(prefix_mask.cumsum(1) - 1).clamp(min=0), ends[:, None] + offset], dim=1)
        segments = torch.cat([segment.new_full((batch, start), -1), segment], dim=1)  # -1: prefix or padding
        seen = F.pad(prefix_mask, (0, width))
        own = (segments[:, :, None] == segments[:, None, :]) & (segments >= 0)[:, None, :]
        allowed = (seen[:, None, :] | own).tril()
        hidden = self._hidden(embeddings, additive_mask(allowed, embeddings.dtype)[:, None], positions)

        # Which position predicts which token: the prefix's last one the first, the place of each token the next one.
        after = (start - 1 + read.cumsum(1)).view_as(candidates)[:, :, :-1]
        source = torch.cat([(ends - 1)[:, None, None].expand(-1, candidates.shape[1], 1), after], dim=2)
        rows, columns, targets = given.nonzero()[:, 0], source[given], candidates[given]
        values = [  # in parts: a vocabulary of 128,256 makes the logits by far the largest tensor
            head_logits(self.language_model, hidden[r, c]).log_softmax(-1).gather(1, t[:, None])[:, 0]
            for r, c, t in zip(rows.split(1024), columns.split(1024), targets.split(1024), strict=True)
        ]
        return hidden.new_zeros(candidates.shape, dtype=torch.float32).masked_scatter(given, torch.cat(values))

    def best_answer(
        self, prompts: Sequence[Sequence[int]], vocabulary: Sequence[str], frames: Any = None, lengths: Any = None
    ) -> list[str]:
        """The word of a closed vocabulary with the highest summed log-probability, for each prompt.

        Exact without scoring every word: a score only falls as tokens are added, so the log-probability of its first
        token bounds a word's score. Words are scored in order of that bound until no bound is above the best score.
        Raises ScoreError, naming the prompt by its place, for scores that are not finite.
        """
        tokens = [self.encode_answer(word) for word in vocabulary]
        first = torch.tensor([word[0] for word in tokens], device=self.device)
        with inference(self):
            video = self.video_input(frames, lengths)
            prefix, mask, _ = self.packed(prompts, video)
            hidden = self._hidden(prefix, mask.long(), (mask.cumsum(1) - 1).clamp(min=0))
            last = hidden[torch.arange(len(mask), device=self.device), mask.sum(1) - 1]
            bounds = head_logits(self.language_model, last).log_softmax(-1)[:, first]
            bounds, order = bounds.sort(dim=1, descending=True, stable=True)
            bounds, order = bounds.double().cpu().numpy(), order.cpu().numpy()
            places = [f"prompt {i + 1} of {len(prompts)}" for i in range(len(prompts))]
            for place, row in zip(places, bounds, strict=True):
                require_finite_scores(row, place)
            best = [(-math.inf, 0)] * len(prompts)  # score and word of each prompt
            done = [0] * len(prompts)  # words scored of each prompt, in order of their bounds
            while True:
                # Rounding may put a score a hair above its bound.
                batches = {
                    i: [
                        int(w)
                        for w, b in zip(order[i, d : d + WORDS_AT_ONCE], bounds[i, d : d + WORDS_AT_ONCE], strict=True)
                        if b >= best[i][0]
                    ]
                    for i, d in enumerate(done)
                }
                batches = {i: words for i, words in batches.items() if words}
                if not batches:
                    return [vocabulary[word] for _, word in best]
                which = list(batches)
                scores = self.score_tokens(
                    [prompts[i] for i in which],
                    [[tokens[w] for w in batches[i]] for i in which],
                    None if video is None else tuple(tensor[which] for tensor in video),
                )
                for i, values in zip(which, scores, strict=True):
                    require_finite_scores(values, places[i])
                    done[i] += len(batches[i])
                    k = int(values[:, 0].argmax())
                    best[i] = max(best[i], (float(values[k, 0]), batches[i][k]), key=lambda pair: pair[0])

    # ---- Bundle ------------------------------------------------------------------------------------------------

    def save_bundle(self, folder: Path | str, info: dict[str, Any] | None = None) -> Path:
        """Write the trained parts to `folder`, at once or not at all; a bundle already there is replaced.

        adapter_model.safetensors and adapter_config.json (stock PEFT loads them), connector.safetensors (connector.*
        and mit.*; not for a blind model), bundle.json (base models, encoder key, profile, video, and `info`, for
        example {"metrics": {...}}). Raises ValueError when `info` has a key that the bundle itself writes, BundleError
        when a tensor is not finite.
        """
        folder = Path(folder)
        profile = self.profile.model_dump(mode="json", exclude={"adem", "retrieval"})
        for section in ("language_model", "encoder"):
            profile[section]["model"] = portable_name(profile[section]["model"])
        facts = {"format": BUNDLE_FORMAT, "video": self.video, **copy.deepcopy(self.base), "profile": profile}
        if clash := facts.keys() & (info or {}).keys():
            raise ValueError(f"info holds {sorted(clash)}, which save_bundle writes itself")
        adapter, video = adapter_tensors(self.language_model), self.video_tensors()
        require_finite(adapter | video, "the model", f"{folder} was not written; train with lower learning rates")
        with whole(folder) as staging:
            staging.mkdir()
            save_file(adapter, staging / "adapter_model.safetensors")
            config = copy.deepcopy(self.language_model.peft_config["default"])
            config.base_model_name_or_path = self.base["language_model"]["model"]
            config.revision = self.base["language_model"]["revision"]
            config.inference_mode = True
            for name in ("target_modules", "feedforward_modules"):
                if isinstance(getattr(config, name, None), set):  # a set would be written in another order every time
                    setattr(config, name, sorted(getattr(config, name)))
            config.save_pretrained(staging)
            if self.video:
                save_file(video, staging / "connector.safetensors")
            (staging / "bundle.json").write_text(json.dumps(facts | (info or {}), indent=2) + "\n", encoding="utf-8")
        return folder

    def trained_digest(self) -> str:
        """Digest of what was trained (adapter, connector and MIT): the same for a model and its bundle."""
        return layers_digest((adapter_tensors(self.language_model) | self.video_tensors()).items())

    def video_tensors(self) -> dict[str, Tensor]:
        """Connector and MIT under the names of connector.safetensors, none of a blind model.

        A frozen MIT is kept as small as it was shipped.
        """
        if not self.video:
            return {}
        mit = self.mit.state_dict()
        if not self.profile.connector.train_mit:
            mit = {name: _half_if_equal(tensor) for name, tensor in mit.items()}
        states = {"connector": self.connector.state_dict(), "mit": mit}
        return on_cpu({f"{part}.{name}": tensor for part, state in states.items() for name, tensor in state.items()})


def _half_if_equal(tensor: Tensor) -> Tensor:
    half = tensor.half()
    return half if torch.equal(half.float(), tensor) else tensor


def adapter_tensors(language_model: PeftModel) -> dict[str, Tensor]:
    """The adapter's trained tensors under the names of PEFT's own files."""
    # save_embedding_layers="auto" would ask the hub whether the embedding was resized
    return on_cpu(get_peft_model_state_dict(language_model, save_embedding_layers=False))
