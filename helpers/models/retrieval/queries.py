"""What a sentence becomes before a head sees it: its embedding, by the model that embedded the training texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, XCLIPModel

from helpers.models.language import BaseLanguageModel, language_model_identity, load_language_model
from helpers.models.parts import BundleError, require_same_base
from helpers.models.retrieval.bundle import XCLIP, Source
from helpers.models.text import start_token, text_tokens
from helpers.models.xclip import encoder_identity, load_xclip
from helpers.workspace.machine import device as default_device
from helpers.workspace.weights import find_model

TextEncoder = Callable[[Sequence[str]], Tensor]


def text_encoder(source: Source, model: str | None = None, device: torch.device | None = None) -> TextEncoder:
    """What embeds texts as a bundle's `source` says: texts to [N, D].

    model: id or folder instead of what the bundle names. Raises BundleError for another model, and for embeddings from
    inside a language model: these take its forward pass, for which `Retriever` takes any encoder.
    """
    device = device or default_device()
    name = model or source.model
    revision = None if model else source.revision
    if source.layer == XCLIP:
        xclip = load_xclip(name, revision).to(device)
        require_same_base(source.identity, encoder_identity(xclip), "video encoder", source.model, name)
        tokenizer = AutoTokenizer.from_pretrained(find_model(name, revision))
        return lambda texts: xclip_texts(xclip, tokenizer, [around(source.prompt, text) for text in texts])
    if (source.layer, source.pooling) != ("before", "mean"):
        raise BundleError(
            f"this head takes texts of layer {source.layer!r}, pooling {source.pooling!r}. Only means of input "
            "embeddings ('before', 'mean') and X-CLIP's texts are embedded here; for others make a Retriever with an "
            "encoder of your own"
        )
    folder = find_model(name, revision)
    language, tokenizer = load_language_model(BaseLanguageModel(name, revision, source.quantisation), device, folder)
    given = language_model_identity(language, tokenizer, folder)
    require_same_base(source.identity, given, "language model", source.model, name)
    embedding = language.get_input_embeddings()  # all that is needed; the rest is freed
    return lambda texts: mean_embeddings(embedding, tokenizer, texts, source.prompt, source.start)


def around(prompt: str, text: str) -> str:
    """`prompt` with a text in place of its {text}."""
    return prompt.replace("{text}", text)


@torch.no_grad()
def mean_embeddings(
    embedding: nn.Embedding, tokenizer: object, texts: Sequence[str], prompt: str = "{text}", start: bool = True
) -> Tensor:
    """Means [N, H] of the input embeddings of each text's tokens, in float32; start: the start token counts too."""
    found = []
    for text in texts:
        ids = text_tokens(tokenizer, text.strip(), prompt.split("{text}"))
        ids = [start_token(tokenizer), *ids] if start else ids
        found.append(embedding(torch.tensor(ids, device=embedding.weight.device)).float().mean(0))
    return torch.stack(found)


@torch.no_grad()
def xclip_texts(xclip: XCLIPModel, tokenizer: object, texts: Sequence[str]) -> Tensor:
    """X-CLIP's text vectors [N, D], before its prompts look at a video; what a tokenizer leaves open ends by EOS."""
    room, end = xclip.config.text_config.max_position_embeddings, tokenizer.eos_token_id
    found = []
    for text in texts:
        ids = tokenizer(text).input_ids
        ids = [*(ids[:-1] if ids and ids[-1] == end else ids)[: room - 1], end]
        hidden = xclip.text_model(input_ids=torch.tensor([ids], device=xclip.device)).pooler_output
        found.append(xclip.text_projection(hidden)[0])
    return torch.stack(found)
