from pathlib import Path

import pytest
import torch
from photos import make_photo_latents
from runs import COMMON, TEACHER
from saved import save

import train_student_mnist
import train_teacher_mnist
from benchmarks.ablations import changes

torch.set_num_threads(1)          # the networks are tiny: threads would only wait for each other


@pytest.fixture(autouse=True)
def seeded():
    """What a test draws without a generator of its own is the same alone, in the whole suite and on any worker."""
    torch.manual_seed(0)


@pytest.fixture
def draw() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    """A teacher and a student, trained without interruption."""
    folder = tmp_path_factory.mktemp("results")
    train_teacher_mnist.main([*TEACHER, "--results-dir", str(folder)])
    train_student_mnist.main([*COMMON, "--results-dir", str(folder)])
    return folder


@pytest.fixture
def undo(monkeypatch):
    """Patches of the ablations last as long as the test."""
    monkeypatch.setattr(changes, "setattr", monkeypatch.setattr, raising=False)


@pytest.fixture
def three(tmp_path) -> Path:
    """A folder with the checkpoints of steps 1, 2 and 3."""
    for step in (1, 2, 3):
        save(tmp_path, step)
    return tmp_path


@pytest.fixture(scope="session")
def photo_latents(tmp_path_factory) -> Path:
    """See `make_photo_latents`: photos, autoencoder, prepared."""
    return make_photo_latents(tmp_path_factory.mktemp("latents"))
