"""The network of imported teachers: their weights, our convention."""

import math

import foreign
import pytest
import torch
from foreign import CHANNELS, CLASSES, PRESET, SIZE, inputs, random_state
from torch import Tensor

from models import DiT, SiT, build_network, student_from_teacher
from models.foreign import read_shapes, translate
from models.sit import SIZES, parse_preset, position_table, preset_name
from utils.optim import Optimizer
from utils.sampling import sample_velocity


def teacher(state: dict[str, Tensor], **conventions) -> SiT:
    network = SiT(PRESET, SIZE, CHANNELS, CLASSES, **conventions)
    network.load_state_dict(translate(state, read_shapes(state), network.architecture))
    return network


@pytest.mark.parametrize("learn_sigma", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1000.0])
@pytest.mark.parametrize("direction", ["data-at-one", "noise-at-one"])
def test_velocity_is_theirs_in_our_convention(direction, scale, learn_sigma):
    state = random_state(learn_sigma=learn_sigma)
    network = teacher(state, time_direction=direction, time_scale=scale)
    z, _, t, y = inputs()
    if direction == "data-at-one":                          # their velocity is data - noise
        expected = -foreign.velocity(state, z, scale * (1 - t), y)
    else:
        expected = foreign.velocity(state, z, scale * t, y)
    assert expected.std() > 0.1
    torch.testing.assert_close(network.velocity(z, t, y), expected, rtol=0, atol=1e-5)
    other = teacher(state, time_direction=({"data-at-one", "noise-at-one"} - {direction}).pop(), time_scale=scale)
    assert (other.velocity(z, t, y) - expected).abs().max() > 0.1           # the direction is seen


class ForeignGaussian:
    """Data x ~ N(0, sd^2) in a convention of other projects: the exact velocity d/d(time) of their straight path."""

    def __init__(self, sd: float, direction: str, scale: float):
        self.sd, self.direction, self.scale = sd, direction, scale

    def velocity(self, z: Tensor, time: Tensor) -> Tensor:
        tau = (time / self.scale).view(-1, 1, 1, 1)
        noise, slope = (1 - tau, -1) if self.direction == "data-at-one" else (tau, 1)       # share of noise, and how it changes
        data = 1 - noise
        return z * (noise * slope - data * slope * self.sd**2) / (noise**2 + data**2 * self.sd**2)


@pytest.mark.parametrize(("direction", "scale"), [("data-at-one", 1.0), ("noise-at-one", 1.0), ("noise-at-one", 1000.0)])
def test_sampling_needs_the_right_direction_and_scale(monkeypatch, direction, scale):
    """An ideal foreign network gives the data's spread through our sampler, and only if its convention is told right."""
    truth, noise = ForeignGaussian(0.25, direction, scale), torch.randn(500, 1, 4, 4, generator=torch.Generator().manual_seed(0))

    def spread(told_direction: str, told_scale: float) -> float:
        network = SiT("SiT-1x8x2/4", 4, 1, 0, time_direction=told_direction, time_scale=told_scale)
        monkeypatch.setattr(network, "condition", lambda time, *others: time)
        monkeypatch.setattr(network, "foreign_velocity", truth.velocity)
        return sample_velocity(network.velocity, noise, torch.zeros(500).long(), 32, "heun").std().item()

    assert spread(direction, scale) == pytest.approx(0.25, rel=0.02)
    opposite = {"data-at-one": "noise-at-one", "noise-at-one": "data-at-one"}[direction]
    assert abs(spread(opposite, scale) - 0.25) > 0.5
    assert abs(spread(direction, 1000.0 if scale == 1 else 1.0) - 0.25) > 0.05


def test_student_is_its_teacher_until_it_learns():
    network = teacher(random_state(), time_direction="noise-at-one", time_scale=1000.0)
    student = student_from_teacher(network)
    assert isinstance(student, SiT) and student.architecture == {**network.architecture, "interval": True}
    z, r, t, y = inputs()
    v = network.velocity(z, t, y)
    assert v.abs().max() > 0.1
    assert torch.equal(student(z, r, t, y), v) and torch.equal(student(z, t, t, y), v)
    torch.nn.init.normal_(student.interval_embed.out.weight)
    assert not torch.allclose(student(z, r, t, y), student(z, r / 2, t, y), atol=1e-3)
    with pytest.raises(ValueError, match="it is a student"):
        student_from_teacher(student)


