# SPDX-License-Identifier: Apache-2.0
"""The page of an inspection and the page of `dualhead demo --web`, in headless Chromium.

The demo's server is also tested without a browser.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer

import dualhead_ext as dh
from dualhead_ext import cli
from dualhead_ext.cli import web
from dualhead_ext.cli.decoding import encode
from dualhead_ext.cli.reply import write_reply
from dualhead_ext.eval.inspection import inspect_tokens, write_page

QUESTION, STRENGTH = "How do I bake bread?", 2.0
COLOR = "span => getComputedStyle(span).backgroundColor"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """Heads on the built-in backbone whose gate and reward head have an effect."""
    folder = tmp_path_factory.mktemp("pages") / "heads"
    model = dh.DualHeadForCausalLM.from_backbone(
        "embedded", reward_head="embedding", gate="linear", trial=False
    )
    generator = torch.Generator().manual_seed(1)
    head = model.lm_head_module
    with torch.no_grad():
        for parameter in (*head.reward_head.parameters(), *head.gate.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def speaker(heads):
    model = dh.DualHeadForCausalLM.from_pretrained(heads)
    return web.Speaker(model, AutoTokenizer.from_pretrained(model.config._name_or_path))


@pytest.fixture(scope="module")
def address(speaker):
    """The address of a running server."""
    server = web.open_server(0)
    server.speaker = speaker
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def browser():
    """Chromium, driven by Playwright, which waits for what is expected even on a slow machine."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    named = os.environ.get("DUALHEAD_BROWSER")
    program = named or next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip("no Chromium (Debian: apt install chromium; or set DUALHEAD_BROWSER)")
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def page(browser):
    """A new tab. A script error, or a request to another server, fails the test."""
    opened = browser.new_page(viewport={"width": 1000, "height": 800})
    opened.set_default_timeout(120_000)
    errors, asked = [], []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("request", lambda request: asked.append(request.url))
    yield opened
    assert not errors
    assert all(url.startswith(("file:", "data:", "http://127.0.0.1:")) for url in asked), asked
    opened.close()


def picture(page, name):
    """Save a screenshot if DUALHEAD_SCREENSHOTS names a folder."""
    if folder := os.environ.get("DUALHEAD_SCREENSHOTS"):
        page.screenshot(path=os.path.join(folder, f"{name}.png"), full_page=True)


# --- the page of an inspection --------------------------------------------------------------------


