"""Images that are moved, and networks that are told so."""

import json
import math

import pytest
import torch
from runs import COMMON, STEPS, TEACHER, assert_same

import train_student_mnist
import train_teacher_mnist
from models import DiT, build_network, student_from_teacher
from utils.augmentation import AUGMENT_DIM, SHIFT, augment, check_augment, draw_augment_labels
from utils.checkpoints import load_network, start_from, write_weights
from utils.latents import Latents
from utils.run_log import Run

NOTHING = torch.zeros(1, AUGMENT_DIM)


def smooth(side: int = 16) -> torch.Tensor:
    """A picture without symmetry whose mean path a bicubic can follow, (1, 2, side, side)."""
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, side)] * 2, indexing="ij")
    return torch.stack([0.8 * torch.sin(2 * x + y), 0.6 * x * y + 0.3 * y])[None]


def told(**values: float) -> torch.Tensor:
    names = ("scale", "stretch_cos", "stretch_sin", "less", "sin", "x", "y")
    return torch.tensor([[values.get(name, 0.0) for name in names]])


def turned(degrees: float) -> torch.Tensor:
    return told(less=1 - math.cos(math.radians(degrees)), sin=math.sin(math.radians(degrees)))


def test_nothing_is_done_where_nothing_is_said():
    x = torch.rand(3, 3, 8, 8) * 2 - 1
    labels = torch.cat([NOTHING, turned(30), NOTHING])
    moved = augment(x, labels)
    assert torch.equal(moved[[0, 2]], x[[0, 2]]) and not torch.allclose(moved[1], x[1], atol=0.1)
    assert moved.abs().max() <= 1                           # a bicubic overshoots
    odd = torch.rand(1, 3, 27, 27) * 2 - 1                  # where interpolation itself would round
    assert torch.equal(augment(odd, NOTHING), odd)


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_quarter_turns_are_exact(quarters):
    """A turn about the centre takes pixels to pixels."""
    torch.testing.assert_close(augment(smooth(), turned(90 * quarters)), torch.rot90(smooth(), quarters, (2, 3)), atol=1e-5, rtol=0)


def test_shifts_by_whole_pixels_are_exact():
    shift = 2 / 16 / SHIFT                                  # two pixels of sixteen
    torch.testing.assert_close(augment(smooth(), told(x=shift))[..., :-2], smooth()[..., 2:], atol=1e-5, rtol=0)
    torch.testing.assert_close(augment(smooth(), told(y=shift))[..., :-2, :], smooth()[..., 2:, :], atol=1e-5, rtol=0)


def test_what_lies_beyond_the_border_is_the_mirror_image():
    shifted = augment(smooth(), told(x=2 / 16 / SHIFT))
    torch.testing.assert_close(shifted[..., -2:], smooth()[..., -2:].flip(-1), atol=1e-5, rtol=0)


def test_sharper_than_bilinear():
    """Half a pixel there and back leaves a fine pattern, of eight pixels a wave, nearly as strong as it was."""
    wave = torch.sin(2 * math.pi * torch.arange(32.0) / 8).expand(1, 1, 32, 32) * 0.9
    back = augment(augment(wave, told(x=0.5 / 32 / SHIFT)), told(x=-0.5 / 32 / SHIFT))[..., 8:24]
    assert back.std() / wave[..., 8:24].std() > 0.93


def test_turned_after_it_is_stretched():
    """Of a plane x, the pixel is taken from the stretched and then turned place: x doubled, then carried to y by a quarter turn."""
    y, x = torch.meshgrid(*[(2 * torch.arange(16) + 1) / 16 - 1] * 2, indexing="ij")
    label, inner = turned(90) + told(stretch_cos=5), slice(5, 11)
    moved = augment(0.2 * torch.stack([x, y])[None], label)[0, :, inner, inner]
    torch.testing.assert_close(moved, 0.2 * torch.stack([-0.5 * y, 2 * x])[:, inner, inner], atol=2e-3, rtol=0)


def test_scale_and_stretch():
    """Twice as far from the centre (scale 5 x 0.2 = 1 in log2); half along x and double along y for a stretch of the same size."""
    y, x = torch.meshgrid(*[(2 * torch.arange(16) + 1) / 16 - 1] * 2, indexing="ij")
    plane = 0.2 * torch.stack([x, y])[None]
    inner = slice(5, 11)                                    # what comes from inside the image; a bicubic is not quite linear
    for label, along_x, along_y in [(told(scale=5), 2, 2), (told(scale=-5), 0.5, 0.5), (told(stretch_cos=5), 2, 0.5),
                                    (told(stretch_cos=-5), 0.5, 2)]:
        expected = plane * torch.tensor([along_x, along_y]).view(1, 2, 1, 1)
        torch.testing.assert_close(augment(plane, label)[..., inner, inner], expected[..., inner, inner], atol=2e-3, rtol=0)
    diagonal = augment(plane, told(stretch_sin=5))          # twice along x = y: there both coordinates double
    torch.testing.assert_close(diagonal[0, 0].diagonal()[inner], 2 * plane[0, 0].diagonal()[inner], atol=2e-3, rtol=0)


