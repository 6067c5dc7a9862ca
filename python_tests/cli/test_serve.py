# SPDX-License-Identifier: Apache-2.0
"""`dualhead serve` without vLLM: concurrent clients get the texts that `generate()` writes."""

import asyncio
import json
import socket
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import transformers
from command_line import run
from packaging.version import Version
from serving_cases import (
    WRONG,
    Server,
    answered,
    check,
    events,
    expected,
    gated,
    jobs,
    prompts,
    request,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from dualhead_ext.cli.batching_engine import BatchingEngine
from dualhead_ext.data import embedded_backbone_path
from dualhead_ext.model import continuous_batching
from dualhead_ext.model.continuous_batching import OLDEST
from dualhead_ext.vllm.answers import AlphaInAnswer
from dualhead_ext.vllm.server import environment

pytest.importorskip("aiohttp", reason="the extra serve is not installed")
SUPPORTED = Version(transformers.__version__) >= Version(OLDEST)
supported = pytest.mark.skipif(not SUPPORTED, reason="needs transformers 5.23")
K = 2
ENDS = (prompts()[1], {"strength": 2.0})
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
TEMPLATE += (
    "{% if messages[0]['role'] == 'nobody' %}{{ raise_exception('no such role') }}{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Heads, on a copy of the embedded backbone whose tokenizer has a chat template."""
    folder = tmp_path_factory.mktemp("serve")
    backbone = AutoModelForCausalLM.from_pretrained(embedded_backbone_path(), dtype=torch.float32)
    backbone.save_pretrained(folder / "backbone")
    tokenizer = AutoTokenizer.from_pretrained(embedded_backbone_path())
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "backbone")
    return folder


@pytest.fixture(scope="module")
def model(folder):
    """Its end token is one that a greedy text holds."""
    own = AutoModelForCausalLM.from_pretrained(folder / "backbone", dtype=torch.float32)
    model = gated(own, num_objectives=K)
    model.generation_config.eos_token_id = expected(model, [ENDS])[0][0][5]
    model.generation_config.save_pretrained(folder / "backbone")
    model.save_pretrained(folder / "heads")
    return model


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder / "backbone")


@pytest.fixture(scope="module")
def server(model, folder):
    options = ("--engine", "transformers", "--positions", "4096")
    server = Server(folder / "heads", folder / "log", *options)
    try:
        yield server.wait()
    finally:
        server.kill()


@supported
def test_twelve_clients(server, model):
    work = jobs(K)[::2]
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda job: server.post("/v1/completions", request(*job)), work))
    check([answered(answer) for answer in found], expected(model, work))


@supported
def test_a_sampled_text_depends_on_its_seed_alone(server, model):
    ids = prompts()[1]
    filters = [{"top_p": 0.9}, {"top_k": 3, "min_p": 0.02}, {"temperature": 3.0}]
    bodies = [
        request(ids, {"strength": 1.5}) | {"temperature": 1.1, "seed": 7} | own for own in filters
    ]
    with ThreadPoolExecutor(4) as pool:
        greedy = pool.submit(server.post, "/v1/completions", request(ids, {}))
        found = list(pool.map(lambda body: server.post("/v1/completions", body), bodies))
        check([answered(greedy.result())], expected(model, [(ids, {})]))
    texts = []
    for own in filters:
        out = model.generate(
            torch.tensor([ids]),
            max_new_tokens=16,
            do_sample=True,
            eos_token_id=None,
            pad_token_id=0,
            seeds=torch.tensor([7]),
            strength=1.5,
            **{"temperature": 1.1, "top_k": 0} | own,
        )
        texts.append(out[0, len(ids) :].tolist())
    assert [answered(answer)[0] for answer in found] == texts
    assert len(set(map(tuple, texts))) > 1  # the filters have an effect
    copies = server.post("/v1/completions", bodies[0] | {"n": 2, "vllm_xargs": {"strength": 1.5}})
    assert [choice["index"] for choice in copies["choices"]] == [0, 1]
    assert copies["choices"][0]["token_ids"] == texts[0] != copies["choices"][1]["token_ids"]
    assert copies["usage"] == {"prompt_tokens": 31, "completion_tokens": 32, "total_tokens": 63}


@supported
def test_a_stream_is_the_whole_text_and_ends_with_alpha(server):
    ids, own = jobs(K)[8]
    whole = server.post("/v1/completions", request(ids, own))
    body = request(ids, own) | {"stream": True, "stream_options": {"include_usage": True}}
    with server.open("/v1/completions", body) as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        *parts, alpha, usage = events(answer)
    choices = [event["choices"][0] for event in parts]
    assert len(choices) > 10  # piece by piece
    assert "".join(choice["text"] for choice in choices) == whole["choices"][0]["text"]
    assert [t for c in choices for t in c["token_ids"]] == whole["choices"][0]["token_ids"]
    assert [c["finish_reason"] for c in choices] == [None] * (len(choices) - 1) + ["length"]
    assert alpha["choices"][0]["alpha"] == pytest.approx(whole["choices"][0]["alpha"], abs=1e-5)
    assert usage["usage"] == whole["usage"] and usage["choices"] == []


