# SPDX-License-Identifier: Apache-2.0
"""Saving of heads that is interrupted at every call that changes the disk.

Afterwards the folder loads, with the old heads or with the new ones, complete.
"""

import textwrap

import faults
import pytest

SCRIPT = """
import json, logging, os
import torch
import faults
from tiny_models import make_backbone, make_model
import dualhead_ext as dh

logging.disable()

def model(value, mix):
    made = make_model("llama", gate="linear", mix=mix)
    with torch.no_grad():
        made.lm_head.reward_head.weight.fill_(value)
    return made

OLD, NEW = model(1.0, "logits"), model(2.0, "probs")

def which(folder):
    loaded = dh.DualHeadForCausalLM.from_pretrained(folder, backbone=make_backbone("llama"))
    value = float(loaded.lm_head.reward_head.weight.detach()[0, 0, 0])
    return {{(1.0, "logits"): "old", (2.0, "probs"): "new"}}.get(
        (value, loaded.dual_head_config.mix), f"{{value}} as {{loaded.dual_head_config.mix}}")

def left_over(folder):
    return [name for name in os.listdir(folder) if name.startswith(".")]

def check(folder, outcome):
    try:
        found = which(folder)
    except Exception as error:
        return f"does not load: {{error}}"
    if found not in ("old", "new") or (outcome == "done" and found != "new"):
        return f"holds {{found}}"
    OLD.save_pretrained(folder)
    if left_over(folder) or which(folder) != "old":
        return f"the next save leaves {{left_over(folder)}} and {{which(folder)}}"

results = {{kind: faults.every_point(
    kind, OLD.save_pretrained, NEW.save_pretrained, check) for kind in {kinds}}}
print(json.dumps(results))
"""


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("kinds", [("kill",), ("full", "broken")])
def test_a_save_interrupted_anywhere_is_the_old_head_or_the_new_one(tmp_path, kinds):
    results = faults.run(textwrap.dedent(SCRIPT.format(kinds=kinds)), tmp_path)
    for kind, result in results.items():
        assert not result["problems"], f"{kind}: " + "\n".join(result["problems"])
        assert result["points"] >= 8, f"{kind} met {result['points']} points only"
