# SPDX-License-Identifier: Apache-2.0
"""Files of a dual-head model: the heads alone, and a JSON that names the backbone they belong to.

``dualhead_config.json`` holds format_version, dual_head (DualHeadConfig), quantized (a name of
:data:`dualhead_ext.config.FORMAT_NAMES`, or null) and backbone (name, revision, fingerprint);
``dualhead_model.safetensors`` gate.*, reward_head.*, and lm_head.* only if it was trained or
quantised, with their weight_scale if so.

No pickle, nothing executed, no path followed out of the folder.
"""

from __future__ import annotations

import json
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

from .atomic import write_durably
from .backbones import inside_peft, module_name
from .builtin_backbones import BUILTIN_BACKBONES, backbone_path, builtin_name
from .config import FORMAT_NAMES, DualHeadConfig
from .fingerprint import VALUES, check_fingerprint, fingerprint
from .head_files import check_head_state, head_state, load_head_state
from .quantization import check_format

FORMAT_VERSION = 1
CONFIG_NAME = "dualhead_config.json"
WEIGHTS_NAME = "dualhead_model.safetensors"


def untie_lm_head(model: PreTrainedModel) -> None:
    """Give an LM head that shares its weight with the embedding a copy of its own, so that it can
    differ."""
    head = model.get_output_embeddings()
    if model.get_input_embeddings().weight is head.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), head.weight.requires_grad)
        for config in (model.config, model.config.get_text_config(decoder=True)):
            config.tie_word_embeddings = False


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
        sound = sound and stored.setdefault("quantized", None) in (None, *FORMAT_NAMES)
        if not sound or any(len(v) != VALUES for v in marks["parameters"].values()):
            raise ValueError("backbone or quantized is not as it should be")
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
            TypeError: kwargs without save_full. RuntimeError: save_full, and the LM head is
                quantised and was not tied to the embedding: its full precision is gone.
        """
        plain_lm = self._plain_lm_weight() if save_full else None
        if save_full and plain_lm is None:
            raise RuntimeError(
                "save_pretrained: save_full: the LM head is quantised "
                f"({self.lm_head_module.quantized}) and its full precision is gone; save the "
                "backbone before quantize"
            )
        if kwargs and not save_full:
            raise TypeError(f"save_pretrained: {', '.join(kwargs)} need save_full=True")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        head, config = self.lm_head_module, self.config
        name = config._name_or_path or None
        if name is not None and os.path.isdir(name):
            name = builtin_name(name)  # a path of this machine means nothing on another
        stored = {
            "format_version": FORMAT_VERSION,
            "dual_head": head.config.to_dict(),
            "quantized": head.quantized,
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
            if head.quantized is not None:
                weight = f"{module_name(self, head)}.weight"
                del plain[f"{weight}_scale"]
                plain[weight] = plain_lm.detach()
            base.save_pretrained(self, folder, state_dict=plain, **kwargs)

    @classmethod
    def from_pretrained(
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
        """Restore heads, bit for bit, on their backbone.

        Args:
            pretrained_model_name_or_path: a folder or hub name that :meth:`save_pretrained` wrote.
            backbone: a model, path, hub name or built-in backbone (``dualhead_ext.backbone_path``)
                instead of the one that the file names.
            dtype, device_map: for loading the backbone; the heads follow it. revision: of the
                heads' repository.
            quantize: "int8", "fp8" or "int4": full-precision heads, once restored, in this
                format; see :meth:`dualhead_ext.DualHeadForCausalLM.quantize`. Of a file that holds
                quantised heads, their format or None.
            trial: as :meth:`dualhead_ext.DualHeadForCausalLM.from_backbone`; options: what else the
                backbone's ``from_pretrained`` takes (attn_implementation, gguf_file, ...).
        Raises:
            FileNotFoundError: no such folder or file. ValueError: a damaged or foreign file, a
                newer format, another vocabulary or hidden size than the backbone's, another
                backbone, quantize is no format or not that of the file. The backbone is as it was
                then.
        """
        folder = os.fspath(pretrained_model_name_or_path)
        stored, state = read_config(folder, revision), read_weights(folder, revision)
        config, source = stored["dual_head"], stored["backbone"]
        where, quantized = f"from_pretrained: {folder}", stored["quantized"]
        if quantize is not None:
            check_format("from_pretrained", quantize, config.hidden_size)
            if quantized not in (None, quantize):
                raise ValueError(
                    f"{where} holds heads in {quantized}, which cannot become {quantize}: quantise "
                    "the heads in full precision that they were made from"
                )
        check_head_state(config, state, quantized, where)
        if backbone is None:
            backbone = source["name_or_path"]
            if backbone is None:
                raise ValueError(
                    f"from_pretrained: {folder} names no backbone (it was a local folder); pass "
                    f"backbone="
                )
            known = backbone in BUILTIN_BACKBONES
            if not known and (os.path.isabs(backbone) or ".." in Path(backbone).parts):
                raise ValueError(
                    f"from_pretrained: {folder} names the backbone {backbone!r}, which is not a "
                    f"hub name"
                )
        loaded = _load_backbone(backbone, dtype, device_map, source["revision"], options)
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
        check_fingerprint(loaded, source["fingerprint"], where)
        model = cls._extend(
            "from_pretrained", loaded, config.to_dict(), quantized or quantize, trial
        )
        if quantized is None and "lm_head.weight" in state:
            untie_lm_head(model)
        load_head_state(model.lm_head_module, state, where, quantized)
        if quantized is None and quantize is not None:
            model.quantize(quantize)
        return model.eval()


def _is_head(name: str) -> bool:
    return ".reward_head." in name or (".gate." in name and "lm_head" in name)


def _load_backbone(
    backbone: Any, dtype: Any, device_map: Any, revision: str | None, options: dict[str, Any]
) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    backbone = inside_peft(backbone)
    if isinstance(backbone, PreTrainedModel):
        if options:
            raise TypeError(
                f"from_pretrained: unknown arguments {', '.join(sorted(options))}; what a "
                "backbone's from_pretrained takes is for a path or hub name, not for a model"
            )
        return backbone
    return AutoModelForCausalLM.from_pretrained(
        backbone_path(backbone),
        dtype=dtype or "auto",
        device_map=device_map,
        revision=revision,
        **{"trust_remote_code": False} | options,
    )
