"""Prompts and their parts: exact ranges, in plain text and in whatever a chat template makes of a chat."""

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lens.errors import DataError
from moe_lens.text.prompts import Message, Prompt, as_prompt, from_json, is_chat, render, to_json
from tests.tiny_models import tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
SYSTEM_LAST = (  # the system's message comes last, those of tools not at all
    "{% for m in messages %}{% if m.role in ['user', 'assistant'] %}[{{ m.role }}] {{ m.content }}\n"
    "{% endif %}{% endfor %}{% for m in messages %}{% if m.role == 'system' %}(obey: {{ m.content }})"
    "{% endif %}{% endfor %}"
)
UNTHINKING = "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}{% endfor %}"
TEMPLATES = {"chatml": CHATML, "llama": LLAMA, "system_last": SYSTEM_LAST}


def with_template(template: str | None) -> Any:
    made = tokenizer()
    made.chat_template = template
    return made


def chat(*turns: str) -> list[dict[str, str]]:
    """ "user: hello" -> a message."""
    return [dict(zip(("role", "content"), turn.split(": ", 1), strict=True)) for turn in turns]


def pieces(tokenizer: Any, prompt: Prompt, name: str) -> list[str]:
    rendered = render(tokenizer, prompt)
    return [rendered.text[start:stop] for start, stop in rendered.ranges[name]]


def test_a_text_target_is_its_last_occurrence() -> None:
    assert Prompt("a rat, a cat, a rat.", {"animal": "rat"}).named == {"animal": ((16, 19),)}
    in_chat = Prompt(chat("user: rat rat", "assistant: a cat"), {"animal": "rat"})
    assert in_chat.spans == {"animal": ((0, 4, 7),)}


def test_ranges_are_kept_as_they_are() -> None:
    assert Prompt("abcdef", {"x": (1, 3), "y": [[0, 1], (4, 6)]}).spans == {
        "x": ((1, 3),),
        "y": ((0, 1), (4, 6)),
    }
    assert Prompt(chat("user: abc"), {"x": [0, 1, 3]}).spans == {"x": ((0, 1, 3),)}


def test_roles_name_parts_unless_the_user_does() -> None:
    turns = chat("system: s", "user: one", "assistant: two", "user: three", "assistant: four!")
    named = Prompt(turns).named
    assert named["user"] == ((1, 0, 3), (3, 0, 5))
    assert named["question"] == ((3, 0, 5),)
    assert named["answer"] == ((4, 0, 5),)
    assert named["system"] == ((0, 0, 1),)
    own = Prompt(turns, {"question": "one"}).named
    assert own["question"] == ((1, 0, 3),)
    assert own["answer"] == named["answer"]
    assert set(Prompt(chat("user: hi", "assistant: ")).named) == {"user", "question"}
    assert Prompt("plain").named == {}


def test_chats_are_frozen_and_equal_whatever_held_them() -> None:
    turns = chat("user: one", "assistant: two")
    prompts = [
        Prompt(turns),
        Prompt(tuple(turns)),
        Prompt([Message("user", "one"), Message("assistant", "two")]),
    ]
    extra = Prompt([{**turn, "tool_calls": None} for turn in turns])  # as datasets fill in missing keys
    assert prompts[0] == prompts[1] == prompts[2] == extra == as_prompt(turns)
    assert len({hash(prompt) for prompt in prompts}) == 1
    turns[0]["content"] = "changed"
    assert prompts[0].messages == (("user", "one"), ("assistant", "two"))


