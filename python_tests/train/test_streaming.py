# SPDX-License-Identifier: Apache-2.0
"""Training on an IterableDataset gives the same heads as rows in memory.

It resumes to the bit, and each process has its own rows.
"""

import json
import shutil

import pytest
import torch
from streaming_cases import COUNT, RUN, InOrder, Stream
from tiny_models import make_model
from torchrun import run_in_two_processes
from trainer_cases import arguments, heads, history, make_trainer, pairs, same

import dualhead_ext as dh


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    trainer = make_trainer(folder, data=Stream(), **RUN)
    trainer.train()
    return folder, heads(trainer.model), history(trainer)


def test_the_same_heads_as_rows_in_memory(tmp_path, whole):
    stream = Stream()
    rows = [stream.rows[i] for epoch in range(2) for i in stream.order(epoch)]
    trainer = make_trainer(
        tmp_path, data=InOrder(rows), train_sampling_strategy="sequential", **RUN
    )
    trainer.train()
    assert same(heads(trainer.model), whole[1])


@pytest.mark.parametrize("step", [1, 3])
def test_resumed_is_uninterrupted_to_the_bit(tmp_path, whole, step):
    folder, expected, numbers = whole
    shutil.copytree(folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    trainer = make_trainer(tmp_path, data=Stream(), **RUN)
    trainer.train(resume_from_checkpoint=True)
    assert same(heads(trainer.model), expected) and history(trainer) == numbers


def test_another_stream_is_not_resumed(tmp_path, whole):
    shutil.copytree(whole[0] / "checkpoint-1", tmp_path / "checkpoint-1")
    for data in (Stream(pairs(COUNT, seed=1)), pairs(COUNT)):
        with pytest.raises(ValueError, match=r"same data in the same order: .*rows_sha256 was"):
            make_trainer(tmp_path, data=data, **RUN).train(resume_from_checkpoint=True)


@pytest.mark.slow
def test_two_processes_share_the_rows(tmp_path):
    run_in_two_processes("ddp_streaming.py", tmp_path)
    rows = pairs(COUNT)
    seen = [json.loads((tmp_path / f"rows-{rank}.json").read_text()) for rank in range(2)]
    for rank, part in enumerate(seen):
        own = [*Stream().order(0)[rank::2], *Stream().order(1)[rank::2]]
        assert part == [rows[i] for i in own[:6]]
    # Process p gets row i of each pass if i = p mod 2. There are ten rows, and a step takes eight,
    # so that a pass ends within a step. One process takes the same steps over the same rows.
    order = [[i for epoch in range(4) for i in Stream().order(epoch)[rank::2]] for rank in range(2)]
    data = [rows[own[start + i]] for start in range(0, 20, 4) for own in order for i in range(4)]
    trainer = make_trainer(
        tmp_path / "one",
        data=InOrder(data),
        train_sampling_strategy="sequential",
        **RUN | {"gradient_accumulation_steps": 4},
    )
    trainer.train()
    expected = json.loads((tmp_path / "result.json").read_text())["heads"]
    for name, value in heads(trainer.model).items():
        torch.testing.assert_close(torch.tensor(expected[name]), value, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def text():
    transformers = pytest.importorskip("transformers")
    path = dh.data.embedded_backbone_path()
    return (
        transformers.AutoTokenizer.from_pretrained(path),
        dh.DualHeadForCausalLM.from_backbone("embedded"),
        list(dh.data.load_preference_data("embedded", "test"))[:6],
    )


@pytest.mark.slow
def test_text_is_tokenised_as_it_is_read(tmp_path, text, caplog):
    datasets = pytest.importorskip("datasets", reason="the extra data is not installed")
    tokenizer, model, rows = text
    rows = [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in rows]
    rows.insert(2, rows[0] | {"chosen": "", "rejected": "x"})
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset()
    trainer = dh.DualHeadTrainer(
        model=model,
        args=arguments(tmp_path, preset="default", cache_hidden="auto", max_steps=2, log_kl=True),
        train_dataset=stream,
        processing_class=tokenizer,
    )
    expected = dh.data.collate.tokenize_pairs(dh.data.preference_rows(rows), tokenizer)
    assert trainer.train_dataset.first(6) == expected
    assert "row 2 is skipped, as others like it: empty response" in caplog.text
    trainer.train()
    assert model.dual_head_config.kl_curve is not None
    for data, own, problem in (
        (stream, None, "needs processing_class"),
        (Stream([{"a": 1}]), tokenizer, "train_dataset, row 0: expected columns chosen"),
        (Stream([{"chosen": "a", "rejected": "a"}]), tokenizer, "a usable row for each of 1"),
    ):
        with pytest.raises(ValueError, match=problem):
            dh.DualHeadTrainer(
                model=model,
                args=arguments(tmp_path, max_steps=2, preset="default"),
                train_dataset=data,
                processing_class=own,
            )


def test_what_a_stream_cannot_be_used_for(tmp_path):
    def make(data=None, eval_data=None, **changes):
        return make_trainer(tmp_path, data=data or Stream(), eval_data=eval_data, **RUN | changes)

    for changes, problem in (
        ({"max_steps": -1}, "max_steps must be given for a stream"),
        ({"cache_hidden": "memory"}, "cache_hidden='memory' needs a train_dataset with a length"),
        ({"dataloader_num_workers": 1}, "dataloader_num_workers must be 0 for a stream"),
        ({"eval_data": Stream()}, r"eval_dataset must have a length, got a stream; take a part"),
    ):
        with pytest.raises(ValueError, match=problem):
            trainer = make(**changes)
            trainer.train()
    wrong = pairs(3)
    wrong[1]["chosen_ids"] = [10_000]
    with pytest.raises(ValueError, match="got 10000 in row 2"):
        make(Stream(wrong))
    trainer = make_trainer(tmp_path, make_model("llama"))
    with pytest.raises(ValueError, match="eval_dataset must have a length"):
        trainer.evaluate(Stream())
