"""Several training runs one after the other in the same processes, which torchrun has started: starting them costs most.

    torchrun --standalone --nproc-per-node=2 tests/two_processes.py '[["train_teacher_mnist", "--data", "digits"], ...]'
"""

import importlib
import json
import os
import sys

import runs  # noqa: F401 (its preset)
import torch.distributed as dist

from utils import distributed

if __name__ == "__main__":
    distributed.finish = lambda: None                       # the next run goes on with the same process group
    for script, *arguments in json.loads(sys.argv[1]):
        importlib.import_module(script).main(arguments)
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)                                             # gloo threads of split networks now and then abort the interpreter's own exit
