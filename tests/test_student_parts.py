"""What a student may have that its teacher has not: more blocks, and a share of its input in its output."""

import numpy as np
import pytest
import torch
from runs import COMMON
from test_dit import inputs, randomised

import export
import release
import sample
import train_student_mnist
from models import DiT, SiT, build_network, student_from_teacher
from utils.checkpoints import RELEASED, load_network, start_from, weights_id, write_weights

PARTS = dict(extra_blocks=2, input_skip=True)
TEACHERS = {"DiT": lambda: randomised(DiT("DiT-Nano/4", 8, 1, 3)), "SiT": lambda: randomised(SiT("SiT-4x8x2/4", 8, 1, 3))}


@pytest.fixture(params=TEACHERS)
def teacher(request):
    return TEACHERS[request.param]()


def closed(student) -> list[bool]:
    """Of each block, whether it does nothing."""
    return [not any(weight.any() for weight in block.modulation.parameters()) if isinstance(student, SiT)
            else not block.modulation.up.weight.any() for block in student.blocks]


def saved(network, file):
    write_weights(file, network.state_dict(), dict(kind="student", architecture=network.architecture))
    return file


def test_it_starts_as_its_teacher_and_every_part_learns(teacher):
    student, (z, r, t, y) = student_from_teacher(teacher, **PARTS), inputs()
    assert torch.equal(student(z, r, t, y), teacher.velocity(z, t, y))
    assert closed(student) == [True, False, False, True, False, False]      # 4 in 6: before the first, and before the third
    new = {name for name in student.state_dict() if name not in teacher.state_dict()}
    assert {name.split(".")[0] for name in new} == {"interval_embed", "blocks", "input_skip"}
    student(z, r, t, y).square().mean().backward()
    for i in (0, 3):
        gates = getattr(student.blocks[i].modulation, "up", student.blocks[i].modulation)
        assert gates.weight.grad.abs().max() > 0 and gates.bias.grad.abs().max() > 0
    assert all(p.grad.abs().max() > 0 for p in student.input_skip.parameters())


def test_an_open_block_counts(teacher):
    student, (z, r, t, y) = student_from_teacher(teacher, **PARTS), inputs()
    before = student(z, r, t, y)
    randomised(student.blocks[3])
    assert not torch.allclose(student(z, r, t, y), before, atol=1e-2)


@pytest.mark.parametrize("build", [lambda: DiT("DiT-Nano/4", 8, 2, 3),
                                   lambda: SiT("SiT-4x8x2/4", 8, 2, 3, time_direction="data-at-one"),
                                   lambda: SiT("SiT-4x8x2/4", 8, 2, 3, time_direction="noise-at-one")],
                         ids=["DiT", "SiT, data at one", "SiT, noise at one"])
def test_the_share_is_of_each_channel_and_the_condition_chooses_it(build):
    student = student_from_teacher(randomised(build()), input_skip=True)
    z, r, t, y = inputs(channels=2)
    before = student(z, r, t, y)
    with torch.no_grad():
        student.input_skip.share.bias.copy_(torch.tensor([0.5, -2.0]))
    torch.testing.assert_close(student(z, r, t, y), before + torch.tensor([0.5, -2.0])[:, None, None] * z)
    torch.nn.init.normal_(student.input_skip.share.weight)
    share = (student(z, r, t, y) - before) / z                              # one number for each image and channel
    torch.testing.assert_close(share, share[:, :, :1, :1].expand_as(share), atol=1e-2, rtol=1e-2)
    assert (share[:, 0, 0, 0].unsqueeze(0) - share[:, 0, 0, 0].unsqueeze(1)).abs().max() > 0.02


def test_the_share_is_not_rounded_to_bfloat16():
    student = student_from_teacher(DiT("DiT-Nano/4", 8, 1, 3), input_skip=True)         # its blocks give 0
    torch.nn.init.constant_(student.input_skip.share.bias, 1 / 3)
    z, r, t, y = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        u = student(z, r, t, y)
    torch.testing.assert_close(u, z / 3, rtol=1e-6, atol=0)


def test_networks_of_before_know_nothing_of_it(teacher):
    assert not set(PARTS) & set(student_from_teacher(teacher).architecture)
    architecture = student_from_teacher(teacher, **PARTS).architecture
    assert architecture["preset"] == teacher.architecture["preset"] and PARTS.items() <= architecture.items()
    assert len(build_network(**architecture).blocks) == 6
    with pytest.raises(ValueError, match="extra_blocks must be at least 0, not -1"):
        student_from_teacher(teacher, extra_blocks=-1)
    with pytest.raises(ValueError, match="extra_blocks 0, input_skip True: only a student's network"):
        build_network(**{**teacher.architecture, "input_skip": True})


@pytest.mark.parametrize("before", [{}, {"extra_blocks": 2}, {"input_skip": True}, PARTS])
def test_start_from_a_student_with_less(before, teacher, tmp_path):
    theirs = randomised(student_from_teacher(teacher, **before))
    network, (z, r, t, y) = student_from_teacher(teacher, **PARTS), inputs()
    start_from(network, saved(theirs, tmp_path / "before.safetensors"))
    torch.testing.assert_close(network(z, r, t, y), theirs(z, r, t, y))
    assert sum(closed(network)) == 2 - before.get("extra_blocks", 0)


