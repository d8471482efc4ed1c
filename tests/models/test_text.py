"""Control tokens that a person's text spells are text: compared with a tokenizer that was built without any."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AddedToken, AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast

from helpers.models.adem_vl.sequences import encode
from helpers.models.text import answer_tokens, prompt_tokens
from helpers.workspace import repo_root

ALPHABET = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
MERGES = [("e", "o"), ("eo", "s"), ("Ġ", "<"), ("<", "|")]
VOCABULARY = ALPHABET | {a + b: len(ALPHABET) + i for i, (a, b) in enumerate(MERGES)}
SPELT = [
    "what is <|endoftext|> ?",
    "<|eot_id|>",
    "say [INST] <s> <eos>",
    "<|eot_id|><|eot_id|> eos",
    "a\n<|endoftext|>",
]


def without_controls() -> Tokenizer:
    bare = Tokenizer(models.BPE(VOCABULARY, MERGES))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return bare


def gpt2():
    return GPT2Tokenizer(vocab=VOCABULARY | {"<|endoftext|>": len(VOCABULARY)}, merges=MERGES)


def llama3():
    fast = PreTrainedTokenizerFast(tokenizer_object=without_controls(), bos_token="<s>", eos_token="<|eot_id|>")
    fast.add_tokens([AddedToken("<eos>", special=True), AddedToken("[INST]", special=False)])
    return fast


@pytest.mark.parametrize("make", [gpt2, llama3])
@pytest.mark.parametrize("text", SPELT)
def test_control_tokens_in_questions_and_answers_are_text(make, text):
    tokenizer, bare = make(), without_controls()
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    asked = f"Question: {text}\nOptions: {text}; b\nAnswer:"
    template = "Question: {question}\nAnswer:"
    assert prompt_tokens(tokenizer, template, text, [text, "b"]) == [start, *bare.encode(asked).ids]
    assert answer_tokens(tokenizer, text) == [*bare.encode(f" {text}").ids, end]
    sample = encode(tokenizer, f"Question: {text}\nThe answer is", f" {text}", has_image=False, use_cls=False)
    assert sample.input_ids == [start, *bare.encode(f"Question: {text}\nThe answer is {text}").ids, end]


def test_control_tokens_of_the_prompt_stay_control_tokens():
    tokenizer, bare = llama3(), without_controls()
    inst, end = tokenizer.convert_tokens_to_ids(["[INST]", "<|eot_id|>"])
    for question in ("what ?", "what <|eot_id|> ?", "{question} [INST]"):
        expected = [tokenizer.bos_token_id, inst, *bare.encode(f" {question} ").ids, end, *bare.encode("\nA:").ids]
        assert prompt_tokens(tokenizer, "[INST] {question} <|eot_id|>\nA:", question) == expected


@pytest.mark.parametrize("name", ["llama", "science_llama"])
def test_the_shipped_tokenizers_spell_their_control_tokens(name):
    tokenizer = AutoTokenizer.from_pretrained(repo_root() / "helpers" / "assets" / "tiny" / name)
    for control in tokenizer.all_special_tokens:
        ids = answer_tokens(tokenizer, f"a {control} b")
        assert ids[:-1] == tokenizer(f" a {control} b", add_special_tokens=False, split_special_tokens=True).input_ids
        assert tokenizer.eos_token_id not in ids[:-1]


def test_a_control_token_in_the_vocabulary_itself_is_spelt():
    """Unigram models hold <s> among their pieces, where it would win over its letters."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)] + [(c, -5.0) for c in "▁ab<s>/"]
    unigram = Tokenizer(models.Unigram(list(dict(pieces).items()), unk_id=0))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=unigram, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    ids = answer_tokens(tokenizer, "a <s> b")
    assert tokenizer.convert_ids_to_tokens(ids) == ["▁", "a", "▁", "<", "s", ">", "▁", "b", "</s>"]
