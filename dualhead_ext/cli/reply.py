# SPDX-License-Identifier: Apache-2.0
"""One reply of a model, streamed: its text up to the end of the turn, and alpha of each token."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..data.rendering import turn_ends
from . import terminal as show

if TYPE_CHECKING:
    import torch


@dataclass
class Reply:
    """A model's reply.

    Attributes:
        sequence: ids of prompt and reply, without tokens after the end of the turn.
        tokens: (text, alpha) of each token that has a text; alpha is None without heads.
        ended: whether the model ended its turn.
        stopped: whether the user stopped it.
    """

    sequence: list[int]
    tokens: list[show.Token] = field(default_factory=list)
    ended: bool = False
    stopped: bool = False

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(text for text, _ in self.tokens)


class ReplyStream:
    """A streamer and stopping criterion for ``generate``. It passes text on as soon as it cannot be
    the beginning of a marker of the next turn.

    Args:
        tokenizer: decodes ids.
        head: the gated head, which has the alpha of the last token; None without heads.
        markers: texts that end the turn where they first occur.
        strip: whether to remove white space around the reply.
        print: called with each part of the text.
    """

    def __init__(
        self,
        tokenizer: Any,
        head: Any = None,
        markers: tuple[str, ...] = (),
        strip: bool = False,
        print: Any = None,
    ) -> None:
        self._text, self._head, self._markers = show.TokenText(tokenizer), head, markers
        self._strip, self._print = strip, print
        self._said, self._shown = "", 0  # the whole text, and the length that was passed on
        self._parts: list[show.Token] = []
        self._ids: list[int] = []
        self._ends: list[int] = []  # length of the text after each token
        self._prompt_passed = False
        self._end: int | None = None  # where a marker begins
        self.stopped = False

    def put(self, value: Any) -> None:
        """Take one new token, int64 (1,). The first call has the prompt (1, T) and is skipped."""
        if not self._prompt_passed:
            self._prompt_passed = True
            return
        alpha = None if self._head is None else float(self._head.last_alpha[0, -1])
        for token in value.flatten().tolist():
            self.push(token, alpha)

    def push(self, token: int, alpha: float | None = None) -> None:
        """Take one new token. After a marker, tokens are ignored."""
        if self._end is None:
            self._ids.append(token)
            self._add(self._text.push(token), alpha)

    @property
    def at_marker(self) -> bool:
        """Whether the text has reached a marker."""
        return self._end is not None

    def _add(self, text: str, alpha: float | None) -> None:
        self._said += text
        self._parts.append((text, alpha))
        self._ends.append(len(self._said))
        starts = [at for m in self._markers if (at := self._said.find(m)) >= 0]
        self._end = min(starts, default=None)
        self._hand_on(self._settled() if self._end is None else self._end)

    def _settled(self) -> int:
        """The length of the text that cannot be part of a marker."""
        length = len(self._said)
        for marker in self._markers:
            for size in range(min(len(marker) - 1, len(self._said)), 0, -1):
                if self._said.endswith(marker[:size]):
                    length = min(length, len(self._said) - size)
                    break
        return length

    def _kept(self, end: int) -> tuple[int, int]:
        """(start, end) of the reply in the text up to ``end``."""
        if not self._strip:
            return 0, end
        text = self._said[:end]
        return len(text) - len(text.lstrip()), len(text.rstrip())

    def _hand_on(self, upto: int) -> None:
        begin, upto = self._kept(upto)
        text = self._said[max(begin, self._shown) : upto]
        if self._print is not None and text:
            self._print(text)
        self._shown = max(self._shown, upto)

    def end(self) -> None:
        """Pass on the remaining text: there are no more tokens."""
        if self._end is None:
            self._add(self._text.flush(), None)
        self._hand_on(len(self._said) if self._end is None else self._end)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
        """Whether to stop, (B,) bool: at a marker, or because the user asks for it."""
        import torch

        done = self.stopped or self._end is not None
        return torch.full((len(input_ids),), done, device=input_ids.device)

    def reply(self, prompt: list[int], ends: set[int]) -> Reply:
        """The reply after ``prompt``. ends: the tokens that end a turn."""
        begin, stop = self._kept(len(self._said) if self._end is None else self._end)
        tokens, before = [], 0
        for (text, alpha), after in zip(self._parts, self._ends, strict=True):
            kept = text[max(0, begin - before) : max(0, stop - before)]
            before = after
            if kept:
                tokens.append((kept, alpha))
        ids = self._ids
        if self._end is not None:  # without the marker's tokens
            ids = [t for t, end in zip(ids, self._ends, strict=False) if end <= self._end]
        ended = self._end is not None or bool(ids and ids[-1] in ends)
        return Reply([*prompt, *ids], tokens, ended, self.stopped and not ended)


def write_reply(
    model: Any,
    tokenizer: Any,
    inputs: Any,
    options: dict[str, Any],
    *,
    raw: bool = False,
    strip: bool = False,
    print: Any = None,
    started: Any = None,
) -> Reply:
    """Generate a reply.

    Args:
        model: with or without heads.
        inputs: ids (1, T) and mask of the prompt, on the model's device.
        options: of ``generate``.
        raw: whether only the model's own end tokens end the text.
        strip, print: see :class:`ReplyStream`.
        started: called with the stream; a signal handler may set its ``stopped``.
    """
    ends = model.generation_config.eos_token_id
    ends = set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
    markers: tuple[str, ...] = ()
    if not raw:
        tokens, markers = turn_ends(tokenizer)
        ends |= tokens
    head = getattr(model, "lm_head_module", None)
    stream = ReplyStream(tokenizer, head, markers, strip, print)
    if started is not None:
        started(stream)
    if ends:
        options = options | {"eos_token_id": sorted(ends)}
        if model.generation_config.pad_token_id is None and tokenizer.pad_token_id is None:
            options["pad_token_id"] = min(ends)
    model.generate(**inputs, streamer=stream, stopping_criteria=[stream], **options)
    return stream.reply(inputs["input_ids"][0].tolist(), ends)


def print_gate(to: Any, reply: Reply, streamed: bool) -> None:
    """Show a reply with alpha of each token, and the legend. It replaces the streamed plain text if
    that is still on the screen; otherwise it is printed below.
    """
    if streamed and not show.erase(to, reply.text):
        to.file.write("\n\n")
    show.print_tokens(to, reply.tokens)
    show.print_legend(to, reply.tokens)
