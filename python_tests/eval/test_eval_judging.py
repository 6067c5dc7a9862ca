# SPDX-License-Identifier: Apache-2.0
"""Win rates against known values, and the judge behind an endpoint against a local server."""

import json
import math
import random
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import ClassVar

import pytest
import torch

from dualhead_ext.eval import judging


def longer(prompt, first, second):
    return 0.5 if len(first) == len(second) else float(len(first) > len(second))


def test_places_cancel():
    assert judging.both_orders(lambda *_: 1.0, "", "a", "b") == 0.5
    assert judging.both_orders(longer, "", "aa", "b") == 1.0
    assert judging.both_orders(lambda p, x, y: 0.8 if x == "a" else 0.4, "", "a", "b") == (
        pytest.approx(0.7)
    )
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        judging.both_orders(lambda *_: 1.5, "", "a", "b")


def test_wins_ties_and_losses():
    a, b = ["xxx", "x", "xx", "xxxx"], ["x", "xx", "xx", "x"]
    found = judging.compare(longer, ["p"] * 4, a, b)
    assert (found.wins, found.ties, found.losses) == (2, 1, 1)
    assert found.win_rate.value == pytest.approx(0.625)
    assert found.win_rate.low <= 0.625 <= found.win_rate.high
    mirrored = judging.compare(longer, ["p"] * 4, b, a)
    assert mirrored.win_rate.value == pytest.approx(0.375)
    for wrong in (([], [], []), (["p"], ["a"], [])):
        with pytest.raises(ValueError, match="must have one length and not be empty"):
            judging.compare(longer, *wrong)


def test_length_controlled_rate_against_torchs_optimizer(seed):
    generator = random.Random(seed)
    differences = [generator.gauss(30, 80) for _ in range(200)]
    verdicts = [
        float(generator.random() < 1 / (1 + math.exp(-(0.3 + x / 60)))) for x in differences
    ]
    x = torch.tensor(differences, dtype=torch.float64)
    x = torch.tanh(x / x.std(correction=0))
    y = torch.tensor(verdicts, dtype=torch.float64)
    weights = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=500, tolerance_grad=1e-12)

    def closure():
        optimizer.zero_grad()
        logits = weights[0] + weights[1] * x
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, y, reduction="sum")
        loss = loss + 0.5 * judging._RIDGE * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    got = judging.length_controlled_win_rate(verdicts, differences)
    assert got == pytest.approx(torch.sigmoid(weights[0]).item(), abs=1e-6)


def test_a_judge_of_length_alone_is_seen_through(seed):
    """A often wins because it is longer. At equal lengths it would win half of the comparisons."""
    generator = random.Random(seed)
    differences = [generator.gauss(50, 60) for _ in range(2000)]
    verdicts = [
        float(generator.random() < 1 / (1 + math.exp(-4 * math.tanh(x / 60)))) for x in differences
    ]
    assert sum(verdicts) / 2000 > 0.7
    assert judging.length_controlled_win_rate(verdicts, differences) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("verdict, limits", [(1.0, (0.97, 1.0)), (0.5, (0.5, 0.5))])
def test_length_controlled_rate_of_equal_lengths_is_the_win_rate(verdict, limits):
    got = judging.length_controlled_win_rate([verdict] * 100, [0] * 100)
    assert limits[0] - 1e-9 <= got <= limits[1] + 1e-9


def test_bootstrap_covers_as_often_as_it_says(seed):
    generator = random.Random(seed)
    hits = 0
    for trial in range(200):
        rows = [float(generator.random() < 0.6) for _ in range(80)]
        found = judging.bootstrap(rows, lambda r: sum(r) / len(r), resamples=200, seed=trial)
        hits += found.low <= 0.6 <= found.high
    assert 0.88 * 200 <= hits <= 200
    assert judging.bootstrap([1.0] * 9, lambda r: sum(r) / len(r)) == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="not be empty"):
        judging.bootstrap([], len)


def test_reward_judge():
    judge = judging.reward_judge(lambda prompt, response: len(response) - len(prompt))
    assert judge("p", "long", "x") == 1.0
    assert judge("p", "x", "long") == 0.0
    assert judge("p", "xy", "zz") == 0.5


class _Server(BaseHTTPRequestHandler):
    """Sends the next one of `answers`, and records the requests."""

    answers: ClassVar[list] = []
    requests: ClassVar[list] = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.requests.append((self.path, dict(self.headers), body))
        answer = self.answers.pop(0)
        status, text = answer if isinstance(answer, tuple) else (200, answer)
        data = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
        self.send_response(status)
        self.end_headers()
        self.wfile.write(data if text is not None else b"not json")

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(_Server, "answers", [])
    monkeypatch.setattr(_Server, "requests", [])
    running = HTTPServer(("127.0.0.1", 0), _Server)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}/v1"
    running.shutdown()
    thread.join()
    running.server_close()


def test_endpoint_judge(server):
    judge = judging.EndpointJudge(f"{server}/", "some-model", api_key="key")
    _Server.answers += ["1", " 2. ", '"Tie"']
    assert [judge("the prompt", "text A", "text B") for _ in range(3)] == [1.0, 0.0, 0.5]
    path, headers, body = _Server.requests[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer key"
    assert body["model"] == "some-model"
    question = body["messages"][0]["content"]
    assert 0 < question.index("the prompt") < question.index("text A") < question.index("text B")


@pytest.mark.parametrize("answer", ["both are fine", "", (500, "1"), (200, None), "12"])
def test_an_answer_that_is_no_verdict_is_not_a_tie(server, answer):
    _Server.answers.append(answer)
    with pytest.raises(RuntimeError, match="EndpointJudge"):
        judging.EndpointJudge(server, "m")("p", "a", "b")


def test_endpoint_judge_refuses():
    with pytest.raises(ValueError, match="http:// or https://"):
        judging.EndpointJudge("file:///etc/passwd", "m")
    with pytest.raises(RuntimeError, match="no answer"):
        judging.EndpointJudge("http://127.0.0.1:9/v1", "m", timeout=2)("p", "a", "b")