@pytest.mark.parametrize(
    ("content", "spans", "words"),
    [
        ("", {}, "empty"),
        ([], {}, "without messages"),
        (["hello"], {}, "Message 0"),
        ([{"role": "user"}], {}, "Message 0"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": ["a"]}], {}, "Message 1"),
        ([{"role": "user", "content": "a", "name": {"x"}}], {}, "JSON cannot hold"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], {}, "type 'image', without text"),
        ([{"role": "", "content": "a"}], {}, "role"),
        ("text", {"part": "absent"}, "'absent', does not occur"),
        ("text", {"part": ""}, "does not occur"),
        ("text", {"all": "text"}, "other than"),
        ("text", {"last": "text"}, "other than"),
        ("text", {"part": (0, 5)}, "inside the prompt"),
        ("text", {"part": (2, 2)}, "inside the prompt"),
        ("text", {"part": (-3, 2)}, "inside the prompt|ranges"),
        ("text", {"part": (0, 0, 2)}, "inside the prompt"),
        ("text", {"part": []}, "ranges"),
        ("text", {"part": 3}, "ranges"),
        ([{"role": "user", "content": "a"}], {"part": (1, 0, 1)}, "inside the prompt"),
        ([{"role": "user", "content": "a"}], {"part": (0, 1)}, "inside the prompt"),
    ],
)
def test_what_is_no_prompt_is_refused(content: Any, spans: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        Prompt(content, spans)


@pytest.mark.parametrize(
    "bad", [None, 3, {"role": "user", "content": "a"}, ["a", "b"], [4, 5], b"x"], ids=str
)
def test_as_prompt_refuses_what_is_none(bad: Any) -> None:
    with pytest.raises(DataError):
        as_prompt(bad)
    assert not is_chat(bad)


def test_json_keeps_everything() -> None:
    for prompt in (
        Prompt("abc"),
        Prompt("abc", {"x": "b", "y": [(0, 1), (2, 3)]}),
        Prompt(chat("user: q", "assistant: a")),
        Prompt(chat("user: q", "assistant: a"), {"x": (1, 0, 1)}),
    ):
        assert from_json(to_json(prompt)) == prompt
    assert from_json({"content": "abc", "spans": {"x": "b"}}) == Prompt("abc", {"x": (1, 2)})
    for bad in ({"text": "abc"}, {"content": "abc", "span": {}}, 3, {"content": 3}):
        with pytest.raises(DataError):
            from_json(bad)


@pytest.mark.parametrize("name", TEMPLATES)
def test_messages_are_found_even_where_the_same_words_stand_elsewhere(name: str) -> None:
    """Contents that are substrings of each other, of role names and of the template's own words."""
    made = with_template(TEMPLATES[name])
    turns = chat("system: user", "user: assistant", "assistant: user", "user: a", "assistant: system\nuser")
    prompt = Prompt(turns, {"inner": (4, 7, 9)})
    assert pieces(made, prompt, "system") == ["user"]
    assert pieces(made, prompt, "user") == ["assistant", "a"]
    assert pieces(made, prompt, "assistant") == ["user", "system\nuser"]
    assert pieces(made, prompt, "inner") == ["us"]
    rendered = render(made, prompt)
    (start, _), heads = rendered.ranges["question"][0], {"chatml": "user\n", "llama": "<|end_header_id|>\n\n"}
    assert rendered.text[:start].endswith(heads.get(name, "[user] "))


def test_the_opening_of_an_answer_is_there_unless_there_is_an_answer() -> None:
    made = with_template(CHATML)
    assert render(made, Prompt(chat("user: q"))).text.endswith("<|im_start|>assistant\n")
    assert render(made, Prompt(chat("user: q", "assistant: a"))).text.endswith("a<|im_end|>\n")


def test_a_template_that_strips_moves_the_ranges() -> None:
    prompt = Prompt(
        [{"role": "user", "content": "  hello you \n"}], {"you": "you", "head": (0, 0, 4), "gap": (0, 0, 2)}
    )
    made = with_template(LLAMA)
    for name, expected in (("user", "hello you"), ("you", "you"), ("head", "he")):
        rendered = render(made, prompt, [name])
        assert [rendered.text[a:b] for a, b in rendered.ranges[name]] == [expected]
    with pytest.raises(DataError, match="leaves out '  ' of message 0"):
        render(made, prompt, ["gap"])


def test_a_template_that_cuts_keeps_what_is_left() -> None:
    made = with_template(UNTHINKING)
    prompt = Prompt(chat("user: q", "assistant: <think>hm</think>four"), {"thought": "hm", "end": "our"})
    rendered = render(made, prompt, ["answer", "end"])
    assert rendered.text == "<user>q<assistant>four"
    assert rendered.ranges == {"answer": ((18, 22),), "end": ((19, 22),)}
    with pytest.raises(DataError, match="'hm'"):
        render(made, prompt, ["thought"])


def test_a_message_that_is_left_out_is_refused_only_where_it_is_wanted() -> None:
    made = with_template(SYSTEM_LAST)
    prompt = Prompt(chat("tool: seven", "user: what is seven"))
    with pytest.raises(DataError, match=r"leaves out message 0, 'seven'"):  # although "seven" occurs once
        render(made, prompt, ["tool"])
    assert pieces_of(made, prompt, "question") == ["what is seven"]


def pieces_of(tokenizer: Any, prompt: Prompt, name: str) -> list[str]:
    rendered = render(tokenizer, prompt, [name])
    return [rendered.text[start:stop] for start, stop in rendered.ranges[name]]


def test_a_template_that_looks_into_contents_falls_back_on_a_unique_occurrence() -> None:
    made = with_template(
        "{% for m in messages %}{% if 'w' not in m.content %}{{ raise_exception('no w') }}{% endif %}"
        "<{{ m.content }}>{% endfor %}"
    )
    prompt = Prompt(chat("user: w1 w2", "assistant: w3"))
    assert pieces_of(made, prompt, "answer") == ["w3"]
    with pytest.raises(DataError, match="Message 1, 'w1', cannot be located"):
        render(made, Prompt(chat("user: w1 w2", "assistant: w1")))


def test_a_unique_occurrence_in_another_message_is_none() -> None:
    last_alone = with_template(
        "{% for m in messages %}{% if 'w' not in m.content %}{{ raise_exception('no w') }}{% endif %}"
        "{% endfor %}<{{ messages[-1].content }}>"
    )
    prompt = Prompt(chat("user: w1", "assistant: w1 w2"))
    assert pieces_of(last_alone, prompt, "answer") == ["w1 w2"]
    with pytest.raises(DataError, match="Message 0, 'w1', cannot be located"):
        render(last_alone, prompt, ["question"])


def test_what_is_left_of_a_message_must_be_one_part_of_it() -> None:
    with pytest.raises(DataError, match="cannot be located"):  # which of the two was kept?
        render(with_template(UNTHINKING), Prompt(chat("assistant: ab</think>ab")))


def test_a_message_written_twice_is_ambiguous() -> None:
    made = with_template("{% for m in messages %}{{ m.content }} {{ m.content }}{% endfor %}")
    with pytest.raises(DataError, match="cannot be located"):
        render(made, Prompt(chat("user: w1")))


def test_a_chat_needs_a_template_that_takes_it() -> None:
    with pytest.raises(DataError, match="chat_template"):
        render(with_template(None), Prompt(chat("user: q")))
    strict = with_template("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match="roles must alternate"):
        render(strict, Prompt(chat("user: q")))


CONTENTS = st.text(st.sampled_from("ab user\n<|>assistant"), min_size=1, max_size=12).filter(str.strip)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), CONTENTS), min_size=1, max_size=4))
def test_every_message_is_found_where_it_stands(turns: list[tuple[str, str]]) -> None:
    """Oracle: build ChatML by hand and count the characters."""
    rendered = render(with_template(CHATML), Prompt([Message(*turn) for turn in turns]))
    text, expected = "", {"user": [], "assistant": []}
    for role, content in turns:
        text += f"<|im_start|>{role}\n"
        expected[role].append((len(text), len(text) + len(content)))
        text += f"{content}<|im_end|>\n"
    assert rendered.text == text + ("<|im_start|>assistant\n" if turns[-1][0] == "user" else "")
    for role, ranges in expected.items():
        assert list(rendered.ranges.get(role, ())) == ranges


