# SPDX-License-Identifier: Apache-2.0
"""DualHeadTrainingArguments and what DualHeadTrainer refuses: defaults, invalid values."""

import numpy as np
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


def test_the_weight_on_squared_rewards_is_for_token_rewards(tmp_path):
    def args(**changes):
        return dh.DualHeadTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **changes)

    assert args().reward_l2 == args().loss_options.reward_l2 > 0
    assert args(preference="log_prob").loss_options.reward_l2 == 0
    with pytest.raises(ValueError, match="reward_l2 must be 0 if preference is not"):
        args(preference="log_prob", reward_l2=1.0)


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
        ({"learning_rate": "fast"}, TypeError, "learning_rate must be a number, got 'fast'"),
        ({"learning_rate": -1.0}, ValueError, "learning_rate must be >= 0, got -1.0"),
        ({"learning_rate": float("nan")}, TypeError, "learning_rate must be a number, got nan"),
        ({"adam_beta1": 2}, ValueError, "adam_beta1 must be below 1, got 2"),
        ({"max_grad_norm": "abc"}, TypeError, "max_grad_norm must be a number"),
        ({"weight_decay": -1}, ValueError, "weight_decay must be >= 0"),
        ({"warmup_steps": "abc"}, TypeError, "warmup_steps must be a number"),
        ({"max_steps": 1.5}, TypeError, "max_steps must be a whole number, got 1.5"),
        ({"max_length": "long"}, TypeError, "max_length must be a whole number"),
        ({"save_total_limit": "all"}, TypeError, "save_total_limit must be a whole number"),
        ({"per_device_train_batch_size": 0}, ValueError, "train_batch_size must be >= 1, got 0"),
        ({"gradient_accumulation_steps": 0}, ValueError, "accumulation_steps must be >= 1, got 0"),
        ({"dataloader_num_workers": -1}, ValueError, "dataloader_num_workers must be >= 0"),
        ({"seed": "abc"}, TypeError, "seed must be a whole number"),
        ({"seed": 2**32}, ValueError, "seed must be below 4294967296"),
        ({"bf16": "abc"}, TypeError, "bf16 must be True or False, got 'abc'"),
        ({"gate_learning_rate": "abc"}, TypeError, "gate_learning_rate must be a number"),
        ({"objective_weights": "abc"}, TypeError, "objective_weights must be numbers, one per"),
        ({"optim_args": "abc"}, ValueError, "optim_args must be key=value"),
        ({"lr_scheduler_kwargs": "abc"}, TypeError, "lr_scheduler_kwargs must be a mapping"),
    ],
)
def test_bad_arguments(tmp_path, changes, error, message):
    """Before the backbone runs, which may take hours."""
    with pytest.raises(error, match=message):
        arguments(tmp_path, **changes)


def test_objective_weights_are_one_per_reward_head(tmp_path):
    with pytest.raises(ValueError, match="must hold one number per reward head, 1, got 2"):
        dh.DualHeadTrainer(
            make_model("llama"), arguments(tmp_path, objective_weights=[1.0, 2.0]), pairs(2)
        )


def test_numbers_of_other_types_are_taken(tmp_path):
    args = arguments(
        tmp_path, adam_epsilon="1e-8", learning_rate=np.float32(0.5), max_steps=np.int64(3), bf16=0
    )
    assert args.adam_epsilon == 1e-8 and args.learning_rate == 0.5 and args.max_steps == 3


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
