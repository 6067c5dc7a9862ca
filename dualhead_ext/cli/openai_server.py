# SPDX-License-Identifier: Apache-2.0
"""An OpenAI-compatible server for a gated model without vLLM: completions and chat completions,
whole or as a stream, and the controls of a request in ``vllm_xargs``.

HTTP is aiohttp's, decoding is transformers' continuous batching (`batching_engine`).
"""

from __future__ import annotations

import asyncio
import json
import signal
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

from aiohttp import web

from .batching_engine import BatchingEngine, EngineError
from .openai_requests import Asked, BadRequest, asked
from .reply import ReplyStream

_MAX_BODY = 2**23
Send = Callable[["Choice", str], Awaitable[None]]


class Choice:
    """One text of an answer.

    Attributes:
        index: its place in the answer.
        text, ids, alpha: so far; alpha is of each token.
        finish_reason: "stop", "length", or None while it is written.
    """

    def __init__(self, engine: BatchingEngine, what: Asked, index: int) -> None:
        self.index, self.prompt = index, what.prompts[index]
        self._decoding = what.decodings[index]
        self._request = engine.request(self.prompt, self._decoding)
        self._parts: list[str] = []
        self._reply = ReplyStream(engine.tokenizer, markers=what.stop, print=self._parts.append)
        self.ids: list[int] = []
        self.alpha: list[float] = []
        self.text = ""
        self.finish_reason: str | None = None

    async def write(self, send: Send) -> None:
        """Decode the text. send: called with each piece of it."""
        async with aclosing(self._request.tokens()) as tokens:
            async for token in tokens:
                self.ids.append(token)
                self._reply.push(token)
                await self._hand_on(send)
                if self._reply.at_marker:
                    break
        self._reply.end()
        await self._hand_on(send)
        self.alpha = self._request.alpha[: len(self.ids)]
        ended = self._reply.at_marker or self.ids[-1] in self._decoding.ends
        self.finish_reason = "stop" if ended else "length"

    async def _hand_on(self, send: Send) -> None:
        piece = "".join(self._parts)
        self._parts.clear()
        self.text += piece
        if piece:
            await send(self, piece)


class _Answer:
    """The JSON of one answer."""

    def __init__(self, name: str, chat: bool, what: Asked, choices: list[Choice]) -> None:
        self.chat, self.what, self.choices = chat, what, choices
        kind = "chat.completion" if chat else "text_completion"
        if chat and what.stream:
            kind = "chat.completion.chunk"
        prefix = "chatcmpl" if chat else "cmpl"
        self._head: dict[str, Any] = {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind}
        self._head |= {"created": int(time.time()), "model": name}

    def usage(self) -> dict[str, int]:
        prompt = sum(len(choice.prompt) for choice in self.choices[:: self.what.copies])
        new = sum(len(choice.ids) for choice in self.choices)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    def whole(self) -> dict[str, Any]:
        found = []
        for choice in self.choices:
            own: dict[str, Any] = {"index": choice.index, "finish_reason": choice.finish_reason}
            if self.chat:
                own["message"] = {"role": "assistant", "content": choice.text}
            else:
                own["text"] = choice.text
            own["logprobs"] = None
            if self.what.return_token_ids:
                own["token_ids"] = choice.ids
            if self.what.return_alpha:
                own["alpha"] = choice.alpha
            found.append(own)
        return self._head | {"choices": found, "usage": self.usage()}

    def chunk(self, choice: Choice, text: str = "", role: bool = False, **more: Any) -> bytes:
        own: dict[str, Any] = {"index": choice.index, "finish_reason": None, "logprobs": None}
        if self.chat:
            said = {"content": text} if text or role else {}
            own["delta"] = ({"role": "assistant"} if role else {}) | said
        else:
            own["text"] = text
        return _event(self._head | {"choices": [own | more]})

    def usage_chunk(self) -> bytes:
        return _event(self._head | {"choices": [], "usage": self.usage()})


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


