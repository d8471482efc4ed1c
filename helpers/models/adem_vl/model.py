"""ADEM-VL (Hao et al., arXiv 2410.17779; code: github.com/Hao840/ADEM-VL) on stock Llama and CLIP.

Both base models are frozen. CLIP's patch features, pooled to several scales, pass a small projector once; every block
of the language model then attends to them by a cross-attention that has no parameters of its own: scores are
phi(query) phi(key)^T without softmax, heads or scale, and the signed-smallest of them are dropped for each text
position (adaptive fusion). The CLS feature becomes one token of the input. Hooks on the blocks' `mlp` or `self_attn`
do it, so that neither model is forked: the same hooks serve training, quantised bases and Hugging Face's `generate`.

Where paper and official code differ, the code is followed.
"""

from __future__ import annotations

import argparse
import json
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, CLIPVisionConfig, LlamaConfig, PreTrainedModel

from helpers.models.adem_vl.config import NO_CLS, PHI, VISION_MODELS, AdemVLConfig, AdemVLError, hf_config
from helpers.models.adem_vl.layers import ClipAdapter, Projector, fuse, fuse_softly, pool_scales
from helpers.models.digests import language_model_digest, language_tensors, layers_digest, module_digest
from helpers.models.language import BaseLanguageModel, answer_loss, head_logits, load_language_model
from helpers.models.parts import (
    IGNORED,
    inference,
    on_cpu,
    read_facts,
    read_tensors,
    require_finite,
    same_base,
    tensor_faults,
    warn_without_digest,
)
from helpers.models.xclip import portable_name
from helpers.workspace.disk import whole
from helpers.workspace.machine import compute_dtype
from helpers.workspace.machine import device as default_device
from helpers.workspace.weights import find_model


def parameter_comparison(model: AdemVL) -> pd.DataFrame:
    """Trained parameters by part: of `model`, and of the paper's LLaMA-7B with CLIP ViT-L/14."""
    with torch.device("meta"):
        llama = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
        size = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        vision = CLIPVisionConfig(**size, image_size=224, patch_size=14)
        paper = AdemVL(AdemVLConfig(llama, vision))
    columns: dict[str, dict[str, int]] = {}
    for name, one in (("this run", model), ("paper, LLaMA-7B", paper)):
        columns[name] = {}
        for tensor_name, tensor in one.adapter_tensors().items():
            part = tensor_name.split(".")[0]
            columns[name][part] = columns[name].get(part, 0) + tensor.numel()
    table = pd.DataFrame(columns).fillna(0).astype(int)
    table.loc["total"] = table.sum()
    return table


RELEASED = "checkpoint_7B_sqa.pth, of the release tagged `checkpoint` of github.com/Hao840/ADEM-VL"
DDP_PREFIX = "module."  # of every name in a checkpoint that was saved from a DistributedDataParallel object
DIGEST = "layers_digest"  # attribute of a base model: taken before quantisation and rounding
FORMAT = 1  # raise when an older folder of save_pretrained can no longer be read


@dataclass
class _Visual:
    """What the hooks add in one forward or one generation."""

    keys: Tensor  # [B, V, D]: phi already applied
    values: Tensor  # [B, V, D]
    cls: Tensor | None  # [B, D]
    cls_position: Tensor | None  # [B]: column of the CLS token, NO_CLS without

    def rows(self, count: int) -> _Visual:
        """For `count` rows: beams stand behind one another for each sample."""
        times, rest = divmod(count, len(self.keys))
        if rest or not times:
            raise AdemVLError(f"{count} rows of text were given for {len(self.keys)} rows of visual features")
        parts = (self.keys, self.values, self.cls, self.cls_position)
        return self if times == 1 else _Visual(*(p if p is None else p.repeat_interleave(times, 0) for p in parts))


