# SPDX-License-Identifier: Apache-2.0
"""Conversations as text, and the spans that the assistant says. Training and decoding use the same
layout.

Messages go through the tokenizer's chat template if it has one, otherwise into HH-RLHF's layout.
With a chat template, strings in HH-RLHF's layout go through it too. Other strings are unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from .texts import ASSISTANT, HUMAN, is_dialogue

_MARKER = re.compile(f"({re.escape(HUMAN)}|{re.escape(ASSISTANT)})")
_ROLE_OF = {HUMAN: "user", ASSISTANT: "assistant"}
# The marker before a turn in HH-RLHF's layout.
_MARKER_OF = {"assistant": ASSISTANT, "system": ""}

Message = dict[str, Any]
Span = tuple[int, int]


@dataclass(frozen=True)
class Rendered:
    """A prompt and its response as one text.

    Args:
        text: the whole text.
        spans: (start, end) of the characters that the assistant says, in order: its turns in the
            response, each with the template's end of turn.
        prompt_end: the end of the prompt as a chat template renders it for decoding; None if no
            template wrote the text.
        closed: whether the text ends with the template's end of turn, so that no further end token
            is needed.
        closing: the number of characters of the end of turn in the last span.
    """

    text: str
    spans: list[Span]
    prompt_end: int | None = None
    closed: bool = False
    closing: int = 0


def has_chat_template(tokenizer: Any) -> bool:
    """Whether a tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def is_raw(prompt: str | list[Message], tokenizer: Any) -> bool:
    """Whether a prompt is used as it is although the tokenizer has a chat template: a string that
    is not a dialogue in HH-RLHF's layout.
    """
    return isinstance(prompt, str) and has_chat_template(tokenizer) and not is_dialogue(prompt)


def render_prompt(prompt: str | list[Message], tokenizer: Any) -> tuple[str, bool]:
    """(the text before a response, whether a chat template wrote it). If the prompt ends with an
    assistant's turn, the response continues that turn.

    Raises:
        ValueError, TypeError, jinja2.TemplateError: the chat template refuses the prompt.
    """
    if isinstance(prompt, str):
        if not (has_chat_template(tokenizer) and is_dialogue(prompt)):
            return prompt, False
        prompt = messages_of(prompt)
    begun = bool(prompt) and prompt[-1]["role"] == "assistant"
    if not has_chat_template(tokenizer):
        return "".join(map(_turn, prompt)) + ("" if begun else ASSISTANT), False
    if begun:
        return tokenizer.apply_chat_template(
            prompt, tokenize=False, continue_final_message=True
        ), True
    return _apply(tokenizer, prompt, add_generation_prompt=True), True


def render(prompt: str | list[Message], response: str | list[Message], tokenizer: Any) -> Rendered:
    """Render a prompt with its response, both strings or both lists of messages.

    Raises:
        ValueError, TypeError, jinja2.TemplateError: the chat template refuses the messages, or
            renders the prompt differently if a response follows.
    """
    if isinstance(prompt, str):
        response = cast(str, response)
        dialogue = is_dialogue(prompt)
        if not (dialogue and has_chat_template(tokenizer)):
            spans = dialogue_spans(response) if dialogue else [(0, len(response))]
            shifted = [(a + len(prompt), b + len(prompt)) for a, b in spans if a < b]
            return Rendered(prompt + response, shifted)
        prompt, response = messages_of(prompt), messages_of(ASSISTANT + response)
    prompt, response = cast(list[Message], prompt), cast(list[Message], response)
    if has_chat_template(tokenizer):
        return _through_template(prompt, response, tokenizer)
    return _as_dialogue(prompt, response)


# --- HH-RLHF's layout -----------------------------------------------------------------------------


def dialogue_spans(response: str) -> list[Span]:
    """The spans of a dialogue's response that the assistant says: all of it except role markers and
    human turns, which a few responses of HH-RLHF contain.
    """
    spans, start, speaking = [], 0, True
    for match in _MARKER.finditer(response):
        if speaking:
            spans.append((start, match.start()))
        start, speaking = match.end(), match.group() == ASSISTANT
    if speaking:
        spans.append((start, len(response)))
    return [span for span in spans if span[0] < span[1]]


