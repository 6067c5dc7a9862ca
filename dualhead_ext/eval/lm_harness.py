# SPDX-License-Identifier: Apache-2.0
"""Gated heads as the model ``dualhead`` of EleutherAI's lm-evaluation-harness.

    python -m dualhead_ext.eval.lm_harness run --model dualhead \\
        --model_args pretrained=HEADS,strength=1.5 --tasks hellaswag

Versions after 0.4.13 read the entry point ``lm_eval.models`` and find it themselves: ``lm_eval run
--model dualhead ...``. Earlier versions know only their own models, so this module is their command
line with this model added. Needs the extra ``lm-eval``.
"""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from ..model.causal_lm import DualHeadForCausalLM


@register_model("dualhead")
class DualHeadLM(HFLM):
    """A folder of heads with its backbone, at one setting of the controls.

    Log-likelihoods are those of the mixture, and generations are decoded from it; ``strength=0`` is
    the backbone.

    Args:
        pretrained: a folder of heads, or its name on the hub.
        backbone: instead of the one that the heads name.
        quantize: format of both heads, or None.
        strength, gate_offset, alpha, max_kl: numbers, as for ``generate()``.
        dtype: of the backbone. Default "auto".
        options: options of the harness's ``hf`` model: batch_size, device, max_length, ...
    Raises:
        ValueError: a control out of range; raised at the first call.
    """

    def __init__(
        self,
        pretrained: str,
        backbone: str | None = None,
        quantize: str | None = None,
        strength: float | None = None,
        gate_offset: float | None = None,
        alpha: float | None = None,
        max_kl: float | None = None,
        dtype: str | torch.dtype = "auto",
        **options: Any,
    ) -> None:
        given = {"strength": strength, "gate_offset": gate_offset, "alpha": alpha, "max_kl": max_kl}
        self.controls = {name: value for name, value in given.items() if value is not None}
        model = DualHeadForCausalLM.from_pretrained(
            pretrained, backbone=backbone, quantize=quantize, dtype=dtype
        )
        # The harness does not move a model that exists already.
        device = options.get("device") or "cuda"
        if not torch.cuda.is_available() and str(device).startswith("cuda"):
            device = "cpu"
        options.setdefault("tokenizer", model.config._name_or_path)
        super().__init__(pretrained=model.to(device), **options)

    def _model_call(self, inps: torch.Tensor, **options: Any) -> torch.Tensor:
        """The mixture's logits (B, T, V) for ids (B, T)."""
        with torch.no_grad():
            return self.model(input_ids=inps, **self.controls).logits

    def _model_generate(self, *arguments: Any, **options: Any) -> torch.Tensor:
        return super()._model_generate(*arguments, **options, **self.controls)

    def get_model_info(self) -> dict[str, Any]:
        """The model information in the harness's results, with the controls."""
        return super().get_model_info() | {"dualhead_controls": self.controls}


if __name__ == "__main__":
    cli_evaluate()