WITH_TOOLS = (
    "{% if tools %}tools {{ tools | length }} {% endif %}{% for m in messages %}<{{ m.role }}>"
    "{% if m.reasoning_content and thinking %}[{{ m.reasoning_content }}]{% endif %}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}"
    "{% endif %}{% for call in m.tool_calls or [] %}({{ call.function.name }}){% endfor %}</{{ m.role }}>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
CALLING = [
    {"role": "user", "content": [{"type": "text", "text": "Is it "}, {"type": "text", "text": "raining?"}]},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look"}}]},
    {"role": "tool", "content": "yes", "tool_call_id": "1"},
    {"role": "assistant", "content": "It is.", "reasoning_content": "so it says"},
]


def test_parts_tool_calls_and_reasoning_reach_the_template_as_they_were_given() -> None:
    made = with_template(WITH_TOOLS)
    given = [{k: v for k, v in message.items() if v is not None} for message in CALLING]
    tools, opened = {"tools": [{"type": "function"}]}, {"add_generation_prompt": True}
    for options in ({}, {"thinking": True}, tools, opened):
        found = render(made, Prompt(CALLING, template=options))
        whole = {"add_generation_prompt": False, **options}
        assert found.text == made.apply_chat_template(given, tokenize=False, **whole)
        assert [found.text[a:b] for a, b in found.ranges["question"]] == ["Is it raining?"]
        assert [found.text[a:b] for a, b in found.ranges["answer"]] == ["It is."]
        assert [found.text[a:b] for a, b in found.ranges["tool"]] == ["yes"]
    assert "[so it says]" in render(made, Prompt(CALLING, template={"thinking": True})).text
    assert render(made, Prompt(CALLING[:3])).text.endswith("<tool>yes</tool><assistant>")


def test_what_a_message_says_more_makes_another_message() -> None:
    prompts = [
        Prompt(CALLING[3:]),
        Prompt([{"role": "assistant", "content": "It is."}]),
        Prompt([{"role": "assistant", "content": [{"type": "text", "text": "It is."}]}]),
        Prompt([{"role": "assistant", "content": "It is.", "name": "x"}]),
    ]
    assert len(set(prompts)) == 4
    assert all((a == b) == (i == j) for i, a in enumerate(prompts) for j, b in enumerate(prompts))
    for one in [*prompts, Prompt(CALLING, {"weather": "raining"}, {"thinking": True, "tools": []})]:
        assert from_json(json.loads(json.dumps(to_json(one)))) == one
        assert copy.deepcopy(one) == one
    assert Prompt(CALLING).messages != Prompt(CALLING[:3]).messages


@pytest.mark.parametrize(
    ("content", "template", "words"),
    [
        ("plain", {"thinking": True}, "options of a chat's template"),
        (CALLING, {"tokenize": True}, "'tokenize' says what the tokenizer returns"),
    ],
)
def test_template_options_that_cannot_be_are_refused(content: Any, template: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        Prompt(content, template=template)
