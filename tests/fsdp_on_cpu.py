"""train_msee.py with sharded weights on the CPU, which accelerate offers on accelerators only.

It turns FSDP on for several processes of any kind but MULTI_CPU; they are made to pass for MULTI_GPU.
"""

import sys

from accelerate import DistributedType, PartialState
from training_fixtures import train_msee


prepare = PartialState.__init__


def pass_for_gpus(self, *args, **kwargs):
    prepare(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


if __name__ == "__main__":
    PartialState.__init__ = pass_for_gpus
    train_msee.main(sys.argv[1:])
