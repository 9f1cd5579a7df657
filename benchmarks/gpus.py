"""Training commands side by side: each visible GPU takes one at a time."""

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

from utils.checkpoints import is_finished

Result = TypeVar("Result")


def visible_gpus() -> list[str | None]:
    """What CUDA_VISIBLE_DEVICES may be for one command each; None where there is no GPU."""
    asked = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return (asked.split(",")[:count] if asked else [str(i) for i in range(count)]) or [None]


def start(line: list[str], gpu: str | None) -> None:
    """Run a Python program.

    Args:
        line: what stands after "python".

    Raises:
        RuntimeError: it failed; with the end of what it printed.
    """
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu} if gpu is not None else None
    done = subprocess.run([sys.executable, *line], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"python {' '.join(line)} ended with {done.returncode}:\n{done.stdout[-1000:]}{done.stderr[-2000:]}")


def is_done(folder: Path, line: list[str]) -> bool:
    """Whether a run folder is at its end, and this command was the last to go on with it. line: as for `start`."""
    files = [folder / name for name in ("config.json", "environment.json")]
    if not all(file.is_file() for file in files):
        return False
    config, starts = (json.loads(file.read_text()) for file in files)
    asked = line[2:] if line[0] == "-m" else line[1:]
    return starts[-1]["command"][1:] == asked and is_finished(folder / "checkpoints", config["steps"])


def finish(folder: Path, line: list[str], gpu: str | None) -> None:
    """Run a training script to its end, unless it is there.

    Raises:
        RuntimeError: it failed, or was stopped on its way.
    """
    if not is_done(folder, line):
        start(line, gpu)
        if not is_done(folder, line):
            raise RuntimeError(f"{folder} was stopped before its end; the same command goes on")


def on_each(jobs: Sequence[Callable[[str | None], Result]], keep: Callable[[Result], None]) -> None:
    """Call each job with a GPU of its own for as long as it takes, in their order.

    Args:
        keep: called with what each job returned, as soon as it is there, one at a time.

    Raises:
        Whatever the first of the jobs that failed raised: those that had begun beside it were finished and kept, no other was begun.
    """
    gpus: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    for gpu in visible_gpus():
        gpus.put(gpu)
    failed, keeping = threading.Event(), threading.Lock()

    def one(job: Callable[[str | None], Result]) -> None:
        if failed.is_set():
            return
        gpu = gpus.get()
        try:
            result = job(gpu)
            with keeping:
                keep(result)
        except BaseException:
            failed.set()
            raise
        finally:
            gpus.put(gpu)

    with ThreadPoolExecutor(gpus.qsize()) as threads:
        runs = [threads.submit(one, job) for job in jobs]
    for run in runs:
        run.result()