def test_student_learns_with_muon_and_its_position_table_stays():
    student = student_from_teacher(teacher(random_state()))
    torch.nn.init.normal_(student.interval_embed.out.weight)
    optimizer = Optimizer(student, "muon", lr=1e-2, muon_lr=1e-2)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    student(*inputs()).square().mean().backward()
    assert [name for name, p in student.named_parameters() if p.grad is None or p.grad.abs().max() == 0] == []
    assert len(optimizer.parts[1].param_groups[0]["params"]) == 4 * foreign.DEPTH          # qkv, out, and both of the MLP
    optimizer.step(1.0, skip=torch.tensor(False))
    assert [name for name, tensor in student.state_dict().items() if torch.equal(tensor, before[name])] == ["position"]


def test_position_table():
    """The first half of the channels tells the column, the second the row; in each, sines and then cosines."""
    table = position_table(3, 16)
    assert table.shape == (1, 9, 16)
    for row in range(3):
        for column in range(3):
            expected = [wave(place / 10_000 ** (i / 4)) for place in (column, row) for wave in (math.sin, math.cos) for i in range(4)]
            assert table[0, 3 * row + column].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("size", "shape"), {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}.items())
def test_published_sizes(size, shape):
    for patch_size in (2, 4, 8):
        preset, found = parse_preset(f"SiT-{size}/{patch_size}")
        assert (preset.depth, preset.width, preset.num_heads) == shape and found == patch_size
        assert preset == SIZES[size] and preset_name(*shape, patch_size) == f"SiT-{size}/{patch_size}"


def test_number_of_weights():
    """675 million with 1,000 classes on latents 4 x 32 x 32 (SiT, Table 1), 130 million of B."""
    with torch.device("meta"):
        counts = [sum(p.numel() for p in SiT(preset, 32, 4, 1000).parameters()) for preset in ("SiT-XL/2", "SiT-B/2")]
    assert [round(count / 1e6) for count in counts] == [675, 130]


@pytest.mark.parametrize(("arguments", "message"), [
    (dict(preset="SiT-Q/2"), "unknown model 'SiT-Q/2'; known are SiT-S, B, L, XL or depth x width x heads as in SiT-6x256x4"),
    (dict(preset="DiT-S/2"), "unknown model 'DiT-S/2'"),
    (dict(preset="SiT-2x24x5/2"), "divisible by 4 and by the number of heads"),
    (dict(preset="SiT-2x24x3/3"), "image size 8 is not divisible by the patch size 3"),
    (dict(num_channels=0), "num_channels .* 0 and 2"),
    (dict(num_classes=-1), "num_classes .* 3 and -1"),
    (dict(time_direction="data"), "unknown time direction 'data'; known are data-at-one, noise-at-one"),
    (dict(time_scale=0.0), "time scale must be above 0, not 0.0"),
])
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        SiT(**{**dict(preset=PRESET, image_size=SIZE, num_channels=CHANNELS, num_classes=CLASSES), **arguments})


def test_architecture_rebuilds_the_network():
    network = teacher(random_state(), time_direction="noise-at-one", time_scale=1000.0)
    again = build_network(**network.architecture)
    again.load_state_dict(network.state_dict())
    given = inputs()
    assert torch.equal(network(*given), again(*given))
    dit = DiT("DiT-Nano/4", 8, 1, 3)
    assert "network" not in dit.architecture and type(build_network(**dit.architecture)) is DiT     # as in files that name none
    with pytest.raises(ValueError, match="unknown network 'UNet'; known are DiT, SiT"):
        build_network(**{**dit.architecture, "network": "UNet"})


def test_precision_under_autocast():
    network = teacher(random_state())
    z, r, t, y = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        out = network(z, r, t, y)
    assert out.dtype == torch.float32
    exact = network(z, r, t, y)
    torch.testing.assert_close(out, exact, rtol=0.1, atol=0.1 * exact.abs().max().item())


def test_exports_with_any_batch_size():
    network = student_from_teacher(teacher(random_state())).eval()
    torch.nn.init.normal_(network.interval_embed.out.weight)
    batch = torch.export.Dim("batch")
    program = torch.export.export(network, inputs(4), dynamic_shapes=tuple({0: batch} for _ in range(4))).module()
    for count in (1, 7):
        torch.testing.assert_close(program(*inputs(count)), network(*inputs(count)), rtol=0, atol=1e-5)
