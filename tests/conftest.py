from pathlib import Path

import pytest
import torch
from own_images import photo
from own_images import save as save_image
from photos import make_photo_latents
from runs import COMMON, TEACHER
from saved import save

import train_classifier
import train_student_mnist
import train_teacher_mnist
from benchmarks.ablations import changes
from models import DiT, student_from_teacher
from utils.checkpoints import write_weights

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


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """A judge of the digits, and a small untrained teacher and student."""
    folder = tmp_path_factory.mktemp("evaluate")
    train_classifier.main(["--data", "digits", "--out", str(folder / "judge.safetensors"), "--epochs", "12", "--width", "8",
                           "--min-accuracy", "0.9", "--device", "cpu"])
    torch.manual_seed(0)
    teacher = DiT("DiT-Test/4", 8, 1, 10)
    for weight in (teacher.final.out.weight, teacher.final.modulation.up.weight):           # or it would be zero, whatever the label
        torch.nn.init.normal_(weight, std=0.02)
    config = {"data": "digits", "guidance_scale": 1.5, "guidance_interval": [0.0, 1.0], "global_batch_size": 8, "seed": 0}
    classes = [str(digit) for digit in range(10)]
    for kind, network in (("teacher", teacher), ("student", student_from_teacher(teacher))):
        write_weights(folder / f"{kind}-digits.safetensors", network.state_dict(),
                      dict(kind=kind, architecture=network.architecture, classes=classes, config=config, step=1))
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


@pytest.fixture
def class_folders(tmp_path) -> Path:
    for i, name in enumerate(("cat/1.png", "cat/2.png", "dog/1.png", "owl/young/3.png")):
        save_image(tmp_path / "photos" / name, photo(i))
    return tmp_path / "photos"


@pytest.fixture
def loose_images(tmp_path) -> Path:
    for i in range(3):
        save_image(tmp_path / "photos" / f"{i}.png", photo(i))
    return tmp_path / "photos"
