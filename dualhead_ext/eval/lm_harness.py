# SPDX-License-Identifier: Apache-2.0
"""Gated heads as a model of EleutherAI's lm-evaluation-harness, by the name ``dualhead``.

    python -m dualhead_ext.eval.lm_harness run --model dualhead \\
        --model_args pretrained=HEADS,strength=1.5 --tasks hellaswag

A harness that reads the entry points ``lm_eval.models`` (those after 0.4.13) finds it by itself:
``lm_eval run --model dualhead ...``. Earlier ones know only their own models, so this module is
their command line with one name more. Needs the extra ``lm-eval``.
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
        pretrained: a folder of heads, or a hub's name of one. backbone: in place of the one that it
            names. quantize: format of both heads. strength, gate_offset, alpha, max_kl: numbers,
            as ``generate()`` takes them.
        options: of the harness's ``hf`` model: batch_size, device, max_length, ...
    Raises:
        ValueError: a control out of its range, naming it; from the first call.
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
        # The harness moves no model that is made already.
        device = options.get("device") or "cuda"
        if not torch.cuda.is_available() and str(device).startswith("cuda"):
            device = "cpu"
        options.setdefault("tokenizer", model.config._name_or_path)
        super().__init__(pretrained=model.to(device), **options)

    def _model_call(self, inps: torch.Tensor, **options: Any) -> torch.Tensor:
        """(B, T) -> logits (B, T, V) of the mixture."""
        with torch.no_grad():
            return self.model(input_ids=inps, **self.controls).logits

    def _model_generate(self, *arguments: Any, **options: Any) -> torch.Tensor:
        return super()._model_generate(*arguments, **options, **self.controls)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside the figures, and the controls."""
        return super().get_model_info() | {"dualhead_controls": self.controls}


if __name__ == "__main__":
    cli_evaluate()
