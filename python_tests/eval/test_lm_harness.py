# SPDX-License-Identifier: Apache-2.0
"""Heads in lm-evaluation-harness, offline, on a task of two files.

The figures must be those of the model's own logits. The tests are skipped if the harness is not
installed; `make test-lm-eval` installs it.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from build_backend import ROOT
from transformers import AutoTokenizer

import dualhead_ext as dh

pytest.importorskip("lm_eval", reason="lm-eval is not installed: make test-lm-eval")

import lm_eval
from lm_eval.tasks import TaskManager

from dualhead_ext.eval import lm_harness

STRENGTH = 1.5
ROWS = [
    {"question": "The sky is", "choices": [" blue", " a kind of bread"], "answer": 0},
    {"question": "To bake bread, you need", "choices": [" a car", " flour and water"], "answer": 1},
    {"question": "I am", "choices": [" not", " very sorry to hear that you are ill"], "answer": 1},
]
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
CHOICE = """\
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
"""
WRITE = """\
output_type: generate_until
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, rest in (("local_choice", CHOICE), ("local_write", WRITE)):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, file=file) + rest)
    return folder


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm-eval") / "heads"
    model = dh.DualHeadForCausalLM.from_backbone("embedded", gate="linear", trial=False)
    generator = torch.Generator().manual_seed(1)
    head = model.lm_head_module
    with torch.no_grad():
        for parameter in (*head.reward_head.parameters(), *head.gate.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def found(heads, tasks):
    """The harness's samples for each task."""
    return lm_eval.simple_evaluate(
        model="dualhead",
        model_args=f"pretrained={heads},strength={STRENGTH},device=cpu",
        tasks=["local_choice", "local_write"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        batch_size=2,
        bootstrap_iters=0,
    )


def log_likelihood(model, tokenizer, text, continuation, strength):
    """The sum over the continuation's tokens, with one forward pass for each token."""
    whole = tokenizer(text + continuation)["input_ids"]
    start, total = len(tokenizer(text)["input_ids"]), 0.0
    for end in range(start, len(whole)):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([whole[:end]]), strength=strength).logits[0, -1]
        total += float(torch.log_softmax(logits.double(), -1)[whole[end]])
    return total


def test_log_likelihoods_are_the_mixtures(found, heads):
    model = dh.DualHeadForCausalLM.from_pretrained(heads)
    tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
    samples = found["samples"]["local_choice"]
    assert len(samples) == len(ROWS)
    for sample in samples:
        row = ROWS[sample["doc_id"]]
        for choice, (value, _) in zip(row["choices"], sample["filtered_resps"], strict=True):
            ours = log_likelihood(model, tokenizer, row["question"], choice, STRENGTH)
            plain = log_likelihood(model, tokenizer, row["question"], choice, 0.0)
            assert float(value) == pytest.approx(ours, abs=2e-3)
            assert abs(ours - plain) > 0.01, "the strength reaches the model"


def test_texts_are_decoded_from_the_mixture(found, heads):
    model = dh.DualHeadForCausalLM.from_pretrained(heads)
    tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
    for sample in found["samples"]["local_write"]:
        inputs = tokenizer(ROWS[sample["doc_id"]]["question"], return_tensors="pt")
        out = model.generate(**inputs, strength=STRENGTH, max_new_tokens=6, do_sample=False)
        text = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert sample["resps"][0][0] == text.split("\n")[0]


def test_the_settings_stand_beside_the_figures(found):
    assert found["config"]["dualhead_controls"] == {"strength": STRENGTH}


def test_its_command_line_knows_the_name(heads, tasks, tmp_path):
    command = [sys.executable, "-m", "dualhead_ext.eval.lm_harness", "run", "--model", "dualhead"]
    command += ["--model_args", f"pretrained={heads},strength=0", "--device", "cpu"]
    command += ["--tasks", "local_choice", "--include_path", str(tasks)]
    done = subprocess.run(
        [*command, "--output_path", str(tmp_path)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "local_choice" in done.stdout
    (file,) = tmp_path.rglob("results_*.json")
    assert json.loads(file.read_text())["config"]["dualhead_controls"] == {"strength": 0}


def test_the_entry_point_of_later_versions():
    place = f"{lm_harness.DualHeadLM.__module__}:{lm_harness.DualHeadLM.__name__}"
    declared = f'[project.entry-points."lm_eval.models"]\ndualhead = "{place}"\n'
    assert declared in (ROOT / "pyproject.toml").read_text()
    assert lm_eval.api.registry.get_model("dualhead") is lm_harness.DualHeadLM


def test_a_control_out_of_range_is_named(heads):
    model = lm_harness.DualHeadLM(str(heads), strength=-1.0, device="cpu")
    with pytest.raises(ValueError, match="strength"):
        model._model_call(torch.tensor([[1, 2, 3]]))