class Server:
    """The routes of an engine."""

    def __init__(self, engine: BatchingEngine, name: str) -> None:
        self._engine, self._name, self._created = engine, name, int(time.time())

    def app(self) -> web.Application:
        """The application."""
        app = web.Application(client_max_size=_MAX_BODY, middlewares=[_errors])
        app.add_routes(
            [
                web.get("/health", self._health),
                web.get("/v1/models", self._models),
                web.post("/v1/completions", self._completions),
                web.post("/v1/chat/completions", self._chat),
            ]
        )
        return app

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if self._engine.alive else 503)

    async def _models(self, request: web.Request) -> web.Response:
        own: dict[str, Any] = {"id": self._name, "object": "model", "created": self._created}
        own |= {"owned_by": "dualhead_ext", "max_model_len": self._engine.max_length}
        return web.json_response({"object": "list", "data": [own]})

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, chat=False)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, chat=True)

    async def _answer(self, request: web.Request, chat: bool) -> web.StreamResponse:
        # A web page can send other content types to this machine without asking first.
        if request.content_type != "application/json":
            raise BadRequest(None, f"expected application/json, got {request.content_type}")
        try:
            body = await request.json()
        except ValueError as error:
            raise BadRequest(None, f"the body is not JSON: {error}") from error
        if isinstance(body, dict) and body.get("model", self._name) not in (self._name, None):
            return _error(404, f"the model {body['model']!r} does not exist", "model")
        what = asked(body, chat, self._engine)
        if not self._engine.alive:
            raise EngineError("the engine has stopped")
        choices = [Choice(self._engine, what, i) for i in range(len(what.prompts))]
        answer = _Answer(self._name, chat, what, choices)
        if what.stream:
            return await _stream(request, answer)
        await _together(choice.write(_nothing) for choice in choices)
        return web.json_response(answer.whole())


async def _nothing(choice: Choice, text: str) -> None:
    pass


async def _together(coroutines: Any) -> None:
    """Run coroutines until all are done, or one fails; then the others are cancelled."""
    tasks = [asyncio.ensure_future(one) for one in coroutines]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _stream(request: web.Request, answer: _Answer) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Cache-Control": "no-store"})
    response.content_type, response.charset = "text/event-stream", "utf-8"
    await response.prepare(request)

    async def send(choice: Choice, text: str) -> None:
        await response.write(answer.chunk(choice, text, **new_ids(choice)))

    told = dict.fromkeys(answer.choices, 0)

    def new_ids(choice: Choice) -> dict[str, Any]:
        before, told[choice] = told[choice], len(choice.ids)
        return {"token_ids": choice.ids[before:]} if answer.what.return_token_ids else {}

    async def write(choice: Choice) -> None:
        if answer.chat:
            await response.write(answer.chunk(choice, role=True))
        await choice.write(send)
        reason: dict[str, Any] = {"finish_reason": choice.finish_reason}
        await response.write(answer.chunk(choice, **reason, **new_ids(choice)))

    try:
        await _together(write(choice) for choice in answer.choices)
    except EngineError as error:  # the status was sent before
        await response.write(_event(_content(500, str(error))))
        return response
    if answer.what.return_alpha:
        await response.write(answer.chunk(answer.choices[0], alpha=answer.choices[0].alpha))
    if answer.what.include_usage:
        await response.write(answer.usage_chunk())
    await response.write(b"data: [DONE]\n\n")
    await response.write_eof()
    return response


@web.middleware
async def _errors(request: web.Request, handler: Any) -> web.StreamResponse:
    try:
        return await handler(request)
    except BadRequest as error:
        return _error(400, str(error), error.param)
    except EngineError as error:
        return _error(503 if "stop" in str(error) else 500, str(error))
    except web.HTTPException as error:  # no such path, a body too large
        return _error(error.status, error.reason)


def _content(code: int, message: str, param: str | None = None) -> dict[str, Any]:
    kind = {400: "BadRequestError", 404: "NotFoundError"}.get(code, "InternalServerError")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _error(code: int, message: str, param: str | None = None) -> web.Response:
    return web.json_response(_content(code, message, param), status=code)


def run(
    engine: BatchingEngine, name: str, host: str, port: int, grace: float, ready: Any = None
) -> None:
    """Serve until SIGTERM or Ctrl-C. Then requests that are running may finish, for at most
    ``grace`` seconds; a second signal ends them.

    Args:
        name: model name for clients.
        ready: called when the server listens.
    Raises:
        OSError: the port cannot be listened on.
    """
    engine.start()
    try:
        asyncio.run(_serve(Server(engine, name).app(), host, port, grace, ready))
    finally:
        engine.stop()


async def _serve(app: web.Application, host: str, port: int, grace: float, ready: Any) -> None:
    loop, told, at_once = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()

    def stop() -> None:
        (at_once if told.is_set() else told).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    # handler_cancellation: a client that goes away ends its request.
    runner = web.AppRunner(
        app, access_log=None, handle_signals=False, handler_cancellation=True,
        shutdown_timeout=grace,
    )  # fmt: skip
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
        if ready is not None:
            ready()
        await told.wait()
    finally:
        ending = asyncio.ensure_future(runner.cleanup())
        waiting = asyncio.ensure_future(at_once.wait())
        await asyncio.wait((ending, waiting), return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        ending.cancel()
