# SPDX-License-Identifier: Apache-2.0
"""`DualHeadForCausalLM`: any Hugging Face causal language model with the gated head in the place of
its lm_head.

The model is extended in place: it stays an instance of its own class, and its own forward runs. See
`lm_head` for how the gate sees every hidden state, and `hf_cache` for where its state lives.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache

from .backbones import backbone_post_processing, refuse_packed, replace_module
from .config import DualHeadConfig
from .controls import objective_rows, per_row
from .generation import Decoding, FusedDecodingMixin, decoding_of
from .hf_cache import StaticGateLayer
from .lm_head import Call, DualHeadLMHead
from .packing import check_packing, packed_rows
from .pretrained import DualHeadFilesMixin

CONTROLS = ("strength", "gate_offset", "alpha", "max_kl", "skip_threshold", "objective_weights")
# What forward takes beyond the backbone's own arguments.
_NEW_ARGUMENTS = (
    *(*CONTROLS, "dualhead_valid", "dualhead_decoding"),
    *("completion_mask", "objective", "loss_options", "hidden_states"),
)


class DualHeadForCausalLM(DualHeadFilesMixin, FusedDecodingMixin):
    """A Hugging Face causal language model with a gated, two-headed lm_head. Not made by its
    constructor: see :meth:`from_backbone` and :meth:`from_pretrained`.

    ``model.lm_head`` is the gated head (:class:`dualhead_ext.lm_head.DualHeadLMHead`): ``.weight``
    is the backbone's own parameter, ``.reward_head`` and ``.gate`` are trained. Everything else is
    the backbone's.
    """

    @classmethod
    def from_backbone(
        cls,
        backbone: str | PreTrainedModel,
        *,
        dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        revision: str | None = None,
        **config: Any,
    ) -> DualHeadForCausalLM:
        """Extend a causal language model in place with a reward head (a copy of its LM head) and a
        gate (alpha = 1/2).

        Args:
            backbone: a model, or a path or hub name for ``AutoModelForCausalLM.from_pretrained``
                (with dtype, device_map, revision; dtype default "auto", as the files are).
            config: fields of :class:`DualHeadConfig` but sizes, bias and post-processing, which are
                read from it.
        Raises:
            TypeError: not a causal language model, or an unknown field. ValueError: it has a gated
                head already.
        """
        if not isinstance(backbone, PreTrainedModel):
            if not isinstance(backbone, str):
                raise TypeError(
                    f"from_backbone: backbone must be a model, a path or a hub name, got "
                    f"{type(backbone).__name__}"
                )
            backbone = AutoModelForCausalLM.from_pretrained(
                backbone, dtype=dtype or "auto", device_map=device_map, revision=revision
            )
        elif not (dtype is device_map is revision is None):
            raise TypeError(
                "from_backbone: dtype, device_map and revision are for a path or hub name, not a "
                "model"
            )
        if isinstance(backbone, DualHeadForCausalLM):
            raise ValueError(
                "from_backbone: backbone has a gated head already; dualhead_ext.detach(model) "
                "removes it"
            )
        linear = backbone.get_output_embeddings()
        if not isinstance(linear, nn.Linear):
            raise TypeError(
                f"from_backbone: {type(backbone).__name__} must have a linear lm_head, got "
                f"{type(linear).__name__}"
            )
        read = {
            "hidden_size": linear.in_features,
            "vocab_size": linear.out_features,
            "bias": linear.bias is not None,
            **backbone_post_processing(backbone.config),
        }
        known = {field.name for field in fields(DualHeadConfig)}
        if unknown := sorted(set(config) - known):
            raise TypeError(f"from_backbone: unknown arguments {', '.join(unknown)}")
        for name, value in read.items():
            if config.setdefault(name, value) != value:
                raise ValueError(
                    f"from_backbone: {name} is {value} in the backbone, got {config[name]}"
                )
        return _attach(backbone, linear, DualHeadConfig(**config))

    # --- forward ---

    def _dual_head_forward(
        self, base_forward: Any, names: tuple[str, ...], args: tuple, kwargs: dict
    ) -> Any:
        kwargs = dict(zip(names, args, strict=False)) | kwargs
        new = {name: kwargs.pop(name, None) for name in _NEW_ARGUMENTS}
        if new["completion_mask"] is not None:
            return self._training_forward(new, kwargs)
        refuse_packed(kwargs)
        mask = kwargs.get("attention_mask")
        if (
            mask is not None
            and new["dualhead_valid"] is None
            and not (isinstance(mask, Tensor) and mask.dim() == 2)
        ):
            raise NotImplementedError(
                "DualHeadForCausalLM.forward: attention_mask must be (B, columns); for a mask of "
                "more dimensions pass "
                "dualhead_valid (B, T), true where the new positions are real tokens"
            )
        decoding: Decoding = new["dualhead_decoding"] or Decoding()
        if not decoding.begun:
            decoding.refuse("this mode of generation")
        call = Call(
            {name: new[name] for name in CONTROLS},
            attention_mask=mask if isinstance(mask, Tensor) and mask.dim() == 2 else None,
            new_valid=new["dualhead_valid"],
            cache=kwargs.get("past_key_values"),
            logits_to_keep=kwargs.get("logits_to_keep", 0),
            sampling=decoding.sampling,
            keep_raw=decoding.begun and not torch.compiler.is_compiling(),
        )
        self.lm_head_module.begin(call)
        try:
            out = base_forward(self, **kwargs)
        finally:
            self.lm_head_module.end()
        if call.step is not None:
            out.logits = torch.stack((call.step.token, call.step.status.long()), 1)
            return out
        out = self._without_backbones_f(out, call, kwargs)
        if call.raw is not None:
            decoding.compare(self.lm_head_module.after_f(call.raw), out.logits[:, -1:])
        return out

    def _without_backbones_f(self, out: Any, call: Call, kwargs: dict) -> Any:
        """For the probability mix: the head's log-probabilities themselves, where the backbone has
        put its f on top.
        """
        config = self.dual_head_config
        if call.logits is None or (config.logit_scale == 1.0 and config.logit_softcap == 0.0):
            return out
        if kwargs.get("labels") is not None or isinstance(out, tuple):
            raise NotImplementedError(
                'DualHeadForCausalLM.forward: labels and return_dict=False with mix="probs" on a '
                "backbone that scales or "
                "caps its logits; use dualhead_ext.functional.dual_head_loss"
            )
        out.logits = call.logits
        return out

    def _training_forward(self, new: dict[str, Any], kwargs: dict[str, Any]) -> Any:
        """The objective, computed inside the model's forward so that DDP's and FSDP's hooks fire:
        of padded rows, or of a packed one. With ``hidden_states`` the backbone does not run.
        """
        input_ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        if input_ids is None:
            raise ValueError(
                "DualHeadForCausalLM.forward: completion_mask needs input_ids, got None"
            )
        hidden, completion_mask = new["hidden_states"], new["completion_mask"]
        if hidden is None:
            hidden = self.training_hidden_states(**kwargs)
        elif hidden.shape[:-1] != input_ids.shape:
            raise ValueError(
                f"DualHeadForCausalLM.forward: hidden_states must be {(*input_ids.shape, 'd')}, "
                f"got {tuple(hidden.shape)}"
            )
        packed = packed_rows(kwargs.get("position_ids")) if mask is None else None
        if packed is not None:
            hidden, input_ids = packed.unpack(hidden), packed.unpack(input_ids)
            completion_mask, mask = packed.unpack(completion_mask) * packed.valid, packed.valid
        return self.lm_head_module.training_loss(
            hidden, input_ids, mask, completion_mask, new["objective"], new["loss_options"] or {}
        )

    def training_hidden_states(self, **inputs: Any) -> Tensor:
        """What the heads read in training: the decoder's last hidden states of a batch (input_ids,
        attention_mask, ...), (2P, T, d), or (1, N, d) of a packed one.
        """
        if not self.lm_head_module.packing_checked and inputs.get("attention_mask") is None:
            if packed_rows(inputs.get("position_ids")) is not None:
                check_packing(self.get_decoder(), self.get_input_embeddings())
                self.lm_head_module.packing_checked = True
        dropped = ("labels", "past_key_values", "logits_to_keep", "return_dict", "use_cache")
        kwargs = {k: v for k, v in inputs.items() if k not in (*dropped, *_NEW_ARGUMENTS)}
        return self.get_decoder()(**kwargs, use_cache=False)[0]

    @property
    def lm_head_module(self) -> DualHeadLMHead:
        """The gated head, whatever attribute the backbone keeps its lm_head under."""
        return self.get_output_embeddings()

    @property
    def dual_head_config(self) -> DualHeadConfig:
        """The configuration of the gated head."""
        return self.lm_head_module.config

    # --- generate ---

    def prepare_inputs_for_generation(
        self, input_ids, *args, attention_mask=None, inputs_embeds=None, **kwargs
    ):
        """As the backbone's, and which of the new positions are real tokens: a static cache's mask
        is 4-D by then.
        """
        inputs = super().prepare_inputs_for_generation(
            input_ids, *args, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
        )
        if attention_mask is not None and attention_mask.dim() == 2:
            ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
            length = (embeds if ids is None else ids).shape[1]
            # Cloned, as transformers does with ids: a slice's stride would grow with the mask and
            # recompile each step.
            valid = attention_mask[:, -length:].bool()
            inputs["dualhead_valid"] = valid.clone(memory_format=torch.contiguous_format)
        return inputs

    def _prepare_static_cache(self, *args: Any, **kwargs: Any) -> Cache:
        cache = super()._prepare_static_cache(*args, **kwargs)
        bound = inspect.signature(super()._prepare_static_cache).bind(*args, **kwargs).arguments
        # Sliding layers report their window as their length: the gate needs the whole of it.
        head, length = self.lm_head_module, self._previous_max_cache_length
        cache.layers.append(StaticGateLayer(head.new_cache(bound["batch_size"], length)))
        return cache

    def generate(
        self, inputs: Tensor | None = None, *args: Any, output_gate: bool = False, **kwargs: Any
    ) -> Any:
        """Hugging Face's own ``generate``, every option of it, and per request:

        Args:
            strength, gate_offset, alpha: a number, or one per request (B,); see
                ``DualHead.forward``.
            max_kl: likewise; lowers alpha at each token until KL(pi_mix || pi_LM) is within it.
                Steps are then computed by eager PyTorch.
            skip_threshold: likewise, in [0, 0.5]; alpha nearer than that to 0 or 1 counts as such,
                and a step in which it does for all requests reads one head (docs/generation.md).
            objective_weights: (K,) or (B, K).
            fused: whether tokens are chosen by the fused step, without logits (see
                :mod:`dualhead_ext.generation`). None: where the options allow it; False: never;
                True: always, or ValueError naming the option that is in the way.
            seeds: (B,) int64, of sampled requests; generator: draws them where they are not given
                (default: torch's global one). For the fused loop alone.
            output_gate: with ``return_dict_in_generate=True``, adds ``out.gate_alpha`` (B, new
                tokens): alpha at each position that chose a token, from one more pass over the
                finished sequences.
        Raises:
            ValueError, TypeError: controls. NotImplementedError: packed inputs.
        """
        refuse_packed(kwargs)
        given = (
            inputs if inputs is not None else kwargs.get("input_ids", kwargs.get("inputs_embeds"))
        )
        batch = 1 if given is None else given.shape[0]
        decoding = decoding_of(kwargs, batch, self.generation_config)
        kwargs |= {} if decoding is None else {"dualhead_decoding": decoding}
        for name in CONTROLS[:-1]:
            row = per_row(
                "generate", name, kwargs.pop(name, None), batch, torch.float32, self.device
            )
            kwargs |= {} if row is None else {name: row}
        weights = kwargs.pop("objective_weights", None)
        count = self.dual_head_config.num_objectives
        rows = objective_rows("generate", weights, batch, count, torch.float32, self.device)
        kwargs |= {} if rows is None else {"objective_weights": rows}
        controls = {name: kwargs[name] for name in CONTROLS if name in kwargs}
        out = super().generate(inputs, *args, **kwargs)
        if output_gate:
            if isinstance(out, Tensor):
                raise ValueError("generate: output_gate=True needs return_dict_in_generate=True")
            out["gate_alpha"] = self._alpha_of(out.sequences, given, kwargs, controls)
        return out

    @torch.no_grad()
    def _alpha_of(
        self, sequences: Tensor, prompt: Tensor | None, kwargs: dict, controls: dict
    ) -> Tensor:
        """alpha at every position that chose a token of ``sequences``: (B, new tokens)."""
        repeats = 1 if prompt is None else sequences.shape[0] // prompt.shape[0]
        repeated = {name: row.repeat_interleave(repeats, 0) for name, row in controls.items()}
        mask, embeds = kwargs.get("attention_mask"), kwargs.get("inputs_embeds")
        if embeds is not None:
            embeds = embeds.repeat_interleave(repeats, 0)
            rest = self.get_input_embeddings()(sequences.to(embeds.device))
            inputs: dict[str, Any] = {"inputs_embeds": torch.cat((embeds, rest), 1)}
            start, total = embeds.shape[1], embeds.shape[1] + sequences.shape[1]
        else:
            start, total = (1 if prompt is None else prompt.shape[1]), sequences.shape[1]
            inputs = {"input_ids": sequences}
        if mask is not None:
            mask = mask.repeat_interleave(repeats, 0)
            ones = mask.new_ones(mask.shape[0], total - mask.shape[1])
            inputs["attention_mask"] = torch.cat((mask, ones), 1)
            positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
            if "position_ids" in inspect.signature(self.forward).parameters:
                inputs["position_ids"] = positions
        keep = torch.arange(start - 1, total - 1, device=sequences.device)
        self(**inputs, **repeated, use_cache=False, logits_to_keep=keep)
        return self.lm_head_module.last_alpha

    # --- what would go wrong in silence ---

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: continuous batching packs requests into one sequence, across which the gate
        would look.
        """
        raise NotImplementedError(
            "generate_batch: continuous batching is not supported by the gated head; use generate"
        )

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: the reward head would keep its old vocabulary."""
        raise NotImplementedError(
            "resize_token_embeddings: resize the backbone first, then attach the gated head"
        )


@functools.cache
def _extended_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The backbone's class with the gated head's methods before its own. It keeps the name:
    pipelines and saved configs go by it, and ``isinstance`` holds both ways.
    """
    signature = inspect.signature(base.forward)
    parameters = list(signature.parameters.values())
    names = tuple(p.name for p in parameters[1:] if p.kind is not p.VAR_KEYWORD)

    # generate() and Trainer inspect signatures: without the base's, GPT-2 silently loses its
    # position_ids.
    @functools.wraps(base.forward)
    def forward(self, *args, **kwargs):
        return self._dual_head_forward(base.forward, names, args, kwargs)

    added = [
        inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None) for n in _NEW_ARGUMENTS
    ]
    rest = [p for p in parameters if p.kind is p.VAR_KEYWORD]
    forward.__signature__ = signature.replace(
        parameters=[p for p in parameters if p.kind is not p.VAR_KEYWORD] + added + rest
    )
    return type(
        base.__name__,
        (DualHeadForCausalLM, base),
        {"forward": forward, "__module__": base.__module__},
    )


def _attach(
    model: PreTrainedModel, linear: nn.Linear, config: DualHeadConfig
) -> DualHeadForCausalLM:
    model.requires_grad_(False)
    head = DualHeadLMHead(linear, config)
    head.train(linear.training)
    replace_module(model, linear, head)
    head.decoder_hook = model.get_decoder().register_forward_hook(head.on_decoder, with_kwargs=True)
    model.__class__ = _extended_class(type(model))
    return model


def detach(model: DualHeadForCausalLM) -> PreTrainedModel:
    """The plain backbone back, in place: its class, its lm_head, nothing left behind.

    Raises:
        TypeError: the model has no gated head.
    """
    if not isinstance(model, DualHeadForCausalLM):
        raise TypeError(f"detach: model must have a gated head, got {type(model).__name__}")
    head = model.lm_head_module
    head.decoder_hook.remove()
    linear = nn.Linear(
        head.in_features, head.out_features, bias=head.bias is not None, device="meta"
    )
    linear.weight = head.weight
    if head.bias is not None:
        linear.bias = head.bias
    linear.train(head.training)
    replace_module(model, head, linear)
    model.__class__ = type(model).__bases__[1]
    return model
