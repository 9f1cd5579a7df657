"""A training run whose rank 1 is killed after its fifth update without a word, as where a host's memory has run out.

    torchrun --standalone --nproc-per-node=2 tests/dying_rank.py FOLDER train_teacher_mnist --data digits ...

Each rank leaves its process id in FOLDER.
"""

import importlib
import itertools
import os
import signal
import sys
from pathlib import Path

import runs  # noqa: F401 (its preset)

from utils.run_log import Run

if __name__ == "__main__":
    folder, script, *arguments = sys.argv[1:]
    rank, count, advance = os.environ["RANK"], itertools.count(1), Run.advance
    Path(folder, f"rank{rank}.pid").write_text(str(os.getpid()))

    def die_after_five(run: Run) -> None:
        advance(run)
        if next(count) == 5 and rank == "1":
            os.kill(os.getpid(), signal.SIGKILL)

    Run.advance = die_after_five
    importlib.import_module(script).main(arguments)
