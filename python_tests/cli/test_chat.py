# SPDX-License-Identifier: Apache-2.0
"""`dualhead chat`, in a terminal and with its input from a pipe."""

import io
import json
import re
import sys

import pytest
import torch
from terminal import Terminal
from transformers import AutoTokenizer

import dualhead_ext as dh
from dualhead_ext import cli
from dualhead_ext.cli.reply import ReplyStream
from dualhead_ext.data.rendering import turn_ends

QUESTION = "How do I bake bread?"


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """Heads on the built-in backbone whose gate and reward head have an effect."""
    folder = tmp_path_factory.mktemp("chat") / "heads"
    model = dh.DualHeadForCausalLM.from_backbone(
        "embedded", reward_head="embedding", gate="linear", num_objectives=2, trial=False
    )
    generator = torch.Generator().manual_seed(1)
    head = model.lm_head_module
    with torch.no_grad():
        for parameter in (*head.reward_head.parameters(), *head.gate.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(folder)
    return folder


def talk(heads, monkeypatch, lines, *options):
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    return cli.main(["chat", str(heads), "--max-new-tokens", "8", *options])


# --- the end of a turn ----------------------------------------------------------------------------


class Bytes:
    """A tokenizer with one token per byte."""

    def decode(self, ids, skip_special_tokens, clean_up_tokenization_spaces):
        return bytes(i for i in ids if i != 0).decode(errors="replace")


def streamed(text, markers, strip):
    shown = []
    stream = ReplyStream(Bytes(), None, markers, strip, shown.append)
    stream.put(torch.zeros(1, 3, dtype=torch.int64))  # the prompt
    for byte in text.encode():
        stream.put(torch.tensor([byte]))
        if stream(torch.zeros(1, 1), None).all():
            break
    stream.end()
    return "".join(shown), stream.reply([7], {0})


MARKERS = ("\n\nHuman:", "\n\nAssistant:")


@pytest.mark.parametrize(
    ("said", "shown", "ended"),
    [
        (" Yes.\n\nHuman: and", "Yes.", True),
        (" Yes.\n\nAssistant: and", "Yes.", True),
        (" Yes.\n\nHumans", "Yes.\n\nHumans", False),
        (" One\n\n\n\nHuman: x", "One", True),
        (" Half\n\nHum", "Half\n\nHum", False),
        ("\n\nHuman: x", "", True),
        (" Yes.\n \x00", "Yes.", True),
    ],
)
def test_a_reply_never_shows_the_next_turn(said, shown, ended):
    text, reply = streamed(said, MARKERS, strip=True)
    assert (text, reply.text, reply.ended) == (shown, shown, ended)


def test_raw_text_is_not_cut():
    said = " Yes.\n\nHuman: and "
    text, reply = streamed(said, (), strip=False)
    assert text == reply.text == said and not reply.ended


def test_turn_ends_of_a_chat_template():
    tokenizer = AutoTokenizer.from_pretrained(dh.data.embedded_backbone_path())
    assert turn_ends(tokenizer) == (set(), MARKERS)
    tokenizer.chat_template = (
        "{% for m in messages %}<|bos|>{{ m.role }} {{ m.content }}<|eos|>{% endfor %}"
        "{% if add_generation_prompt %}<|bos|>assistant {% endif %}"
    )
    ids = tokenizer.convert_tokens_to_ids(["<|bos|>", "<|eos|>"])
    assert turn_ends(tokenizer) == (set(ids), ("\n\nHuman:",))


# --- from a pipe ----------------------------------------------------------------------------------


def test_replies_are_what_the_model_says_to_the_whole_conversation(heads, monkeypatch, capsys):
    assert talk(heads, monkeypatch, [QUESTION, "/strength 2", "Why?"]) == 0
    first, _, second = capsys.readouterr().out.partition("strength 2\n")
    model = dh.DualHeadForCausalLM.from_pretrained(heads)
    tokenizer = AutoTokenizer.from_pretrained(dh.data.embedded_backbone_path())
    prompt = f"\n\nHuman: {QUESTION}\n\nAssistant:"
    for shown, strength in ((first, 1.0), (second, 2.0)):
        ids = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=8, strength=strength)[0]
        text = tokenizer.decode(out[ids["input_ids"].shape[1] :], skip_special_tokens=True)
        text = re.split(r"\n\n(?:Human|Assistant):", text)[0].strip()
        assert shown.startswith(f"{text}\n"), "no text of the user's or of the next turn in it"
        prompt += f" {text}\n\nHuman: Why?\n\nAssistant:"


