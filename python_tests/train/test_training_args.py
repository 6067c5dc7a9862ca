# SPDX-License-Identifier: Apache-2.0
"""DualHeadTrainingArguments and what DualHeadTrainer refuses: defaults, invalid values."""

import pytest
from tiny_models import make_backbone, make_model
from trainer_cases import arguments, pairs
from transformers import HfArgumentParser, TrainerState

import dualhead_ext as dh
from dualhead_ext.loss.terms import GATE_REGULARIZERS, LossOptions


def test_the_papers_preset_has_its_numbers(tmp_path):
    args = dh.DualHeadTrainingArguments(output_dir=str(tmp_path), use_cpu=True, preset="paper")
    assert (args.learning_rate, args.adam_beta1, args.adam_beta2) == (5e-5, 0.9, 0.999)
    assert args.lr_scheduler_type == "cosine"
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 64
    assert args.loss_options == LossOptions() and args.beta_r == 0.1 and args.lambda_g == 0.01


def test_a_run_of_any_length_logs_a_curve(tmp_path):
    """A short run logs every step, a longer one 20 to 40 times."""
    args = dh.DualHeadTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    for steps in (1, 12, 40, 41, 60, 219, 1000, 30001):
        state = TrainerState()
        state.compute_steps(args, steps)
        logs = steps // state.logging_steps
        assert logs == steps or 20 <= logs <= 40, (steps, logs)
        assert logs == steps or steps > 40


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"beta_r": 0.0}, ValueError, "beta_r must be a number > 0"),
        ({"gate_regularizer": "l1"}, ValueError, "gate_regularizer must be one of"),
        ({"label_smoothing_factor": 0.1}, ValueError, "use label_smoothing"),
        ({"push_to_hub": True}, ValueError, "push_to_hub=True"),
        ({"max_length": 1}, ValueError, "max_length must be at least 2"),
        ({"cache_hidden_dtype": "int8"}, ValueError, "cache_hidden_dtype must be one of auto, bf"),
        ({"bf16_full_eval": True}, ValueError, "bf16_full_eval=True would leave the heads in half"),
        ({"fp16_full_eval": True}, ValueError, "fp16_full_eval=True would leave.*use fp16=True"),
        ({"ddp_static_graph": True}, ValueError, "ddp_static_graph=True is not supported"),
    ],
)
def test_bad_arguments(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        arguments(tmp_path, **changes)


def test_every_own_option_has_help_and_parses(tmp_path):
    parser = HfArgumentParser(dh.DualHeadTrainingArguments)
    text = parser.format_help()
    command = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--beta_r", "0.3"]
    command += ["--preset", "paper"]
    command += ["--gate_regularizer", "none", "--lm_on_chosen", "false"]
    (args,) = parser.parse_args_into_dataclasses([*command, "--objective_weights", "0.5", "2"])
    assert args.loss_options == LossOptions(beta_r=0.3, gate_regularizer="none", lm_on_chosen=False)
    assert args.objective_weights == [0.5, 2.0]
    assert args.loss_arguments()["objective_weights"] == [0.5, 2.0]
    assert all(name in text for name in GATE_REGULARIZERS)
    for field in dh.DualHeadTrainingArguments.__annotations__:
        assert dh.DualHeadTrainingArguments.__dataclass_fields__[field].metadata["help"]


def test_bad_trainers(tmp_path):
    args, model = arguments(tmp_path), make_model("llama")
    with pytest.raises(TypeError, match=r"model must have a gated head.*LlamaFor"):
        dh.DualHeadTrainer(model=make_backbone("llama"), args=args)
    with pytest.raises(TypeError, match="args must be DualHeadTrainingArguments, got NoneType"):
        dh.DualHeadTrainer(model=model)
    with pytest.raises(ValueError, match="train_dataset must hold at least one pair"):
        dh.DualHeadTrainer(model=model, args=args, train_dataset=[])
    with pytest.raises(TypeError, match="eval_dataset must be a sequence of rows, got generator"):
        dh.DualHeadTrainer(model=model, args=args, eval_dataset=(row for row in pairs(2)))
    text = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    with pytest.raises(ValueError, match="train_dataset holds text, which needs processing_class"):
        dh.DualHeadTrainer(model=model, args=args, train_dataset=text)
