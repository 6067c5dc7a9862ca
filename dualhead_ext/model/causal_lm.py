# SPDX-License-Identifier: Apache-2.0
"""`DualHeadForCausalLM`: any Hugging Face causal language model with the gated head as its lm_head.

The model is extended in place: it stays an instance of its own class, and its own forward runs.
`lm_head` describes how the gate reads every hidden state, and `hf_cache` where its state is kept.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation.continuous_batching.requests import GenerationOutput
from transformers.utils.hub import PushToHubMixin

from ..config import DualHeadConfig, head_fields
from ..head.controls import Controls
from ..head.dual_head import GatedHead
from ..quantization import check_format
from ..quantization.torchao_weights import check_lm_weight
from . import fused_loop, pretrained
from .attachment import attach, detach, extended_class
from .backbones import (
    backbone_post_processing,
    class_name,
    decoder_of,
    inside_peft,
    module_name,
    refuse_bypass,
    refuse_offloaded,
    refuse_packed,
)
from .builtin_backbones import backbone_path
from .continuous_batching import GatedBatchingManager, batching_config, prompts_with_controls
from .generate import add_controls_of, alpha_of, check_prompt, new_valid, strength_of
from .generation_options import Decoding
from .head_folder import CONFIG_NAME, without_local_path
from .hf_cache import CACHE_NAMES, StaticGateLayer, cache_in
from .lm_head import Call, DualHeadLMHead
from .packing import check_packing, packed_rows
from .paged_gate import PagedGate, paged_gate
from .shards import whole_heads

# Arguments of forward that the backbone's own forward does not have.
_NEW_ARGUMENTS = (
    *(*Controls.NAMES, "dualhead_valid", "dualhead_decoding"),
    *("completion_mask", "objective", "pairs", "loss_options", "hidden_states"),
)

_NOT_ADAPTED = (
    "which cannot be adapted: leave lm_head out of target_modules, target_parameters and "
    "modules_to_save (and the embedding too, if lm_head is tied to it), or adapt the backbone and "
    "merge the adapter before attaching the heads"
)


NO_SHARDS = (
    "tensor parallelism leaves each process a part of the lm_head, but the heads need all of it; "
    "load the backbone without tp_plan, over several devices with device_map"
)

if TYPE_CHECKING:

    class _Extension(PreTrainedModel):
        """For type checkers: the class of every instance derives from this one and from the
        backbone's, which inherits transformers' generation."""

        generation_config: Any
        generate: Callable[..., Any]
        _prepare_generation_config: Callable[..., Any]
        _sample: Callable[..., Any]
        _prepare_static_cache: Callable[..., Cache]
        _previous_max_cache_length: int
        init_continuous_batching: Callable[..., Any]
        generate_batch: Callable[..., Any]
else:
    _Extension = PushToHubMixin


class DualHeadForCausalLM(_Extension):
    """A Hugging Face causal language model whose lm_head is a gated head. Make one with
    :meth:`from_backbone` or :meth:`from_pretrained`, not with the constructor.

    ``model.lm_head`` is a :class:`dualhead_ext.model.lm_head.DualHeadLMHead`. Its ``.weight`` is
    the backbone's own parameter; its ``.reward_head`` and ``.gate`` are trained. Everything else is
    the backbone's.
    """

    @classmethod
    def from_backbone(
        cls,
        backbone: str | os.PathLike | nn.Module,
        *,
        quantize: str | None = None,
        trial: bool = True,
        **options: Any,
    ) -> DualHeadForCausalLM:
        """Extend a causal language model in place with a gated head. Until it is trained, the
        reward head changes nothing, and alpha is 1/2.

        Args:
            backbone: a model; or a path, hub name or built-in backbone ("embedded", "smollm2") for
                ``AutoModelForCausalLM.from_pretrained``; or a GGUF file, also in a hub repository
                ("owner/repository/file.gguf"), which is dequantised to float32 once and cached
                (:mod:`dualhead_ext.model.gguf_files`). For a ``PeftModel``, the model inside is
                extended and returned; the wrapper keeps working.
            quantize: "int8", "fp8" or "int4": quantise the heads at once, see :meth:`quantize`. It
                is required if torchao has quantised the lm_head: both heads then take its
                quantised weights bit for bit (:mod:`dualhead_ext.quantization.torchao_weights`).
            trial: whether to run six tokens through the plain and the gated backbone, in one pass
                and with a cache (:mod:`dualhead_ext.model.backbone_trial`). Default True.
            options: fields of :class:`DualHeadConfig` except sizes, bias and post-processing, which
                are read from the backbone. Defaults: :data:`dualhead_ext.config.DEFAULT_HEAD`. For
                a path or name, all other options are passed to its ``from_pretrained`` (device_map,
                revision, attn_implementation, gguf_file, ...); dtype defaults to "auto".
        Raises:
            TypeError: not a causal language model, an unknown option, or an lm_head that is
                adapted, or quantised by anything but torchao.
            ValueError: the backbone has a gated head already; quantize is not a format, or not the
                format of a torchao lm_head.
            NotImplementedError: the gated head cannot serve this backbone; the message says why.
                The backbone stays as it was.
        """
        if quantize is not None:
            check_format("from_backbone", quantize)
        known = {field.name for field in fields(DualHeadConfig)}
        config = {name: value for name, value in options.items() if name in known}
        config = head_fields(config)
        loading = {name: value for name, value in options.items() if name not in known}
        if loading.get("tp_plan") is not None:
            raise NotImplementedError(f"from_backbone: tp_plan={loading['tp_plan']!r}: {NO_SHARDS}")
        if isinstance(backbone, (str, os.PathLike)):
            loading["dtype"] = loading.get("dtype") or "auto"
            gguf_file, revision = loading.pop("gguf_file", None), loading.get("revision")
            path = backbone_path(backbone, gguf_file, revision)
            backbone = AutoModelForCausalLM.from_pretrained(path, **loading)
        elif loading:
            raise TypeError(
                f"from_backbone: unknown arguments {', '.join(sorted(loading))}; arguments of "
                "from_pretrained (dtype, device_map, ...) need a path or hub name, not a model"
            )
        backbone = inside_peft(backbone)
        if not isinstance(backbone, PreTrainedModel):
            raise TypeError(
                "from_backbone: backbone must be a model, a path or a hub name, got "
                f"{type(backbone).__name__}"
            )
        model = cls._extend("from_backbone", backbone, config, quantize, trial)
        if quantize is not None:
            model.quantize(quantize)
        return model

    @classmethod
    def _extend(
        cls,
        operator: str,
        backbone: PreTrainedModel,
        config: dict[str, Any],
        quantize: str | None,
        trial: bool = True,
    ) -> DualHeadForCausalLM:
        """Attach heads in full precision. ``quantize`` is the format that they will have later, if
        any. All checks come before the backbone is changed.
        """
        if isinstance(backbone, DualHeadForCausalLM):
            raise ValueError(
                f"{operator}: backbone has a gated head already; dualhead_ext.detach(model) "
                "removes it"
            )
        linear = backbone.get_output_embeddings()
        if not isinstance(linear, nn.Linear):
            raise TypeError(
                f"{operator}: {type(backbone).__name__} must have a linear lm_head, got "
                f"{class_name(linear)}"
            )
        if isinstance(linear.weight, DTensor):
            raise NotImplementedError(f"{operator}: lm_head.weight is a DTensor: {NO_SHARDS}")
        read = {
            "hidden_size": linear.in_features,
            "vocab_size": linear.out_features,
            "bias": linear.bias is not None,
            **backbone_post_processing(backbone.config),
        }
        known = {field.name for field in fields(DualHeadConfig)}
        if unknown := sorted(set(config) - known):
            raise TypeError(f"{operator}: unknown arguments {', '.join(unknown)}")
        for name, value in read.items():
            if config.setdefault(name, value) != value:
                raise ValueError(
                    f"{operator}: {name} is {value} in the backbone, got {config[name]}"
                )
        settings = DualHeadConfig(**config)
        if quantize is not None:
            check_format(operator, quantize, settings.hidden_size)
        check_lm_weight(operator, linear.weight, quantize)
        kind: Any = type(backbone)
        extended = extended_class(DualHeadForCausalLM, kind, _NEW_ARGUMENTS)
        return attach(backbone, linear, settings, extended, operator, trial)

    # --- files ---

    def save_pretrained(  # type: ignore[override]  # the heads' options are here by name
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        save_function: Callable[..., Any] | None = None,
        push_to_hub: bool = False,
        token: str | bool | None = None,
        save_full: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write the heads alone: ``dualhead_config.json`` and ``dualhead_model.safetensors``. After
        a crash the folder holds the old pair or the new one. Unless the folder has them,
        ``config.json`` for transformers' Auto classes and the model card ``README.md`` are written
        too. Adapters on the backbone are not saved; a warning says so.

        Args:
            save_directory: the folder; created if missing.
            is_main_process: False writes nothing; for the other processes of a distributed run.
            state_dict: a state dict of the model to take the heads from. Default: its current
                state.
            save_function: accepted but not used; the files are always safetensors.
            push_to_hub: also upload the files, as ``PreTrainedModel.save_pretrained`` does, with
                ``repo_id`` (default: the folder's name), ``token``, ``private``,
                ``commit_message``, ``create_pr``, ``revision``. The path of a local backbone is
                then removed from the configuration.
            save_full: also write the backbone with its own ``save_pretrained(**kwargs)``. The
                folder is then its own backbone.
            kwargs: other arguments of the backbone's ``save_pretrained``, and
                ``safe_serialization=True``, which transformers before 5 had.
        Raises:
            TypeError: an unknown argument.
            ValueError: safe_serialization is False, the heads hold NaN or infinite numbers, or do
                not match the configuration,
                or state_dict lacks them. Nothing is written.
            RuntimeError: save_full, but the LM head is quantised and was not tied to the embedding,
                so its full-precision weights are gone.
            OSError: the disk; the old files stay.
        """
        pretrained.save_heads(
            self, save_directory, is_main_process, state_dict, push_to_hub, token, save_full, kwargs
        )

    def _upload_modified_files(
        self, working_dir: str | os.PathLike, *arguments: Any, **options: Any
    ) -> Any:
        """Remove the local path of the backbone, then upload as transformers does."""
        if (Path(working_dir) / CONFIG_NAME).is_file():
            without_local_path(Path(working_dir))
        return super()._upload_modified_files(working_dir, *arguments, **options)

    @classmethod
    def from_pretrained(  # type: ignore[override]  # the heads' options and the backbone by name
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        backbone: str | os.PathLike | PreTrainedModel | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        revision: str | None = None,
        quantize: str | None = None,
        trial: bool = True,
        **options: Any,
    ) -> Any:
        """Load heads, bit for bit, onto their backbone. The model is returned in eval mode.

        Args:
            pretrained_model_name_or_path: a folder or hub name that :meth:`save_pretrained` wrote.
            backbone: a model, path, GGUF file, hub name or built-in backbone
                (``dualhead_ext.backbone_path``). Default: the backbone that the file names, or the
                local folder that it came from, if that is still there.
            dtype, device_map: for loading the backbone; the heads follow it. dtype defaults to
                "auto".
            revision: of the heads' repository.
            quantize: "int8", "fp8" or "int4": quantise full-precision heads after loading; see
                :meth:`dualhead_ext.DualHeadForCausalLM.quantize`. If the file holds quantised
                heads: their format or None.
            trial: see :meth:`dualhead_ext.DualHeadForCausalLM.from_backbone`.
            options: other arguments of the backbone's ``from_pretrained`` (attn_implementation,
                gguf_file, ...).
        Raises:
            FileNotFoundError: no such folder or file.
            ValueError: a damaged or foreign file, a newer format, another vocabulary or hidden size
                than the backbone's, another backbone, or quantize is not a format or not that of
                the file. The backbone stays as it was.
        """
        return pretrained.load_heads(
            cls, pretrained_model_name_or_path, backbone, dtype, device_map, revision, quantize,
            trial, options,
        )  # fmt: skip

    # --- quantised heads ---

    def quantize(self, format: str, calibration: Tensor | None = None) -> DualHeadForCausalLM:
        """Quantise both heads in place. The backbone is not changed, nor is an embedding that
        shared its weight with the LM head. Quantised heads cannot be trained.

        Args:
            format: "int8", "fp8" or "int4".
            calibration: hidden states (..., d) as the heads read them, without padding, for example
                ``model.get_decoder()(ids).last_hidden_state``. Default: see
                :meth:`dualhead_ext.DualHead.quantize`.
        Returns: self.
        Raises:
            see :meth:`dualhead_ext.DualHead.quantize`.
        """
        self.lm_head_module.quantize(format, calibration)
        return self

    def dequantize(self, *args: Any, **kwargs: Any) -> Any:
        """Dequantise a quantised backbone, as transformers does. Heads that :meth:`quantize` has
        rounded cannot be restored.

        Raises:
            ValueError: the heads are quantised, or the backbone is not.
        """
        if (format := self.lm_head_module.quantized) is not None:
            raise ValueError(
                f"dequantize: the heads are quantised ({format}) and keep no other weights; "
                "detach(model, dequantize=True) gives the plain backbone, and heads that were "
                "saved before load in full precision"
            )
        return super().dequantize(*args, **kwargs)

    def tie_weights(self, missing_keys: set[str] | None = None, recompute_mapping: bool = True):
        """As the backbone's, but a quantised LM head is left alone: it is not tied to anything."""
        quantized = self.lm_head_module.quantized is not None
        return super().tie_weights(missing_keys, recompute_mapping or quantized)

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """{target: source} of tied weights; see :meth:`tie_weights`."""
        keys = super().get_expanded_tied_weights_keys(all_submodels)
        if self.lm_head_module.quantized is not None:
            keys.pop(f"{module_name(self, self.lm_head_module)}.weight", None)
        return keys

    def _plain_lm_weight(self) -> Tensor | None:
        """The LM head's weight in full precision. For a quantised head, the weight of the embedding
        that it was tied to, or None.
        """
        head = self.lm_head_module
        if head.quantized is None:
            return head.weight
        tied = super().get_expanded_tied_weights_keys(all_submodels=False)
        source = tied.get(f"{module_name(self, head)}.weight")
        return None if source is None else self.get_parameter(source)

    # --- forward ---

    def _dual_head_forward(
        self, base_forward: Any, names: tuple[str, ...], args: tuple, kwargs: dict
    ) -> Any:
        kwargs = dict(zip(names, args, strict=False)) | kwargs
        new = {name: kwargs.pop(name, None) for name in _NEW_ARGUMENTS}
        if new["completion_mask"] is not None:
            return self._training_forward(new, kwargs)
        if (pages := paged_gate(kwargs)) is not None:
            return self._paged_forward(base_forward, pages, kwargs)
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
        decoding: Decoding | None = new["dualhead_decoding"]
        begun = decoding is not None and decoding.begun
        if decoding is not None and not begun:
            decoding.refuse("this mode of generation")
        call = Call(
            Controls.take(new),
            attention_mask=mask if isinstance(mask, Tensor) and mask.dim() == 2 else None,
            new_valid=new["dualhead_valid"],
            cache=cache_in(kwargs),
            logits_to_keep=kwargs.get("logits_to_keep", 0),
            sampling=None if decoding is None else decoding.sampling,
            keep_raw=begun and not torch.compiler.is_compiling(),
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

    def _paged_forward(self, base_forward: Any, pages: PagedGate, kwargs: dict) -> Any:
        """Forward of a continuous batch: logits at the last position of each request."""
        kept = kwargs.get("logits_to_keep", 0)
        call = Call(Controls(), paged=pages, batch=dict(kwargs), logits_to_keep=kept)
        kwargs["attention_mask"] = pages.backbone_mask(kwargs["attention_mask"])
        self.lm_head_module.begin(call)
        try:
            out = base_forward(self, **kwargs)
        finally:
            self.lm_head_module.end()
        return self._without_backbones_f(out, call, kwargs)

    def _without_backbones_f(self, out: Any, call: Call, kwargs: dict) -> Any:
        """For the probability mix: replace the logits, to which the backbone has applied its f, by
        the head's own log-probabilities.
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

    # --- generation ---

    def generate(
        self, inputs: Tensor | None = None, *args: Any, output_gate: bool = False, **kwargs: Any
    ) -> Any:
        """Hugging Face's own ``generate`` with all its options, and these:

        Args:
            kwargs: the fields of :class:`dualhead_ext.head.controls.Controls`, each one number for
                all requests or one per request. Default: an attribute of that name of the
                generation config. All others are Hugging Face's.
            kl: instead of a strength, the mean KL from the backbone in nats per token, one number
                or one per request. The strength is read from the calibration curve, which was
                measured at uniform objective weights.
            fused: whether the fused step chooses the tokens, without logits (see
                :mod:`dualhead_ext.model.fused_loop`). None (default): if the options allow it;
                False: never; True: always, or a ValueError that names the option that prevents it.
            seeds: (B,) int64, the seeds of sampled requests. Default: drawn from ``generator``.
                Needs the fused loop.
            generator: a torch.Generator. Default: torch's global one. Needs the fused loop.
            output_gate: with ``return_dict_in_generate=True``, add ``out.gate_alpha`` (B, new
                tokens): alpha at each position where a token was chosen, from another pass over
                the finished sequences. Default False.
        Raises:
            ValueError, TypeError: a wrong control, or a prompt without tokens.
            NotImplementedError: packed inputs.
        """
        refuse_packed(kwargs)
        given = (
            inputs if inputs is not None else kwargs.get("input_ids", kwargs.get("inputs_embeds"))
        )
        check_prompt(given if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"])
        batch = 1 if given is None else given.shape[0]
        if args:
            kwargs["generation_config"], args = args[0], args[1:]  # its options choose the loop
        add_controls_of(kwargs.get("generation_config") or self.generation_config, kwargs)
        if (kl := kwargs.pop("kl", None)) is not None:
            kwargs["strength"] = strength_of(self.dual_head_config.kl_curve, kl, kwargs)
        decoding = fused_loop.decoding_of(kwargs, batch, self.generation_config)
        if decoding is not None and kwargs.get("cache_implementation") == "paged":
            decoding.refuse('cache_implementation="paged"')
        kwargs |= {} if decoding is None else {"dualhead_decoding": decoding}
        where = (batch, self.dual_head_config.num_objectives, torch.float32, self.device)
        controls = Controls.take(kwargs).rows("generate", *where)
        kwargs |= controls.given()  # as tensors, which transformers repeats for beams
        with whole_heads(self):
            out = super().generate(inputs, *args, **kwargs)
            if output_gate:
                if isinstance(out, Tensor):
                    raise ValueError(
                        "generate: output_gate=True needs return_dict_in_generate=True"
                    )
                out["gate_alpha"] = alpha_of(self, out.sequences, given, kwargs, controls)
        return out

    def _prepare_generation_config(self, generation_config: Any, **kwargs: Any) -> Any:
        # A config that has an attribute of the same name would swallow the argument.
        controls = Controls.take(kwargs).given()
        config, arguments = super()._prepare_generation_config(generation_config, **kwargs)
        return config, arguments | controls

    def prepare_inputs_for_generation(
        self, input_ids, *args, attention_mask=None, inputs_embeds=None, **kwargs
    ):
        """As the backbone's; also marks which new positions are real tokens."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, *args, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
        )
        if (valid := new_valid(inputs, attention_mask)) is not None:
            inputs["dualhead_valid"] = valid
        return inputs

    def _prepare_static_cache(self, *args: Any, **kwargs: Any) -> Cache:
        cache = super()._prepare_static_cache(*args, **kwargs)
        bound = inspect.signature(super()._prepare_static_cache).bind(*args, **kwargs).arguments
        # Sliding layers report their window as their length; the gate needs the full length.
        head, length = self.lm_head_module, self._previous_max_cache_length
        cache.layers.append(StaticGateLayer(head.new_cache(bound["batch_size"], length)))
        return cache

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: list,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        arguments = {
            "logits_processor": logits_processor,
            "stopping_criteria": stopping_criteria,
            "generation_config": generation_config,
            "synced_gpus": synced_gpus,
            "streamer": streamer,
        }
        return fused_loop.sample(self, super()._sample, input_ids, arguments, model_kwargs)

    def init_continuous_batching(
        self, generation_config: Any = None, continuous_batching_config: Any = None, **kwargs: Any
    ) -> GatedBatchingManager:
        """As transformers', but ``add_request`` and ``add_requests`` of the manager also take the
        controls of :meth:`generate`. ``continuous_batching_context_manager`` calls this method.

        Raises:
            NotImplementedError: transformers before 5.23; CUDA graphs, compilation or asynchronous
                batches.
        """
        config = batching_config(continuous_batching_config)
        manager = super().init_continuous_batching(generation_config, config, **kwargs)
        return GatedBatchingManager.of(manager)

    def generate_batch(
        self, inputs: list[list[int]], *args: Any, **kwargs: Any
    ) -> dict[str, GenerationOutput]:
        """Decode prompts of any lengths in one continuous batch, as transformers does. Each request
        gets the text that :meth:`generate` writes for it, up to the rounding of the two engines.

        Args:
            inputs: token ids of each prompt.
            kwargs: the controls of :meth:`generate`, each one number for all prompts or one per
                prompt; all others are transformers'.
        Raises:
            TypeError, ValueError: a wrong control, or padding.
            NotImplementedError: see :meth:`init_continuous_batching`.
        """
        if (mask := kwargs.pop("attention_mask", None)) is not None and not bool(mask.all()):
            raise ValueError(
                "generate_batch: inputs must hold no padding, got an attention_mask with zeros; "
                "prompts may have different lengths"
            )
        config = args[0] if args else kwargs.get("generation_config")
        place = (self, "generate_batch", kwargs, config or self.generation_config)
        inputs = prompts_with_controls(*place, inputs)
        return super().generate_batch(inputs, *args, **kwargs)

    # --- training ---

    def _training_forward(self, new: dict[str, Any], kwargs: dict[str, Any]) -> Any:
        """The training objective of padded rows or of a packed row. It is computed inside the
        model's forward, so that the hooks of DDP and FSDP fire. With ``hidden_states`` the backbone
        does not run.
        """
        input_ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        if input_ids is None:
            raise ValueError(
                "DualHeadForCausalLM.forward: completion_mask needs input_ids, got None"
            )
        if self.lm_head_module.knows_f is False:
            raise NotImplementedError(
                f"DualHeadForCausalLM.forward: {type(self).__name__} changes its logits in a way "
                "that its config does not say (logit_scale, logit_softcap), which the loss must "
                "know"
            )
        hidden, completion_mask = new["hidden_states"], new["completion_mask"]
        if hidden is None:
            hidden = self._hidden_states(**kwargs)
        elif hidden.shape[:-1] != input_ids.shape:
            raise ValueError(
                f"DualHeadForCausalLM.forward: hidden_states must be {(*input_ids.shape, 'd')}, "
                f"got {tuple(hidden.shape)}"
            )
        packed = packed_rows(kwargs.get("position_ids")) if mask is None else None
        if packed is not None:
            hidden, input_ids = packed.unpack(hidden), packed.unpack(input_ids)
            completion_mask, mask = packed.unpack(completion_mask) * packed.valid, packed.valid
        options = dict(new["loss_options"] or {})
        if new["pairs"] is not None:
            options["pairs"] = new["pairs"]
        return self.lm_head_module.training_loss(
            hidden, input_ids, mask, completion_mask, new["objective"], options
        )

    def training_hidden_states(self, **inputs: Any) -> Tensor:
        """The hidden states that the heads read in training: the decoder's last ones, (2P, T, d),
        or (1, N, d) for a packed batch. inputs: a batch (input_ids, attention_mask, ...).
        """
        return self._hidden_states(**inputs)  # under FSDP2 this one is a forward of its own

    def _hidden_states(self, **inputs: Any) -> Tensor:
        if not self.lm_head_module.packing_checked and inputs.get("attention_mask") is None:
            if packed_rows(inputs.get("position_ids")) is not None:
                embeddings = self.get_input_embeddings()
                check_packing(self.get_decoder(), embeddings)
                self.lm_head_module.packing_checked = True
        dropped = ("labels", *CACHE_NAMES, "logits_to_keep", "return_dict", "use_cache")
        kwargs = {k: v for k, v in inputs.items() if k not in (*dropped, *_NEW_ARGUMENTS)}
        return self.get_decoder()(**kwargs, use_cache=False)[0]

    def _get_candidate_generator(self, *, model_kwargs: dict[str, Any], **others: Any) -> Any:
        """transformers': a plain assistant drafts without the controls, which it does not know."""
        if not isinstance(others.get("assistant_model"), DualHeadForCausalLM):
            names = set(Controls.NAMES)
            model_kwargs = {n: v for n, v in model_kwargs.items() if n not in names}
        make = super()._get_candidate_generator  # type: ignore[misc]  # the backbone class has it
        return make(model_kwargs=model_kwargs, **others)

    def get_decoder(self) -> nn.Module:
        """The module whose last hidden states the head reads."""
        return decoder_of(self, super().get_decoder())

    @property
    def lm_head_module(self) -> DualHeadLMHead:
        """The gated head, under whatever name the backbone keeps its lm_head.

        Raises:
            NotImplementedError: an adapter has replaced the head, its gate or its reward head; or
                the head was offloaded after it was attached.
        """
        head = self.get_output_embeddings()
        if not isinstance(head, DualHeadLMHead):
            raise NotImplementedError(
                f"DualHeadForCausalLM: {class_name(head)} has replaced the gated lm_head, "
                f"{_NOT_ADAPTED}"
            )
        if not torch.compiler.is_compiling():
            refuse_offloaded(head, "DualHeadForCausalLM", type(self).__name__)
            for name in ("reward_head", "gate"):
                part = getattr(head, name)
                if class_name(part).startswith("peft "):
                    raise NotImplementedError(
                        f"DualHeadForCausalLM: {class_name(part)} has replaced lm_head.{name}, "
                        f"{_NOT_ADAPTED}"
                    )
        return head

    @property
    def dual_head_config(self) -> DualHeadConfig:
        """The configuration of the gated head."""
        return self.lm_head_module.config

    def __setattr__(self, name: str, value: Any) -> None:
        """As the backbone's, but a forward that would bypass the gated head is refused."""
        if name == "forward":
            refuse_bypass(value)
        super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        """The extended class is created at run time, so unpickling derives it from the backbone's
        class again.
        """
        return _of_base, (type(self).__bases__[1],), self.__getstate__()

    def use_heads(self, head: GatedHead) -> None:
        """Decode and train with the gate and the reward head of ``head`` from now on, for example
        with what ``merge_objectives``, ``compress`` or ``expand`` made of this model's own head.
        The LM head stays. Modules are shared with ``head``, not copied.

        Args:
            head: sizes, bias and post-processing must be those of this model's LM head. ``expand``
                gives a correction's constant part to a bias, which an LM head without one has not.
        Raises:
            TypeError: no head. ValueError: another size, bias or post-processing; the model stays
                as it was. RuntimeError: quantised heads.
        """
        if not isinstance(head, GatedHead):
            raise TypeError(f"use_heads: head must be a DualHead, got {type(head).__name__}")
        own = self.lm_head_module
        for one in (own, head):
            one._refuse_quantized("use_heads")
        for name in ("hidden_size", "vocab_size", "bias", "logit_scale", "logit_softcap"):
            expected, given = getattr(own.config, name), getattr(head.config, name)
            if given != expected:
                raise ValueError(f"use_heads: head.config.{name} must be {expected}, got {given}")
        place = own.weight.device
        own.config, own.gate = replace(head.config), head.gate.to(place)
        own.reward_head = head.reward_head.to(place)
        for module in own.modules():
            vars(module)["_is_hf_initialized"] = True  # as attach() does

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize the embedding as the backbone does, and the reward heads with it. delta of a new
        token is zero; for an "embedding" correction it follows from the LM head's new row.

        Raises:
            RuntimeError: the heads are quantised.
        """
        old, extended = self.lm_head_module, type(self)
        old._refuse_quantized("resize_token_embeddings")
        trained = {name for name, value in self.named_parameters() if value.requires_grad}
        plain = detach(self)
        try:
            embeddings = plain.resize_token_embeddings(*args, **kwargs)
        finally:  # the heads go back even after an error
            linear = plain.get_output_embeddings()
            config = replace(old.config, vocab_size=linear.out_features)
            attach(plain, linear, config, extended, "resize_token_embeddings", trial=False)
            head = self.lm_head_module
            old.reward_head.resize(linear.weight, linear.bias)
            head.gate, head.reward_head = old.gate, old.reward_head
            head.lm_head_trained = old.lm_head_trained
            for name, value in self.named_parameters():
                value.requires_grad_(name in trained)
        return embeddings


def _of_base(base: Any) -> PreTrainedModel:
    """An empty model on the backbone class ``base``, for unpickling and copying."""
    extended = extended_class(DualHeadForCausalLM, base, _NEW_ARGUMENTS)
    return extended.__new__(extended)