def messages_of(dialogue: str) -> list[Message]:
    """The turns of a dialogue in HH-RLHF's layout. Text before the first turn is the system
    message. Consecutive turns of one role are joined, since chat templates expect alternating
    roles. An open assistant turn at the end is left out.
    """
    head, *parts = _MARKER.split(f"\n\n{dialogue.lstrip()}")
    turns = [("system", head.strip())] if head.strip() else []
    turns += [
        (_ROLE_OF[marker], text.strip())
        for marker, text in zip(parts[::2], parts[1::2], strict=True)
    ]
    messages: list[Message] = []
    for role, text in turns:
        if messages and messages[-1]["role"] == role:
            joined = "\n\n".join(filter(None, (messages[-1]["content"], text)))
            messages[-1] = {"role": role, "content": joined}
        else:
            messages.append({"role": role, "content": text})
    if messages and messages[-1] == {"role": "assistant", "content": ""}:
        messages.pop()
    return messages


def _turn(message: Message) -> str:
    if message.get("tool_calls"):
        raise ValueError("tool calls need a tokenizer with a chat template")
    return f"{_MARKER_OF.get(message['role'], HUMAN)} {message['content']}"


def _as_dialogue(prompt: list[Message], response: list[Message]) -> Rendered:
    parts, length, spans = [], 0, []
    for number, message in enumerate([*prompt, *response]):
        parts.append(_turn(message))
        length += len(parts[-1])
        if number >= len(prompt) and message["role"] == "assistant":
            spans.append((length - len(message["content"]) - 1, length))
    return Rendered("".join(parts), spans)


# --- chat templates -------------------------------------------------------------------------------


def _apply(tokenizer: Any, messages: list[Message], add_generation_prompt: bool = False) -> str:
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt
    )


def _through_template(prompt: list[Message], response: list[Message], tokenizer: Any) -> Rendered:
    """Find the turns by a second rendering, in which a placeholder replaces the content of each
    message of the response. The text between two placeholders comes from the template.
    """
    messages = [*prompt, *response]
    whole = _apply(tokenizer, messages)
    opening, start = _opening(prompt, whole, tokenizer)
    closing, final = _closing(tokenizer)
    placed = [i for i in range(len(prompt), len(messages)) if not messages[i].get("tool_calls")]
    between = _template_text(messages, placed, whole, tokenizer)
    pieces = _positions(whole, between, [messages[i]["content"] for i in placed])
    if pieces is None:
        span = _one_turn(whole, start, response, closing, between[-1])
        return _rendered(whole, [span], start, closing, final)
    spans: list[Span] = []
    for number, text in enumerate(between):
        # text: the template's text before message placed[number], or after the last message.
        where = pieces[number - 1][1] if number else 0
        end_of = (placed[number - 1] + 1) if number else len(prompt)
        upto = placed[number] if number < len(placed) else len(messages)
        for message in messages[end_of:upto]:  # their tool calls are in this text
            spans.append(_calls(message, whole, where, where + len(text), start, opening, closing))
        if number == len(placed) or messages[placed[number]]["role"] != "assistant":
            continue
        begin, end = pieces[number]
        header = text.rfind(opening) if opening else -1
        if placed[number] == len(prompt) and (opening or not whole[start:begin].strip()):
            begin = start
        elif header >= 0:
            begin = where + header + len(opening)
        closed = between[number + 1].find(closing) if closing else -1
        spans.append((begin, end + closed + len(closing) if closed >= 0 else end))
    return _rendered(whole, spans, start, closing, final)


def _rendered(whole: str, spans: list[Span], start: int, closing: str, final: bool) -> Rendered:
    closed = bool(closing and spans) and whole[: spans[-1][1]].endswith(closing)
    return Rendered(whole, spans, start, closed and final, len(closing) if closed else 0)


def _opening(prompt: list[Message], whole: str, tokenizer: Any) -> tuple[str, int]:
    """(the template's text before an answer, the end of the prompt). The text is empty if the
    template ignores ``add_generation_prompt``.
    """
    bare = _apply(tokenizer, prompt)
    asked = _apply(tokenizer, prompt, add_generation_prompt=True)
    if not whole.startswith(asked):
        raise ValueError(
            "the tokenizer's chat template renders a prompt differently once a response follows"
        )
    return (asked[len(bare) :] if asked.startswith(bare) else ""), len(asked)