@supported
def test_chat_is_the_template_and_stop_cuts_the_text(server, model, tokenizer):
    messages = [{"role": "user", "content": [{"type": "text", "text": "The weather"}]}]
    body = {"messages": messages, "max_tokens": 24, "temperature": 0, "vllm_xargs": {"strength": 2}}
    answer = server.post("/v1/chat/completions", body)
    ids = tokenizer("user: The weather\n", return_tensors="pt", add_special_tokens=False)[
        "input_ids"
    ]
    out = model.generate(ids, max_new_tokens=24, do_sample=False, strength=2.0)[0, ids.shape[1] :]
    message = answer["choices"][0]["message"]
    assert message == {"role": "assistant", "content": tokenizer.decode(out, True)}
    assert answer["usage"]["prompt_tokens"] == ids.shape[1] and "alpha" not in answer["choices"][0]
    text = message["content"]
    stop = text[10:14]
    cut = server.post("/v1/chat/completions", body | {"stop": ["never said", stop]})["choices"][0]
    assert cut["message"]["content"] == text[: text.index(stop)]
    assert cut["finish_reason"] == "stop"
    with server.open("/v1/chat/completions", body | {"stop": stop, "stream": True}) as stream:
        deltas = [event["choices"][0]["delta"] for event in events(stream)]
    assert deltas[0]["role"] == "assistant"
    assert "".join(delta.get("content", "") for delta in deltas) == text[: text.index(stop)]


@supported
def test_a_text_ends_at_its_end_token(server, model):
    tokens, alpha = expected(model, [ENDS])[0]
    end = tokens.index(model.generation_config.eos_token_id) + 1
    answer = server.post("/v1/completions", request(*ENDS) | {"ignore_eos": False})
    found, own = answered(answer)
    assert found == tokens[:end] and answer["choices"][0]["finish_reason"] == "stop"
    torch.testing.assert_close(own, alpha[:end], rtol=0, atol=1e-4)


@supported
def test_wrong_requests_are_400_beside_good_ones(server, model):
    work = jobs(K)[:6]
    bodies = [({"prompt": [5], "vllm_xargs": own}, message) for own, message in WRONG]
    bodies += [
        ({"prompt": [5], "max_token": 3}, "did you mean max_tokens?"),
        ({"prompt": [5], "max_tokens": 0}, "max_tokens must be a whole number"),
        ({"prompt": [5] * 400, "max_tokens": 10**6}, "max_tokens must be at most"),
        ({"prompt": [5] * 5000}, "expected at most"),
        ({"prompt": [4096]}, "token ids must be in [0, 4095]"),
        ({"prompt": [[5], "a"], "vllm_xargs": {"return_alpha": True}}, "needs a request for one"),
        ({"prompt": []}, "prompt must be a text"),
        ({"prompt": [[]]}, "prompt must be a text"),
        ({}, "prompt must be a text"),
        ({"prompt": [5], "temperature": "warm"}, "temperature must be a number >= 0"),
        ({"prompt": [5], "top_p": 0}, "top_p must be a number in (0, 1]"),
        ({"prompt": [5], "n": 1000}, "n must be a whole number in [1, 128]"),
        ({"prompt": [5], "stop": 3}, "stop must be a text"),
        ({"prompt": [5], "stream": "yes"}, "stream must be true or false"),
        ({"prompt": [5], "logprobs": 1}, "logprobs is not supported by this engine"),
        ({"prompt": [5], "vllm_xargs": [1]}, "vllm_xargs must be an object"),
    ]
    with ThreadPoolExecutor(12) as pool:
        good = [pool.submit(server.post, "/v1/completions", request(*job)) for job in work]
        bad = [pool.submit(server.refusal, "/v1/completions", body) for body, _ in bodies]
        for one, (_, message) in zip(bad, bodies, strict=True):
            code, found = one.result()
            assert code == 400 and message in found
        check([answered(one.result()) for one in good], expected(model, work))
    chats = (
        ([], "messages must be a list"),
        (["hello"], "must have a role"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "content must be text"),
        ([{"role": "nobody", "content": "x"}], "the chat template refuses it: no such role"),
    )
    for messages, message in chats:
        code, found = server.refusal("/v1/chat/completions", {"messages": messages})
        assert code == 400 and message in found
    assert server.refusal("/v1/completions", {"prompt": [5], "model": "other"})[0] == 404
    assert server.refusal("/v1/embeddings", {})[0] == 404


