# SPDX-License-Identifier: Apache-2.0
"""``dualhead demo --web``: a page on this machine that streams the backbone's reply beside the
gated one, and shows alpha of each token.

It uses Python's own server and a page without libraries. The replies are two rows of one batch, so
they are written at the same pace.
"""

from __future__ import annotations

import errno
import json
import os
import threading
from argparse import Namespace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from ..data.rendering import turn_ends
from ..eval.alpha_scale import COLORS, AlphaScale
from .decoding import context_of, encode
from .errors import UserError, argument
from .models import load, quiet_transformers
from .reply import ReplyStream
from .web_page import PAGE

HOST, PORT = "127.0.0.1", 8765
NEW_TOKENS = 96
MAX_STRENGTH = 4.0
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    # The page is self-contained; nothing is fetched from elsewhere.
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src 'self'",
}


def serve(arguments: Namespace, train: Any) -> None:
    """Serve the heads in ``arguments.output`` until Ctrl-C. If there are none, ``train()`` makes
    them first.

    Raises:
        UserError: the port is in use, or the heads cannot be loaded.
    """
    server = open_server(arguments.port)  # before training, which takes minutes
    try:
        if not os.path.isfile(os.path.join(arguments.output, "dualhead_config.json")):
            train()
        with argument():
            quiet_transformers("embedded")
        options = {"heads": arguments.output, "backbone": None, "quantize": None}
        server.speaker = Speaker(*load(Namespace(**options, device="auto")))
        print(f"{arguments.output}: http://{HOST}:{server.server_port} (Ctrl-C ends)", flush=True)
        server.serve_forever()
    finally:
        server.server_close()


def open_server(port: int) -> Server:
    """A server that listens on ``port``; 0: any free port.

    Raises:
        UserError: the port is in use, or not allowed.
    """
    try:
        return Server((HOST, port), Handler)
    except OSError as error:
        reason = "is in use" if error.errno == errno.EADDRINUSE else f"({error.strerror})"
        raise UserError(f"--port: expected a free port, got {port}, which {reason}") from error


class Speaker:
    """Answers prompts with and without the heads, one at a time."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._busy = threading.Lock()

    def answer(self, prompt: str, strength: float, send: Any) -> None:
        """Generate both replies to a prompt.

        Args:
            send: called with events, dicts for JSON: ``{"side", "text"}`` for each piece of text
                (side 0 is the backbone), and ``{"tokens", "legend"}`` at the end. If it raises
                OSError because the page was closed, the replies end.
        Raises:
            ValueError: the prompt is empty, or too long for the model.
        """
        if not prompt.strip():
            raise ValueError("prompt: expected a text, got none")
        inputs = encode(prompt, self.tokenizer)
        length, context = inputs["input_ids"].shape[1], context_of(self.model)
        if context is not None and length + NEW_TOKENS > context:
            raise ValueError(
                f"prompt: expected at most {context - NEW_TOKENS} tokens, got {length}"
            )
        with self._busy:
            self._generate(inputs, strength, send)

    def _generate(self, inputs: Any, strength: float, send: Any) -> None:
        import torch

        ends, markers = turn_ends(self.tokenizer)
        own = self.model.generation_config.eos_token_id
        ends |= set() if own is None else {own} if isinstance(own, int) else set(own)
        both = _Both(self.model.lm_head_module, self.tokenizer, markers, ends, send)
        rows = {name: value.expand(2, -1).to(self.model.device) for name, value in inputs.items()}
        options = {"eos_token_id": sorted(ends), "pad_token_id": min(ends)} if ends else {}
        with torch.inference_mode():
            self.model.generate(
                **rows,
                **options,
                strength=torch.tensor([0.0, strength]),
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                streamer=both,
                stopping_criteria=[both],
            )
        prompt = inputs["input_ids"][0].tolist()
        send(_coloured([stream.reply(prompt, ends).tokens for stream in both.streams]))


def _coloured(replies: list[list[tuple[str, float | None]]]) -> dict[str, Any]:
    """The event with the tokens of both replies; those of the gated one have alpha and a colour."""
    backbone, gated = replies
    scale = AlphaScale.of(alpha for _, alpha in gated)
    tokens = [
        [[text] for text, _ in backbone],
        [
            [text] if alpha is None else [text, scale.number(alpha), scale.hex_color(alpha)]
            for text, alpha in gated
        ],
    ]
    if scale is None:
        return {"tokens": tokens, "legend": []}
    if scale.flat:
        return {"tokens": tokens, "legend": [[scale.number(scale.low), scale.hex_color(scale.low)]]}
    count = len(COLORS)
    legend = [
        [scale.number(scale.middle(level, count)), color] for level, (_, color) in enumerate(COLORS)
    ]
    return {"tokens": tokens, "legend": legend}


class _Row:
    """One row of the head's last alpha, in the form of a batch of one for `ReplyStream`."""

    def __init__(self, head: Any, row: int) -> None:
        self._head, self._row = head, row

    @property
    def last_alpha(self) -> Any:
        return self._head.last_alpha[self._row : self._row + 1]


