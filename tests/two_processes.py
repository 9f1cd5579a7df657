"""Several training runs one after the other in the same processes, which torchrun has started: starting them costs most.

    torchrun --standalone --nproc-per-node=2 tests/two_processes.py '[["train_teacher_mnist", "--data", "digits"], ...]'
"""

import importlib
import json
import sys

from utils import distributed

if __name__ == "__main__":
    leave = distributed.finish
    distributed.finish = lambda: None                       # the next run goes on with the same process group
    for script, *arguments in json.loads(sys.argv[1]):
        importlib.import_module(script).main(arguments)
    leave()
