"""Control tokens that a person's text spells are text: compared with a tokenizer that was built without any."""

import itertools
import string

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


@pytest.mark.parametrize("make", [gpt2, llama3])
@pytest.mark.parametrize("style", ["lettered", "listed"])
def test_options_are_listed_in_as_many_tokens_and_spelt_alike_in_every_order(make, style):
    """Against the text encoded whole, without control tokens; the options hold some, and the words of the prompt."""
    tokenizer, bare = make(), without_controls()
    options = ["<|eot_id|>", "eos eos", "Answer:", "a; (B) b"]
    prompts = []
    for order in itertools.permutations(options):
        if style == "lettered":
            listed = "".join(f"\n({letter}) {option}" for letter, option in zip("ABCD", order, strict=True))
        else:
            listed = " " + "; ".join(order)
        found = prompt_tokens(tokenizer, "Q: {question}\nAnswer:", "what ?", order, style)
        assert found == [tokenizer.bos_token_id, *bare.encode(f"Q: what ?\nOptions:{listed}\nAnswer:").ids]
        prompts.append(tuple(found))
    assert len(set(prompts)) == 24 and len({tuple(sorted(prompt)) for prompt in prompts}) == 1


def test_more_options_than_letters_and_a_prompt_that_asks_twice():
    tokenizer, bare = llama3(), without_controls()
    options = [f"o{number}" for number in range(28)]
    marks = [*string.ascii_uppercase, "27", "28"]
    listed = "".join(f"\n({mark}) {option}" for mark, option in zip(marks, options, strict=True))
    expected = bare.encode(f"a who b who\nOptions:{listed} c").ids
    assert prompt_tokens(tokenizer, "a {question} b {question} c", "who", options, "lettered")[1:] == expected


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
