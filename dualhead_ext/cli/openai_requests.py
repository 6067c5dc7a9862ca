# SPDX-License-Identifier: Apache-2.0
"""The bodies of OpenAI's completions and chat completions: checked, and turned into token ids and
settings of the engine.

A field that would change the answer and is not supported is refused, not ignored.
"""

from __future__ import annotations

import difflib
import secrets
from dataclasses import dataclass, replace
from typing import Any

from ..head.controls import Sampling
from ..vllm.requests import RETURN_ALPHA, WHERE, controls_of
from .batching_engine import BatchingEngine, Decoding
from .errors import one_line

MAX_CHOICES = 128
# OpenAI's default for completions; a chat may use the whole context.
_MAX_TOKENS = 16
# These do not change the answer.
_IGNORED: tuple[str, ...] = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
)
_IGNORED += ("parallel_tool_calls",)
# Not supported: field -> values that change nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "repetition_penalty": (1, 1.0),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
_KNOWN: tuple[str, ...] = (
    "model",
    "n",
    "seed",
    "stop",
    "max_tokens",
    "stream",
    "stream_options",
    "ignore_eos",
)
_KNOWN += ("return_token_ids", WHERE, *Sampling.FILTERS)
_OF_CHAT = ("messages", "max_completion_tokens", "chat_template_kwargs")


class BadRequest(Exception):
    """A request that is refused with HTTP 400. param: the field."""

    def __init__(self, param: str | None, message: str) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True)
class Asked:
    """What a body asks for.

    Attributes:
        prompts: token ids of each text that is wanted: each prompt ``copies`` times in a row.
        decodings: the settings of each text. They differ in their seeds.
        stop: texts that end a text where they first occur.
        stream, include_usage, return_token_ids, return_alpha: what the answer holds.
    """

    prompts: list[list[int]]
    copies: int
    decodings: list[Decoding]
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    return_token_ids: bool
    return_alpha: bool


def asked(body: Any, chat: bool, engine: BatchingEngine) -> Asked:
    """Check a body.

    Raises:
        BadRequest: a wrong field.
    """
    if not isinstance(body, dict):
        raise BadRequest(None, f"expected a JSON object, got {type(body).__name__}")
    body = {name: value for name, value in body.items() if value is not None}
    _check_names(body, chat)
    prompts = [_of_messages(body, engine)] if chat else _prompts(body, engine)
    n = _whole(body, "n", 1, MAX_CHOICES, 1)
    if len(prompts) * n > MAX_CHOICES:
        raise BadRequest("n", f"expected at most {MAX_CHOICES} texts, got {len(prompts) * n}")
    prompts = [ids for ids in prompts for _ in range(n)]
    extra = body.get(WHERE, {})
    if not isinstance(extra, dict):
        raise BadRequest(WHERE, f"{WHERE} must be an object, got {extra!r}")
    alpha = extra.get(RETURN_ALPHA)
    if alpha not in (None, True):
        raise BadRequest(WHERE, f"{WHERE}: {RETURN_ALPHA} must be true, or left out, got {alpha!r}")
    if alpha and len(prompts) > 1:
        raise BadRequest(WHERE, f"{WHERE}: {RETURN_ALPHA} needs a request for one text")
    try:
        controls = controls_of(extra, engine.model.dual_head_config.num_objectives)
    except ValueError as error:
        raise BadRequest(WHERE, str(error)) from error
    first = Decoding(
        max_new_tokens=0,
        ends=frozenset() if _flag(body, "ignore_eos") else engine.ends,
        controls=controls,
        output_gate=bool(alpha),
    )
    sampling = _sampling(body, engine.model.generation_config)
    decodings = [
        replace(
            first,
            max_new_tokens=_room(body, chat, len(ids), engine),
            sampling=sampling and sampling | {"seed": _wrapped(sampling["seed"] + i)},
        )
        for i, ids in enumerate(prompts)
    ]
    stream = _flag(body, "stream")
    options = body.get("stream_options", {})
    if not isinstance(options, dict) or (options and not stream):
        raise BadRequest("stream_options", "stream_options must be an object, and needs stream")
    return Asked(
        prompts,
        n,
        decodings,
        _stop(body),
        stream,
        _flag(options, "include_usage"),
        _flag(body, "return_token_ids"),
        bool(alpha),
    )


def _check_names(body: dict[str, Any], chat: bool) -> None:
    known = (*_KNOWN, *(_OF_CHAT if chat else ("prompt",)))
    for name, value in body.items():
        if name in known or name in _IGNORED:
            continue
        if name in _UNSUPPORTED:
            if not any(type(value) is type(off) and value == off for off in _UNSUPPORTED[name]):
                raise BadRequest(name, f"{name} is not supported by this engine; vLLM has it")
            continue
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise BadRequest(name, f"expected {', '.join(known)}, got {name}{hint}")


def _flag(body: dict[str, Any], name: str) -> bool:
    value = body.get(name, False)
    if not isinstance(value, bool):
        raise BadRequest(name, f"{name} must be true or false, got {value!r}")
    return value


