"""Chat templates of the families that are met, on the tiny tokenizer: own texts, with the same traits."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import processors
from transformers import AddedToken, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Family:
    """A chat template with its tokens; `head` is what stands in front of a user's first message, written by hand."""

    template: str
    head: str
    end: str
    bos: str
    eos: str
    special: list[str]
    plain: list[str] = field(default_factory=list)  # added tokens that the tokenizer does not call special


FAMILIES = {
    # The day in a system turn of its own, messages trimmed, an end of the turn beside the end of the text.
    "llama3": Family(
        template=(
            "{{- bos_token -}}"
            "{%- if not date_string is defined -%}{%- set date_string = strftime_now('%d %b %Y') -%}{%- endif -%}"
            "{{- '<|head|>system<|/head|>\\n\\nDay: ' + date_string + '\\n\\n<|eot|>' -}}"
            "{%- for m in messages -%}"
            "{{- '<|head|>' + m['role'] + '<|/head|>\\n\\n' + (m['content'] | trim) + '<|eot|>' -}}"
            "{%- endfor -%}"
            "{%- if add_generation_prompt -%}{{- '<|head|>assistant<|/head|>\\n\\n' -}}{%- endif -%}"
        ),
        head="<|text|><|head|>system<|/head|>\n\nDay: 26 Jul 2024\n\n<|eot|><|head|>user<|/head|>\n\n",
        end="<|eot|>",
        bos="<|text|>",
        eos="<|end|>",
        special=["<|text|>", "<|end|>", "<|head|>", "<|/head|>", "<|eot|>"],
    ),
    # No BOS, though the tokenizer has one (the start of a turn); a system turn of its own; a line behind each turn.
    "chatml": Family(
        template=(
            "{% for m in messages %}"
            "{% if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system\\nhelp<|im_end|>\\n' }}{% endif %}"
            "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
            "{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
        ),
        head="<|im_start|>system\nhelp<|im_end|>\n<|im_start|>user\n",
        end="<|im_end|>",
        bos="<|im_start|>",
        eos="<|im_end|>",
        special=["<|im_start|>", "<|im_end|>"],
    ),
    # No system role and no flag for the generation prompt; a space around messages; the marks are not special.
    "mistral": Family(
        template=(
            "{{ bos_token }}{% for m in messages %}"
            "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
            "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
            "{% else %}{{ raise_exception('only user and assistant may speak') }}{% endif %}{% endfor %}"
        ),
        head="<s>[INST]",
        end="</s>",
        bos="<s>",
        eos="</s>",
        special=["<s>", "</s>"],
        plain=["[INST]", "[/INST]"],
    ),
    # No system role; the assistant has another name; the end of a turn is neither special nor the end of the text.
    "gemma": Family(
        template=(
            "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
            "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
            "{{ '<turn>' + role + '\\n' + m['content'] | trim + '</turn>\\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<turn>model\\n' }}{% endif %}"
        ),
        head="<bos><turn>user\n",
        end="</turn>",
        bos="<bos>",
        eos="<eos>",
        special=["<bos>", "<eos>"],
        plain=["<turn>", "</turn>"],
    ),
}


def chat_tokenizer(plain: Path, family: Family) -> PreTrainedTokenizerFast:
    """The tokenizer in `plain` with the family's tokens and template; as many do, it puts a BOS in front by itself."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(plain)
    tokenizer.add_tokens([AddedToken(text, special=True) for text in family.special])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in family.plain])
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = family.bos, family.eos, family.eos
    tokenizer.chat_template = family.template
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{family.bos} $A", special_tokens=[(family.bos, tokenizer.bos_token_id)]
    )
    return tokenizer


def save_chat_model(plain: Path, family: Family, folder: Path) -> None:
    """A random `LlamaForCausalLM` with the family's tokenizer; two tokens end its texts, neither its turns."""
    tokenizer = chat_tokenizer(plain, family)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(plain)
    config.update({"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id})
    model = LlamaForCausalLM(config)
    ends = tokenizer.convert_tokens_to_ids([family.eos, "<|eos|>"])
    model.generation_config = GenerationConfig(eos_token_id=sorted(set(ends)), pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