@supported
def test_the_models_and_a_body_that_is_not_json(server):
    with server.open("/v1/models") as answer:
        own = json.load(answer)["data"]
    assert [(model["id"], model["max_model_len"]) for model in own] == [("gated", 1024)]
    raw = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: {}\r\n"
    raw += "Content-Length: 1\r\n\r\n{{"
    for kind, message in (("application/json", "is not JSON"), ("text/plain", "expected applic")):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(raw.format(kind).encode())
            answer = b"".join(iter(lambda: connection.recv(4096), b"")).decode()
        assert answer.startswith("HTTP/1.1 400") and message in answer


@supported
def test_a_client_that_goes_away_in_mid_stream_harms_nobody(server, model):
    ids, own = jobs(K)[2]
    body = request(ids, own) | {"stream": True, "max_tokens": 700}
    for _ in range(8):  # together they would fill the cache, and the last would wait for it
        with server.open("/v1/completions", body) as answer:
            assert answer.readline().startswith(b"data: ")
    found = server.post("/v1/completions", request(ids, own))
    check([answered(found)], expected(model, [(ids, own)]))


def test_what_the_command_refuses(model, folder, capsys):
    heads = str(folder / "heads")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        for words, message in (
            (["--port", port], f"--port: expected a free port of 127.0.0.1, got {port}, which is"),
            (["--host", "nowhere.invalid"], "--host: expected an address, got nowhere.invalid"),
            (["--", "--max-model-len", "64"], "options after --: only --engine vllm takes it"),
        ):
            assert run("serve", heads, "--engine", "transformers", *words) == 2
            said = capsys.readouterr().err
            assert message in said and len(said.strip().splitlines()) == 1
    assert run("serve", heads, "--positions", "3") == 2
    assert "--positions" in capsys.readouterr().err


@supported
def test_sigterm_lets_requests_finish(server, model):  # keep this test last: it stops the server
    ids, own = jobs(K)[2]
    body = request(ids, own) | {"stream": True, "max_tokens": 40}
    with server.open("/v1/completions", body) as answer:
        first = answer.readline()
        assert server.process.poll() is None
        server.process.terminate()
        found = events([first, *answer])
    assert server.process.wait(600) == 0
    assert sum(len(event["choices"][0].get("token_ids") or ()) for event in found) == 40
    with pytest.raises(urllib.error.URLError):
        server.open("/health")
    log = server.log.read_text()
    assert "Traceback" not in log and "transformers' continuous batching" in log


def test_vllms_cache_on_a_cpu(monkeypatch):
    name = "VLLM_CPU_KVCACHE_SPACE"
    monkeypatch.delenv(name, raising=False)
    assert environment(["--dtype", "float32"])[name] == "4"
    for option in ("--kv-cache-memory-bytes", "--gpu_memory_utilization=0.5"):
        assert name not in environment(["--dtype", "float32", option])
    monkeypatch.setenv(name, "9")
    assert environment([])[name] == "9"


@pytest.mark.parametrize("ended", ["silently", "with an error"])
def test_alpha_is_null_if_vllms_engine_has_ended(ended):
    """After SIGTERM, vLLM's engine may end between the last token and the question for alpha."""

    class Engine:
        is_running = False

        async def collective_rpc(self, method, args):
            if ended == "with an error":
                raise RuntimeError("the engine is dead")
            await asyncio.Event().wait()

    sent = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        body = json.dumps({"choices": [{"text": "good", "token_ids": [5]}]}).encode()
        await send({"type": "http.response.body", "body": body})

    async def receive():
        body = json.dumps({"prompt": "a", "vllm_xargs": {"return_alpha": True}}).encode()
        return {"type": "http.request", "body": body}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    scope["app"] = SimpleNamespace(state=SimpleNamespace(engine_client=Engine()))
    asyncio.run(asyncio.wait_for(AlphaInAnswer(app)(scope, receive, send), 60))
    assert json.loads(sent[-1]["body"])["choices"] == [{"text": "good", "alpha": None}]


def test_an_older_transformers_is_refused(monkeypatch):
    """By its version, before anything is imported that it does not have."""
    from transformers.generation.continuous_batching import model_runner

    monkeypatch.setattr(continuous_batching, "OLDEST", "99.0")
    monkeypatch.delattr(model_runner, "infer_max_single_request_tokens", raising=False)
    with pytest.raises(NotImplementedError, match=r"needs transformers 99\.0 or newer, got"):
        BatchingEngine(None, None)
