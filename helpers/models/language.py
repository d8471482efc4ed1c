"""The frozen language model, in 4 bits where the profile says so, and the adapter inside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import IA3Config, LoraConfig, PeftConfig, TaskType
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from helpers.config import LanguageModelConfig
from helpers.models.chat import chat_format
from helpers.models.digests import language_model_digest
from helpers.models.parts import require_finite
from helpers.workspace.machine import compute_dtype
from helpers.workspace.weights import find_model

# IA3 scales the input of a feed-forward block's last layer and the output of all others (arXiv 2205.05638, section 3.3)
FEED_FORWARD_OUTPUTS = ("down_proj", "mlp.c_proj", "fc2")


@dataclass(frozen=True)
class BaseLanguageModel:
    """Which language model to load: its id or folder, its revision, and "nf4" or "none" for its precision."""

    model: str
    revision: str | None
    quantisation: str


def answer_loss(logits: Tensor, targets: Tensor, counts: Tensor | None = None) -> dict[str, Tensor]:
    """Loss in nats and logits [M, V] of the M answer tokens [M], row after row.

    The loss is the mean cross-entropy over all tokens; with `counts` [B], the number of tokens of each row, it is the
    mean over the rows of the mean over each one's tokens. Raises ValueError if there is no token.
    """
    if not len(targets):
        raise ValueError("labels hold no answer token: every label is -100")
    if counts is None:
        return {"loss": F.cross_entropy(logits, targets), "logits": logits}
    shares = counts.repeat_interleave(counts, output_size=len(targets)) * len(counts)
    return {"loss": (F.cross_entropy(logits, targets, reduction="none") / shares).sum(), "logits": logits}


def head_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits [..., V] of hidden states [..., H], in float32, whatever the precision of the head."""
    head = model.get_output_embeddings()
    return head(hidden.to(head.weight.dtype)).float()


def load_language_model(
    config: LanguageModelConfig | BaseLanguageModel, device: torch.device, folder: str | None = None
) -> tuple[PreTrainedModel, Any]:
    """Load a causal language model (frozen) and its tokenizer, in NF4 with double quantisation or unquantised.

    `folder` stands in for the profile's model id. Raises ModelNotFound when the weights are nowhere to be had,
    BundleError when a number of them is not finite, in the precision in which they were loaded, ChatTemplateError for a
    chat template that cannot be used.
    """
    folder = folder or find_model(config.model, config.revision)
    dtype = compute_dtype(device)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {config.model} has no end-of-sequence token; answers could not end")
    chat = chat_format(tokenizer, config) if isinstance(config, LanguageModelConfig) else None
    options: dict[str, Any] = {}
    if config.quantisation == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map={"": device}, **options)
    require_finite(dict(model.named_parameters()), f"{folder} (as {dtype})", "fetch it again, or name another model")
    if config.quantisation == "nf4":
        from bitsandbytes.nn import Linear4bit

        for module in model.modules():
            if isinstance(module, Linear4bit):
                # Else a CPU with AVX512-BF16 repacks the weights lossily at the first evaluation forward.
                module.support_avx512bf16_for_cpu = False
    ends = [tokenizer.eos_token_id]
    if chat is not None:  # what ends the turn, and what else ends the model's texts
        own = model.generation_config.eos_token_id
        ends = [*{chat.end, *ends, *(own if isinstance(own, list) else [own])} - {None}]
    # Hub models bring sampling settings (temperature, top-p) that greedy and beam search would warn about.
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends[0] if len(ends) == 1 else ends,
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


def language_model_identity(model: PreTrainedModel, tokenizer: Any, folder: str) -> dict[str, Any]:
    """What tells a base model, loaded from `folder`, from others, whatever folder or precision it was loaded from."""
    config = model.config
    tokens = tokenizer("What does the small cat do 3 times?", add_special_tokens=False).input_ids
    return {
        "architecture": f"{config.model_type}, {config.num_hidden_layers} layers of {config.hidden_size}, "
        f"vocabulary {config.vocab_size}",
        "tokens": [*tokens, tokenizer.bos_token_id, tokenizer.eos_token_id],
        "weights": model.get_input_embeddings().weight[tokens, :4].float().flatten().tolist(),
        "digest": language_model_digest(folder, config.tie_word_embeddings),
    }