def test_draws():
    """Each kind with its own chance, both numbers of a kind together, rotations over the whole circle; the same from the same generator."""
    labels = draw_augment_labels(20_000, 0.3, torch.Generator().manual_seed(0))
    kinds = torch.stack([(labels[:, part] != 0).all(1) for part in ([0], [1, 2], [3, 4], [5, 6])])
    assert torch.equal(kinds, torch.stack([(labels[:, part] != 0).any(1) for part in ([0], [1, 2], [3, 4], [5, 6])]))
    torch.testing.assert_close(kinds.float().mean(1), torch.full((4,), 0.3), atol=0.015, rtol=0)
    assert kinds.all(0).float().mean().item() == pytest.approx(0.3**4, abs=0.003)
    for column in (0, 5, 6):
        assert labels[labels[:, column] != 0, column].std().item() == pytest.approx(1, abs=0.05)
    assert labels[:, 1:3].norm(dim=1)[kinds[1]].square().mean().item() == pytest.approx(1, abs=0.06)
    turns = labels[kinds[2], 3:5]
    torch.testing.assert_close((1 - turns[:, 0]).square() + turns[:, 1].square(), torch.ones(len(turns)))
    assert abs((1 - turns[:, 0]).mean()) < 0.05 and abs(turns[:, 1].mean()) < 0.05
    assert torch.equal(labels, draw_augment_labels(20_000, 0.3, torch.Generator().manual_seed(0)))
    assert not draw_augment_labels(100, 0.0, torch.Generator()).any()


def teacher(**more) -> DiT:
    torch.manual_seed(0)
    network = DiT("DiT-Nano/4", 8, 1, 10, **more)
    for block in network.blocks:
        torch.nn.init.normal_(block.modulation.up.weight, std=0.1)
    torch.nn.init.normal_(network.final.out.weight, std=0.1)
    return network


BATCH = torch.randn(4, 1, 8, 8), torch.rand(4), torch.arange(4)


def test_a_network_is_told():
    network = teacher(augment_dim=AUGMENT_DIM)
    labels = draw_augment_labels(4, 1.0, torch.Generator().manual_seed(0))
    torch.testing.assert_close(network.velocity(*BATCH, augment_labels=labels), network.velocity(*BATCH))   # at first it does not listen
    torch.nn.init.normal_(network.augment_embed.weight)
    assert not torch.allclose(network.velocity(*BATCH, augment_labels=labels), network.velocity(*BATCH), atol=1e-2)
    torch.testing.assert_close(network.velocity(*BATCH, augment_labels=0 * labels), network.velocity(*BATCH))


def test_its_student_is_not_told():
    network = teacher(augment_dim=AUGMENT_DIM)
    torch.nn.init.normal_(network.augment_embed.weight)
    student = student_from_teacher(network)
    z, t, y = BATCH
    torch.testing.assert_close(student(z, t / 2, t, y), network.velocity(*BATCH))
    assert student.augment_embed is None and "augment_dim" not in student.architecture
    assert "augment_dim" not in teacher().architecture      # nor do checkpoints of before know of it


@pytest.mark.parametrize("before", [0, AUGMENT_DIM])
def test_start_from_a_network_that_was_or_was_not_told(before, tmp_path):
    theirs = teacher(augment_dim=before)
    write_weights(tmp_path / "theirs.safetensors", theirs.state_dict(), dict(kind="teacher", architecture=theirs.architecture))
    ours = DiT("DiT-Nano/4", 8, 1, 10, augment_dim=AUGMENT_DIM - before)
    start_from(ours, tmp_path / "theirs.safetensors")
    torch.testing.assert_close(ours.velocity(*BATCH), theirs.velocity(*BATCH))


def test_latents_are_refused():
    latents = Latents.__new__(Latents)
    object.__setattr__(latents, "name", "photos")
    object.__setattr__(latents, "autoencoder", {"id": "some"})
    with pytest.raises(ValueError, match=r"--augment 0.1: photos holds latents.*--augment 0"):
        check_augment(latents, 0.1)
    check_augment(latents, 0.0)


def test_training(tmp_path, monkeypatch):
    """Goes on where it stopped as if it had not; its student trains; no one else's run is taken for it."""
    flags = [*TEACHER, "--augment", "0.5", "--results-dir", str(tmp_path)]
    train_teacher_mnist.main([*flags, "--name", "whole"])
    monkeypatch.setattr(Run, "asked_to_stop", lambda self, step, stop: step == 3)
    train_teacher_mnist.main([*flags, "--name", "parts"])
    monkeypatch.undo()
    train_teacher_mnist.main([*flags, "--name", "parts"])
    assert_same(tmp_path / "whole", tmp_path / "parts")
    network, metadata = load_network(tmp_path / "whole", build_network)
    assert metadata["config"]["augment"] == 0.5 and network.augment_embed.weight.abs().sum() > 0
    train_teacher_mnist.main([*TEACHER, "--results-dir", str(tmp_path), "--name", "plain"])
    loss = [json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1])["loss"] for name in ("whole", "plain")]
    assert loss[0] != loss[1]
    train_student_mnist.main([*COMMON, "--results-dir", str(tmp_path), "--name", "student", "--teacher", str(tmp_path / "whole")])
    assert load_network(tmp_path / "student", build_network)[1]["step"] == STEPS


def test_a_run_of_before_augmentation_goes_on(tmp_path, monkeypatch):
    flags = [*TEACHER, "--results-dir", str(tmp_path), "--name", "old"]
    monkeypatch.setattr(Run, "asked_to_stop", lambda self, step, stop: step == 3)
    train_teacher_mnist.main(flags)
    monkeypatch.undo()
    file = tmp_path / "old/config.json"
    file.write_text(json.dumps({key: value for key, value in json.loads(file.read_text()).items() if key != "augment"}))
    with pytest.raises(ValueError, match=r"another run \(augment: 0.5, was 0.0\)"):
        train_teacher_mnist.main([*flags, "--augment", "0.5"])
    train_teacher_mnist.main(flags)
