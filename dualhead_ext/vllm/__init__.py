# SPDX-License-Identifier: Apache-2.0
"""The gated head as a vLLM plugin, which vLLM finds by the entry point ``vllm.general_plugins``.

It registers one gated model for each architecture of
:data:`dualhead_ext.model.served_folder.ARCHITECTURES`; scheduler, paged cache and backbones are
vLLM's own. Importing this module does not import vLLM or require it.

- `models`: the gated models; `head`: gate and heads from vLLM's layers; `gate_cache`: the gate's
  keys and values as one more attention layer.
- `requests`: checks the controls of a request; `request_table`: the requests of a batch on the
  device; `controls_v1` and `controls_v2` fill it from vLLM's two model runners.
- `alpha`: alpha per token of a request; `answers`: alpha in HTTP responses; `server`: the
  OpenAI-compatible server.
"""

from __future__ import annotations


def register() -> None:
    """Register the gated models with vLLM, which calls this in each of its processes."""
    from .plugin import register_models

    register_models()
