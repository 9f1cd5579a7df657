import pytest
import torch

torch.set_num_threads(2)


@pytest.fixture
def draw() -> torch.Generator:
    return torch.Generator().manual_seed(0)