@pytest.fixture(scope="module")
def inspected(speaker, tmp_path_factory):
    """(the file of a page, what it shows): a text at three strengths."""
    tokenizer = speaker.tokenizer
    prompt = tokenizer("The cake was")["input_ids"]
    text = " a lie, and </script> so is <b>bread</b>."
    ids = [*prompt, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    runs = [
        replace(
            inspect_tokens(speaker.model, tokenizer, ids, len(prompt), strength=strength),
            label=f"strength {strength}",
        )
        for strength in (0, 1, 2)
    ]
    path = tmp_path_factory.mktemp("page") / "cake.html"
    write_page(path, runs, "The cake")
    return path, runs


def test_the_slider_chooses_a_run_and_the_mouse_a_token(page, inspected):
    path, runs = inspected
    page.goto(path.as_uri())
    shown = page.locator(".run:visible")
    assert shown.count() == 1
    assert "</script> so is <b>bread</b>." in shown.locator(".text").inner_text()
    colors = []
    alphas = [token.alpha for token in runs[2].tokens]
    highest = alphas.index(max(alphas))
    for number in (2, 1, 0):
        page.locator("#strength").fill(str(number))
        assert page.locator(".run").nth(number).is_visible() and shown.count() == 1
        assert page.locator("#label").inner_text() == runs[number].label
        spans = shown.locator("[data-i]")
        assert spans.count() == len(runs[number].tokens)
        for i in (0, len(runs[number].tokens) - 1):
            spans.nth(i).hover()
            token = runs[number].tokens[i]
            said = page.locator("#details p").inner_text()
            assert said.startswith(f"{json.dumps(token.text, ensure_ascii=False)}: alpha ")
            assert f"KL {token.kl:.4f} nats" in said
            best = page.locator("#details tr").nth(1).locator("td").nth(3).inner_text()
            # The page rounds twice.
            assert best.endswith(" %")
            assert abs(float(best[:-2]) - 100 * token.lm_head[0].probability) < 0.1
        colors.append(spans.nth(highest).evaluate(COLOR))
        if number == 2:
            picture(page, "inspection")
    assert len(set(colors)) == 3, "alpha is seen"


def test_the_keyboard_reaches_the_tokens(page, inspected):
    path, runs = inspected
    page.goto(path.as_uri())
    page.locator("#strength").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#label").inner_text() == runs[1].label
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    second = runs[1].tokens[1].text
    said = page.locator("#details p").inner_text()
    assert said.startswith(json.dumps(second, ensure_ascii=False))


# --- the page of the demo, in a browser -----------------------------------------------------------


def expected(speaker, strength):
    """The reply to a single request, which a row of the batch must equal."""
    inputs = encode(QUESTION, speaker.tokenizer)
    options = {"strength": strength, "do_sample": False, "max_new_tokens": web.NEW_TOKENS}
    return write_reply(speaker.model, speaker.tokenizer, inputs, options, strip=True)


@pytest.fixture(scope="module")
def replies(speaker):
    return expected(speaker, 0.0), expected(speaker, STRENGTH)


def test_a_person_compares_two_replies(page, address, replies):
    page.goto(address)
    page.locator("#prompt").fill(QUESTION)
    page.locator("#strength").fill(str(STRENGTH))
    assert page.locator("#value").inner_text() == "2.0"
    page.locator("#go").click()
    page.locator("#note", has_text="done").wait_for()
    for side, reply in enumerate(replies):
        assert page.locator(f"#reply{side}").evaluate("node => node.textContent") == reply.text
    spans = page.locator("#reply1 span")
    assert spans.count() == len(replies[1].tokens)
    assert spans.nth(0).get_attribute("title").startswith("alpha ")
    style = "spans => new Set(spans.map(span => getComputedStyle(span).backgroundColor)).size"
    assert spans.evaluate_all(style) > 2
    assert page.locator("#legend span").count() == 9
    assert page.locator("#shown").inner_text() == "2.0"
    picture(page, "demo")


def test_an_empty_prompt_is_a_sentence_on_the_page(page, address):
    page.goto(address)
    page.locator("#prompt").fill("  ")
    page.locator("#go").click()
    page.locator("#note", has_text="prompt: expected a text, got none").wait_for()
    assert page.locator("#go").inner_text() == "Answer"


def test_stop_ends_the_replies(page, address, speaker, monkeypatch):
    monkeypatch.setattr(web, "NEW_TOKENS", 400)
    page.goto(address)
    page.locator("#prompt").fill(QUESTION)
    page.locator("#go").click()
    page.locator("#reply1:not(:empty)").wait_for()  # it has started to stream
    page.locator("#go", has_text="Stop").click()
    page.locator("#note", has_text="stopped").wait_for()
    assert page.locator("#go").inner_text() == "Answer"
    assert speaker._busy.acquire(timeout=120), "the model stops too"
    speaker._busy.release()


# --- its server -----------------------------------------------------------------------------------


def ask(address, path, **headers):
    return urllib.request.urlopen(
        urllib.request.Request(address + path, headers=headers), timeout=120
    )


def events(address, **query):
    with ask(address, f"/reply?{urllib.parse.urlencode(query)}") as answer:
        assert answer.headers["Content-Type"] == "text/event-stream"
        lines = answer.read().decode().splitlines()
    return [json.loads(line.removeprefix("data: ")) for line in lines if line]


def test_both_replies_come_at_once_and_are_those_of_single_requests(address, replies):
    found = events(address, prompt=QUESTION, strength=STRENGTH)
    assert found[-1] == {"done": True}
    pieces, final = found[:-2], found[-2]
    for side, reply in enumerate(replies):
        assert "".join(p["text"] for p in pieces if p["side"] == side) == reply.text
        assert [token[0] for token in final["tokens"][side]] == [text for text, _ in reply.tokens]
    sides = [piece["side"] for piece in pieces]
    assert sides[:4] in ([0, 1, 0, 1], [1, 0, 1, 0]), "neither waits for the other"
    alphas = [alpha for _, alpha in replies[1].tokens]
    said = [float(token[1]) for token in final["tokens"][1]]
    assert said == pytest.approx(alphas, abs=0.006)


def test_what_it_refuses(address, speaker):
    assert events(address, prompt="")[0] == {"error": "prompt: expected a text, got none"}
    (error, done) = events(address, prompt="word " * 3000)
    assert error["error"].startswith("prompt: expected at most ") and done == {"done": True}
    for path, code in (("/reply?prompt=a&strength=9", 400), ("/reply?strength=x", 400),
                       ("/reply?prompt=a&strength=nan", 400), ("/other", 404)):  # fmt: skip
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask(address, path)
        assert refused.value.code == code
        refused.value.close()


def test_a_page_of_another_name_is_refused(address):
    """Otherwise a site whose name resolves to this machine could read replies (DNS rebinding)."""
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(address, "/", Host="evil.example:80")
    assert refused.value.code == 403
    refused.value.close()
    with ask(address, "/") as answer:
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]


def test_a_port_in_use_is_one_sentence_before_any_work(heads, capsys):
    with socket.socket() as taken:
        taken.bind((web.HOST, 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert cli.main(["demo", "--web", "--output", "none-there", "--port", port]) == 2
    error = capsys.readouterr().err
    assert error == f"dualhead demo: --port: expected a free port, got {port}, which is in use\n"
    assert not os.path.exists("none-there")
    assert cli.main(["demo", "--port", "1"]) == 2
    assert capsys.readouterr().err == "dualhead demo: --port: expected only with --web\n"


def test_the_command_serves_heads_that_are_there(heads):
    command = [sys.executable, "-m", "dualhead_ext", "demo", "--web", "--output", str(heads)]
    with subprocess.Popen(
        [*command, "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as started:
        try:
            line = started.stdout.readline()
            assert line.startswith(f"{heads}: http://127.0.0.1:"), started.stderr.read()
            with ask(line.split()[1], "/") as answer:
                assert b"with the reward head" in answer.read()
        finally:
            started.terminate()
            started.wait()
