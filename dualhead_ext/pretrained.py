# SPDX-License-Identifier: Apache-2.0
"""Files of a dual-head model: the heads alone, and a JSON that names the backbone they belong to.

``dualhead_config.json`` holds format_version, dual_head (DualHeadConfig) and backbone (name,
revision, fingerprint); ``dualhead_model.safetensors`` gate.*, reward_head.*, and lm_head.* only if
it was trained.

No pickle, nothing executed, no path followed out of the folder.
"""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import cached_file
from transformers.utils.hub import PushToHubMixin

from .config import DualHeadConfig
from .data import EMBEDDED, embedded_backbone_path

FORMAT_VERSION = 1
CONFIG_NAME = "dualhead_config.json"
WEIGHTS_NAME = "dualhead_model.safetensors"

# Parameters and values per parameter in a fingerprint: a few kilobytes of JSON that no other
# backbone shares.
_FINGERPRINT_PARAMETERS, _FINGERPRINT_VALUES = 32, 4
# Values agree between float32, bfloat16 and float16 copies of one backbone to half an ulp of
# bfloat16, 2^-8.
_FINGERPRINT_TOLERANCE = 2.0**-7


def head_state(head: torch.nn.Module) -> dict[str, Tensor]:
    """The tensors of a gated head that files hold, by the names that files use."""
    state = {name: value for name, value in head.state_dict().items() if "." in name}
    if _lm_head_is_ours(head):
        state["lm_head.weight"] = head.lm_weight
        if head.lm_bias is not None:
            state["lm_head.bias"] = head.lm_bias
    return {name: value.detach().cpu().contiguous() for name, value in state.items()}


def _lm_head_is_ours(head: torch.nn.Module) -> bool:
    return head.lm_head_trained or head.weight.requires_grad


def untie_lm_head(model: PreTrainedModel) -> None:
    """Give an LM head that shares its weight with the embedding a copy of its own, so that it can
    differ."""
    head = model.get_output_embeddings()
    if model.get_input_embeddings().weight is head.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), head.weight.requires_grad)
        for config in (model.config, model.config.get_text_config(decoder=True)):
            config.tie_word_embeddings = False


def fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """What tells backbones apart: the architecture, and a few values of evenly chosen parameters.

    The heads are left out, and an LM head that is trained with them.
    """
    head = model.get_output_embeddings()
    ours = _lm_head_is_ours(head)
    left_out = {id(p) for n, p in head.named_parameters() if "." in n or ours}
    names = [
        name
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and parameter.numel() and id(parameter) not in left_out
    ]
    step = max(1, math.ceil(len(names) / _FINGERPRINT_PARAMETERS))
    values = {name: _few_values(model.get_parameter(name)) for name in names[::step]}
    return {"model_type": model.config.model_type, "parameters": values}


def _few_values(parameter: Tensor) -> list[float]:
    flat = parameter.detach().flatten()
    where = torch.linspace(0, flat.numel() - 1, _FINGERPRINT_VALUES, device=flat.device).long()
    return flat[where].float().tolist()


def check_fingerprint(model: PreTrainedModel, stored: dict[str, Any], where: str) -> None:
    """Raise ValueError unless ``model`` is the backbone that ``stored`` describes, in any floating
    dtype.
    """
    if model.config.model_type != stored["model_type"]:
        raise ValueError(
            f"{where}: its backbone must be a {stored['model_type']} model, "
            f"got {model.config.model_type}"
        )
    parameters = dict(model.named_parameters())
    for name, values in stored["parameters"].items():
        parameter = parameters.get(name)
        if parameter is None or not parameter.is_floating_point():
            continue  # quantised or renamed here: nothing to compare
        got = _few_values(parameter)
        tolerance = _FINGERPRINT_TOLERANCE * max(max(map(abs, values)), 1e-6)
        if not all(abs(a - b) <= tolerance for a, b in zip(values, got, strict=True)):
            raise ValueError(
                f"{where}: was trained on another backbone: parameter {name} "
                f"begins {values}, this one {got}"
            )


