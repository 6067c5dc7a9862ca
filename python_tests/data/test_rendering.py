# SPDX-License-Identifier: Apache-2.0
"""Which tokens count as the response.

The inputs are messages through several styles of chat template, dialogues in HH-RLHF's layout, and
plain strings. Decoding must see the layout of training.
"""

import time
from itertools import pairwise

import pytest
from transformers import AutoTokenizer

import dualhead_ext as dh
from dualhead_ext.cli.decoding import encode as generate_tokens
from dualhead_ext.data import ASSISTANT, HUMAN
from dualhead_ext.data.collate import encode
from dualhead_ext.data.rendering import is_raw, messages_of, render, render_prompt
from dualhead_ext.model.builtin_backbones import smollm2_path

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}{% for m in messages %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content | trim }} "
    "{{ eos_token }}{% else %}[INST] {{ m.content | trim }} [/INST]{% endif %}{% endfor %}"
)
# Templates of models that think. An answer starts with a thought, and the template removes the
# thought that an answer contains.
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% set c = m.content %}"
    "{% if m.role == 'assistant' %}{% if loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ c }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
R1 = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
NO_GENERATION_PROMPT = CHATML.partition("{% if add")[0]
# {name: (template, its special tokens, what follows an answer)}
STYLES = {
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
    "gemma": (GEMMA, ["<start_of_turn>", "<end_of_turn>"], "<end_of_turn>"),
    "llama3": (LLAMA3, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|eot_id|>"),
    "llama2": (LLAMA2, ["[INST]", "[/INST]"], " <|eos|>"),
    "no generation prompt": (NO_GENERATION_PROMPT, ["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
    "bare": ("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
             "{% if add_generation_prompt %}<assistant>{% endif %}", [], "<|eos|>"),
    "none": (None, [], "<|eos|>"),
}  # fmt: skip


def styled(template, special=()):
    tokenizer = AutoTokenizer.from_pretrained(dh.data.embedded_backbone_path())
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module", params=[*STYLES, "smollm2"])
def style(request):
    """(tokenizer, what follows an answer, the space before an answer)"""
    if request.param == "smollm2":
        return AutoTokenizer.from_pretrained(smollm2_path()), "<|im_end|>", ""
    template, special, end = STYLES[request.param]
    return styled(template, special), end, " " if request.param in ("llama2", "none") else ""


def said(prompt, response, tokenizer, max_length=100_000):
    """The texts that are trained on, one for each run of tokens under the mask."""
    coded = encode(prompt, response, tokenizer, max_length)
    runs, before = [], 0
    for token, on in zip(coded["input_ids"], coded["completion_mask"], strict=True):
        if on and not before:
            runs.append([])
        if on:
            runs[-1].append(token)
        before = on
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def test_an_answer_and_one_end_are_learnt(style):
    tokenizer, end, space = style
    assert said([user("Hi")], [assistant("Yes, I do.")], tokenizer) == [f"{space}Yes, I do.{end}"]


def test_text_ends_with_the_turn(style):
    """The text ends with one end-of-turn marker, and nothing follows it."""
    tokenizer, end, _ = style
    coded = encode([user("Hi")], [assistant("Yes.")], tokenizer, 1000)
    assert coded["completion_mask"][-1] == 1
    text = tokenizer.decode(coded["input_ids"], skip_special_tokens=False)
    assert text.endswith(f"Yes.{end}")


def test_other_turns_in_a_response_are_not_learnt(style):
    tokenizer, end, space = style
    response = [
        assistant("One."),
        user("And?"),
        assistant("Two."),
        user("So?"),
        assistant("Three."),
    ]
    runs = said([user("Hi")], response, tokenizer)
    learnt = "".join(runs)
    assert len(runs) == 3 and runs[-1] == f"{space}Three.{end}"
    assert "And" not in learnt and "So" not in learnt and "user" not in learnt
    for run, text in zip(runs, ("One.", "Two."), strict=False):
        bare = end == "<|eos|>"  # a layout without an end-of-turn marker
        assert run == f"{space}{text}" + ("" if bare else end)


def test_quotes_of_role_markers_are_text(style):
    tokenizer, end, space = style
    quote = f"It begins{HUMAN} Hi{ASSISTANT} and so on <assistant> [INST]"
    runs = said([user("How?")], [assistant(quote)], tokenizer)
    assert runs == [f"{space}{quote}{end}"]


def test_the_prompt_of_generate_is_what_training_saw(style):
    tokenizer, _, _ = style
    coded = encode([user("Hi there")], [assistant("Yes")], tokenizer, 1000)
    prompt = coded["input_ids"][: coded["completion_mask"].index(1)]
    if tokenizer.chat_template == NO_GENERATION_PROMPT:
        header = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
        # Training does not train on the header, and generate() does not add it
        assert prompt[-len(header) :] == header
        prompt = prompt[: -len(header)]
    assert generate_tokens("Hi there", tokenizer)["input_ids"][0].tolist() == prompt


def test_dialogues_are_trained_in_the_layout_that_generate_decodes(style):
    tokenizer, end, space = style
    dialogue = f"{HUMAN} Hi there{ASSISTANT} Hello.{HUMAN} How are you?{ASSISTANT}"
    response = f" Well.{HUMAN} Sure?{ASSISTANT} Yes."
    coded = encode(dialogue, response, tokenizer, 1000)
    as_messages = encode(messages_of(dialogue), messages_of(ASSISTANT + response), tokenizer, 1000)
    assert coded == as_messages
    assert said(dialogue, response, tokenizer)[-1].strip() == f"{space}Yes.{end}".strip()
    prompt = generate_tokens(dialogue, tokenizer)["input_ids"][0].tolist()
    assert coded["input_ids"][: len(prompt)] == prompt
    assert ("Human:" in tokenizer.decode(prompt)) == (not tokenizer.chat_template)


def seconds(prompt, response, tokenizer):
    """CPU time of this process, which other processes do not change."""
    start = time.process_time()
    encode(prompt, response, tokenizer, 10**6)
    return time.process_time() - start


def is_linear(prompt, response_of, tokenizer):
    """Eight times the turns take less than 24 times as long; quadratic time would give 64."""
    few, many = (seconds(prompt, response_of(turns), tokenizer) for turns in (400, 3200))
    return many < 24 * few + 0.1


def test_many_turns_take_linear_time(style):
    tokenizer, _, _ = style

    def response(turns):
        return [assistant("Yes.") if i % 2 == 0 else user("And?") for i in range(turns)]

    assert is_linear([user("Hi")], response, tokenizer)
    mask = encode([user("Hi")], response(300), tokenizer, 10**6)["completion_mask"]
    assert sum(a < b for a, b in pairwise([0, *mask])) == 150
    assert mask[-1] == 1  # the last question is left out


def test_a_dialogue_of_many_turns_takes_linear_time():
    def response(turns):
        return f" Yes.{HUMAN} And?{ASSISTANT}" * turns + " No."

    assert is_linear(f"{HUMAN} Hi{ASSISTANT}", response, styled(None))


def test_markers_are_turns_only_in_dialogues():
    tokenizer = styled(None)
    quote = f" A turn begins{HUMAN} Hi{ASSISTANT} Hello"
    assert said("Q: how?\nA:", quote, tokenizer) == [f"{quote}<|eos|>"]
    turns = said(f"{HUMAN} how?{ASSISTANT}", quote, tokenizer)
    assert turns == [" A turn begins", " Hello<|eos|>"]


def test_plain_strings_stay_as_they_are(style):
    tokenizer, _, _ = style
    coded = encode("Q: how?\nA:", " so", tokenizer, 100)
    text = tokenizer.decode(coded["input_ids"], skip_special_tokens=False)
    assert text.endswith(f"Q: how?\nA: so{tokenizer.eos_token}")
    assert said("Q: how?\nA:", " so", tokenizer) == [f" so{tokenizer.eos_token}"]


def test_a_template_that_thinks():
    tokenizer = styled(QWEN3, ["<|im_start|>", "<|im_end|>"])
    runs = said([user("Hi")], [assistant("Yes")], tokenizer)
    # generate() ends the prompt with the bare header, so that the model must write the empty
    # thought.
    assert runs == ["<think>\n\n</think>\n\nYes<|im_end|>"]
    runs = said([user("Hi")], [assistant("<think>hm</think>\nYes")], tokenizer)
    assert runs == ["<think>\n\n</think>\n\nYes<|im_end|>"]
    with pytest.raises(ValueError, match="changes the contents of a response of several turns"):
        render([user("a")], [assistant("x</think>b"), user("c"), assistant("d")], tokenizer)


def test_a_template_whose_prompt_no_response_follows_is_refused():
    with pytest.raises(ValueError, match="renders a prompt differently once a response follows"):
        render([user("Hi")], [assistant("Yes")], styled(R1))
    with pytest.raises(ValueError, match="leaves a message of the response out"):
        render([user("Hi")], [assistant("Yes")], styled("{{ messages[0].content }}"))


TOOLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function.name }}"
    "({{ call.function.arguments }})</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_tool_calls_are_said_and_tools_results_are_not():
    tokenizer = styled(TOOLS, ["<|im_start|>", "<|im_end|>"])
    call = {"type": "function", "function": {"name": "weather", "arguments": "Rome"}}
    calls = {"role": "assistant", "content": None, "tool_calls": [call]}
    result = {"role": "tool", "content": "sunny"}
    runs = said([user("Weather?")], [calls, result, assistant("It is sunny.")], tokenizer)
    expected = "<tool_call>weather(Rome)</tool_call><|im_end|>"
    assert runs == [expected, "It is sunny.<|im_end|>"]
    assert said([user("Weather?")], [calls], tokenizer) == [expected]
    with pytest.raises(ValueError, match="leaves tool calls out"):
        render([user("Weather?")], [calls | {"content": ""}], styled(CHATML, ["<|im_end|>"]))
    with pytest.raises(ValueError, match="tool calls need a tokenizer with a chat template"):
        render([user("Weather?")], [calls], styled(None))


@pytest.mark.parametrize("template", [None, CHATML])
def test_a_response_in_which_the_assistant_says_nothing(template):
    tokenizer = styled(template, ["<|im_start|>", "<|im_end|>"])
    with pytest.raises(ValueError, match=r"the assistant says nothing|a prompt differently once"):
        encode([user("Hi")], [user("And?")], tokenizer, 100)


def test_messages_of_a_dialogue():
    text = f"Be kind.{HUMAN} a{HUMAN} b{ASSISTANT}{ASSISTANT} c{ASSISTANT}"
    assert messages_of(text) == [
        {"role": "system", "content": "Be kind."},
        user("a\n\nb"),
        assistant("c"),
    ]
    assert messages_of("Human: hi") == [user("hi")]


def test_a_begun_answer_is_continued(style):
    tokenizer, _, _ = style
    text, _ = render_prompt([user("Hi"), assistant("Well,")], tokenizer)
    assert text.endswith("Well,") and text.count("Well,") == 1


def test_truncation_keeps_the_answers_beginning(style):
    tokenizer, _, _ = style
    whole = encode([user("one two three")], [assistant("four five six")], tokenizer, 1000)
    for max_length in range(4, len(whole["input_ids"])):
        cut = encode([user("one two three")], [assistant("four five six")], tokenizer, max_length)
        assert cut["truncated"] and len(cut["input_ids"]) == max_length
        answers = [
            [t for t, on in zip(c["input_ids"], c["completion_mask"], strict=True) if on]
            for c in (whole, cut)
        ]
        assert answers[1] and answers[0][: len(answers[1])] == answers[1]


def test_a_string_is_raw_where_a_template_would_have_rendered_messages():
    plain = AutoTokenizer.from_pretrained(dh.backbone_path("embedded"))
    plain.chat_template = None
    chat = AutoTokenizer.from_pretrained(dh.backbone_path("embedded"))
    chat.chat_template = CHATML
    question, dialogue = "How are you?", f"{HUMAN}How are you?{ASSISTANT}"
    assert is_raw(question, chat) and render_prompt(question, chat) == (question, False)
    for prompt in (dialogue, [{"role": "user", "content": question}]):
        assert not is_raw(prompt, chat) and render_prompt(prompt, chat)[1]
    assert not is_raw(question, plain)
