"""`chatglm` as `accelerate launch` starts it, with CPUs taken for GPUs: accelerate shards over those alone."""

import os
import sys

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType

from chatglm.cli import main

os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
torch.set_num_threads(1)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