def write_durably(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data`` in one step: a crash leaves the old file or the new one, never a
    part.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _file_of(folder: str, name: str, revision: str | None) -> Path:
    """A file of a local folder or a hub repository; only a regular file right inside the folder."""
    if not os.path.isdir(folder):
        if os.path.exists(folder) or folder.startswith((".", "/", "~")):
            raise FileNotFoundError(f"from_pretrained: {folder} is not a folder of heads")
        return Path(cached_file(folder, name, revision=revision))
    path = Path(folder) / name
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        raise FileNotFoundError(f"from_pretrained: {folder} holds no {name}") from None
    if not stat.S_ISREG(mode):
        raise ValueError(f"from_pretrained: {path} must be a regular file")
    return path


def read_config(folder: str, revision: str | None = None) -> dict[str, Any]:
    """The checked contents of a folder's ``dualhead_config.json``, ``dual_head`` as a
    :class:`DualHeadConfig`.
    """
    path = _file_of(folder, CONFIG_NAME, revision)
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        version, dual_head, backbone = (
            stored[k] for k in ("format_version", "dual_head", "backbone")
        )
        name, marks = backbone["name_or_path"], backbone["fingerprint"]
        sound = isinstance(marks["model_type"], str) and isinstance(marks["parameters"], dict)
        sound = sound and (name is None or isinstance(name, str))
        if not sound or any(len(v) != _FINGERPRINT_VALUES for v in marks["parameters"].values()):
            raise ValueError("backbone is not described as it should be")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"from_pretrained: {path} is not a dual-head configuration ({error!r})"
        ) from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"from_pretrained: {path} has format version {version}, this release reads "
            f"{FORMAT_VERSION}; update it"
        )
    return stored | {"dual_head": DualHeadConfig.from_dict(dual_head)}


def read_weights(folder: str, revision: str | None = None) -> dict[str, Tensor]:
    path = _file_of(folder, WEIGHTS_NAME, revision)
    try:
        return load_file(path)
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        raise ValueError(
            f"from_pretrained: {path} is not a complete safetensors file ({error})"
        ) from error


