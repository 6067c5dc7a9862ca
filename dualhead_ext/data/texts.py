# SPDX-License-Identifier: Apache-2.0
"""The texts of a row of preference data: conversion, and the split of whole texts into prompt and
responses.
"""

from __future__ import annotations

from itertools import takewhile
from typing import Any

from ..files.foreign import shown

ASSISTANT, HUMAN = "\n\nAssistant:", "\n\nHuman:"
Text = str | list[dict[str, Any]]


class Unusable(Exception):
    """A row must be skipped. The message says why."""


def text_of(value: Any) -> Text:
    """A string as it is; or messages without null fields, with their text parts joined.

    Raises:
        ValueError: another type. Unusable: a message has a part that is not text.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)) and all(isinstance(message, dict) for message in value):
        return [_message(message) for message in value]
    raise ValueError(
        f"expected a string or a list of {{role, content}} messages, got {type(value).__name__}"
    )


def _message(message: dict[str, Any]) -> dict[str, Any]:
    message = {name: value for name, value in message.items() if value is not None}
    content, role = message.get("content"), message.get("role")
    if not isinstance(role, str):
        raise ValueError(f"a message must have a role, got {shown(message) or 'nothing'}")
    if isinstance(content, (list, tuple)):
        kinds = [part.get("type", "text") if isinstance(part, dict) else None for part in content]
        texts: list[Any] = [
            part.get("text") if isinstance(part, dict) else part for part in content
        ]
        other = next((kind for kind in kinds if kind not in ("text", None)), None)
        if other is not None:
            raise Unusable(f"a message holds a part of type {other}")
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("the parts of a message's content must be text")
        content = "".join(texts)
    elif content is None and message.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise ValueError(f"a message's content must be text, got {type(content).__name__}")
    return message | {"content": content}


def is_empty(response: Text) -> bool:
    if isinstance(response, str):
        return not response.strip()
    return not any(
        message["role"] == "assistant" and (message["content"].strip() or message.get("tool_calls"))
        for message in response
    )


def is_dialogue(prompt: str) -> bool:
    """Whether a prompt is a dialogue in HH-RLHF's layout that ends with an open assistant turn.
    Only there do role markers begin turns; in other text they are quotations.
    """
    return HUMAN in f"\n\n{prompt.lstrip()}" and prompt.rstrip().endswith(ASSISTANT)


def split_texts(chosen: str, rejected: str) -> tuple[str, str, str]:
    """(prompt, chosen, rejected) of two whole texts: HH-RLHF's dialogues, or other texts, whose
    prompt is their common beginning up to a space.
    """
    if HUMAN in f"\n\n{chosen.lstrip()}":
        return split_dialogues(chosen, rejected)
    end = shared_length(chosen, rejected)
    while end > 0 and not chosen[end : end + 1].isspace():
        end -= 1
    if not chosen[:end].strip():
        raise Unusable("no prompt, and no beginning in common")
    return chosen[:end], chosen[end:], rejected[end:]


def split_dialogues(chosen: str, rejected: str) -> tuple[str, str, str]:
    """For HH-RLHF: the prompt is the longest common prefix, cut after its last assistant marker.

    Cutting each text at its own last marker would give two different prompts if a response contains
    another turn.
    """
    same = shared_length(chosen, rejected)
    end = chosen.rfind(ASSISTANT, 0, same)
    if end < 0:
        raise Unusable("no prompt in common that ends in an assistant turn")
    end += len(ASSISTANT)
    return chosen[:end], chosen[end:], rejected[end:]


def shared_length(a: Any, b: Any) -> int:
    """The number of characters or messages in the common beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def split_messages(chosen: list, rejected: list) -> tuple[list, list, list]:
    """TRL's implicit prompt: the common first messages, up to the last by a user."""
    end = shared_length(chosen, rejected)
    while end > 0 and chosen[end - 1]["role"] == "assistant":
        end -= 1
    if end == 0:
        raise Unusable("no message in common")
    return chosen[:end], chosen[end:], rejected[end:]


def prompt_of_messages(prompt: str, responses: list[list]) -> list:
    """A string prompt as messages. If all responses begin with messages that contain it, those
    messages are the prompt.
    """
    shared = []
    for messages in zip(*responses, strict=False):
        if messages[0]["role"] == "assistant" or any(m != messages[0] for m in messages):
            break
        shared.append(messages[0])
    asked = {"role": "user", "content": prompt}
    if any(m["role"] == "user" and m["content"].strip() == prompt.strip() for m in shared):
        return shared
    return [asked]
