# SPDX-License-Identifier: Apache-2.0
"""Runs that FSDP2 trains in several processes, and the same in one process, with equal steps."""

from pathlib import Path

import pytest
import torch
from tiny_models import make_model
from trainer_cases import make_trainer, pairs

CONFIGURATIONS = Path(__file__).resolve().parents[1] / "examples" / "accelerate"

# With Adam or clipping, a wrong scale would not show.
PLAIN = {"optim": "sgd", "max_grad_norm": 0.0, "num_train_epochs": 2}
# Adam's state is gathered for a checkpoint.
SAVED = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3}
CORRECTION = SAVED | {"preset": "default", "calibrate": False}
LEARNED = {"preset": "default", "num_train_epochs": 2, "calibrate": True, "log_kl": True}


def llama(**config):
    return make_model("llama", **config)


def tied():
    return make_model("llama-tied")


def rows():
    """A model whose vocabulary can be split evenly between two processes."""
    return make_model("llama", sizes={"vocab_size": 102})


def lora():
    """A backbone in bf16 with adapters in fp32."""
    import peft

    model = make_model("llama-tied")
    model.model.bfloat16()  # and the LM head, which shares the embedding's weight
    torch.manual_seed(2)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.inject_adapter_in_model(config, model)


# {name: (what makes the model, the run's options)}
CASES = {
    "rows": (rows, SAVED),
    "tied": (tied, PLAIN),
    "lowrank": (lambda: llama(reward_head="lowrank", reward_rank=2, gate="linear"), CORRECTION),
    "lm_head": (tied, PLAIN | {"train_lm_head": True, "untie": True}),
    "lora": (lora, PLAIN),
    "embedding": (
        lambda: llama(reward_head="embedding", reward_rank=3, num_objectives=2),
        LEARNED | {"gate_learning_rate": 1e-2},
    ),
}

# Those that four processes train, in two copies.
COPIED = ("rows", "tied", "embedding")


def run(folder, name, resume=None, **changes):
    """The trainer of a case, after training."""
    make, options = CASES[name]
    model = make()
    count = model.dual_head_config.num_objectives
    data, held_out = pairs(16, objectives=count), pairs(7, seed=5, objectives=count)
    trainer = make_trainer(folder, model, data, held_out, **options | changes)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def assert_close(found, expected):
    """The same tensors, within 1e-5."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5, msg=name)


def assert_trained(name, found):
    """The trained tensors of a case are not those that it starts from."""
    start = dict(CASES[name][0]().named_parameters())
    assert not any(torch.equal(start[n], value) for n, value in found.items() if n in start)


def assert_same_figures(one, found):
    """What several processes have logged and evaluated is what the trainer ``one`` has.

    ``found`` has their "logs" and "metrics".
    """
    for ours, theirs in zip(one.state.log_history, found["logs"], strict=False):
        for key in ("loss", "grad_norm", "rewards/margins", "gate/mean", "kl"):
            if key in ours:
                assert theirs[key] == pytest.approx(ours[key], rel=1e-3, abs=1e-4), key
    metrics = one.evaluate()
    for key in ("eval_loss", "eval_rewards/margins", "eval_gate/mean"):
        assert found["metrics"][key] == pytest.approx(metrics[key], rel=1e-3, abs=1e-4), key


def launched_with(configuration, processes=2):
    """The variables that ``accelerate launch`` sets for a file of examples/accelerate."""
    from accelerate.commands import launch

    given = ["--config_file", str(CONFIGURATIONS / configuration), "script.py"]
    arguments, _, _ = launch._validate_launch_command(
        launch.launch_command_parser().parse_args(given)
    )
    assert arguments.num_processes == processes
    names = ("ACCELERATE_", "FSDP_", "PARALLELISM_")
    made = launch.prepare_multi_gpu_env(arguments)
    return {name: value for name, value in made.items() if name.startswith(names)}
