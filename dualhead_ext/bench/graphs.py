# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs for the decode benchmark, and steps optimised without a custom kernel:

- ``two_gemms``: the gate, one product per head, mixture and choice, in one CUDA graph.
- ``one_gemm``: the same with both heads' weights in one matrix, so that cuBLAS runs one product.

To sample, both take the argmax of logits / temperature plus Gumbel noise, which needs no softmax,
no sort and no loop. On the CPU the same functions are called without graphs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import reference


def gumbel_token(logits: Tensor, temperature: Tensor) -> Tensor:
    """A token per row of softmax(logits / temperature), by the exponential race: (B, V) -> (B,)."""
    noise = torch.empty_like(logits).exponential_().log()
    return (logits / temperature[:, None] - noise).argmax(-1)


def gemm_step(
    arguments: dict[str, Tensor], stacked: Tensor | None = None
) -> reference.DecodeOutput:
    """One decode step of PyTorch's own operators, without the log-probability and status that the
    fused step also returns.

    Args:
        arguments: those of ``decode_step`` with an attention gate and one objective.
        stacked: (2V, d), the weights of both heads, to use one product; None for two products.
    """
    hidden = arguments["hidden"]
    names = ("q_weight", "k_weight", "u_weight", "cache_k", "cache_u", "cache_valid")
    operands = {name: arguments[name] for name in (*names, "cache_length")}
    context, attention, _ = reference.append_and_attend(hidden, **operands, new_valid=None)
    gate_logit = context + arguments["gate_bias"]
    alpha = reference.mixing_weight(gate_logit, None, None)
    if stacked is None:
        z_lm = reference.head_logits(hidden, arguments["lm_weight"], None)
        z_rm = reference.head_logits(hidden, arguments["reward_weight"][0], None)
    else:
        z_lm, z_rm = reference.head_logits(hidden, stacked, None).chunk(2, dim=-1)
    logits = reference.mix_logits(z_lm, z_rm, alpha)
    if "seeds" in arguments:
        token = gumbel_token(logits, arguments["temperature"])
    else:
        token = logits.argmax(-1)
    nothing = logits.new_empty(0)
    return reference.DecodeOutput(logits, alpha, gate_logit, token, nothing, nothing, attention)


def capture(
    call: Callable[[int], object],
    prepare: Callable[[int], object],
    copies: int,
    device: torch.device,
) -> Callable[[int], object]:
    """Capture ``call`` in one CUDA graph per copy of its operands; on the CPU, return it unchanged.

    The result replays a copy's graph and returns the graph's output. ``prepare`` runs before each
    call.
    """
    if device.type != "cuda":
        return call
    graphs, outputs = [], []
    side = torch.cuda.Stream()
    for copy in range(copies):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # warm up: the setup of a first call must not be captured
            for _ in range(2):
                prepare(copy)
                call(copy)
            prepare(copy)
        torch.cuda.current_stream().wait_stream(side)
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            outputs.append(call(copy))

    def replay(copy: int) -> object:
        graphs[copy].replay()
        return outputs[copy]

    return replay
