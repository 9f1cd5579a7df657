"""Batches as a function of (seed, step), whoever asks."""

import pytest
import torch

from utils.data import Batches, Images, load_images, to_pixels
from utils.distributed import Ranks


def numbered(num: int, flip: bool = False) -> Images:
    pixels = torch.arange(num, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 1, 4, 4)
    pixels[..., 0] = 255
    return Images("numbered", pixels, torch.arange(num) % 7, [str(i) for i in range(7)], flip)


def batches(images: Images, size: int, seed: int = 0, rank: int = 0, world_size: int = 1) -> Batches:
    return Batches(images, size, seed, Ranks(rank, world_size, torch.device("cpu")))


def numbers(x) -> list[int]:
    return to_pixels(x)[:, 0, 0, 1:3].amin(-1).tolist()


def mirrored(x):
    return x[:, 0, 0, -1] == 1


@pytest.mark.parametrize("size", [4, 5, 12, 30])
def test_every_epoch_is_a_permutation(size):
    """Also where a batch straddles epochs, and where it is larger than the data set; labels stay with their images."""
    stream, labels = [], []
    draw = batches(numbered(12), size)
    for step in range(1, 61):
        x, y = draw(step)
        assert len(x) == size
        stream, labels = stream + numbers(x), labels + y.tolist()
    epochs = [stream[i : i + 12] for i in range(0, len(stream) - 11, 12)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    assert labels == [number % 7 for number in stream]
    assert len(draw.orders) <= 2 + size // 12               # old epochs are forgotten


def test_batch_depends_on_seed_and_step_alone():
    """In any order of asking, and in a fresh object, as after resuming."""
    images = numbered(20, flip=True)
    forward = batches(images, 8)
    expected = {step: forward(step) for step in range(1, 12)}
    backward = batches(images, 8)
    for step in reversed(range(1, 12)):
        assert all(torch.equal(a, b) for a, b in zip(backward(step), expected[step]))
    assert all(torch.equal(a, b) for a, b in zip(batches(images, 8)(7), expected[7]))
    assert numbers(batches(images, 8, seed=1)(7)[0]) != numbers(expected[7][0])


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_batch_of_one_process(world_size):
    images = numbered(50, flip=True)
    for step in (1, 4, 9):
        x, y = batches(images, 16)(step)
        for rank in range(world_size):
            x_rank, y_rank = batches(images, 16, rank=rank, world_size=world_size)(step)
            assert torch.equal(x_rank, x[rank::world_size]) and torch.equal(y_rank, y[rank::world_size])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_leading_share_of_the_batch_is_one_of_each_rank(world_size, monkeypatch):
    for rank in range(world_size):
        ranks = Ranks(rank, world_size, torch.device("cpu"))
        rows = ranks.rows(torch.arange(11))
        assert all((rows[: ranks.count(num)] < num).all() and (rows[ranks.count(num) :] >= num).all() for num in range(12))
        assert rows.untyped_storage().nbytes() == rows.nbytes               # of the rest of the batch nothing is kept
        assert ranks.is_main == (rank == 0)
    monkeypatch.setattr(Ranks, "gather", lambda self, values: torch.stack([values, torch.zeros(1)]))
    assert ranks.agree(True) and not ranks.agree(False)                     # one is enough


def test_half_of_the_images_are_mirrored():
    draw = batches(numbered(200, flip=True), 1000)
    flags = torch.stack([mirrored(draw(step)[0]) for step in (1, 2, 3, 4)]).float()
    assert flags.mean().item() == pytest.approx(0.5, abs=0.03)
    assert flags.corrcoef().fill_diagonal_(0).abs().max() < 0.1             # fresh coins each step
    one = numbered(1, flip=True)
    assert not torch.equal(batches(one, 64)(1)[0], batches(one, 64, seed=1)(1)[0])      # and of each seed


def test_without_flip_nothing_is_mirrored():
    assert not mirrored(batches(numbered(200), 1000)(1)[0]).any()


@pytest.mark.parametrize("flip", [False, True])
def test_flip_may_be_said(flip):
    draw = Batches(numbered(200, flip=not flip), 1000, 0, Ranks(0, 1, torch.device("cpu")), flip)
    assert mirrored(draw(1)[0]).any() == flip


def test_batches_lie_in_the_models_range():
    x, y = batches(load_images("digits"), 256)(1)
    assert (x.dtype, x.min(), x.max(), y.dtype) == (torch.float32, -1, 1, torch.int64)


def test_batch_must_divide_among_processes():
    with pytest.raises(ValueError, match="--global-batch-size 9 is not divisible by 2"):
        batches(numbered(20), 9, world_size=2)
