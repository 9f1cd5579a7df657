"""A mistake ends in one line, a bug in its traceback."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sample
from utils.checkpoints import CheckpointError
from utils.errors import run_script
from utils.meter import NonFiniteError

ROOT = Path(__file__).parent.parent


def raising(error: Exception):
    def main() -> None:
        raise error
    return main


def chained() -> None:
    try:
        json.loads("{")
    except ValueError as error:
        raise CheckpointError("it is torn") from error


@pytest.mark.parametrize(("main", "said"), [
    (raising(ValueError("--steps 0")), "error: --steps 0"), (raising(NonFiniteError("step 3")), "error: step 3"),
    (chained, "error: it is torn"), (lambda: sample.main(["nope", "--device", "cpu"]), "error: no checkpoint at nope"),
    (lambda: open(ROOT / "nope"), r"error: \[Errno 2\] No such file or directory: .*nope'"),
])
def test_a_mistake_is_told(main, said, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit, match=f"^{said}$"):
        run_script(main)
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit, match=f"^{said.replace('error:', 'error in process 3:', 1)}$"):
        run_script(main)


@pytest.mark.parametrize(("main", "error"), [
    (lambda: int("x"), ValueError), (lambda: json.loads("{"), ValueError), (raising(KeyError("x")), KeyError),
    (lambda: torch.distributions.Normal(0.0, -1.0, validate_args=True), ValueError), (lambda: torch.ones(2) @ torch.ones(3), RuntimeError),
])
def test_a_bug_keeps_its_traceback(main, error):
    with pytest.raises(error):
        run_script(main)


def test_a_script_ends_so():
    command = [sys.executable, "sample.py", "checkpoints/classifier-mnist.safetensors"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(r"error: checkpoints/classifier-mnist.safetensors is a classifier, [^\n(]*\n", done.stderr)


def test_every_script_ends_so():
    sources = [path for pattern in ("*.py", "benchmarks/**/*.py", "demo/*.py") for path in ROOT.glob(pattern)]
    mains = [path for path in sources if "def main(" in path.read_text()]
    assert len(mains) > 20
    assert [path for path in mains if not path.read_text().endswith('\n\nif __name__ == "__main__":\n    run_script(main)\n')] == []