MISTAKES = {
    "/strenght 2": "/strenght: no such command; did you mean /strength?",
    "/fly": "/fly: no such command; /help lists the commands",
    "/strength -1": "/strength: expected a number of at least 0, got '-1'",
    "/objective 1": "/objective: expected as many weights as the heads have objectives, 2",
    "/objective a": "/objective: expected numbers separated by commas, got 'a'",
    "/alpha 3": "/alpha: expected on or off, got '3'",
    "/compare": "/compare: expected a message before it, got none",
    "/compare now": "/compare: expected nothing after it",
    "/save": "/save: expected a file, got none",
    "/save x.txt": "/save: expected a conversation, got none yet",
}


def test_mistakes_do_not_end_the_chat(heads, monkeypatch, capsys):
    assert talk(heads, monkeypatch, [*MISTAKES, "/objective 0.8,0.2", "word " * 2000]) == 0
    out, err = capsys.readouterr()
    *lines, last = err.splitlines()
    assert len(lines) == len(MISTAKES)
    for line, words in zip(lines, MISTAKES.values(), strict=True):
        assert line.startswith(f"dualhead chat: {words}")
    assert "objectives 0.8,0.2" in out and "a context of 1024" in last


def test_the_oldest_turns_leave_a_full_context(heads, monkeypatch, capsys):
    assert talk(heads, monkeypatch, ["word " * 450, "word " * 450, "word " * 450]) == 0
    out, err = capsys.readouterr()
    assert re.search(r"the first [24] messages no longer fit the context of 1024", out), out
    assert not err


def test_compare_reset_system_and_save(heads, monkeypatch, capsys, tmp_path):
    saved, again = tmp_path / "talk.json", tmp_path / "talk.txt"
    again.write_text("mine")
    lines = ["/system Be brief.", QUESTION, "/compare", f"/save {saved}", f"/save {again}"]
    lines += [f"/save {saved}", "/reset", "/compare", "/system none", "/quit", "never said"]
    assert talk(heads, monkeypatch, lines, "--sample", "--strength", "3") == 0
    out, err = capsys.readouterr()
    record = json.loads(saved.read_text())
    roles = [message["role"] for message in record["messages"]]
    assert roles == ["system", "user", "assistant"] and record["settings"] == ["strength 3"]
    assert again.read_text() == "mine" and f"but {again} exists" in err
    reply = record["messages"][2]["content"]
    cells = [row.split("│") for row in out.splitlines() if row.startswith("│")]
    column = " ".join(cell[2].strip() for cell in cells).split()
    assert column == reply.split(), "sampled again as it was"
    assert "/compare: expected a message" in err and "never said" not in out
    assert "system message: Be brief." in out and "system message: none" in out


# --- in a terminal --------------------------------------------------------------------------------


# The first letter of a reply, after what the user typed and readline's control codes.
BEGUN = r"bread\?\n(?:\x1b\[\?2004l\r?)?\s*[^\s\x1b]"


def test_a_chat_in_a_terminal(heads):
    """Alpha in colours, Ctrl-C during a reply and at the prompt, a mistyped command, Ctrl-D."""
    person = Terminal("chat", str(heads), "--max-new-tokens", "600", "--sample", "--top-k", "0",
                      "--temperature", "3", NO_COLOR="")  # fmt: skip
    assert "/help lists the commands" in person.until("> ")
    person.type(f"{QUESTION}\n")
    person.until(BEGUN)
    person.type("\x03")
    assert "Traceback" not in person.until(r"\((stopped)\)\n\n.*?> ")
    person.interrupt(r"Ctrl-D or /quit ends the chat(.|\n)*?> ")
    person.type("/alhpa\n")
    person.until(r"did you mean /alpha\?(.|\n)*?> ")
    person.type("/alpha\n")
    person.until(r"alpha of each token: shown(.|\n)*?> ")
    person.type(f"{QUESTION}\n")
    person.until(BEGUN + r"(?:.|\n){60}")
    person.type("\x03")
    shown = person.until(r"alpha: mean (.|\n)*?> ")
    assert len(set(re.findall(r"48;5;(\d+)m", shown))) > 1, shown
    person.type("\x04")
    assert person.process.wait(timeout=60) == 0
