# SPDX-License-Identifier: Apache-2.0
"""Runs that FSDP2 trains in two processes, and the same runs in one process, with equal steps."""

from pathlib import Path

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


def run(folder, name, resume=None, **changes):
    """The trainer of a case, after training."""
    make, options = CASES[name]
    model = make()
    count = model.dual_head_config.num_objectives
    data, held_out = pairs(16, objectives=count), pairs(7, seed=5, objectives=count)
    trainer = make_trainer(folder, model, data, held_out, **options | changes)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def launched_with(configuration):
    """The variables that ``accelerate launch`` sets for a file of examples/accelerate."""
    from accelerate.commands import launch

    given = ["--config_file", str(CONFIGURATIONS / configuration), "script.py"]
    arguments, _, _ = launch._validate_launch_command(
        launch.launch_command_parser().parse_args(given)
    )
    assert arguments.num_processes == 2
    names = ("ACCELERATE_", "FSDP_")
    made = launch.prepare_multi_gpu_env(arguments)
    return {name: value for name, value in made.items() if name.startswith(names)}
