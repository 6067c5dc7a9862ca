# SPDX-License-Identifier: Apache-2.0
"""One reply of a model as it comes: its text up to the end of the turn, and alpha of each token."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..data.rendering import turn_ends
from . import terminal as show

if TYPE_CHECKING:
    import torch


@dataclass
class Reply:
    """What a model said.

    Attributes:
        sequence: ids of prompt and reply, without what came after the end of the turn.
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
        """The whole of it."""
        return "".join(text for text, _ in self.tokens)


class ReplyStream:
    """A streamer for ``generate``, which is also its stopping criterion: hands on text as soon as
    it cannot be the beginning of the next turn's marker.

    Args:
        tokenizer: turns ids into text.
        head: the gated head, which knows the alpha of the token just chosen; None without heads.
        markers: texts of which the first ends the turn.
        strip: whether white space around the reply is left out.
        print: what to do with each part of the text.
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
        self._said, self._shown = "", 0  # all of the text, and how much was handed on
        self._parts: list[show.Token] = []
        self._ids: list[int] = []
        self._ends: list[int] = []  # length of the text after each token
        self._prompt_passed = False
        self._end: int | None = None  # where a marker begins
        self.stopped = False

    def put(self, value: Any) -> None:
        """One new token, int64 (1,); first of all the prompt (1, T), which is not shown."""
        if not self._prompt_passed:
            self._prompt_passed = True
            return
        alpha = None if self._head is None else float(self._head.last_alpha[0, -1])
        for token in value.flatten().tolist():
            if self._end is None:
                self._ids.append(token)
                self._add(self._text.push(token), alpha)

    def _add(self, text: str, alpha: float | None) -> None:
        self._said += text
        self._parts.append((text, alpha))
        self._ends.append(len(self._said))
        starts = [at for m in self._markers if (at := self._said.find(m)) >= 0]
        self._end = min(starts, default=None)
        self._hand_on(self._settled() if self._end is None else self._end)

    def _settled(self) -> int:
        """How much of the text can be no part of a marker."""
        length = len(self._said)
        for marker in self._markers:
            for size in range(min(len(marker) - 1, len(self._said)), 0, -1):
                if self._said.endswith(marker[:size]):
                    length = min(length, len(self._said) - size)
                    break
        return length

    def _kept(self, end: int) -> tuple[int, int]:
        """Where the reply begins and ends in the text up to ``end``."""
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
        """No more tokens."""
        if self._end is None:
            self._add(self._text.flush(), None)
        self._hand_on(len(self._said) if self._end is None else self._end)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
        """Whether to stop, (B,) bool: at a marker, or as the user says."""
        import torch

        done = self.stopped or self._end is not None
        return torch.full((len(input_ids),), done, device=input_ids.device)

    def reply(self, prompt: list[int], ends: set[int]) -> Reply:
        """What was said after ``prompt``; ``ends`` are the tokens that end a turn."""
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
    """Let a model answer.

    Args:
        model: with or without heads.
        inputs: ids (1, T) and mask of the prompt, on the model's device.
        options: of ``generate``.
        raw: whether nothing but the model's own end tokens ends the text.
        strip, print: of :class:`ReplyStream`.
        started: called with the stream, whose ``stopped`` may be set from a signal handler.
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
    """Show alpha of each token of a reply, in the place of its plain text where that was streamed
    and is on the screen, below it otherwise; and the legend.
    """
    if streamed and not show.erase(to, reply.text):
        to.file.write("\n\n")
    show.print_tokens(to, reply.tokens)
    show.print_legend(to, reply.tokens)
