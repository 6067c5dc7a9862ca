# SPDX-License-Identifier: Apache-2.0
"""The gated head as a backbone's lm_head.

The backbone's own forward stays: decoder, slice, lm_head, post-processing. The gate needs every
hidden state, but generate() asks for the logits of the last position only. So a hook on the decoder
reads all hidden states and writes the cache. The head then gets the sliced hidden states and mixes.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from ..config import DualHeadConfig
from ..head import decoding
from ..head.controls import GREEDY, Controls, Sampling
from ..head.dual_head import GatedHead
from ..ops import DecodeOutput
from ..ops.logits import postprocess
from ..quantization.quantized_head import QuantizedStorage
from .hf_cache import (
    FIRST_CAPACITY,
    GateLayer,
    StaticGateLayer,
    cache_of,
    columns_of,
    gate_layer,
)
from .paged_gate import PagedGate

_FORWARD = "DualHeadForCausalLM.forward"


@dataclass
class Call:
    """The arguments that one forward of the model passes to its lm_head."""

    controls: Controls  # as given; converted to rows once the decoder's hook knows B
    attention_mask: Tensor | None = None  # (B, columns + T)
    new_valid: Tensor | None = None  # (B, T); replaces the mask's last columns if given
    cache: Cache | None = None
    logits_to_keep: int | Tensor = 0
    sampling: Sampling | None = None  # rows; if given, choose a token and return no logits
    keep_raw: bool = False  # keep the head's own logits, to compare the backbone's with them
    paged: PagedGate | None = None  # for continuous batching
    batch: dict[str, Any] | None = None  # the model's arguments, with paged
    # Set by the hook on the decoder and by the head:
    hidden: Tensor | None = None  # (B, T, d)
    layer: GateLayer | None = None
    past: int | Tensor = 0  # columns before this call
    fused: bool = False  # one new position per row: use the fused step
    from_scratch: bool = False  # whole sequences with gradients
    logits: Tensor | None = field(default=None, repr=False)  # mix="probs": before the backbone's f
    raw: Tensor | None = field(default=None, repr=False)  # (B, 1, V), with keep_raw
    step: DecodeOutput | None = None  # with sampling
    gate_logit: Tensor | None = None  # (N, 1), with paged: at the requests' last positions


def keep_positions(values: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """Select positions of (B, T, ...), as transformers slices hidden states before an lm_head.
    ``logits_to_keep``: an int counts from the end (0: all); positions (N,) or (B, N); or a bool
    mask (B, T), which flattens the result to (N, ...).
    """
    if isinstance(logits_to_keep, int):
        return values[:, -logits_to_keep:] if logits_to_keep else values
    if logits_to_keep.dim() == 1:
        return values[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return values[logits_to_keep]
    index = logits_to_keep.view(*logits_to_keep.shape, *(1,) * (values.dim() - 2))
    return torch.take_along_dim(values, index, dim=1)


class DualHeadLMHead(GatedHead, QuantizedStorage, nn.Linear):
    """A gated head that is an ``nn.Linear`` whose ``.weight`` is the backbone's own Parameter, so
    that tied embeddings and state-dict keys keep working. Once quantised, ``.weight`` holds the
    quantised weights and ``.weight_scale`` their scales; an embedding that shared the Parameter
    keeps it.
    """

    def __init__(self, linear: nn.Linear, config: DualHeadConfig) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        self._add_gate_and_reward_head(config)
        self._start_as(linear)
        self.lm_head_trained = False  # if True, files hold its weights too
        self.impl: str | None = None  # for the step, see head.decoding.run_step
        self.packing_checked = False  # see packing.check_packing
        # Results of backbone_trial: whether the backbone scales hidden states instead of logits,
        # and whether its f is the one in its config (None: not tried).
        self.scaled_input = False
        self.knows_f: bool | None = None
        self.last_alpha: Tensor | None = None  # (B, N), of the latest call
        self._calls: dict[int, Call] = {}

    @property
    def lm_weight(self) -> Tensor:
        return self.weight

    @property
    def lm_bias(self) -> nn.Parameter | None:
        return self.bias

    @property
    def lm_scale(self) -> Tensor | None:
        return self._parameters.get("weight_scale")

    @property
    def hidden_dtype(self) -> torch.dtype:
        return self.weight.dtype if self.lm_scale is None else self.compute_dtype

    @property
    def owns_lm_head(self) -> bool:
        """Whether the LM head differs from the backbone's, so that the heads' files hold it."""
        return self.lm_head_trained or self.weight.requires_grad or self.lm_scale is not None

    def _hold_lm(self, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        self.hold(weight, scale, dtype)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: leaves out the forwards in progress."""
        return self.__dict__ | {"_calls": {}}

    # --- one forward of the model ---

    @staticmethod
    def _thread() -> int:
        # Several threads may generate with one model. A compiled region has one thread only.
        return 0 if torch.compiler.is_compiling() else threading.get_ident()

    def begin(self, call: Call) -> None:
        """Note the start of a forward of the model."""
        self._calls[self._thread()] = call

    def end(self) -> None:
        """Note the end of a forward, also after an exception."""
        self._calls.pop(self._thread(), None)

    def on_decoder(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        """Forward hook of the decoder: keep the hidden states, and write keys and folded values of
        every position into the cache's gate layer. Outside a forward of the model it does nothing.
        """
        call = self._calls.get(self._thread())
        if call is None:
            return
        call.hidden = output[0].to(self.weight.device)  # a device_map may separate them
        if call.paged is not None:
            with torch.no_grad():
                call.gate_logit = call.paged.gate_logits(self, call.hidden, call.batch)
            return
        batch, length = call.hidden.shape[:2]
        # Check the controls before the gate's cache is written.
        call.controls = self.control_rows(_FORWARD, call.controls, call.hidden)
        if call.attention_mask is not None:
            # PEFT adds virtual tokens before the prompt after new_valid was computed.
            if call.new_valid is None or call.new_valid.shape[1] != length:
                call.new_valid = call.attention_mask[:, -length:].bool()
        cache = cache_of(output) if call.cache is None else call.cache
        if not isinstance(cache, Cache):
            return
        call.layer = gate_layer(cache) or self._add_layer(cache, batch, length)
        gate_cache = call.layer.gate_cache
        if not torch.compiler.is_compiling():
            self.check_cache(_FORWARD, gate_cache, batch)
            call.layer.make_room(length)
            # After a cached prompt there are no gradients: its keys are detached.
            call.from_scratch = gate_cache.columns == 0 and self._wants_gradients(call.hidden)
        # One new position per row: the fused step appends, attends and mixes at once.
        call.fused = length == 1 and not call.from_scratch
        if not call.fused:
            self._write(call)

    def _wants_gradients(self, hidden: Tensor) -> bool:
        trained = (*self.parameters(), hidden)
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in trained)

    def _add_layer(self, cache: Cache, batch: int, length: int) -> GateLayer:
        if getattr(cache, "offloading", False):
            raise NotImplementedError(
                "DualHeadForCausalLM: offloaded caches are not supported; use cache_implementation "
                '"dynamic" or "static"'
            )
        unseen = columns_of(cache) - length
        if unseen > 0:
            raise ValueError(
                f"DualHeadForCausalLM: the cache holds {unseen} positions "
                "that the gate has not seen; fill it with this model, not with the plain backbone"
            )
        if cache.is_compileable and not isinstance(cache, DynamicCache):
            capacity = _static_length(cache)
            layer: GateLayer = StaticGateLayer(self.new_cache(batch, capacity))
        else:
            layer = GateLayer(self.new_cache(batch, max(FIRST_CAPACITY, length)))
        cache.layers.append(layer)
        return layer

    @torch.no_grad()
    def _write(self, call: Call) -> None:
        """Append every position of this call to the gate's layer."""
        gate_cache, hidden = call.layer.gate_cache, call.hidden
        batch, length = hidden.shape[:2]
        valid = call.new_valid
        if valid is None:
            valid = torch.ones(batch, length, dtype=torch.bool, device=hidden.device)
        k = u = None
        if self.gate.has_state:
            weights = gate_cache.weights
            u_weight = weights.tensors["u_weight"]
            k, u = self.gate.keys_and_values(hidden, u_weight, weights.projection)
        if torch.compiler.is_compiling():
            call.past = gate_cache.length.clone()
            gate_cache.append_on_device(k, u, valid)
        else:
            call.past = gate_cache.columns
            gate_cache.append(k, u, valid)

    # --- logits ---

    def forward(self, x: Tensor) -> Tensor:
        """Mixed logits at the positions that the backbone kept: x (B, N, d) or (N, d) -> (B, N, V)
        or (N, V), fp32. For the logits mix these are the values before f, which the backbone
        applies next.

        Raises:
            RuntimeError: called outside the model's forward; the gate needs the whole sequence.
        """
        call = self._calls.get(self._thread())
        if call is None or call.hidden is None:
            raise RuntimeError(
                "DualHeadLMHead: the gated lm_head needs the decoder's hidden states; call the "
                "model, or dualhead_ext.detach(model) for the plain backbone"
            )
        if self.lm_scale is not None and x.dtype == self.weight.dtype:
            raise NotImplementedError(
                "DualHeadLMHead: this backbone casts its hidden states to the dtype of "
                f"lm_head.weight, which is {x.dtype} once quantised"
            )
        raw = self.config.mix == "logits" and not self.scaled_input
        if call.paged is not None:
            logits, alpha = self._mix_paged(x, call)
            self.last_alpha = alpha
            call.logits = None if raw or self.scaled_input else logits
            return logits
        if self.scaled_input:
            same = x.shape[:2] == call.hidden.shape[:2] and x.dim() == 3
            x = keep_positions(call.hidden, 0 if same else call.logits_to_keep)
        if call.sampling is not None:
            return self._choose_token(x, call)
        if call.fused:
            out = self._fused_step(call, GREEDY, post_process=not raw)
            logits, alpha = out.logits[:, None], out.alpha[:, None]
        else:
            logits, alpha = self._mix_kept(x, call)
        self.last_alpha = alpha.detach()
        call.logits = None if raw or self.scaled_input else logits
        call.raw = logits[:, -1:] if call.keep_raw else None
        return logits

    @torch.no_grad()
    def _fused_step(self, call: Call, sampling: Sampling, **options: bool) -> DecodeOutput:
        new_valid = None if call.new_valid is None else call.new_valid[:, -1].contiguous()
        hidden, cache = call.hidden[:, 0], call.layer.gate_cache
        out, _ = decoding.run_step(
            self,
            _FORWARD,
            hidden,
            cache,
            call.controls,
            sampling,
            new_valid=new_valid,
            impl=self.impl,
            **options,
        )
        return out

    def _choose_token(self, x: Tensor, call: Call) -> Tensor:
        """Let the step choose a token, into ``call.step``. Returns empty logits (B, 1, 0)."""
        if not call.fused:
            raise RuntimeError(
                "DualHeadLMHead: a token can be chosen for one new position per row with a cache, "
                f"got hidden states of {tuple(call.hidden.shape)}"
            )
        call.step = self._fused_step(call, call.sampling, return_logits=False)
        self.last_alpha = call.step.alpha[:, None]
        return x.new_empty(*x.shape[:-1], 0)

    def after_f(self, raw: Tensor) -> Tensor:
        """The head's logits after the backbone's f, as its config describes it."""
        if self.config.mix == "probs" or self.scaled_input:
            return raw
        return postprocess(raw, self.config.logit_scale, self.config.logit_softcap)

    def _mix_kept(self, x: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        batch, length = call.hidden.shape[:2]
        flat = x.dim() == 2  # selected by a mask: each position is a row of its own
        keep = 0 if x.shape[:2] == call.hidden.shape[:2] and not flat else call.logits_to_keep
        gate_logit = keep_positions(
            self._gate_logits(call, 0 if flat else keep), keep if flat else 0
        )
        controls, hidden = call.controls, x
        if flat:
            places = torch.arange(batch, device=x.device)[:, None].expand(-1, length)
            controls = controls.select(keep_positions(places, keep))
            hidden, gate_logit = x[:, None], gate_logit[:, None]
        post_process = self.config.mix != "logits" or self.scaled_input
        out = self.mixed(hidden, gate_logit, controls, post_process)
        return (out.logits[:, 0], out.alpha[:, 0]) if flat else (out.logits, out.alpha)

    @torch.no_grad()
    def _mix_paged(self, x: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """(logits (1, N, V), alpha (N, 1)) at the requests' last positions, from x (1, N, d). A
        backbone that does not slice gives x (1, Q, d) and gets logits (1, Q, V), 0 elsewhere.
        """
        last = call.batch["logits_indices"].long()
        sliced = isinstance(call.logits_to_keep, Tensor)
        hidden = call.hidden if self.scaled_input else x
        hidden = hidden[0, last] if self.scaled_input or not sliced else x[0]
        post_process = self.config.mix != "logits" or self.scaled_input
        controls = call.paged.rows_for(call.gate_logit)
        out = self.mixed(hidden[:, None], call.gate_logit, controls, post_process)
        logits = out.logits[:, 0]
        if not sliced:
            logits = logits.new_zeros(x.shape[1], logits.shape[1]).index_copy(0, last, logits)
        return logits[None], out.alpha

    def _gate_logits(self, call: Call, keep: int | Tensor) -> Tensor:
        """Gate logits (B, N) at the kept positions of this call."""
        hidden, layer = call.hidden, call.layer
        batch, length = hidden.shape[:2]
        if layer is None or call.from_scratch:
            return keep_positions(self.gate(hidden, call.new_valid), keep)
        queries = keep_positions(hidden, keep)
        if not self.gate.has_state:
            return self.gate(queries)
        positions = torch.arange(length, device=hidden.device).expand(batch, -1)
        past = call.past[:, None] if isinstance(call.past, Tensor) else call.past
        columns = keep_positions(positions + past, keep)
        cache = layer.gate_cache
        filled = cache.max_length if torch.compiler.is_compiling() else cache.columns
        with torch.no_grad():
            return self.gate.attend(
                queries,
                columns,
                cache.k[:, :, :filled],
                cache.u[:, :, :filled],
                cache.valid[:, :filled],
            )

    # --- training ---

    def training_loss(
        self,
        hidden: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        completion_mask: Tensor,
        objective: Tensor | None,
        options: dict[str, Any],
    ) -> Any:
        """The training objective of a batch [all chosen; all rejected]; see
        :func:`dualhead_ext.functional.dual_head_loss`.

        hidden (2P, T, d), input_ids and masks (2P, T). Position t predicts token t + 1.

        Raises:
            RuntimeError: the heads are quantised.
        """
        self._refuse_quantized("training")
        return _dual_head_loss(
            hidden[:, :-1],
            input_ids[:, 1:],
            completion_mask[:, 1:].bool(),
            self.gate(hidden, attention_mask)[:, :-1],
            lm_weight=self.lm_weight,
            lm_bias=self.lm_bias,
            **self.reward_head.tensors(),
            mix=self.config.mix,
            logit_scale=self.config.logit_scale,
            logit_softcap=self.config.logit_softcap,
            objective=objective,
            **options,
        )


# Not compiled: the numbers of tokens and chunks depend on the batch, and the products are library
# calls. Backbone and gate around it are compiled.
@torch.compiler.disable
def _dual_head_loss(*args: Any, **kwargs: Any) -> Any:
    from ..functional import dual_head_loss

    return dual_head_loss(*args, **kwargs)


def _static_length(cache: Cache) -> int:
    """The columns of a static cache that a caller has made. Sliding layers, which know only their
    window, are skipped.
    """
    lengths = [
        layer.get_max_length() for layer in cache.layers if not getattr(layer, "is_sliding", False)
    ]
    if not lengths or max(lengths) < 0:
        raise ValueError(
            "DualHeadForCausalLM: the cache is a static one of sliding layers only, so its length "
            'is unknown; use generate(cache_implementation="static")'
        )
    return max(lengths)