def _closing(tokenizer: Any) -> tuple[str, bool]:
    """(the template's text after an answer, whether it ends with a special token). The text is cut
    after that token; what follows belongs to no turn.
    """
    asks, says = "placeholder of a question", "placeholder of an answer"
    messages = [{"role": "user", "content": asks}, {"role": "assistant", "content": says}]
    tail = _apply(tokenizer, messages).rpartition(says)[2]
    coded = tokenizer(tail, add_special_tokens=False, return_offsets_mapping=True)
    special = special_tokens(tokenizer)
    for token, (_, end) in zip(coded["input_ids"], coded["offset_mapping"], strict=True):
        if token in special:
            return tail[:end], True
    return tail, False


def turn_ends(tokenizer: Any) -> tuple[set[int], tuple[str, ...]]:
    """(tokens, texts) that end a model's turn: the template's end of turn, the special token that
    begins the next turn, and HH-RLHF's role markers. End-of-sequence tokens are not included.
    """
    if not has_chat_template(tokenizer):
        return set(), (HUMAN, ASSISTANT)
    asks, says = "placeholder of a question", "placeholder of an answer"
    question = [{"role": "user", "content": asks}]
    answer = {"role": "assistant", "content": says}
    bare, asked = (_apply(tokenizer, question, generation) for generation in (False, True))
    special, found = special_tokens(tokenizer), set()
    closing = _apply(tokenizer, [*question, answer]).rpartition(says)[2]
    for text in (closing, asked.removeprefix(bare)):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        found |= set([token for token in ids if token in special][:1])
    return found, (HUMAN,)


def special_tokens(tokenizer: Any) -> set[int]:
    """The ids of a tokenizer's special tokens, including those of its chat template."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return set(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}


def _template_text(
    messages: list[Message], placed: list[int], whole: str, tokenizer: Any
) -> list[str]:
    """The text of the template before, between and after the messages ``placed``."""
    name = "placeholder"
    while name in whole:
        name += "x"
    shown = list(messages)
    for i in placed:
        shown[i] = messages[i] | {"content": f"{name}{i}end"}
    rest, between = _apply(tokenizer, shown), []
    position = 0
    for i in placed:
        found = rest.find(f"{name}{i}end", position)
        if found < 0:
            raise ValueError("the tokenizer's chat template leaves a message of the response out")
        between.append(rest[position:found])
        position = found + len(f"{name}{i}end")
    return [*between, rest[position:]]


def _positions(whole: str, between: list[str], contents: Sequence[str]) -> list[Span] | None:
    """(start, end) of each content in the whole text, also if the template strips contents; None if
    it changes them in another way.
    """
    if not whole.startswith(between[0]):
        return None
    found, position = [], len(between[0])
    for content, following in zip(contents, between[1:], strict=True):
        for text in (content, content.strip(), content.lstrip(), content.rstrip()):
            if whole.startswith(text + following, position):
                break
        else:
            return None
        found.append((position, position + len(text)))
        position += len(text) + len(following)
    return found if position == len(whole) else None


def _one_turn(whole: str, start: int, response: list[Message], closing: str, tail: str) -> Span:
    """The span after the prompt, for a template that changes contents (for example, removes
    reasoning). It must be a single turn.
    """
    if len(response) != 1 or not whole.endswith(tail):
        raise ValueError(
            "the tokenizer's chat template changes the contents of a response of several turns"
        )
    end = len(whole) - len(tail)
    return start, end + (len(closing) if tail.startswith(closing) else 0)


def _calls(
    message: Message,
    whole: str,
    low: int,
    high: int,
    start: int,
    opening: str,
    closing: str,
) -> Span:
    """(start, end) of an assistant's tool calls, in the template's text from low to high."""
    if not opening:
        raise ValueError("tool calls need a chat template with a generation prompt")
    begin = start if low < start <= high else whole.find(opening, low, high) + len(opening)
    end = whole.find(closing, begin, high) + len(closing) if closing else high
    names = [call.get("function", call).get("name", "") for call in message["tool_calls"]]
    if begin < low or end < begin or not all(name in whole[begin:end] for name in names):
        raise ValueError("the tokenizer's chat template leaves tool calls out")
    return begin, end
