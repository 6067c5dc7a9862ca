# SPDX-License-Identifier: Apache-2.0
"""Change the contents of head folders and make their hashes match, as an attacker could."""

import hashlib
import json
from pathlib import Path

from safetensors.torch import save

from dualhead_ext.model.head_folder import CONFIG_NAME, WEIGHTS_NAME, _own_sha256


def read(folder):
    """The configuration of a folder, without checks."""
    return json.loads((Path(folder) / CONFIG_NAME).read_text())


def write(folder, stored=None, weights=None):
    """Replace the configuration or the weights (tensors or bytes) in a folder.

    Both hashes are made to match.
    """
    folder, stored = Path(folder), read(folder) if stored is None else stored
    if weights is not None:
        data = weights if isinstance(weights, bytes) else save(weights)
        (folder / WEIGHTS_NAME).write_bytes(data)
    if "weights_sha256" in stored:
        data = (folder / WEIGHTS_NAME).read_bytes()
        stored = stored | {"weights_sha256": hashlib.sha256(data).hexdigest()}
    if "sha256" in stored:
        stored = stored | {"sha256": _own_sha256(stored)}
    (folder / CONFIG_NAME).write_text(json.dumps(stored))
