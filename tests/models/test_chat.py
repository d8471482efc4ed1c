"""Chat templates: prompt and answer are the tokens that the stock template gives, cut where the video stands."""

import shutil
from datetime import datetime

import pytest
import torch
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from helpers.models.chat import ChatTemplateError, chat_format
from helpers.models.gif_qa import GifQA, GifQAModel, Window, load_bundle
from helpers.models.language import load_language_model
from helpers.models.parts import BundleError
from helpers.models.text import answer_tokens, prompt_tokens
from tests.chats import FAMILIES, chat_tokenizer

QUESTION, OPTIONS = "what color is the circle ?", ["red", "a blue star"]
PROMPT = "Question: {question}\nAnswer:"
DAY = {"date_string": "26 Jul 2024"}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def tokenizer(family, tiny_llama_dir):
    return chat_tokenizer(tiny_llama_dir, family)


@pytest.fixture(scope="module")
def config(make_profile):
    return make_profile(language_model__chat=True).language_model


def stock(tokenizer, *contents: str, **options) -> list[int]:
    """Token ids of a chat by the stock tokenizer; user and assistant take turns."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return tokenizer.apply_chat_template(messages, return_dict=False, **DAY, **options)


def plain(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("prompt", [PROMPT, "{question}", "\n Say: {question} "])
@pytest.mark.parametrize(
    ("options", "style", "listed"),
    [
        (None, "listed", ""),
        (OPTIONS, "listed", "\nOptions: red; a blue star"),
        (OPTIONS, "lettered", "\nOptions:\n(A) red\n(B) a blue star"),
    ],
)
def test_prompt_and_answer_are_the_stock_template_s_tokens(tokenizer, family, config, prompt, options, style, listed):
    chat = chat_format(tokenizer, config)
    asked = QUESTION + listed
    content = prompt.format(question=asked).strip()
    ids = prompt_tokens(tokenizer, prompt, QUESTION, options, style, chat)
    assert ids == stock(tokenizer, content, add_generation_prompt=True)
    for answer in ("red", "10", "a small blue star"):
        whole = [*ids, *answer_tokens(tokenizer, f" {answer} ", chat)]
        assert whole == stock(tokenizer, content, answer)[: len(whole)]
        assert whole[-1] == tokenizer.convert_tokens_to_ids(family.end)
    assert answer_tokens(tokenizer, " ", chat) == [tokenizer.convert_tokens_to_ids(family.end)]
    assert tokenizer.decode(chat.head) == family.head
    assert tuple(ids[: len(chat.head)]) == chat.head


def test_bos_stands_once_and_only_where_the_template_writes_it(tokenizer, family, config):
    """Also where the tokenizer adds it by itself; ChatML has none, and its BOS is the start of every turn."""
    assert tokenizer("x").input_ids[0] == tokenizer.bos_token_id
    ids = prompt_tokens(tokenizer, PROMPT, QUESTION, chat=chat_format(tokenizer, config))
    turns = stock(tokenizer, "x", add_generation_prompt=True).count(tokenizer.bos_token_id)
    assert ids.count(tokenizer.bos_token_id) == turns == (3 if family is FAMILIES["chatml"] else 1)
    assert ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("text", ["what is {} ?", "{}", "{0}{0} a", "say\n{} [INST] <|eos|>"])
def test_control_tokens_that_a_question_spells_stay_text(tokenizer, family, config, tiny_llama_dir, text):
    """Compared with the tokenizer before it learnt any of the family's tokens."""
    bare = PreTrainedTokenizerFast.from_pretrained(tiny_llama_dir)
    chat = chat_format(tokenizer, config)
    controls = {*family.special, *family.plain, "<|eos|>"}
    for control in controls:
        question = text.format(control)
        expected = [
            *bare(f"Question: {question}\nAnswer:", add_special_tokens=False, split_special_tokens=True).input_ids
        ]
        empty = prompt_tokens(tokenizer, "{question}", "", chat=chat)
        ids = prompt_tokens(tokenizer, PROMPT, question, chat=chat)
        of_both = tokenizer.convert_tokens_to_ids(sorted(controls))
        assert [i for i in ids if i in of_both] == [i for i in empty if i in of_both]
        if family is not FAMILIES["mistral"]:  # its spaces around the message join the words
            behind = empty[len(chat.head) :]
            assert ids == [*chat.head, *expected, *behind]
        answer = answer_tokens(tokenizer, question, chat)
        assert not set(answer[:-1]) & set(of_both)
        assert tokenizer.decode(answer[:-1]).strip() == question


