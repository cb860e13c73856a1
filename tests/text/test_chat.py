"""Chat templates: what is learned of a conversation, where turns end, and that scoring asks as training did."""

import pytest
from transformers import AutoTokenizer

from abba.errors import RecipeError
from abba.text.chat import ChatTemplate, read_conversation
from abba.text.encode import encode_prompt
from abba.text.examples import examples
from abba.text.prompt import CHAT
from abba.text.rows import BadRows
from abba.training.tokens import tokens_path
from tests.distributed.ranks import TINY
from tests.training.test_data import source, write_rows

TURNS = "{{ bos_token }}{% for m in messages %}{{ '<<' + m.role + '>>\n' + m.content }}"
PROMPT = "{% if add_generation_prompt %}{{ '<<assistant>>\n' }}{% endif %}"
TEMPLATES = {
    # EOS after every turn, as Zephyr's; after the assistant's alone, as Mistral's; another token, as Gemma's; that, and
    # EOS where all ends, as Phi's; none.
    "eos": TURNS + "{{ eos_token + '\n' }}{% endfor %}" + PROMPT,
    "eos of the assistant": TURNS + "{{ eos_token if m.role == 'assistant' else '\n' }}{% endfor %}" + PROMPT,
    "own token": TURNS + "{{ '<|end|>\n' }}{% endfor %}" + PROMPT,
    "eos of the whole": TURNS
    + "{{ '<|end|>' }}{% endfor %}"
    + PROMPT.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}"),
    "none": TURNS + "{{ '\n' }}{% endfor %}" + PROMPT,
}
ENDS = {"eos": "</s>", "eos of the assistant": "</s>", "own token": "<|end|>"}
ENDS |= {"eos of the whole": "<|end|>", "none": "\n"}
TALK = [
    {"role": "system", "content": "Count."},
    {"role": "user", "content": "3 and 4?"},
    {"role": "assistant", "content": " 7 "},
    {"role": "user", "content": "and 5?"},
    {"role": "assistant", "content": "12\n#### 12"},
]


def with_template(template):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|end|>"]})
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    "more, reason",
    [
        ({"weight": 0}, "has a turn with weight=0, which is not supported"),
        ({"train": False}, "has a turn with train=False, which is not supported"),
        ({"reasoning_content": "3 + 4"}, "has a turn with reasoning_content, which is not supported"),
        ({"tool_calls": [{"id": "1"}]}, "has a turn with tool_calls, which is not supported"),
    ],
)
def test_what_a_message_asks_for_and_is_not_done_makes_a_bad_row(more, reason):
    with pytest.raises(ValueError, match=reason):
        read_conversation([*TALK[:-1], {**TALK[-1], **more}], "messages")
    assert read_conversation(
        [{**turn, "weight": 1, "train": True, "tool_calls": [], "thinking": ""} for turn in TALK], "messages"
    )


@pytest.fixture(params=TEMPLATES)
def kind(request):
    return request.param


def test_every_turn_of_the_assistant_is_learned_with_its_end_and_nothing_else(kind):
    tokenizer = with_template(TEMPLATES[kind])
    ((ids, learned),) = ChatTemplate(tokenizer).encode_conversations([read_conversation(TALK, "messages")])
    first, last = (tokenizer.decode(ids[start:stop]) for start, stop in learned)
    assert first == f"7{ENDS[kind]}"
    assert last == "12\n#### 12" + ENDS[kind] + "</s>" * (ENDS[kind] != "</s>"), "generation stops at EOS"
    assert ids[-1] == tokenizer.eos_token_id and learned[-1][1] == len(ids)
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    masked = tokenizer.decode(ids[: learned[0][0]])
    end = {"eos": "</s>\n", "own token": "<|end|>\n", "eos of the whole": "<|end|>"}.get(kind, "\n")
    assert "Count." in masked and masked.endswith(f"3 and 4?{end}<<assistant>>\n")
    whole = tokenizer.apply_chat_template([{**m, "content": m["content"].strip()} for m in TALK])["input_ids"]
    own = len(ids) - (ENDS[kind] != "</s>")
    assert ids[:own] == whole[:own]


def test_the_token_that_ends_a_turn_is_a_stop(kind):
    tokenizer = with_template(TEMPLATES[kind])
    own = {tokenizer.convert_tokens_to_ids("<|end|>")} if ENDS[kind] == "<|end|>" else set()
    assert ChatTemplate(tokenizer).turn_end() <= {*own, tokenizer.eos_token_id}
    assert ChatTemplate(tokenizer).turn_end() >= own


def test_scoring_asks_with_the_tokens_that_training_masked(kind, tmp_path):
    tokenizer = with_template(TEMPLATES[kind])
    rows = [{"question": " How many? ", "answer": "7 "}, {"question": "Why?\n", "answer": "So."}]
    found = list(examples(source(write_rows(tmp_path, *rows)), tokenizer, CHAT, BadRows()))
    assert [example.row for example in found] == [0, 1]
    asked = encode_prompt(tokenizer, [row["question"] for row in rows], CHAT)
    for example, prompt in zip(found, asked, strict=True):
        ((start, stop),) = example.learned
        assert example.ids[:start] == prompt and stop == len(example.ids)
    assert (
        asked[0]
        == tokenizer.apply_chat_template([{"role": "user", "content": "How many?"}], add_generation_prompt=True)[
            "input_ids"
        ]
    )


def test_sharegpt_and_what_follows_the_last_answer():
    talk = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, {"from": "human", "value": "c"}]
    assert read_conversation(talk, "conversations") == [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    ]  # fmt: skip


USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    "messages, reason",
    [
        (None, "messages is missing"),
        ("hello", "messages is str, not a list"),
        ([], "messages is empty"),
        ([USER], "messages has no turn of the assistant"),
        ([ASSISTANT], "messages starts with the assistant, whom nobody has asked"),
        ([USER, "b"], "messages holds str, not objects of role and content"),
        ([USER, {"role": "tool", "content": "b"}], "messages has the role 'tool', which is none of system, user"),
        ([USER, {"content": "b"}], "messages has the role 'None'"),
        ([USER, {"role": ["assistant"], "content": "b"}], "messages has the role \"['assistant']\""),
        ([USER, {"role": "assistant", "content": None}], "messages has content that is NoneType, not text"),
        ([USER, {"role": "assistant", "content": [{"type": "text"}]}], "messages has content that is list, not text"),
        ([USER, {"role": "assistant", "content": " \n"}], "messages has an empty turn of the assistant"),
    ],
)
def test_conversations_that_cannot_be_trained_on(messages, reason):
    with pytest.raises(ValueError) as refused:
        read_conversation(messages, "messages")
    assert str(refused.value).startswith(reason)


@pytest.mark.parametrize(
    "template, reason",
    [
        ("{% if messages|length > 2 %}{{ raise_exception('turns must alternate') }}{% endif %}" + TEMPLATES["eos"],
         "the chat template refuses it: turns must alternate"),
        ("{{ messages|length // 2 }}" + TEMPLATES["eos"],
         "the chat template writes a turn otherwise, or in other tokens, when more follows"),
        ("{{ messages[-1].role }}" + TEMPLATES["eos"], "the chat template asks for an answer otherwise than it writes"),
        (TEMPLATES["eos"] + "{% if add_generation_prompt %}<think>\n{% endif %}",
         "the chat template asks for an answer otherwise than it writes one, such as with <think>"),
        ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
         "the chat template leaves out a turn of the assistant"),
    ],
)  # fmt: skip
def test_templates_that_spoil_a_conversation_are_a_reason_and_no_traceback(template, reason, tmp_path):
    rows = [{"messages": TALK}, {"messages": [USER, {"role": "assistant", "content": None}]}]
    where = source(write_rows(tmp_path, *rows), instruction_field=None, response_field=None, messages_field="messages")
    bad = BadRows()
    assert list(examples(where, with_template(template), CHAT, bad)) == []
    assert bad.reasons.total() == 2 and bad.first.startswith(f"the first is row 1: {reason}")


def test_a_template_that_keeps_thoughts_of_the_last_turn_only_is_refused_for_several_turns():
    template = (
        TEMPLATES["eos"]
        .replace("m.content }}", "('' if loop.last else '') + m.content }}")
        .replace("+ m.content", "+ ('<think>\n' if loop.last and m.role == 'assistant' else '') + m.content")
    )
    twice = [USER, ASSISTANT, USER, ASSISTANT]
    first, refused, last = ChatTemplate(with_template(template)).encode_conversations([twice[:2], twice, twice[:2]])
    assert first == last and first[1] and "writes a turn otherwise" in str(refused), "each by itself"


def test_the_day_does_not_change_the_tokens():
    tokenizer = with_template("{{ strftime_now('%d %b %Y') }}\n\n" + TEMPLATES["eos"])
    ((ids, _),) = ChatTemplate(tokenizer).encode_conversations([[USER, ASSISTANT]])
    assert tokenizer.decode(ids).startswith("26 Jul 2024\n\n<s>")
    plain = with_template("\n" + TEMPLATES["eos"])
    assert ChatTemplate(plain).text == plain.chat_template


def test_a_tokenizer_without_a_template_says_so():
    with pytest.raises(RecipeError, match=r"has no chat template; put a chat_template\.jinja beside it") as refused:
        encode_prompt(AutoTokenizer.from_pretrained(TINY), ["a"], CHAT)
    assert "\n" not in str(refused.value)


def test_a_template_with_a_mistake_is_the_bases_and_no_rows(tmp_path):
    rows = write_rows(tmp_path, {"messages": [USER, ASSISTANT]})
    talks = source(rows, instruction_field=None, response_field=None, messages_field="messages")
    for first in ("{{ bos_token }}\n", "{{ strftime_now('%Y') }}\n"):
        broken = with_template(first + "{% for m in messages %}{{ m.content }}")
        with pytest.raises(RecipeError, match="this base's tokenizer has a mistake in line 2: ") as refused:
            list(examples(talks, broken, CHAT, BadRows()))
        assert "\n" not in str(refused.value)


def test_reasons_that_hold_words_of_rows_do_not_grow_with_them(tmp_path):
    bad = BadRows()
    for row in range(100):
        bad.add(row, f"has the role {row % 50}")
    assert len(bad.reasons) == 21 and bad.reasons["has the role 3"] == 2 and bad.reasons["other reasons"] == 60
    assert bad.reasons.total() == 100


def test_the_tokens_name_depends_on_the_field_and_the_template(tmp_path):
    path = write_rows(tmp_path, {"messages": TALK, "other": TALK, "question": "a", "answer": "b"})
    talks = {"instruction_field": None, "response_field": None}
    names = {
        tokens_path(source(path, **changes), 512, 0, with_template(TEMPLATES[kind]), tmp_path, prompt)
        for kind in ("eos", "none")
        for changes in ({**talks, "messages_field": "messages"}, {**talks, "messages_field": "other"}, {})
        for prompt in (CHAT, "plain")
    }
    assert len(names) == 2 * 2 + 2 + 1, "conversations and the prompt chat go with the template, plain does not"