class _Both:
    """The streamer and stopping criterion for two rows."""

    def __init__(
        self, head: Any, tokenizer: Any, markers: tuple[str, ...], ends: set[int], send: Any
    ) -> None:
        self._ends, self._send = ends, send
        self._done, self._prompt_passed, self._lost = [False, False], False, False
        self.streams = [
            ReplyStream(
                tokenizer,
                _Row(head, side),
                markers,
                strip=True,
                print=lambda text, side=side: self._pass_on({"side": side, "text": text}),
            )
            for side in (0, 1)
        ]

    def _pass_on(self, event: dict[str, Any]) -> None:
        if self._lost:
            return
        try:
            self._send(event)
        except OSError:  # the page was closed: the replies end at the next token
            self._lost = True

    def put(self, value: Any) -> None:
        for side, stream in enumerate(self.streams):
            if not self._prompt_passed:
                stream.put(value)
            elif not self._done[side]:
                token = value.flatten()[side : side + 1]
                stream.put(token)
                self._done[side] = int(token) in self._ends
        self._prompt_passed = True

    def end(self) -> None:
        for stream in self.streams:
            stream.end()

    def __call__(self, input_ids: Any, scores: Any, **options: Any) -> Any:
        import torch

        stops = [self._lost or bool(s(input_ids[:1], None)) for s in self.streams]
        return torch.tensor(stops, device=input_ids.device)


class Server(ThreadingHTTPServer):
    """Runs each request in its own thread; ``speaker`` answers."""

    daemon_threads = True
    speaker: Speaker


class Handler(BaseHTTPRequestHandler):
    """Serves the page at ``/`` and a stream of events at ``/reply?prompt=...&strength=...``."""

    server: Server

    def do_GET(self) -> None:
        # A page of another site must not read this model's replies by DNS rebinding.
        host = (self.headers.get("Host") or "").rpartition(":")[0]
        if host not in (HOST, "localhost"):
            self.send_error(403, "this server answers 127.0.0.1 and localhost only")
            return
        path, query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
        if path == "/":
            self._begin("text/html; charset=utf-8")
            self.wfile.write(PAGE.encode())
        elif path == "/reply":
            self._reply(query)
        else:
            self.send_error(404)

    def _reply(self, query: dict[str, list[str]]) -> None:
        try:
            strength = float(query.get("strength", ["1"])[-1])
        except ValueError:
            strength = -1.0
        if not 0 <= strength <= MAX_STRENGTH:
            self.send_error(400, f"strength: expected a number from 0 to {MAX_STRENGTH:g}")
            return
        self._begin("text/event-stream")
        try:
            try:
                self.server.speaker.answer(query.get("prompt", [""])[-1], strength, self._event)
            except ValueError as error:
                self._event({"error": str(error)})
            self._event({"done": True})
        except OSError:
            self.close_connection = True  # the page was closed

    def _begin(self, kind: str) -> None:
        self.send_response(200)
        for name, value in {"Content-Type": kind, **_HEADERS}.items():
            self.send_header(name, value)
        self.end_headers()

    def _event(self, event: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.flush()

    def log_message(self, format: str, *values: Any) -> None:
        """Log nothing to the terminal."""
