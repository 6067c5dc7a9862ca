# SPDX-License-Identifier: Apache-2.0
"""Run by torchrun in test_wrapped_loss.py: the loss inside a model that FSDP shards.

Each of the two processes has one pair.
"""

import sys
from pathlib import Path

from safetensors.torch import save_file
from tiny_models import make_model
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torchrun import leave
from trainer_cases import pairs

from dualhead_ext.data.collate import PreferenceCollator
from dualhead_ext.train.trainer import prepare_for_training

distributed.init_process_group("gloo")
rank = distributed.get_rank()
model = make_model("llama").double()
prepare_for_training(model)
for layer in model.model.layers:
    fully_shard(layer)
fully_shard(model)
assert not all(p.to_local().shape == p.shape for p in model.parameters())
loss = model(**PreferenceCollator(0)(pairs(2)[rank : rank + 1]), loss_options={}).loss
loss.backward()
gradients = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.requires_grad}
if rank == 0:
    save_file(gradients, str(Path(sys.argv[1]) / "gradients.safetensors"))
distributed.barrier()
leave()
