# SPDX-License-Identifier: Apache-2.0
"""accelerate shards on accelerators alone; for the tests it does so on CPUs too, where FSDP2 itself
works over gloo.
"""

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType


def shard_on_cpus() -> None:
    """Let accelerate's state keep FSDP on CPUs as it does on GPUs."""
    plain = AcceleratorState.__init__

    def keeping_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and not hasattr(self, "fsdp_plugin"):
            self.distributed_type = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = keeping_fsdp
