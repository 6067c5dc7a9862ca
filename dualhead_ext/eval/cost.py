# SPDX-License-Identifier: Apache-2.0
"""The cost of a decoder: measured time, memory, forward passes and parameters; computed FLOPs.

Every system is timed in the same way: whole calls of its decoder with a fixed number of new tokens,
in turns (:func:`dualhead_ext.measurement.timing.alternate`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..config import DualHeadConfig
from ..measurement.timing import Contender, Timing, alternate
from ..model.hf_cache import cache_of

COUNTED = "parameters, buffers and caches, counted"
CUDA_PEAK = "peak of CUDA's allocator"


@dataclass(frozen=True)
class System:
    """A decoder and the models that it calls.

    Attributes:
        decode: dict of input_ids and attention_mask (B, T) -> (B, T + new_tokens) ids; must not
            stop early.
        models: every model that ``decode`` calls.
    """

    decode: Callable[[dict[str, Tensor]], Tensor]
    models: Sequence[nn.Module]


@dataclass(frozen=True)
class Cost:
    """The cost of one system at one batch size.

    Attributes:
        timing: time of whole calls, prompt included.
        forwards: model calls (of all models together) per new token.
        passes: positions computed by all models together, divided by the positions of the texts
            without their last tokens: 1 for plain decoding with a cache.
        memory_bytes: memory use; ``memory`` says how it was obtained.
        memory: :data:`CUDA_PEAK`, or on the CPU, which has no such counter, :data:`COUNTED` (caches
            at their largest, without activations).
        trainable, resident: numbers of parameters; see :func:`parameter_counts`.
    """

    batch_size: int
    prompt_tokens: int
    new_tokens: int
    timing: Timing
    forwards: float
    passes: float
    memory_bytes: int
    memory: str
    trainable: int
    resident: int

    @property
    def ms_per_token(self) -> float:
        """Median latency: milliseconds per call divided by the new tokens of a row."""
        return self.timing.us_median / 1000 / self.new_tokens

    @property
    def tokens_per_s(self) -> float:
        """Median throughput: new tokens of all rows per second."""
        return self.batch_size * self.new_tokens / self.timing.us_median * 1e6

    def row(self) -> dict[str, Any]:
        """A plain dict, as results files store it."""
        return {
            "B": self.batch_size,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "ms_per_token_median": self.ms_per_token,
            "ms_per_token_q1": self.timing.us_q1 / 1000 / self.new_tokens,
            "ms_per_token_q3": self.timing.us_q3 / 1000 / self.new_tokens,
            "tokens_per_s_median": self.tokens_per_s,
            "repeats": self.timing.repeats,
            "forwards_per_token": self.forwards,
            "passes_per_position": self.passes,
            "memory_bytes": self.memory_bytes,
            "memory": self.memory,
            "trainable_parameters": self.trainable,
            "resident_parameters": self.resident,
        }


def measure(
    systems: Mapping[str, System],
    prompts: Tensor,
    new_tokens: int,
    batch_sizes: Sequence[int] = (1, 8, 32),
    seconds: float = 1.0,
    min_rounds: int = 5,
) -> dict[str, list[Cost]]:
    """The cost of each system at each batch size: name -> one :class:`Cost` per batch size.

    Args:
        prompts: (N, T) int64 on the models' device; N at least the largest batch size.
        new_tokens: number of tokens that every decoder generates.
        seconds, min_rounds: as in :func:`dualhead_ext.measurement.timing.alternate`.
    Raises:
        ValueError: too few prompts.
        RuntimeError: a decoder generated a different number of tokens.
    """
    if max(batch_sizes) > prompts.shape[0]:
        raise ValueError(
            f"measure: prompts must be at least {max(batch_sizes)}, got {prompts.shape[0]}"
        )
    found: dict[str, list[Cost]] = {name: [] for name in systems}
    for size in batch_sizes:
        inputs = {"input_ids": prompts[:size], "attention_mask": torch.ones_like(prompts[:size])}
        contenders = [
            Contender(name, _call(name, system, inputs, new_tokens))
            for name, system in systems.items()
        ]
        timings = alternate(contenders, seconds=seconds, min_rounds=min_rounds, warmup=1)
        for contender in contenders:
            watched = _watched_call(contender, systems[contender.name].models, prompts.device)
            models = systems[contender.name].models
            trainable, resident = parameter_counts(models)
            found[contender.name].append(
                Cost(
                    size,
                    prompts.shape[1],
                    new_tokens,
                    timings[contender.name],
                    watched.forwards / new_tokens,
                    watched.positions / (size * (prompts.shape[1] + new_tokens - 1)),
                    watched.memory_bytes,
                    watched.memory,
                    trainable,
                    resident,
                )
            )
    return found


def _call(
    name: str, system: System, inputs: dict[str, Tensor], new_tokens: int
) -> Callable[[int], None]:
    expected = (inputs["input_ids"].shape[0], inputs["input_ids"].shape[1] + new_tokens)
    device = inputs["input_ids"].device

    def call(copy: int) -> None:
        made = system.decode(dict(inputs))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if made.shape != expected:
            raise RuntimeError(f"measure: {name} must write {expected}, got {tuple(made.shape)}")

    return call


# --- passes and memory ----------------------------------------------------------------------------


@dataclass
class Watched:
    """What the models inside :func:`watch` did: number of calls, input positions (rows times
    columns), and the largest total size of their caches in bytes.
    """

    forwards: int = 0
    positions: int = 0
    cache_bytes: int = 0
    memory_bytes: int = 0
    memory: str = COUNTED
    _caches: dict[int, int] = field(default_factory=dict)

    def note(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """The forward hook of a decoder."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        fed = kwargs["inputs_embeds"][..., 0] if ids is None else ids
        self.forwards += 1
        self.positions += fed.numel()
        self._caches[id(module)] = cache_bytes(cache_of(output))
        self.cache_bytes = max(self.cache_bytes, sum(self._caches.values()))


