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
from utils.checkpoints import load_network, start_from, write_weights

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
    gates = [p.grad for i in (0, 3) for p in student.blocks[i].modulation.parameters() if p.grad is not None]
    assert gates and max(grad.abs().max() for grad in gates) > 0
    assert all(p.grad.abs().max() > 0 for p in student.input_skip.parameters())


def test_an_open_block_counts(teacher):
    student, (z, r, t, y) = student_from_teacher(teacher, **PARTS), inputs()
    before = student(z, r, t, y)
    randomised(student.blocks[3])
    assert not torch.allclose(student(z, r, t, y), before, atol=1e-2)


def test_the_share_is_of_each_channel_and_the_condition_chooses_it():
    torch.manual_seed(0)
    student = student_from_teacher(randomised(DiT("DiT-Nano/4", 8, 2, 3)), input_skip=True)
    z, r, t, y = inputs(channels=2)
    before = student(z, r, t, y)
    with torch.no_grad():
        student.input_skip.share.bias.copy_(torch.tensor([0.5, -2.0]))
    torch.testing.assert_close(student(z, r, t, y), before + torch.tensor([0.5, -2.0])[:, None, None] * z)
    torch.nn.init.normal_(student.input_skip.share.weight)
    share = (student(z, r, t, y) - before) / z                              # one number for each image and channel
    torch.testing.assert_close(share, share[:, :, :1, :1].expand_as(share), atol=1e-2, rtol=1e-2)
    assert (share[:, 0, 0, 0].unsqueeze(0) - share[:, 0, 0, 0].unsqueeze(1)).abs().max() > 0.1


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


@pytest.mark.parametrize("before", [{}, {"extra_blocks": 1}, {"input_skip": True}, PARTS])
def test_start_from_a_student_with_less(before, teacher, tmp_path):
    theirs = randomised(student_from_teacher(teacher, **before))
    network, (z, r, t, y) = student_from_teacher(teacher, **PARTS), inputs()
    start_from(network, saved(theirs, tmp_path / "before.safetensors"))
    torch.testing.assert_close(network(z, r, t, y), theirs(z, r, t, y))
    assert sum(closed(network)) == 2 - before.get("extra_blocks", 0)


@pytest.mark.parametrize(("wanted", "message"), [({"extra_blocks": 2}, "input_skip True, here None"),
                                                 ({"input_skip": True}, "extra_blocks 2, here None"),
                                                 ({"extra_blocks": 1, "input_skip": True}, "extra_blocks 2, here 1")])
def test_nothing_that_was_learned_is_dropped(wanted, message, teacher, tmp_path):
    file = saved(student_from_teacher(teacher, **PARTS), tmp_path / "before.safetensors")
    with pytest.raises(ValueError, match=f"is another network: {message}"):
        start_from(student_from_teacher(teacher, **wanted), file)


def test_a_file_that_lacks_a_block_is_not_taken_for_a_shallower_network(teacher, tmp_path):
    theirs = student_from_teacher(teacher)
    weights = {name: weight for name, weight in theirs.state_dict().items() if not name.startswith("blocks.3.")}
    write_weights(tmp_path / "torn.safetensors", weights, dict(kind="student", architecture=theirs.architecture))
    with pytest.raises(RuntimeError, match="blocks.3."):
        start_from(student_from_teacher(teacher), tmp_path / "torn.safetensors")


@pytest.fixture(scope="module")
def run(results, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    train_student_mnist.main([*COMMON, "--results-dir", str(folder), "--teacher", str(results / "teacher-digits"),
                              "--extra-blocks", "2", "--input-skip", "True"])
    return folder / "student-digits"


def test_trained_sampled_and_exported(run, tmp_path):
    """Six updates open the new blocks and the share; every command takes the file."""
    network, _ = load_network(run, DiT)
    assert len(network.blocks) == 6 and not any(closed(network)) and network.input_skip.share.bias.abs().max() > 0
    sample.main([str(run), "--num-steps", "1", "--num-images", "4", "--formats", "npz", "--out", str(tmp_path / "out"), "--device", "cpu"])
    assert np.load(tmp_path / "out" / "1step.npz")["arr_0"].shape == (4, 8, 8, 1)
    release.main([str(run), str(tmp_path / "folder")])
    assert "Network DiT-Nano/4 with 2 blocks more, images 8 x 8 x 1" in (tmp_path / "folder" / "README.md").read_text()
    for form in ("pt2", "onnx"):                            # which compares it with the network before it is kept
        export.main([str(run), str(tmp_path / f"out.{form}")])


def test_other_parts_are_another_run(run, results):
    flags = [*COMMON, "--results-dir", str(run.parent), "--teacher", str(results / "teacher-digits"), "--steps", "8"]
    with pytest.raises(ValueError, match="extra_blocks: 1, was 2"):
        train_student_mnist.main([*flags, "--extra-blocks", "1", "--input-skip", "True"])
    with pytest.raises(ValueError, match="--extra-blocks -1: must be at least 0"):
        train_student_mnist.Config(extra_blocks=-1)
    assert load_network(run, DiT)[1]["config"]["extra_blocks"] == 2
