# SPDX-License-Identifier: Apache-2.0
"""Engines that cannot train the heads are refused before training, by what is really set.

test_sharding.py tests FSDP2.
"""

from types import SimpleNamespace

import pytest
import torch
from accelerate import ParallelismConfig
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from tiny_models import make_backbone, make_model
from torch import distributed, nn
from torchrun import run_in_two_processes
from trainer_cases import arguments, make_trainer

import dualhead_ext as dh
from dualhead_ext.files.checkpoint import latest_checkpoint, verify
from dualhead_ext.train.engines import refuse_engines, refuse_ignored_fsdp


def test_by_an_argument(tmp_path):
    with pytest.raises(ValueError, match=r"deepspeed=.* cannot train heads.*fsdp_version: 2"):
        arguments(tmp_path, deepspeed={"zero_optimization": {"stage": 2}})
    arguments(tmp_path)  # the refused settings do not stay in the environment


@pytest.mark.parametrize("name", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_by_the_environment_that_accelerate_launch_sets(tmp_path, monkeypatch, name):
    args = arguments(tmp_path)
    monkeypatch.setenv("FSDP_VERSION", "1")
    monkeypatch.setenv(name, "true")
    message = f"{name}=true.*, from accelerate launch.* cannot train heads"
    with pytest.raises(ValueError, match=f"DualHeadTrainingArguments: .*{message}"):
        arguments(tmp_path)
    with pytest.raises(ValueError, match=f"DualHeadTrainer: .*{message}"):
        dh.DualHeadTrainer(model=make_model("llama"), args=args, train_dataset=[])
    monkeypatch.setenv(name, "false")
    make_trainer(tmp_path)


def test_by_the_state_of_accelerate(tmp_path):
    """As on a GPU, where accelerate keeps the plugin. On a CPU it drops FSDP's plugin."""
    trainer = make_trainer(tmp_path)

    def refused(engine, **plugin):
        state = SimpleNamespace(**{f"{engine}_plugin": SimpleNamespace(**plugin)})
        found = SimpleNamespace(state=state, distributed_type=DistributedType(engine.upper()))
        with pytest.raises(ValueError) as error:
            refuse_engines("DualHeadTrainer", trainer.args, found)
        return str(error.value)

    assert "accelerate's deepspeed_plugin) cannot train heads" in refused("deepspeed")
    assert "FSDP1 (accelerate's fsdp_plugin) cannot train heads" in refused("fsdp", fsdp_version=1)
    plain = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="SIZE_BASED_WRAP")
    assert "SIZE_BASED_WRAP is not supported" in refused("fsdp", **vars(plain))
    plain = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_offload=True)
    assert "offload_params (cpu_offload) is not supported" in refused("fsdp", **vars(plain))


@pytest.mark.parametrize("name", ["tp", "cp", "sp"])
def test_other_parallelism(tmp_path, name):
    found = SimpleNamespace(
        state=SimpleNamespace(),
        distributed_type=DistributedType.MULTI_CPU,
        parallelism_config=ParallelismConfig(**{f"{name}_size": 2}),
    )
    with pytest.raises(ValueError, match=f"DualHeadTrainer: {name}_size > 1 is not supported"):
        refuse_engines("DualHeadTrainer", arguments(tmp_path), found)
    found.parallelism_config = ParallelismConfig(dp_shard_size=2)
    refuse_engines("DualHeadTrainer", arguments(tmp_path), found)


def test_fsdp_that_accelerate_leaves_out(tmp_path):
    """On CPUs, each of two processes that should share a model would hold all of it."""
    args = SimpleNamespace(fsdp=True)
    state, device = SimpleNamespace(), SimpleNamespace(type="cpu")
    two = SimpleNamespace(state=state, num_processes=2, device=device)
    with pytest.raises(ValueError, match="accelerate leaves it out on a device of the kind 'cpu'"):
        refuse_ignored_fsdp("DualHeadTrainer", args, two)
    refuse_ignored_fsdp("DualHeadTrainer", SimpleNamespace(fsdp=None), two)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there, accelerate joins them")
def test_processes_that_accelerate_has_not_joined(tmp_path, monkeypatch):
    """torchrun without a GPU and without use_cpu starts two separate runs in one folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were started, and each of them would train"):
        make_trainer(tmp_path, use_cpu=False)
    monkeypatch.delenv("WORLD_SIZE")
    make_trainer(tmp_path)


def test_data_parallel(tmp_path):
    with pytest.raises(TypeError, match=r"must have a gated head .*got DataParallel"):
        make_trainer(tmp_path, nn.DataParallel(make_model("llama")))


def test_tensor_parallelism_is_refused_by_from_backbone(tmp_path):
    backbone = make_backbone("llama")
    backbone.save_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match=r"tp_plan='auto': .* without tp_plan"):
        dh.DualHeadForCausalLM.from_backbone(tmp_path, tp_plan="auto")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = distributed.init_device_mesh("cpu", (1,))
        shard = distributed.tensor.distribute_tensor(
            backbone.lm_head.weight.data, mesh, [distributed.tensor.Shard(0)]
        )
        backbone.lm_head.weight = nn.Parameter(shard)
        with pytest.raises(NotImplementedError, match=r"lm_head\.weight is a DTensor"):
            dh.DualHeadForCausalLM.from_backbone(backbone)
        assert type(backbone.lm_head) is torch.nn.Linear
    finally:
        distributed.destroy_process_group()


@pytest.mark.slow
def test_a_lost_process_is_reported_and_the_run_can_resume(tmp_path):
    run_in_two_processes("ddp_lost_process.py", tmp_path)
    said = (tmp_path / "said.txt").read_text()
    last = latest_checkpoint(tmp_path / "run")
    assert last.name == "checkpoint-2" and verify(last)
    assert said == (
        "DualHeadTrainer: another process of this run has ended or does not answer; "
        f"{last} is whole, and resume_from_checkpoint=True resumes from it"
    )
