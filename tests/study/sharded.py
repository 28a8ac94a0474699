"""Runs a module (`-m NAME ARGUMENTS`) with FSDP on processors, where accelerate leaves it out."""

import runpy
import sys

from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState

usual = Accelerator.__init__


def sharded(self, *args, **kwargs):
    usual(self, *args, **kwargs)
    if self.state.distributed_type == DistributedType.MULTI_CPU:
        AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin()
        if self.native_amp:
            self.state.fsdp_plugin.set_mixed_precision(self.mixed_precision)


Accelerator.__init__ = sharded
sys.argv = [sys.argv[2], *sys.argv[3:]]
runpy.run_module(sys.argv[0], run_name="__main__")
