"""What text begins with, where a response begins, and what a chat template may do."""

import copy

import pytest

from studylib.data import corpora, models, prompts
from studylib.data.corpora import Pair, beginning, windows
from studylib.data.prompts import chat_opening, check_template, conversation
from studylib.evaluate.scores import PackedLM

PAIR = Pair("why?", "because")


@pytest.mark.parametrize("template", [None, models.BYTE_TEMPLATE])
def test_a_conversation_ends_with_the_response_and_what_closes_it(tiny_tokenizer, template):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = template
    tokens, start = conversation(tokenizer, PAIR)
    assert tokenizer.decode(tokens[start:]) == "because" + models.END
    assert "why?" in tokenizer.decode(tokens[:start]) and "because" not in tokenizer.decode(tokens[:start])


@pytest.mark.parametrize(
    ("around", "bos", "first"),
    [
        ("$A", None, []),
        ("$A", "<s>", []),
        ("<s> $A", "<s>", [3]),
        ("$A <|im_end|>", None, []),
        ("<s> $A <|im_end|>", "<s>", [3]),
    ],
)
@pytest.mark.parametrize("chat", [True, False])
def test_what_a_tokenizer_puts_around_a_text_stands_at_the_beginning_only(byte_tokenizer, around, bos, first, chat):
    plain, own = byte_tokenizer(), byte_tokenizer(bos=bos, around=around)
    if not chat:
        plain.chat_template = own.chat_template = None
    assert beginning(own) == first
    cut = windows("wikipedia", own, 64, 8, "evaluation")
    text = windows("wikipedia", plain, 64 - len(first), None, "evaluation")
    assert cut.shape == (8, 64) and cut[:, : len(first)].tolist() == [first] * 8
    whole = text[corpora.evenly_spaced(8, len(text))]
    assert (cut[:, len(first) :] == whole).all()
    tokens, start = conversation(own, PAIR)
    expected, border = conversation(plain, PAIR)
    front = [] if chat else first  # a template writes them itself
    assert (tokens, start) == (front + expected, len(front) + border)
    assert own.decode(tokens[start:]).strip() == "because<|im_end|>"


@pytest.mark.parametrize("around", ["<s> $A", "<s> $A <|im_end|>", "$A <|im_end|>"])
def test_benchmark_prompts_end_where_their_answers_begin(byte_tokenizer, tiny_model, around):
    own, plain = byte_tokenizer(bos="<s>", around=around), byte_tokenizer(bos="<s>")
    asked = PackedLM(tiny_model, own)._encode_pair("Question:", " yes")
    context, answer = PackedLM(tiny_model, plain)._encode_pair("Question:", " yes")
    assert asked == ([3] * around.startswith("<s>") + context, answer)
    assert own("text").input_ids == byte_tokenizer(bos="<s>", around=around)("text").input_ids  # it stays as it was


def test_each_response_begins_where_its_text_does(language_model):
    tokenizer = copy.deepcopy(language_model[1])
    tokenizer.chat_template = None
    pairs = corpora.instruction_pairs("evaluation")
    for pair in pairs:
        tokens, start = conversation(tokenizer, pair)
        assert tokenizer.decode(tokens[start:]) == pair.response + tokenizer.eos_token
    # one token spans the border where the response begins with punctuation
    joined = [tokenizer(tokenizer.decode(conversation(tokenizer, pair)[0])).input_ids for pair in pairs[:200]]
    assert 0 < sum(ids != conversation(tokenizer, pair)[0] for ids, pair in zip(joined, pairs[:200], strict=True)) < 40


def test_a_space_before_the_response_belongs_to_its_first_word(language_model):
    tokenizer = copy.deepcopy(language_model[1])
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|im_end|>{% endfor %}"
    tokens, start = conversation(tokenizer, PAIR)
    assert tokenizer.decode(tokens[start:]) == " because<|im_end|>"
    assert tokens == tokenizer("[user] why?<|im_end|>[assistant] because<|im_end|>").input_ids


DATED = (
    "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{{ date_string }} {{ strftime_now('%H:%M:%S') }}|"
)


def test_a_template_writes_one_date_on_all_days(byte_tokenizer):
    own, plain = byte_tokenizer(chat_template=DATED + byte_tokenizer().chat_template), byte_tokenizer()
    assert own.decode(chat_opening(own)) == "26 Jul 2024 00:00:00|" + plain.decode(chat_opening(plain))
    assert own.decode(conversation(own, PAIR)[0]).startswith("26 Jul 2024 00:00:00|")
    assert prompts.writes_date(own) and not prompts.writes_date(plain)


@pytest.mark.parametrize(
    ("template", "named"),
    [
        ("{% if %}", r"fails \(TemplateSyntaxError"),
        ("{{ raise_exception('no system role') }}", r"fails \(TemplateError: no system role\)"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", r"fails \(SecurityError"),
        ("hello", "does not write each message once"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "does not write each message once"),
        ("{{ messages[0].content }}", "does not write each message once"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "changes the messages"),
        ("{{ range(10**5) | random }}{% for m in messages %}{{ m.content }}{% endfor %}", "something else each time"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "longer than 0.2 seconds"),
    ],
)
def test_templates_that_cannot_be_used(byte_tokenizer, monkeypatch, template, named):
    monkeypatch.setattr(prompts, "SECONDS", 0.2)
    with pytest.raises(ValueError, match=f"the chat template of 'own' .*{named}") as caught:
        check_template(byte_tokenizer(chat_template=template), "own")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("template", ["{% for m in messages %}[{{ m.content | trim }}]{% endfor %}", None])
def test_templates_that_can(byte_tokenizer, template):
    check_template(byte_tokenizer(chat_template=template), "own")


def test_an_opening_of_nothing_is_refused(byte_tokenizer):
    with pytest.raises(ValueError, match="writes something before the first message"):
        chat_opening(byte_tokenizer(chat_template="{% for m in messages %}{{ m.content }}|{% endfor %}"))