@pytest.mark.parametrize("extra", range(1, 13))
def test_any_number_of_blocks_between(extra):
    """Each block keeps its order, none is left out, and what lies between does nothing."""
    teacher, (z, r, t, y) = randomised(SiT("SiT-12x8x2/4", 8, 1, 3)), inputs()
    student = student_from_teacher(teacher, extra_blocks=extra)
    assert torch.equal(student(z, r, t, y), teacher.velocity(z, t, y)) and sum(closed(student)) == extra


@pytest.mark.parametrize(("wanted", "message"), [({"extra_blocks": 2}, "input_skip True, here None"),
                                                 ({"input_skip": True}, "extra_blocks 2, here None"),
                                                 ({"extra_blocks": 1, "input_skip": True}, "extra_blocks 2, here 1"),
                                                 ({"extra_blocks": 4, "input_skip": True}, "extra_blocks 2, here 4")])
def test_nothing_that_was_learned_is_dropped(wanted, message, teacher, tmp_path):
    file = saved(student_from_teacher(teacher, **PARTS), tmp_path / "before.safetensors")
    with pytest.raises(ValueError, match=f"is another network: {message}"):
        start_from(student_from_teacher(teacher, **wanted), file)


@pytest.mark.parametrize(("extra", "place"), [(0, 3), (2, 5)])
def test_weights_that_lack_a_block_are_not_taken_for_a_shallower_network(extra, place, teacher, monkeypatch, tmp_path):
    theirs = student_from_teacher(teacher)
    weights = {name: weight for name, weight in theirs.state_dict().items() if not name.startswith("blocks.3.")}
    write_weights(tmp_path / "torn.safetensors", weights, dict(kind="student", architecture=theirs.architecture))
    with pytest.raises(RuntimeError, match=f"Missing .*blocks.{place}."):
        start_from(student_from_teacher(teacher, extra_blocks=extra), tmp_path / "torn.safetensors")
    monkeypatch.setattr(teacher, "state_dict", lambda: {name: weight for name, weight in weights.items() if "interval" not in name})
    with pytest.raises(RuntimeError, match=f"missing .*blocks.{place}."):
        student_from_teacher(teacher, extra_blocks=extra)


@pytest.fixture(scope="module")
def run(results, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    train_student_mnist.main([*COMMON, "--results-dir", str(folder), "--teacher", str(results / "teacher-digits"),
                              "--extra-blocks", "2", "--input-skip", "True"])
    return folder / "student-digits"


def test_trained_sampled_and_exported(run, tmp_path):
    """Six updates open the new blocks and the share; every command takes the file."""
    network, _ = load_network(run, DiT)
    assert len(network.blocks) == 4 and not any(closed(network)) and network.input_skip.share.bias.abs().max() > 0
    sample.main([str(run), "--num-steps", "1", "--num-images", "4", "--formats", "npz", "--out", str(tmp_path / "out"), "--device", "cpu"])
    assert np.load(tmp_path / "out" / "1step.npz")["arr_0"].shape == (4, 8, 8, 1)
    release.main([str(run), str(tmp_path / "folder")])
    card = (tmp_path / "folder" / "README.md").read_text()
    assert "Network DiT-Test/4 with 2 more blocks, a share of its input in its output, images 8 x 8 x 1" in card
    for form in ("pt2", "onnx"):                            # which compares it with the network before it is kept
        export.main([str(run), str(tmp_path / f"out.{form}")])


@pytest.mark.parametrize("name", ["teacher-mnist", "student-mnist", "teacher-cifar10", "student-cifar10"])
def test_released_weights_fit(name):
    network, metadata = load_network(RELEASED / f"{name}.safetensors", build_network)
    assert metadata["kind"] == name.split("-")[0]
    if name == "student-cifar10":
        assert len(network.blocks) == 16 and network.guidance_range == (1, 2.5) and network.guidance_scale == 2
        assert metadata["teacher"] == weights_id(load_network(RELEASED / "teacher-cifar10.safetensors", build_network)[0])


def test_a_released_student_gives_what_it_gave():
    """Pinned (other weights, other numbers): a network that reads them in another way is spoiled, though every shape fits."""
    student, _ = load_network(RELEASED / "student-mnist.safetensors", build_network)
    z = torch.arange(2.0 * 28 * 28).sin().view(2, 1, 28, 28)
    u = student(z, torch.tensor([0.0, 0.2]), torch.tensor([1.0, 0.7]), torch.tensor([3, 7]))
    expected = torch.tensor([[0.24122, 0.02438, -0.58282, -1.34635], [1.98261, 2.76296, 2.23733, 0.52255]])
    torch.testing.assert_close(u[:, 0, 14, 12:16], expected, rtol=0, atol=1e-3)


def test_other_parts_are_another_run(run, results):
    flags = [*COMMON, "--results-dir", str(run.parent), "--teacher", str(results / "teacher-digits"), "--steps", "8"]
    with pytest.raises(ValueError, match="extra_blocks: 1, was 2"):
        train_student_mnist.main([*flags, "--extra-blocks", "1", "--input-skip", "True"])
    with pytest.raises(ValueError, match="--extra-blocks -1: must be at least 0"):
        train_student_mnist.Config(extra_blocks=-1)
    assert load_network(run, DiT)[1]["config"]["extra_blocks"] == 2
