# SPDX-License-Identifier: Apache-2.0
"""vLLM with the gated head in several processes: tensor parallelism, and the server."""

import json
import subprocess
import sys
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm.entrypoints", reason="vLLM is not in this environment: make test-vllm")

import vllm_cases  # noqa: F401  sets the environment of the processes
from serving_cases import (
    NEW,
    PATIENCE,
    WRONG,
    Server,
    answered,
    check,
    events,
    expected,
    gated,
    jobs,
    request,
    served,
)

TESTS = Path(__file__).resolve().parent.parent
K = 2


@pytest.fixture(scope="module")
def model():
    return gated(num_objectives=K)


@pytest.fixture(scope="module", params=["probs", pytest.param("logits", marks=pytest.mark.slow)])
def parallel(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    config = {"probs": {"reward_head": "full"}, "logits": {"reward_head": "lowrank"}}
    model = gated(mix=request.param, num_objectives=K, **config[request.param])
    return model, served(model, folder), folder


def results_of(script, folder, out):
    """What a script of the tests' folder writes to a file."""
    done = subprocess.run(
        [sys.executable, str(TESTS / script), str(folder), str(out), str(K)],
        capture_output=True, text=True, cwd=TESTS, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


def test_two_processes_share_the_vocabulary(parallel):
    model, folder, out = parallel
    found = results_of("vllm_parallel.py", folder, out / "a.json")
    check([(tokens, torch.tensor(alpha)) for tokens, alpha in found], expected(model, jobs(K)))


def test_the_second_runner_in_tritons_interpreter(model, tmp_path):
    found = results_of("vllm_second_runner.py", served(model, tmp_path), tmp_path / "a.json")
    assert found["runner"] == "vllm.v1.worker.cpu.model_runner"
    wanted = expected(model, jobs(K), NEW // 2)
    for name, own in (("found", wanted), ("again", wanted[14:17])):
        check([(tokens, torch.tensor(alpha)) for tokens, alpha in found[name]], own)
    assert found["hits"] > 0
    assert "got strenght; did you mean strength" in found["refused"]


# --- the server -----------------------------------------------------------------------------------


OPTIONS = ["--", "--dtype", "float32", "--max-model-len", "320", "--enforce-eager"]
OPTIONS += ["--max-num-batched-tokens", "64", "--max-num-seqs", "16"]
OPTIONS += ["--kv-cache-memory-bytes", str(2**26)]


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    model.save_pretrained(folder / "heads")  # served from a folder of links
    template = folder / "t.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    options = [*OPTIONS, "--chat-template", str(template)]
    server = Server(folder / "heads", folder / "log", *options)
    try:
        yield server.wait()
    finally:
        server.kill()


def test_twelve_clients(server, model):
    work = jobs(K)
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda job: server.post("/v1/completions", request(*job)), work))
    check([answered(answer) for answer in found], expected(model, work))


def test_a_stream_ends_with_alpha(server):
    ids, own = jobs(K)[8]
    whole = server.post("/v1/completions", request(ids, own))["choices"][0]
    with server.open("/v1/completions", request(ids, own) | {"stream": True}) as answer:
        choices = [event["choices"][0] for event in events(answer) if event["choices"]]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    assert choices[-1]["alpha"] == pytest.approx(whole["alpha"], abs=1e-4)
    assert sum(len(choice.get("token_ids") or ()) for choice in choices) == len(whole["alpha"])


def test_chat_and_what_was_not_asked_for_is_not_there(server):
    body = {"messages": [{"role": "user", "content": "The weather"}], "max_tokens": 6}
    body |= {"temperature": 0.0}
    plain = server.post("/v1/chat/completions", body | {"vllm_xargs": {"strength": 0.0}})
    assert "alpha" not in plain["choices"][0]
    asked = body | {"vllm_xargs": {"strength": 0.0, "return_alpha": True}}
    answer = server.post("/v1/chat/completions", asked)
    assert answer["choices"][0]["message"] == plain["choices"][0]["message"]
    assert answer["choices"][0]["alpha"] == [0.0] * answer["usage"]["completion_tokens"]
    assert not answer["choices"][0].get("token_ids") and not answer.get("prompt_token_ids")
    with server.open("/v1/chat/completions", asked | {"stream": True}) as stream:
        found = events(stream)
    assert found[-1]["choices"][0]["alpha"] == answer["choices"][0]["alpha"]
    assert found[-1]["id"] == found[0]["id"] and not any("token_ids" in str(e) for e in found)


def test_wrong_requests_are_400_beside_good_ones(server, model):
    work = jobs(K)[:6]
    with ThreadPoolExecutor(12) as pool:
        good = [pool.submit(server.post, "/v1/completions", request(*job)) for job in work]
        bad = [
            pool.submit(server.refusal, "/v1/completions", {"prompt": [5], "vllm_xargs": own})
            for own, _ in WRONG
        ]
        for one, (_, message) in zip(bad, WRONG, strict=True):
            code, found = one.result()
            assert code == 400 and message in found
        check([answered(one.result()) for one in good], expected(model, work))
    two = {"prompt": ["a", "b"], "vllm_xargs": {"return_alpha": True}}
    assert server.refusal("/v1/completions", two)[0] == 400


def test_a_client_that_goes_away_in_mid_stream_harms_nobody(server, model):
    ids, own = jobs(K)[2]
    body = request(ids, own) | {"stream": True, "max_tokens": 200}
    with server.open("/v1/completions", body) as answer:
        assert answer.readline().startswith(b"data: ")
    found = server.post("/v1/completions", request(ids, own))
    check([answered(found)], expected(model, [(ids, own)]))


def test_the_port_in_use_is_one_sentence(server):
    command = [sys.executable, "-m", "dualhead_ext", "serve", "heads", "--port", str(server.port)]
    folder = server.log.parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 2 and "which is in use" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_sigterm_lets_requests_finish(server):  # keep this test last: it stops the server
    ids, own = jobs(K)[2]
    body = request(ids, own) | {"stream": True, "max_tokens": 200}
    with server.open("/v1/completions", body) as answer:
        first = answer.readline()
        assert server.process.poll() is None
        server.process.terminate()
        found = events([first, *answer])
    assert server.process.wait(PATIENCE) == 0
    choices = [event["choices"][0] for event in found if event["choices"]]
    assert sum(len(choice.get("token_ids") or ()) for choice in choices) == 200
    assert "length" in [choice["finish_reason"] for choice in choices]
    alpha = choices[-1]["alpha"]  # None if the engine was faster to end
    assert alpha is None or len(alpha) == 200
    with pytest.raises(urllib.error.URLError):
        server.open("/health")
    assert "Traceback" not in server.log.read_text()
