# SPDX-License-Identifier: Apache-2.0
"""alpha per token in the responses of vLLM's OpenAI server, by a middleware (``--middleware``).

A request with ``"vllm_xargs": {"return_alpha": true}`` gets ``choices[0].alpha``, one number for
each token of the text, including the end token. In a stream, an event before ``[DONE]`` contains
it.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from .alpha import METHOD
from .requests import RETURN_ALPHA, WHERE

_PATHS = ("/v1/completions", "/v1/chat/completions")
_DONE = b"[DONE]"
_POLL = 0.1  # seconds
Send = Callable[[dict[str, Any]], Awaitable[None]]


class AlphaInAnswer:
    """An ASGI middleware that adds alpha to responses."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in _PATHS:
            await self._app(scope, receive, send)
            return
        body = await _whole_body(receive)
        request = _asking(body)
        if request is None:
            await self._app(scope, _after(body, receive), send)
            return
        if (problem := _problem(request)) is not None:
            await _refuse(send, problem)
            return
        name = uuid.uuid4().hex
        request["vllm_xargs"][RETURN_ALPHA] = name
        answer = _Answer(send, scope["app"].state.engine_client, name, request)
        request["return_token_ids"] = True  # to count the response's tokens
        body = json.dumps(request).encode()
        scope = scope | {"headers": _with_length(scope["headers"], len(body))}
        await self._app(scope, _after(body, receive), answer.send)


async def _whole_body(receive: Any) -> bytes:
    parts = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return b"".join(parts)
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def _after(body: bytes, receive: Any) -> Callable[[], Awaitable[dict[str, Any]]]:
    """A receive function for the application: first the body that was read, then the rest."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> dict[str, Any]:
        return waiting.pop() if waiting else await receive()

    return next_message


def _asking(body: bytes) -> dict[str, Any] | None:
    """The request, if it sets ``return_alpha``; otherwise None."""
    try:
        request = json.loads(body)
        return request if RETURN_ALPHA in request["vllm_xargs"] else None
    except (ValueError, KeyError, TypeError):  # the application reports the error
        return None


def _problem(request: dict[str, Any]) -> str | None:
    value = request["vllm_xargs"][RETURN_ALPHA]
    if value is not True:
        return f"{WHERE}: {RETURN_ALPHA} must be true, or left out, got {value!r}"
    prompt = request.get("prompt")
    several = isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int)
    if several or request.get("n") not in (None, 1) or request.get("use_beam_search"):
        return f"{WHERE}: {RETURN_ALPHA} needs a request for one text"
    return None


async def _refuse(send: Send, problem: str) -> None:
    error = {"message": problem, "type": "BadRequestError", "param": WHERE, "code": 400}
    body = json.dumps({"error": error}).encode()
    headers = _with_length([(b"content-type", b"application/json")], len(body))
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _with_length(headers: Any, length: int) -> list[tuple[bytes, bytes]]:
    kept = [(name, value) for name, value in headers if name.lower() != b"content-length"]
    return [*kept, (b"content-length", str(length).encode())]


class _Answer:
    """Forwards the application's response and adds alpha."""

    def __init__(self, send: Send, engine: Any, name: str, request: dict[str, Any]) -> None:
        self._send, self._engine, self._name = send, engine, name
        self._wants_ids = bool(request.get("return_token_ids"))
        self._start: dict[str, Any] | None = None  # held back until the length is known
        self._stream = False
        self._parts = b""
        self._count = 0
        self._event: dict[str, Any] = {}

    async def send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            kind = dict(message["headers"]).get(b"content-type", b"")
            self._stream = kind.startswith(b"text/event-stream")
            self._start = message
            if self._stream or message["status"] != 200:
                await self._send(message)
            return
        if message["type"] != "http.response.body" or self._start["status"] != 200:
            await self._send(message)
            return
        self._parts += message.get("body", b"")
        if self._stream:
            *events, self._parts = self._parts.split(b"\n\n")
            out = [await self._with_alpha(event) + b"\n\n" for event in events]
            await self._send(message | {"body": b"".join(out)})
        elif not message.get("more_body", False):
            body = await self._whole(self._parts)
            headers = _with_length(self._start["headers"], len(body))
            await self._send(self._start | {"headers": headers})
            await self._send(message | {"body": body})

    async def _alpha(self) -> list[float] | None:
        """None if the engine has ended. After SIGTERM it does so with the last request."""
        call = asyncio.ensure_future(self._engine.collective_rpc(METHOD, args=(self._name,)))
        while not (await asyncio.wait((call,), timeout=_POLL))[0]:
            if not self._engine.is_running:
                call.cancel()
                return None
        try:
            found = call.result()[0]
        except Exception:
            if self._engine.is_running:
                raise
            return None
        return (found or [])[: self._count]

    async def _whole(self, body: bytes) -> bytes:
        answer = json.loads(body)
        self._read(answer)
        answer["choices"][0]["alpha"] = await self._alpha()
        return json.dumps(answer).encode()

    async def _with_alpha(self, event: bytes) -> bytes:
        data = event.removeprefix(b"data: ")
        if data == _DONE:
            choice = {"index": 0, "alpha": await self._alpha(), "finish_reason": None}
            empty = (
                {"text": ""} if self._event.get("object") == "text_completion" else {"delta": {}}
            )
            return _event(self._event | {"choices": [choice | empty]}) + b"\n\n" + event
        if not data.startswith(b"{"):
            return event
        content = json.loads(data)
        self._read(content)
        names = ("id", "object", "created", "model")
        self._event = {n: content[n] for n in names if n in content} or self._event
        return _event(content)

    def _read(self, content: dict[str, Any]) -> None:
        """Count the tokens, and remove fields that the client did not request."""
        for choice in content.get("choices") or ():
            self._count += len(choice.get("token_ids") or ())
            if not self._wants_ids:
                choice.pop("token_ids", None)
                choice.pop("prompt_token_ids", None)
        if not self._wants_ids:
            content.pop("prompt_token_ids", None)


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content).encode()
