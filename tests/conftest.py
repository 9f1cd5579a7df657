import pytest
import torch
from runs import COMMON, TEACHER

import train_student_mnist
import train_teacher_mnist

torch.set_num_threads(1)          # the networks are tiny: threads would only wait for each other


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
