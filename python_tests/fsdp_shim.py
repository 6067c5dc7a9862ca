# SPDX-License-Identifier: Apache-2.0
"""Let accelerate shard on CPUs.

accelerate shards on accelerators only, but FSDP2 itself works on CPUs with gloo.
"""

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType


def shard_on_cpus() -> None:
    """Make accelerate's state keep FSDP on CPUs, as it does on GPUs."""
    plain = AcceleratorState.__init__

    def keeping_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and not hasattr(self, "fsdp_plugin"):
            self.distributed_type = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = keeping_fsdp