def test_the_prompt_is_the_same_every_day(tiny_llama_dir, config, monkeypatch):
    """Whatever a template asks the clock: at two times the stock template says two things, ours one."""
    family = FAMILIES["llama3"]
    tokenizer = chat_tokenizer(tiny_llama_dir, family)
    tokenizer.chat_template = family.template.replace("%d %b %Y", "%A %B %d %m %y %Y %H:%M")
    told, by_stock = set(), set()
    for now in (datetime(2025, 1, 3, 4, 5), datetime(2026, 11, 25, 16, 17)):
        clock = type("Clock", (), {"now": staticmethod(lambda now=now: now)})
        monkeypatch.setattr(chat_template_utils, "datetime", clock)
        chat = chat_format(tokenizer, config)
        told.add(chat)
        message = [{"role": "user", "content": "x"}]
        by_stock.add(tokenizer.apply_chat_template(message, tokenize=False))
    assert len(told) == 1 and len(by_stock) == 2
    assert "Day: Friday July 26 07 24 2024 00:00\n" in tokenizer.decode(told.pop().head)


def changed(template: str, old: str, new: str) -> str:
    assert old in template
    return template.replace(old, new)


CHATML = FAMILIES["chatml"].template
FAULTS = {
    "no template": (None, "has no chat template, as base models have none"),
    "no syntax": (CHATML + "{% if %}", "fails: TemplateSyntaxError"),
    "it raises": (CHATML + "{{ raise_exception('an image is missing') }}", "fails: TemplateError: an image is missing"),
    "another type": (CHATML + "{{ 'a' + 1 }}", "fails: TypeError"),
    "another name": (CHATML + "{{ unknown.name }}", "fails: UndefinedError"),
    "no generation prompt": (
        changed(CHATML, "{% if add_generation_prompt %}", "{% if false %}"),
        "no generation prompt",
    ),
    "nothing said": (changed(CHATML, "m['content']", "''"), "does not say a question and its answer once each"),
    "said twice": (changed(CHATML, "m['content']", "m['content'] + m['content']"), "once each"),
    "said otherwise": (changed(CHATML, "m['content']", "m['content'] | upper"), "as they are"),
    "a question said otherwise": (
        changed(CHATML, "m['content']", "(m['content'] | title if m['role'] == 'user' else m['content'])"),
        "as they are",
    ),
    "no default": ({"tool_use": CHATML, "rag": CHATML}, "fails: ValueError: This model has multiple"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_template_that_cannot_be_used_is_refused_in_a_sentence(tiny_llama_dir, config, fault):
    tokenizer = chat_tokenizer(tiny_llama_dir, FAMILIES["chatml"])
    tokenizer.chat_template, said = FAULTS[fault]
    with pytest.raises(ChatTemplateError) as error:
        chat_format(tokenizer, config)
    told = str(error.value)
    assert said in told and config.model in told and told.endswith("-p language_model.chat false")
    assert "\n" not in told


def test_of_several_templates_the_default_is_taken(tiny_llama_dir, config):
    tokenizer = chat_tokenizer(tiny_llama_dir, FAMILIES["chatml"])
    expected = chat_format(tokenizer, config)
    tokenizer.chat_template = {"tool_use": "{{ messages }}", "default": CHATML}
    assert chat_format(tokenizer, config) == expected


def test_a_thinking_model_is_asked_to_answer_at_once(tiny_llama_dir, config):
    tokenizer = chat_tokenizer(tiny_llama_dir, FAMILIES["chatml"])
    thought = "{{ '<think>\\n\\n</think>\\n\\n' if enable_thinking is defined and not enable_thinking }}"
    tokenizer.chat_template = changed(CHATML, "assistant\\n' }}", "assistant\\n' }}" + thought)
    assert chat_format(tokenizer, config).closing.endswith("assistant\n<think>\n\n</think>\n\n")


def test_without_an_end_of_the_turn_the_end_of_the_text_ends_an_answer(tiny_llama_dir, config):
    tokenizer = chat_tokenizer(tiny_llama_dir, FAMILIES["chatml"])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    chat = chat_format(tokenizer, config)
    assert (list(chat.head), chat.end) == (plain(tokenizer, "user:"), tokenizer.eos_token_id)
    assert answer_tokens(tokenizer, "red", chat)[:-1] == plain(tokenizer, " red")


def test_a_token_never_reaches_over_the_place_of_the_video(tiny_llama_dir, config):
    """The last letter in front of a message would join the first word of it: "Q" + "uestion"."""
    tokenizer = chat_tokenizer(tiny_llama_dir, FAMILIES["chatml"])
    tokenizer.chat_template = changed(CHATML, "'\\n' + m", "('\\n' if m['role'] == 'assistant' else '\\nQ') + m")
    chat = chat_format(tokenizer, config)
    ids = prompt_tokens(tokenizer, "uestion: {question}", QUESTION, chat=chat)
    joined = stock(tokenizer, f"uestion: {QUESTION}", add_generation_prompt=True)
    assert tokenizer.decode(ids) == tokenizer.decode(joined) and ids != joined
    assert tokenizer.decode(ids[: len(chat.head)]).endswith("user\nQ")
    assert tokenizer.decode(ids[len(chat.head) :]).startswith("uestion: what")


# ---- With a model --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chats(make_model, chat_dir):
    def make(name: str, **changes) -> GifQAModel:
        return make_model(language_model__chat=True, language_model__model=str(chat_dir(name)), **changes)

    return make


def test_without_the_key_nothing_of_the_template_is_used(make_model, chat_dir):
    """Even where there is one: the prompt, the answer and what ends it are those of a base model."""
    model = make_model(language_model__model=str(chat_dir("gemma")))
    tokenizer = model.tokenizer
    assert model.encode_prompt(QUESTION) == [
        tokenizer.bos_token_id,
        *plain(tokenizer, f"Question: {QUESTION}\nAnswer:"),
    ]
    assert model.encode_answer("red") == [*plain(tokenizer, " red"), tokenizer.eos_token_id]
    assert model.language_model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert "chat" not in model.base["language_model"]


def test_generation_ends_with_the_turn_the_text_or_what_else_the_model_ends_with(make_profile, chat_dir):
    config = make_profile(language_model__chat=True, language_model__model=str(chat_dir("gemma"))).language_model
    model, tokenizer = load_language_model(config, torch.device("cpu"))
    ends = model.generation_config.eos_token_id
    assert sorted(ends) == sorted(tokenizer.convert_tokens_to_ids(["</turn>", "<eos>", "<|eos|>"]))


@pytest.mark.parametrize("end", ["</turn>", "<eos>", "<|eos|>"])
def test_a_text_is_cut_where_it_ends(chats, monkeypatch, end):
    """The end of a turn is not special here, so that decoding alone would leave it in the answer."""
    model = chats("gemma", video=False)
    ids = plain(model.tokenizer, f" a red star{end}<eos>")
    monkeypatch.setattr(model.language_model, "generate", lambda **options: torch.tensor([ids, ids]))
    assert model.generate([model.encode_prompt(QUESTION)] * 2) == ["a red star"] * 2


@pytest.mark.parametrize("video", [True, False])
def test_the_text_is_shown_as_the_model_reads_it(chats, video):
    model = chats("llama3", video=video)
    shown = model.text_of(model.encode_prompt(QUESTION, OPTIONS), model.encode_answer("red"))
    mark = "[video tokens]" if video else ""
    asked = f"Question: {QUESTION}\nOptions: red; a blue star\nAnswer:<|eot|><|head|>assistant<|/head|>\n\nred<|eot|>"
    assert shown == FAMILIES["llama3"].head + mark + asked


def test_a_plain_prompt_is_shown_with_its_bos(make_model):
    model = make_model()
    shown = model.text_of(model.encode_prompt(QUESTION), model.encode_answer("red"))
    assert shown == f"<|bos|>[video tokens]Question: {QUESTION}\nAnswer: red<|eos|>"


def test_a_template_that_changed_since_the_training_is_told(chats, chat_dir, tmp_path):
    folder = chats("chatml", video=False).save_bundle(tmp_path / "bundle")
    twin = shutil.copytree(chat_dir("chatml"), tmp_path / "twin")
    assert load_bundle(folder, language_model=str(twin)).chat is not None
    file = twin / "chat_template.jinja"
    file.write_text(changed(file.read_text(), "\\nhelp<", "\\nbe brief<"))
    with pytest.raises(BundleError, match=r"trained by the chat template .*help.*be brief"):
        load_bundle(folder, language_model=str(twin))


def test_the_model_without_a_licence_learns_is_saved_and_answers(chats, tmp_path):
    """SmolLM2's class (Llama), its tokens (BOS starts a turn, EOS and padding end it), the profiles' target modules."""
    model = chats("chatml", video=False)
    prompt = model.encode_prompt(QUESTION)
    answers = [model.encode_answer("red")]
    ids = torch.tensor([prompt + answers[0]])
    labels = torch.tensor([[-100] * len(prompt) + answers[0]])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(20):
        model(ids, torch.ones_like(ids), labels)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model.generate([prompt]) == ["red"]
    folder = model.save_bundle(tmp_path / "bundle")
    asked = GifQA(load_bundle(folder, language_model=model.profile.language_model.model), None).answer(None, QUESTION)
    assert asked.text == "red" and asked.confidence > 0.5


def test_a_window_is_refused_a_template_that_fails_before_any_weights_are_read(make_profile, chat_dir, tmp_path):
    folder = shutil.copytree(chat_dir("chatml"), tmp_path / "broken", ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    profile = make_profile(language_model__chat=True, language_model__model=str(folder))
    for use in (Window.of, lambda profile: load_language_model(profile.language_model, torch.device("cpu"))):
        with pytest.raises(ChatTemplateError, match="fails: TemplateError: no"):
            use(profile)