class DualHeadFilesMixin(PushToHubMixin):
    """Saving and loading of :class:`dualhead_ext.DualHeadForCausalLM`."""

    def save_pretrained(
        self, save_directory: str | os.PathLike, save_full: bool = False, **kwargs: Any
    ) -> None:
        """Write the heads alone: ``dualhead_config.json`` and ``dualhead_model.safetensors``, each
        in one step.

        Args:
            save_full: also write the backbone, as its own ``save_pretrained(**kwargs)`` does, so
                that the folder can be given as its own backbone.
        Raises:
            TypeError: kwargs without save_full.
        """
        if kwargs and not save_full:
            raise TypeError(f"save_pretrained: {', '.join(kwargs)} need save_full=True")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        head, config = self.lm_head_module, self.config
        name = config._name_or_path or None
        if name is not None and os.path.isdir(name):
            embedded = os.path.realpath(name) == os.path.realpath(embedded_backbone_path())
            name = EMBEDDED if embedded else None  # a path of this machine means nothing on another
        stored = {
            "format_version": FORMAT_VERSION,
            "dual_head": head.config.to_dict(),
            "backbone": {
                "name_or_path": name,
                "revision": getattr(config, "_commit_hash", None),
                "fingerprint": fingerprint(self),
            },
        }
        state = head_state(head)
        write_durably(folder / WEIGHTS_NAME, save(state, metadata={"format": "pt"}))
        write_durably(folder / CONFIG_NAME, json.dumps(stored, indent=2).encode() + b"\n")
        if save_full:
            base = type(self).__bases__[1]
            plain = {n: v for n, v in self.state_dict().items() if not _is_head(n)}
            base.save_pretrained(self, folder, state_dict=plain, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        backbone: str | PreTrainedModel | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        revision: str | None = None,
        quantize: str | None = None,
    ) -> Any:
        """Restore heads, bit for bit, on their backbone.

        Args:
            pretrained_model_name_or_path: a folder or hub name that :meth:`save_pretrained` wrote.
            backbone: a model, path or hub name instead of the one that the file names.
            dtype, device_map: for loading the backbone; the heads follow it. revision: of the
                heads' repository.
            quantize: not available yet; must be None.
        Raises:
            FileNotFoundError: no such folder or file. ValueError: a damaged or foreign file, a
                newer format, another vocabulary or hidden size than the backbone's, another
                backbone.
            NotImplementedError: quantize.
        """
        if quantize is not None:
            raise NotImplementedError(
                f"from_pretrained: quantize={quantize!r} is not available in this release"
            )
        folder = os.fspath(pretrained_model_name_or_path)
        stored, state = read_config(folder, revision), read_weights(folder, revision)
        config, source = stored["dual_head"], stored["backbone"]
        if backbone is None:
            backbone = source["name_or_path"]
            if backbone is None:
                raise ValueError(
                    f"from_pretrained: {folder} names no backbone (it was a local folder); pass "
                    f"backbone="
                )
            if backbone != EMBEDDED and (os.path.isabs(backbone) or ".." in Path(backbone).parts):
                raise ValueError(
                    f"from_pretrained: {folder} names the backbone {backbone!r}, which is not a "
                    f"hub name"
                )
        if backbone == EMBEDDED:
            backbone = str(embedded_backbone_path())
        loaded = _load_backbone(backbone, dtype, device_map, source["revision"])
        linear = loaded.get_output_embeddings()
        for name, there in (
            ("vocab_size", linear.out_features),
            ("hidden_size", linear.in_features),
        ):
            if getattr(config, name) != there:
                raise ValueError(
                    f"from_pretrained: the heads in {folder} have {name} {getattr(config, name)}, "
                    f"the backbone has {there}"
                )
        check_fingerprint(loaded, stored["backbone"]["fingerprint"], f"from_pretrained: {folder}")
        model = cls.from_backbone(loaded, **config.to_dict())
        if "lm_head.weight" in state:
            untie_lm_head(model)
        load_head_state(model.lm_head_module, state, folder)
        return model.eval()


def _is_head(name: str) -> bool:
    return ".reward_head." in name or (".gate." in name and "lm_head" in name)


def _load_backbone(
    backbone: Any, dtype: Any, device_map: Any, revision: str | None
) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    if isinstance(backbone, PreTrainedModel):
        return backbone
    return AutoModelForCausalLM.from_pretrained(
        backbone,
        dtype=dtype or "auto",
        device_map=device_map,
        revision=revision,
        trust_remote_code=False,
    )


def load_head_state(head: torch.nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Copy tensors of a file into a gated head: every name must be there, no other, each of its
    shape.

    Raises:
        ValueError: naming what is missing, unknown or of another shape; the head is left as it was.
    """
    trained_lm = any(name.startswith("lm_head.") for name in state)
    own = {n: v for n, v in head.state_dict(keep_vars=True).items() if "." in n}
    if trained_lm:
        own["lm_head.weight"] = head.lm_weight
        if head.lm_bias is not None:
            own["lm_head.bias"] = head.lm_bias
    missing, unknown = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    if missing or unknown:
        raise ValueError(
            f"{where}: the heads' file must hold {', '.join(sorted(own))}; missing: "
            f"{', '.join(missing) or 'none'}; "
            f"unknown: {', '.join(unknown) or 'none'}"
        )
    for name, value in state.items():
        if value.shape != own[name].shape:
            raise ValueError(
                f"{where}: {name} must be {tuple(own[name].shape)}, got {tuple(value.shape)}"
            )
        if not value.is_floating_point():
            raise ValueError(f"{where}: {name} must hold floating-point numbers, got {value.dtype}")
    with torch.no_grad():
        for name, value in state.items():
            parameter = own[name]
            if value.dtype != parameter.dtype and not name.startswith("lm_head."):
                parameter.data = parameter.data.to(value.dtype)  # heads trained in fp32 stay so
            parameter.copy_(value)
    head.lm_head_trained = trained_lm or head.lm_head_trained