class AdemVL(nn.Module):
    """A frozen language model that looks at images through a frozen vision encoder, with a few trained parameters.

    Trainable: `clip_adapters` (one for each encoder block; the last block is not run, so its adapter counts but is
    never fed and never gets a gradient, as in the release), `projector`, `cls_projector`, `key_embedding`,
    `value_embedding`, and `thresholds` where they are learnable. `AdemVL(config)` makes base models of random weights;
    give `language_model` and `vision_model` for others, of any precision. Called by themselves both base models are
    what they were: the hooks act only inside this model's own calls, so that several models can share them.
    """

    def __init__(
        self,
        config: AdemVLConfig,
        language_model: PreTrainedModel | None = None,
        vision_model: PreTrainedModel | None = None,
        sources: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.tokenizer: Any = None
        self.sources = sources or {}
        vision_class = VISION_MODELS[config.vision_config.model_type]
        if language_model is None:
            language_model = AutoModelForCausalLM.from_config(config.llm_config)
        self.language_model = language_model
        self.vision_model = vision_class(config.vision_config) if vision_model is None else vision_model
        for model in (self.language_model, self.vision_model):
            model.requires_grad_(False)
        if not hasattr(self.language_model.base_model, "layers"):
            raise AdemVLError(f"the language model is a {config.llm_config.model_type!r}; give one of the Llama family")
        width, dim = config.vision_config.hidden_size, config.llm_config.hidden_size
        blocks = self._encoder.encoder.layers
        self.clip_adapters = nn.ModuleList([ClipAdapter(width, config.adapter_dim) for _ in blocks])
        self.projector = Projector(width, config.projector_dim, dim)
        self.cls_projector = Projector(width, config.projector_dim, dim) if config.use_cls else None
        self.key_embedding = nn.Parameter(torch.empty(1, config.positions, dim).normal_(0, 0.02))
        self.value_embedding = nn.Parameter(torch.zeros(1, config.positions, dim))
        self.thresholds = None
        if config.learnable_threshold:
            # where a standard normal distribution leaves the share drop_ratio below
            start = NormalDist().inv_cdf(config.drop_ratio)
            self.thresholds = nn.Parameter(torch.full((config.llm_config.num_hidden_layers,), start))
        self._visual: _Visual | None = None
        self._encoding = False
        self._noted: list[Tensor] | None = None  # scores [B, S, V] of each block, where someone asks for them
        self._install_hooks()

    @classmethod
    def build(
        cls,
        language_model: str,
        vision_model: str,
        *,
        quantisation: str = "none",
        revisions: tuple[str | None, str | None] = (None, None),
        device: torch.device | None = None,
        seed: int = 0,
        **options: Any,
    ) -> AdemVL:
        """Put untrained parts on pretrained base models; sets `tokenizer`.

        language_model, vision_model: hub ids, `tiny/...` assets or folders, with `revisions` of both. quantisation:
        "nf4" (the language model in 4 bits) or "none" (bf16 or fp16 by the GPU, fp32 on a CPU). options: fields of
        `AdemVLConfig`. Raises ModelNotFound when weights are missing.
        """
        device = device or default_device()
        llm, tokenizer = _load_llm(language_model, revisions[0], quantisation, device)
        vision = _load_vision(vision_model, revisions[1], device)
        config = AdemVLConfig(llm.config, vision.config, **options)
        sources = {
            "language_model": {
                "model": portable_name(language_model),
                "revision": revisions[0],
                "quantisation": quantisation,
            },
            "vision_model": {"model": portable_name(vision_model), "revision": revisions[1]},
        }
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            model = cls(config, llm, vision, sources)
        model.tokenizer = tokenizer
        return model.to(device)

    # ---- Structure -------------------------------------------------------------------------------------------------

    @property
    def _encoder(self) -> nn.Module:
        return _inner(self.vision_model)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.key_embedding.device

    def adapter_tensors(self) -> dict[str, Tensor]:
        """The trained parts by name, without the base models: what is saved and loaded."""
        bases = ("language_model.", "vision_model.")
        return {name: tensor for name, tensor in self.named_parameters() if not name.startswith(bases)}

    def _install_hooks(self) -> None:
        self.language_model.base_model.register_forward_pre_hook(self._insert_cls, with_kwargs=True)
        place, query, addition = self.config.cross_attention.split("_")
        for index, block in enumerate(self.language_model.base_model.layers):
            module = block.mlp if place == "mlp" else block.self_attn
            if addition == "in":
                module.register_forward_pre_hook(partial(self._add_to_input, index), with_kwargs=True)
            else:
                hook = partial(self._add_to_output, index, query == "out")
                module.register_forward_hook(hook, with_kwargs=True)
        for index, block in enumerate(self._encoder.encoder.layers):
            block.mlp.register_forward_hook(partial(self._add_adapter, index))

    def gradient_checkpointing_enable(self) -> None:
        """In training, compute both base models' activations again for the backward pass instead of keeping them."""

        def contexts() -> tuple[Any, Any]:
            # A block that is computed again must see what its own forward saw, whatever was looked at since.
            return nullcontext(), self._seeing(self._visual, self._encoding)

        for model in (self.language_model, self.vision_model):
            # the newer name of the same method, where there is one
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": False, "context_fn": contexts})

    # ---- Hooks -----------------------------------------------------------------------------------------------------

    @contextmanager
    def _seeing(self, visual: _Visual | None, encoding: bool = False) -> Iterator[None]:
        """Let the hooks of the language model add what is in `visual`, and with `encoding` those of the encoder act."""
        before = self._visual, self._encoding
        self._visual, self._encoding = visual, encoding
        try:
            yield
        finally:
            self._visual, self._encoding = before

    def _insert_cls(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Replace the embeddings at the CLS positions; columns are counted from the beginning of what is cached."""
        ids, past = kwargs.get("input_ids"), kwargs.get("past_key_values")
        if self._visual is None or ids is None:
            return args, kwargs
        self._visual = visual = self._visual.rows(len(ids))
        if visual.cls is None:
            return args, kwargs
        embeddings = module.get_input_embeddings()(ids)
        columns = torch.arange(ids.shape[1], device=ids.device) + (0 if past is None else past.get_seq_length())
        here = columns == visual.cls_position[:, None]
        embeddings = torch.where(here[..., None], visual.cls[:, None].to(embeddings.dtype), embeddings)
        return args, kwargs | {"input_ids": None, "inputs_embeds": embeddings}

    def _attend(self, index: int, query: Tensor) -> Tensor:
        """alpha * X(query) of block `index`: [B, S, D] to [B, S, D]."""
        config, visual = self.config, self._visual
        scores = PHI[config.phi](query) @ visual.keys.to(query.dtype).mT
        if self.thresholds is not None:
            scores = fuse_softly(scores, self.thresholds[index])
        else:
            scores = fuse(scores, config.dropped)
        if self._noted is not None:
            self._noted.append(scores)
        scores = F.dropout(scores, config.cross_attention_dropout, self.training)
        result = config.alpha * (scores @ visual.values.to(query.dtype))
        if self.training and config.layer_dropout:
            kept = torch.rand(len(result), 1, 1, device=result.device) >= config.layer_dropout
            result = result * kept.to(result.dtype) / (1 - config.layer_dropout)
        return result

    def _add_to_input(
        self, index: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        if self._visual is None:
            return args, kwargs
        query = _module_input(args, kwargs)
        changed = query + self._attend(index, query)
        return ((changed, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": changed})

    def _add_to_output(
        self, index: int, of_output: bool, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any
    ) -> Any:
        if self._visual is None:
            return output
        first = output[0] if isinstance(output, tuple) else output
        changed = first + self._attend(index, first if of_output else _module_input(args, kwargs))
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    def _add_adapter(self, index: int, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output + self.clip_adapters[index](args[0]) if self._encoding else output

    # ---- What is seen ----------------------------------------------------------------------------------------------

    def visual_features(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Features of images [M, 3, H, W]: patches [M, N, W] and CLS [M, W].

        The last block is not run; the final layer norm is applied to all tokens, and the output projection is not used.
        An encoder without a CLS token gives the mean of its patches in its place.
        """
        encoder = self._encoder
        hidden = encoder.embeddings(pixel_values.to(self.vision_model.dtype))
        if hasattr(encoder, "pre_layrnorm"):
            hidden = encoder.pre_layrnorm(hidden)
        with self._seeing(None, encoding=True):
            for block in encoder.encoder.layers[:-1]:
                hidden = block(hidden, None)
        hidden = encoder.post_layernorm(hidden)
        if hasattr(encoder.embeddings, "class_embedding"):
            return hidden[:, 1:], hidden[:, 0]
        return hidden, hidden.mean(1)

    def _look(self, pixel_values: Tensor | None, has_image: Tensor, cls_position: Tensor | None) -> _Visual:
        """Keys, values and CLS tokens of a batch. The encoder runs on the rows with an image alone.

        E = beta * projector(pooled features), exactly 0 for a row without an image, where keys and values are the
        embedding tables alone.
        """
        config, rows = self.config, len(has_image)
        width, dtype = config.vision_config.hidden_size, self.vision_model.dtype
        patches = torch.zeros(rows, config.grid**2, width, dtype=dtype, device=self.device)
        cls = torch.zeros(rows, width, dtype=dtype, device=self.device)
        if has_image.any():
            found = self.visual_features(pixel_values[has_image])
            # under autocast the features' precision is not the encoder's
            patches, cls = (
                zeros.to(seen.dtype).index_put((has_image,), seen)
                for zeros, seen in zip((patches, cls), found, strict=True)
            )
        # The projectors run on all rows, so that their parameters have gradients in a batch without images too.
        embedded = config.beta * self.projector(pool_scales(patches, config.scales)) * has_image[:, None, None]
        dtype = self.language_model.get_input_embeddings().weight.dtype
        return _Visual(
            keys=PHI[config.phi](embedded + self.key_embedding).to(dtype),
            values=(embedded + self.value_embedding).to(dtype),
            cls=None if self.cls_projector is None else self.cls_projector(cls),
            cls_position=cls_position,
        )

    def _check(
        self, input_ids: Tensor, pixel_values: Tensor | None, has_image: Tensor | None, cls_position: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """has_image and cls_position of a batch, filled in where they are None. Raises AdemVLError for a misfit."""
        rows = len(input_ids)
        limit = self.config.llm_config.max_position_embeddings
        if input_ids.shape[1] > limit:
            raise AdemVLError(f"a sequence of {input_ids.shape[1]} tokens is over the language model's {limit}")
        if has_image is None:
            has_image = torch.full((rows,), pixel_values is not None, device=self.device)
        has_image = has_image.to(self.device, torch.bool)
        if has_image.shape != (rows,):
            raise AdemVLError(f"has_image is {list(has_image.shape)}; the batch needs [{rows}]")
        if has_image.any():
            size = self.config.vision_config.image_size
            expected = [rows, 3, size, size]
            if pixel_values is None or list(pixel_values.shape) != expected:
                given = "not given" if pixel_values is None else list(pixel_values.shape)
                raise AdemVLError(f"pixel_values are {given}; rows with an image need {expected}")
        if not self.config.use_cls:
            return has_image, None
        if cls_position is None:
            cls_position = torch.full((rows,), NO_CLS, device=self.device)
        cls_position = cls_position.to(self.device)
        wrong = (cls_position >= 0) != has_image
        if wrong.any() or (cls_position >= input_ids.shape[1]).any():
            row = int(wrong.nonzero()[0]) if wrong.any() else int(cls_position.argmax())
            raise AdemVLError(
                f"row {row} has {'an' if has_image[row] else 'no'} image, but its CLS position is "
                f"{int(cls_position[row])} of {input_ids.shape[1]}: encode sequences with has_image as it is"
            )
        return has_image, cls_position

    # ---- Forward and generation ------------------------------------------------------------------------------------

    def _hidden(self, input_ids: Tensor, attention_mask: Tensor | None, visual: _Visual) -> Tensor:
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        with self._seeing(visual):
            return self.language_model.base_model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0),
                use_cache=False,
            ).last_hidden_state

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_values: Tensor | None = None,
        has_image: Tensor | None = None,
        cls_position: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Logits of a batch, and the loss of its answers.

        input_ids, attention_mask, labels [B, S] (labels: -100 where nothing is to be learnt); pixel_values
        [B, 3, H, W], anything in rows without an image; has_image [B] bool (None: all rows if there are pixel_values,
        else none); cls_position [B]: column that the CLS token replaces, -1 without an image. `collate` makes all.
        Without labels: logits [B, S, vocabulary]. With labels: loss, the mean cross-entropy in nats over all answer
        tokens of the batch, and logits [M, vocabulary] of these M tokens in row-major order.
        Raises AdemVLError for inputs that do not fit one another or the model, or labels without an answer token.
        """
        has_image, cls_position = self._check(input_ids, pixel_values, has_image, cls_position)
        hidden = self._hidden(input_ids, attention_mask, self._look(pixel_values, has_image, cls_position))
        if labels is None:
            return {"logits": head_logits(self.language_model, hidden)}
        targets = labels[:, 1:]
        answers = targets != IGNORED
        if not answers.any():
            raise AdemVLError("labels hold no answer token: every label is -100")
        return answer_loss(head_logits(self.language_model, hidden[:, :-1][answers]), targets[answers])

    def next_logits(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor | None = None,
        has_image: Tensor | None = None,
        cls_position: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, vocabulary] of the token after each row, wherever its padding is; arguments as in `forward`.

        The official answer is their argmax; the likelihoods of the letters are their log-softmax at `letter_tokens`.
        """
        with inference(self):
            has_image, cls_position = self._check(input_ids, pixel_values, has_image, cls_position)
            hidden = self._hidden(input_ids, attention_mask, self._look(pixel_values, has_image, cls_position))
            last = (attention_mask * torch.arange(1, attention_mask.shape[1] + 1, device=hidden.device)).argmax(1)
            return head_logits(self.language_model, hidden[torch.arange(len(last), device=hidden.device), last])

    def contributions(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor | None = None,
        has_image: Tensor | None = None,
        cls_position: Tensor | None = None,
    ) -> Tensor:
        """How much each visual position adds to the last column: [B, V], arguments as in `forward`, padding left.

        The length of alpha * score * value (section 3.2 of the paper) after adaptive fusion, mean over blocks.
        """
        with inference(self):
            has_image, cls_position = self._check(input_ids, pixel_values, has_image, cls_position)
            visual = self._look(pixel_values, has_image, cls_position)
            self._noted = []
            try:
                self._hidden(input_ids, attention_mask, visual)
                scores = torch.stack([block[:, -1] for block in self._noted]).float()
            finally:
                self._noted = None
            return self.config.alpha * scores.abs().mean(0) * visual.values.float().norm(dim=-1)

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        has_image: Tensor | None = None,
        cls_position: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Hugging Face's `generate` (greedy, sampling, beams; cached or not): prompt and new tokens, [B, S + new].

        Rows of unequal length are padded on the left. Arguments as in `forward`; `options` go to `generate` unchanged.
        """
        with inference(self):
            has_image, cls_position = self._check(input_ids, pixel_values, has_image, cls_position)
            with self._seeing(self._look(pixel_values, has_image, cls_position)):
                return self.language_model.generate(input_ids=input_ids, attention_mask=attention_mask, **options)

    # ---- Files -----------------------------------------------------------------------------------------------------

    def _load_strictly(self, tensors: dict[str, Tensor], path: Path, names: dict[str, str] | None = None) -> None:
        """Copy `tensors`, which must be exactly the trained parts in name (through `names`), shape and kind; finite."""
        ours = self.adapter_tensors()
        expected = {(names or {}).get(name, name): tensor for name, tensor in ours.items()}
        if faults := tensor_faults(tensors, expected):
            raise AdemVLError(
                f"{path} does not fit this model: {faults}. Check adapter_dim, projector_dim, "
                "scales, use_cls and learnable_threshold, and the sizes of both base models"
            )
        require_finite(tensors, path, "copy the file again, or train the adapters anew", AdemVLError)
        with torch.no_grad():
            for name, tensor in expected.items():
                tensor.copy_(tensors[name])

    def save_pretrained(self, folder: Path | str) -> Path:
        """Write the trained parts to `folder`, at once or not at all; one that is already there is replaced.

        adapter.safetensors (trained tensors only) and adem_vl.json (configuration, where the base models came from,
        and what tells them from others). A base model of unknown origin, as of `AdemVL(config)`, is written along.
        Raises AdemVLError for a trained tensor that is not finite.
        """
        folder, tensors = Path(folder), on_cpu(self.adapter_tensors())
        advice = f"{folder} was not written; train with a lower learning rate"
        require_finite(tensors, "the model", advice, AdemVLError)
        with whole(folder) as staging:
            staging.mkdir()
            save_file(tensors, staging / "adapter.safetensors")
            bases = {}
            for part in ("language_model", "vision_model"):
                model = getattr(self, part)
                source = dict(self.sources.get(part) or {"model": portable_name(model.name_or_path or "")})
                if not source["model"]:
                    model.save_pretrained(staging / part)
                bases[part] = source | {"identity": _identity(model, part)}
            facts = {"format": FORMAT, "config": self.config.to_dict(), "base": bases}
            (staging / "adem_vl.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        return folder

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        language_model: str | PreTrainedModel | None = None,
        vision_model: str | PreTrainedModel | None = None,
        device: torch.device | None = None,
    ) -> AdemVL:
        """Load what `save_pretrained` wrote, on the base models that it names or on those given (loaded, or by name).

        The model is in evaluation mode, and `tokenizer` is set where the language model was loaded by name. Raises
        AdemVLError for a folder that is incomplete or of another format, for a missing, extra or mismatched tensor or
        one that is not finite, and for other base models than those it was trained on; ModelNotFound when weights are
        missing.
        """
        folder, device = Path(folder), device or default_device()
        facts = _read_facts(folder)
        given = {"language_model": language_model, "vision_model": vision_model}
        config, tokenizer = AdemVLConfig(**facts["config"]), None
        warn_without_digest({part: source["identity"] for part, source in facts["base"].items()}, folder)
        for part, model in given.items():
            source = facts["base"][part]
            if not isinstance(model, PreTrainedModel):
                name = model or source["model"] or str(folder / part)
                revision = source.get("revision") if not model else None
                if part == "vision_model":
                    given[part] = _load_vision(name, revision, device)
                elif name == str(folder / part):  # written along, without a tokenizer
                    given[part] = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
                    require_finite(
                        dict(given[part].named_parameters()), name, "copy the whole folder again", AdemVLError
                    )
                else:
                    given[part], tokenizer = _load_llm(name, revision, source.get("quantisation", "none"), device)
            _require_same(source, given[part], part)
        known = {part: source for part, source in facts["base"].items() if source["model"]}
        for source in known.values():
            del source["identity"]
        model = cls(config, **given, sources=known)
        path = folder / "adapter.safetensors"
        if not path.is_file():
            raise AdemVLError(f"{path} is missing; copy the whole folder")
        model._load_strictly(read_tensors(path, AdemVLError), path)
        model.tokenizer = tokenizer
        return model.to(device).eval()

    def load_released_adapters(self, path: Path | str) -> None:
        """Load a checkpoint of the authors' code into the trained parts, strictly; they released `RELEASED`.

        Every tensor's name begins with "module.", as DDP saves them, or none does. Only tensors and
        `argparse.Namespace` are unpickled. Raises AdemVLError for any other content, and for a missing, extra or
        mismatched tensor, or one that is not finite.
        """
        path = Path(path)
        try:
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise AdemVLError(
                f"{path} is no readable checkpoint of tensors; it was not loaded: {str(error).splitlines()[0]}"
            ) from error
        tensors = content.get("model") if isinstance(content, dict) else None
        if not isinstance(tensors, dict) or not all(
            isinstance(name, str) and isinstance(t, Tensor) for name, t in tensors.items()
        ):
            raise AdemVLError(f"{path} has no `model`, a dict of tensors; give the authors' {RELEASED}")
        prefixed = [name for name in tensors if name.startswith(DDP_PREFIX)]
        if prefixed and len(prefixed) < len(tensors):
            other = next(name for name in tensors if name not in prefixed)
            raise AdemVLError(
                f"{path} mixes names with and without {DDP_PREFIX!r} ({prefixed[0]}, {other}); a checkpoint has the "
                f"prefix on every name or on none. Fetch it again: {RELEASED}"
            )
        if prefixed:
            tensors = {name.removeprefix(DDP_PREFIX): tensor for name, tensor in tensors.items()}
        self._load_strictly(tensors, path, released_names(self.adapter_tensors()))


def _module_input(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def released_names(names: Sequence[str] | dict[str, Tensor]) -> dict[str, str]:
    """The name of each trained tensor in the authors' checkpoints; `thresholds` has none and keeps its own."""
    table = {"key_embedding": "adapter_emb1", "value_embedding": "adapter_emb2"}
    parts = {"projector": "adapter_proj", "cls_projector": "adapter_proj_cls"}
    layers = {"down": "fc1", "up": "fc2"}
    for name in names:
        head, *rest = name.split(".")
        if head in parts:
            table[name] = ".".join([parts[head], *rest])
        elif head == "clip_adapters":
            block, layer, kind = rest
            table[name] = f"backbone.visual.transformer.resblocks.{block}.adapter_mlp.{layers[layer]}.{kind}"
    return {name: table.get(name, name) for name in names}


def _load_llm(name: str, revision: str | None, quantisation: str, device: torch.device) -> tuple[PreTrainedModel, Any]:
    if quantisation not in ("nf4", "none"):
        raise AdemVLError(f"quantisation is {quantisation!r}; it must be 'nf4' or 'none'")
    folder = _find(name, revision)
    model, tokenizer = load_language_model(BaseLanguageModel(name, revision, quantisation), device, folder)
    setattr(model, DIGEST, language_model_digest(folder, model.config.tie_word_embeddings))
    return model, tokenizer


_find = partial(find_model, system="ADEM-VL")


def _load_vision(name: str, revision: str | None, device: torch.device) -> PreTrainedModel:
    folder = _find(name, revision)
    config = hf_config(AutoConfig.from_pretrained(folder), "vision_config")
    if config.model_type not in VISION_MODELS:
        raise AdemVLError(f"{name} is a {config.model_type!r}; the encoder must be one of {', '.join(VISION_MODELS)}")
    model = VISION_MODELS[config.model_type].from_pretrained(folder, dtype=torch.float32)
    setattr(model, DIGEST, _digest(model, vision=True))
    model = model.to(compute_dtype(device))
    advice = "fetch these weights again, or name another vision model"
    require_finite(dict(model.named_parameters()), f"{folder} (as {model.dtype})", advice, AdemVLError)
    return model.eval().to(device)


def _inner(model: PreTrainedModel) -> nn.Module:
    """The vision transformer itself; some versions of transformers keep it one level deeper."""
    return getattr(model, "vision_model", model)


def _identity(model: PreTrainedModel, part: str) -> dict[str, Any]:
    """What tells a base model from others, whatever folder or precision it was loaded from."""
    config = model.config
    vision = part == "vision_model"
    table = _inner(model).embeddings.position_embedding.weight if vision else model.get_input_embeddings().weight
    identity = {
        "architecture": f"{config.model_type}, {config.num_hidden_layers} layers of {config.hidden_size}",
        "weights": table[:8, :8].detach().float().flatten().tolist(),
    }
    digest = getattr(model, DIGEST, None) or _digest(model, vision)
    return identity | ({"digest": digest} if digest else {})


def _digest(model: PreTrainedModel, vision: bool) -> str | None:
    """Digest of a base model's layers; of a quantised one that of the folder it names, None if there is none."""
    if vision:
        return module_digest({"vision_model": _inner(model)})
    if getattr(model, "quantization_method", None) is None:
        return layers_digest(language_tensors(model.state_dict().items(), model.config.tie_word_embeddings))
    folder = Path(model.name_or_path or "")
    return (
        language_model_digest(folder, model.config.tie_word_embeddings) if (folder / "config.json").is_file() else None
    )


def _require_same(source: dict[str, Any], model: PreTrainedModel, part: str) -> None:
    ours, theirs = source["identity"], _identity(model, part)
    if "digest" not in theirs:  # a quantised model in memory of unknown origin
        ours = {name: value for name, value in ours.items() if name != "digest"}
    if same_base(ours, theirs):
        return
    raise AdemVLError(
        f"these adapters were trained on the {part.replace('_', ' ')} {source['model'] or 'written beside them'} "
        f"({ours['architecture']}); the one given is another ({theirs['architecture']}, or other weights)"
    )


def _read_facts(folder: Path) -> dict[str, Any]:
    path = folder / "adem_vl.json"
    if not path.is_file():
        raise AdemVLError(f"{folder} holds no adem_vl.json; give the folder that save_pretrained wrote")
    facts = read_facts(path, AdemVLError)
    if facts.get("format") != FORMAT:
        raise AdemVLError(f"{path} is of format {facts.get('format')!r}; this version reads format {FORMAT}")
    return facts