def _whole(body: dict[str, Any], name: str, low: int, high: int, default: int) -> int:
    value = body.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise BadRequest(name, f"{name} must be a whole number in [{low}, {high}], got {value!r}")
    return value


def _wrapped(seed: int) -> int:
    """A seed in int64."""
    return (seed + 2**63) % 2**64 - 2**63


def _sampling(body: dict[str, Any], defaults: Any) -> dict[str, Any]:
    """Seed and filters; empty for greedy decoding. defaults: the backbone's generation config."""
    found: dict[str, Any] = {}
    for name, off in Sampling.FILTERS.items():
        own = getattr(defaults, name, None)
        value, limits = body.get(name, off if own is None else own), Sampling.LIMITS[name]
        kind: Any = int if name == "top_k" else (int, float)
        if name == "top_k" and value == -1:  # vLLM's word for off
            value = 0
        if isinstance(value, bool) or not isinstance(value, kind) or not limits.hold(value):
            raise BadRequest(name, f"{name} must be {limits.expected}, got {value!r}")
        found[name] = value
    seed = _whole(body, "seed", -(2**63), 2**63 - 1, secrets.randbits(62))
    return found | {"seed": seed} if found["temperature"] > 0 else {}


def _stop(body: dict[str, Any]) -> tuple[str, ...]:
    value = body.get("stop", [])
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(t, str) and t for t in texts):
        raise BadRequest("stop", f"stop must be a text or a list of texts, got {value!r}")
    return tuple(texts)


def _room(body: dict[str, Any], chat: bool, length: int, engine: BatchingEngine) -> int:
    """The number of new tokens of a prompt of ``length`` tokens."""
    name = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
    room = engine.max_length - length
    if room < 1:
        raise BadRequest(
            "messages" if chat else "prompt",
            f"expected at most {engine.max_length - 1} tokens in the prompt, got {length}",
        )
    count = _whole(body, name, 1, 2**31, room if chat else min(_MAX_TOKENS, room))
    if count > room:
        raise BadRequest(
            name,
            f"{name} must be at most {room}, as the prompt has {length} tokens and a request "
            f"{engine.max_length} positions, got {count}",
        )
    return count


def _prompts(body: dict[str, Any], engine: BatchingEngine) -> list[list[int]]:
    prompt = body.get("prompt")
    expected = "prompt must be a text, token ids, or a list of either"
    if isinstance(prompt, str) or (isinstance(prompt, list) and _are_ids(prompt)):
        prompt = [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise BadRequest("prompt", f"{expected}, got {prompt!r:.80}")
    found = []
    vocab = engine.model.config.get_text_config().vocab_size
    for one in prompt:
        if isinstance(one, str):
            one = engine.tokenizer(one)["input_ids"]
        elif not _are_ids(one):
            raise BadRequest("prompt", f"{expected}, got {one!r:.80}")
        elif not all(0 <= i < vocab for i in one):
            raise BadRequest("prompt", f"prompt: token ids must be in [0, {vocab - 1}]")
        if not one:
            raise BadRequest("prompt", "prompt must have at least one token, got none")
        found.append(list(one))
    return found


def _are_ids(value: Any) -> bool:
    is_list = isinstance(value, list) and bool(value)
    return is_list and all(isinstance(i, int) and not isinstance(i, bool) for i in value)


def _of_messages(body: dict[str, Any], engine: BatchingEngine) -> list[int]:
    """Token ids of a chat in the backbone's chat template, which ends with the beginning of the
    assistant's turn.
    """
    if not engine.tokenizer.chat_template:
        raise BadRequest(
            "messages", "this backbone's tokenizer has no chat template; use /v1/completions"
        )
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages", f"messages must be a list of messages, got {messages!r:.80}")
    options = body.get("chat_template_kwargs", {})
    if not isinstance(options, dict):
        raise BadRequest(
            "chat_template_kwargs", f"chat_template_kwargs must be an object, got {options!r:.80}"
        )
    turns = [_message(i, message) for i, message in enumerate(messages)]
    try:
        text = engine.tokenizer.apply_chat_template(
            turns, **{"add_generation_prompt": True} | options | {"tokenize": False}
        )
    except Exception as error:  # a template raises whatever it likes
        raise BadRequest("messages", f"the chat template refuses it: {one_line(error)}") from error
    return engine.tokenizer(text, add_special_tokens=False)["input_ids"]


def _message(index: int, message: Any) -> dict[str, Any]:
    where = f"messages[{index}]"
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise BadRequest("messages", f"{where} must have a role and a content, got {message!r:.80}")
    content = message.get("content")
    if isinstance(content, list):  # parts: text is the only kind that a text model can read
        texts = [part.get("text") if isinstance(part, dict) else None for part in content]
        if not all(isinstance(text, str) for text in texts):
            raise BadRequest("messages", f"{where}: content must be text, got {content!r:.80}")
        content = "\n".join(texts)
    if not isinstance(content, str):
        raise BadRequest("messages", f"{where}: content must be text, got {content!r:.80}")
    return message | {"content": content}