@contextmanager
def watch(models: Iterable[nn.Module]) -> Iterator[Watched]:
    """Count what the decoders of these models do; a shared decoder is counted once."""
    watched = Watched()
    decoders = {id(decoder): decoder for decoder in map(_decoder, models)}
    hooks = [d.register_forward_hook(watched.note, with_kwargs=True) for d in decoders.values()]
    try:
        yield watched
    finally:
        for hook in hooks:
            hook.remove()


def _decoder(model: nn.Module) -> nn.Module:
    """The decoder of a language model or a reward model; calls of heads are not counted."""
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).base_model


def _watched_call(
    contender: Contender, models: Sequence[nn.Module], device: torch.device
) -> Watched:
    """Call the contender once more, untimed, and record its passes and memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with watch(models) as watched:
        contender.call(0)
    if device.type == "cuda":
        watched.memory = CUDA_PEAK
        watched.memory_bytes = torch.cuda.max_memory_allocated(device)
    else:
        watched.memory_bytes = weight_bytes(models) + watched.cache_bytes
    return watched


def cache_bytes(cache: Any) -> int:
    """Bytes of the tensors of a transformers Cache, including the gate's cache; 0 for None."""
    if cache is None:
        return 0
    held: dict[int, int] = {}
    for layer in cache.layers:
        for holder in (layer, getattr(layer, "gate_cache", None)):
            for tensor in vars(holder).values() if holder is not None else ():
                if isinstance(tensor, Tensor):
                    storage = tensor.untyped_storage()
                    held[storage.data_ptr()] = storage.nbytes()
    return sum(held.values())


def weight_bytes(models: Iterable[nn.Module]) -> int:
    """Bytes of all parameters and buffers; shared storage counts once."""
    storages = {}
    for model in models:
        for tensor in (*model.parameters(), *model.buffers()):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def parameter_counts(models: Iterable[nn.Module]) -> tuple[int, int]:
    """(trainable, resident): elements that require a gradient, and elements of all state_dicts.
    Tied or shared tensors count once; two packed int4 values count as one element. After
    ``from_pretrained`` every parameter requires a gradient: freeze those that were not trained.
    """
    trainable, resident = {}, {}
    for model in models:
        trainable |= {id(p): p.numel() for p in model.parameters() if p.requires_grad}
        state = model.state_dict(keep_vars=True).values()
        resident |= {(t.data_ptr(), t.shape): t.numel() for t in state if isinstance(t, Tensor)}
    return sum(trainable.values()), sum(resident.values())


# --- FLOPs ----------------------------------------------------------------------------------------

# Families whose layers have q, k, v, o projections, softmax attention and a gated MLP of three
# matrices.
_COUNTED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def flops_per_token(
    config: Any, context: int, head: DualHeadConfig | None = None, lm_head: bool = True
) -> int:
    """FLOPs of one new token with a cache of ``context`` positions, including the new one.

    With n query heads, m key heads of size h, MLP width f, L layers, S = context (at most the
    layer's sliding window):

        backbone   sum over L of [ 2 d h (n + 2 m) + 2 n h d + 4 S n h + 6 d f ] + 2 d V
        dual head  2 d V K  +  attention gate 4 d g + 2 d H + 2 S' g + 2 S' H, linear gate 2 d

    S' = context; a multiply and an add count as 2 FLOPs. Norms, rotary embeddings, softmax and the
    mixture, O(d + V), are left out. The cost of GenARM is the sum over its models; ARGS adds
    (1 + k) times its reward model (``lm_head=False``); best-of-n costs n times as much.

    Args:
        config: the backbone's config: Llama, Mistral, Qwen2 or Qwen3.
        head: the gated head's config; None for the backbone alone.
        lm_head: False leaves out the LM head's 2 d V.
    Raises:
        NotImplementedError: another model family.
        ValueError: context < 1.
    """
    if context < 1:
        raise ValueError(f"flops_per_token: context must be at least 1, got {context}")
    config = config.get_text_config(decoder=True)
    if config.model_type not in _COUNTED_FAMILIES:
        raise NotImplementedError(
            f"flops_per_token: config must be of {', '.join(_COUNTED_FAMILIES)}, got "
            f"{config.model_type}"
        )
    d, n, m = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    h = getattr(config, "head_dim", None) or d // n
    total = 2 * d * config.vocab_size if lm_head else 0
    for layer in range(config.num_hidden_layers):
        seen = min(context, _window(config, layer) or context)
        total += 2 * d * h * (n + 2 * m) + 2 * n * h * d + 4 * seen * n * h
        total += 6 * d * config.intermediate_size
    return total + (0 if head is None else _head_flops(head, context))


def _window(config: Any, layer: int) -> int | None:
    types = getattr(config, "layer_types", None)
    slides = types[layer] == "sliding_attention" if types else config.model_type == "mistral"
    return getattr(config, "sliding_window", None) if slides else None


def _head_flops(head: DualHeadConfig, context: int) -> int:
    d, heads = head.hidden_size, head.gate_num_heads
    g = heads * head.gate_head_dim
    gate = {
        "attention": 4 * d * g + 2 * d * heads + 2 * context * (g + heads),
        "linear": 2 * d,
        "fixed": 0,
    }[head.gate]
    return 2 * d * head.vocab_size * head.num_objectives + gate
