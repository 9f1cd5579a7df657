"""import_teacher.py as users run it: files of other projects, in every wrapping, and what is wrong with some."""

import argparse
import json
import pickle
import re
import shutil
from pathlib import Path

import foreign
import numpy as np
import pytest
import torch
from foreign import CHANNELS, CLASSES, DEPTH, PATCH, PRESET, SIZE, WIDTH, inputs, random_state
from PIL import Image
from runs import make_images
from safetensors.torch import save_file

import evaluate
import import_teacher
import sample
import train_student
from models import SiT, build_network
from models.foreign import KEYS, Shapes, choose_preset, key_map
from utils.checkpoints import load_network, read_weights
from utils.data import Images
from utils.evaluation import Judge
from utils.teachers import check_teacher

HEADS = ["--num-heads", str(foreign.HEADS), "--time-direction", "noise-at-one"]


def run(source: Path, *flags: str) -> Path:
    target = source.with_name("teacher.safetensors")
    import_teacher.main([str(source), str(target), *(flags or HEADS)])
    return target


def save(folder: Path, content: object) -> Path:
    torch.save(content, folder / "theirs.pt")
    return folder / "theirs.pt"


def assert_is(path: Path, state: dict) -> None:
    """The file at `path` is a teacher that computes what `state` means."""
    network, metadata = load_network(path, build_network)
    assert metadata["kind"] == "teacher"
    z, _, t, y = inputs()
    torch.testing.assert_close(network.velocity(z, t, y), foreign.velocity(state, z, t, y), rtol=0, atol=1e-5)


def test_key_map_is_complete_both_ways():
    """Every weight of ours has one source, every name of theirs one target, and no two share either."""
    theirs, ours = key_map(DEPTH).keys(), list(key_map(DEPTH).values())
    assert theirs == random_state().keys()
    assert sorted(ours) == sorted(SiT(PRESET, SIZE, CHANNELS, CLASSES).state_dict())
    assert len(set(KEYS.values())) == len(KEYS)


@pytest.mark.parametrize("wrapping", ["plain", "ema", "model", "state_dict", "compiled", "distributed", "script", "safetensors"])
def test_every_wrapping(tmp_path, wrapping):
    state = random_state()
    prefixed = {prefix: {prefix + name: tensor for name, tensor in state.items()} for prefix in ("_orig_mod.", "module._orig_mod.")}
    contents = {
        "plain": state, "ema": {"ema": state, "model": random_state(1)}, "model": {"model": state, "step": 7},
        "state_dict": {"state_dict": state}, "compiled": {"model": prefixed["_orig_mod."]}, "distributed": prefixed["module._orig_mod."],
        # As DiT's training script saves: with its options and the optimizer.
        "script": {"model": random_state(1), "ema": state, "opt": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []},
                   "args": argparse.Namespace(model="DiT-XL/2", lr=1e-4)},
    }
    if wrapping == "safetensors":
        save_file(state, tmp_path / "theirs.safetensors")
        source = tmp_path / "theirs.safetensors"
    else:
        source = save(tmp_path, contents[wrapping])
    assert_is(run(source), state)


def test_old_torch_files(tmp_path):
    """Before torch 1.6 files were no zip archives; such ones cannot be mapped into memory."""
    torch.save(random_state(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_is(run(tmp_path / "old.pth"), random_state())


def test_metadata_and_report(tmp_path, capsys):
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    source = save(tmp_path, {"ema": random_state(learn_sigma=True)})
    path = run(source, *HEADS, "--time-scale", "1000", "--class-names", str(tmp_path / "names.txt"), "--data", "digits")
    weights, metadata = read_weights(path)
    assert metadata["architecture"] == dict(network="SiT", preset=PRESET, image_size=SIZE, num_channels=CHANNELS, num_classes=CLASSES,
                                            interval=False, time_direction="noise-at-one", time_scale=1000.0)
    assert metadata["classes"] == ["cat", "dog"] and metadata["config"]["data"] == "digits"
    assert metadata["config"]["imported_from"] == "theirs.pt" and str(tmp_path) not in str(metadata)
    assert weights["final.out.weight"].shape == (PATCH**2 * CHANNELS, WIDTH)
    assert "depth 2, width 24, patch size 2, images 3 x 8 x 8, 2 classes, learn_sigma True" in capsys.readouterr().out


def test_learn_sigma_keeps_the_velocity_alone(tmp_path):
    state = random_state(learn_sigma=True)
    assert_is(run(save(tmp_path, state)), state)


def test_bfloat16(tmp_path):
    state = random_state()
    path = run(save(tmp_path, state), *HEADS, "--precision", "bfloat16")
    assert {tensor.dtype for tensor in read_weights(path)[0].values()} == {torch.bfloat16}
    assert_is(path, {name: tensor.bfloat16().float() for name, tensor in state.items()})


def test_parts_that_served_training_alone(tmp_path, capsys):
    """REPA's projectors: named in an error, or left out when told so; nothing of the network can be left out."""
    source = save(tmp_path, {"module." + name: tensor for name, tensor in
                             {**random_state(), "projectors.0.0.weight": torch.ones(2, 2), "projectors.0.0.bias": torch.ones(2)}.items()})
    with pytest.raises(ValueError, match=r"unknown: projectors\.0\.0\.weight, projectors\.0\.0\.bias$"):
        run(source)
    assert_is(run(source, *HEADS, "--ignore", "projectors"), random_state())
    assert "2 left out" in capsys.readouterr().out
    source.with_name("teacher.safetensors").unlink()
    with pytest.raises(ValueError, match=r"--ignore head: no weight's name begins so; the parts are blocks, final_layer, .*y_embedder$"):
        run(source, *HEADS, "--ignore", "projectors", "head")
    with pytest.raises(ValueError, match=r"--ignore blocks\.1: blocks\.1\.attn\.qkv\.weight.* cannot be left out"):
        run(source, *HEADS, "--ignore", "blocks.1")


def changed(**changes) -> dict:
    """A state dict with tensors replaced, or left out where the change is None; two underscores stand for a dot."""
    state = {**random_state(), **{name.replace("__", "."): tensor for name, tensor in changes.items()}}
    return {name: tensor for name, tensor in state.items() if tensor is not None}


@pytest.mark.parametrize(("state", "flags", "message"), [
    (changed(pos_embed=None), HEADS, "missing: pos_embed$"),
    (changed(blocks__1__attn__q_norm__weight=torch.ones(8)), HEADS, r"unknown: blocks\.1\.attn\.q_norm\.weight$"),
    (changed(blocks__3__attn__qkv__weight=torch.ones(8)), HEADS, r"missing: blocks\.2\.attn\.qkv\.weight, .* and \d+ more$"),
    (changed(blocks__1__mlp__fc1__weight=torch.ones(48, 24)), HEADS, r"blocks\.1\.mlp\.fc1\.weight \[48, 24\] instead of \[96, 24\]"),
    (changed(pos_embed=torch.ones(1, 15, 24)), HEADS, r"square images.*pos_embed \[1, 15, 24\]"),
    (changed(final_layer__linear__bias=torch.ones(18)), HEADS, "18 outputs, but patches of 3 x 2 x 2 need 12, with learn_sigma twice that"),
    (changed(final_layer__linear__bias=torch.full((12,), torch.nan)), HEADS, "final.out.bias holds values that are no finite numbers"),
    ({**random_state(), "module.pos_embed": torch.ones(1)}, HEADS, "hold pos_embed twice"),
    (random_state(), HEADS[2:], "depth 2 and width 24 are no known size.*--num-heads"),
    (random_state(), [*HEADS[2:], "--num-heads", "5"], "divisible by 4 and by the number of heads"),
    (random_state(), [*HEADS, "--preset", "SiT-2x24x2/2"], "--num-heads 3: --preset SiT-2x24x2/2 has 2"),
    (random_state(), [*HEADS[2:], "--preset", "SiT-S/2"], "SiT-S/2 has depth 12, width 384, patch size 2; the weights have depth 2"),
    (random_state(), [*HEADS, "--image-size", "32"], "--image-size 32: must be 8, as in the weights"),
    (random_state(), [*HEADS, "--num-classes", "10"], "--num-classes 10: must be 2, as in the weights"),
    (random_state(), [*HEADS, "--class-names", __file__], "--class-names .* has .* lines.*2 classes"),
    (random_state(), [*HEADS, "--class-names", "nowhere"], "--class-names nowhere: no such file"),
    (random_state(), [*HEADS, "--data", "nowhere"], "--data nowhere: must be mnist, cifar10, digits, a path that is there, or left out"),
    ({"weight": 3}, HEADS, r"holds no state dict: .*\(weight is none\)"),
    ([1, 2], HEADS, "holds no state dict"),
])
def test_bad_weights(tmp_path, state, flags, message):
    source = save(tmp_path, state)
    with pytest.raises(ValueError, match=message):
        run(source, *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs.pt"]


@pytest.mark.parametrize(("flags", "message"), [
    ([*HEADS, "--time-scale", "0"], "--time-scale 0.0: must be above 0"),
    (HEADS[:2], "--time-direction"),
])
def test_bad_flags(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as end:
        run(save(tmp_path, random_state()), *flags)
    assert message in str(end.value) + capsys.readouterr().err


class Exploit:
    """Unpickling it would create a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("harm", ["torn", "empty", "pickle", "exploit", "no safetensors"])
def test_bad_files(tmp_path, harm):
    source, executed = save(tmp_path, random_state()), tmp_path / "executed"
    if harm == "exploit":
        torch.save({"ema": random_state(), "args": Exploit(executed)}, source)
    elif harm == "no safetensors":
        source = source.rename(tmp_path / "theirs.safetensors")
    else:
        whole, foreign_pickle = source.read_bytes(), pickle.dumps(Exploit(executed), protocol=2)
        source.write_bytes({"torn": whole[: len(whole) // 2], "empty": b"", "pickle": foreign_pickle}[harm])
    with pytest.raises(ValueError, match=f"{re.escape(str(source))} is torn, or holds more than weights"):
        run(source)
    assert not executed.exists()


def test_files_that_are_there_stay(tmp_path):
    source = tmp_path / "theirs.safetensors"
    save_file(random_state(), source)
    path = run(source)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"teacher.safetensors exists; use --replace True"):
        run(source)
    with pytest.raises(ValueError, match="is the source itself"):
        import_teacher.main([str(source), str(source), *HEADS, "--replace", "True"])
    with pytest.raises(FileNotFoundError, match=r"no file .*nowhere\.pt"):
        import_teacher.main([str(tmp_path / "nowhere.pt"), str(tmp_path / "x.safetensors"), *HEADS])
    assert path.read_bytes() == before
    run(source, *HEADS, "--replace", "True", "--precision", "bfloat16")
    assert path.read_bytes() != before


def test_presets_of_known_sizes():
    shapes = Shapes(28, 1152, 2, 32, 4, 1000, True)
    assert choose_preset(shapes) == choose_preset(shapes, "SiT-XL/2") == choose_preset(shapes, "SiT-28x1152x16/2") == "SiT-XL/2"
    assert choose_preset(shapes, num_heads=18) == "SiT-28x1152x18/2"


def test_from_another_projects_weights_to_samples_of_a_student(tmp_path):
    """Import, look at the teacher, three updates of a student on a folder of images, its samples."""
    draw = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(8):
            Image.fromarray(draw.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(tmp_path / "photos" / name / f"{i}.png")
    path, results = run(save(tmp_path, random_state())), tmp_path / "results"
    own = ["--teacher", str(path), "--data", str(tmp_path / "photos"), "--image-size", str(SIZE), "--steps", "3", "--num-steps", "1",
           "--global-batch-size", "8", "--log-every", "1", "--comet", "off", "--device", "cpu", "--results-dir", str(results)]
    with pytest.raises(ValueError, match=f"--model SiT-XL/2: the student has the size of its teacher .*, which is {PRESET}"):
        train_student.main([*own, "--model", "SiT-XL/2"])
    train_student.main([*own, "--model", PRESET])

    student, metadata = load_network(results / "student-photos", build_network)
    teacher, _ = load_network(path, build_network)
    assert metadata["kind"] == "student" and metadata["classes"] == ["cat", "dog"]
    assert student.architecture == {**teacher.architecture, "interval": True}
    same = [name for name, tensor in teacher.state_dict().items() if torch.equal(tensor, student.state_dict()[name])]
    assert same == ["position"] and student.interval_embed.out.weight.abs().max() > 0
    for checkpoint, name in ((path, "t"), (results / "student-photos", "s")):
        sample.main([str(checkpoint), "--num-images", "4", "--num-steps", "2", "--formats", "npz", "--device", "cpu", "--out",
                     str(tmp_path / name)])
    images = [np.load(tmp_path / name / "2step.npz")["arr_0"] for name in ("t", "s")]
    assert images[1].shape == (4, SIZE, SIZE, 3) and images[1].std() > 10
    assert np.abs(images[0].astype(int) - images[1]).max() > 0                      # the student has moved from its teacher


def test_a_teacher_without_names_of_classes_is_measured(tmp_path, monkeypatch):
    """As a student may learn from it: what it was not told is not compared, but how many classes there are is."""
    def see(pixels):
        return pixels.float().mean((2, 3)), pixels.float().mean((2, 3))[:, :2]

    monkeypatch.setattr(evaluate, "find_classifier", lambda *_: None)
    monkeypatch.setattr(evaluate, "classifier_judge", lambda *_: Judge("colours", see, knows_classes=True))
    source, photos = save(tmp_path, random_state()), make_images(tmp_path / "photos", ["cat", "dog"])
    flags = ["--data", str(photos), "--held-out", str(photos), "--num-steps", "1", "--num-images", "12", "--seeds", "1", "--device", "cpu",
             "--out", str(tmp_path / "out"), "--cache", str(tmp_path)]
    evaluate.main([str(run(source)), *flags])
    row, = json.loads((tmp_path / "out/metrics.json").read_text())["rows"]
    assert 0 <= row["class_accuracy [colours, n=12]"]["mean"] <= 1
    make_images(photos, ["eel"])
    with pytest.raises(ValueError, match=r"has classes \['cat', 'dog', 'eel'\]; .* was trained on \['0', '1'\]"):
        evaluate.main([str(source.with_name("teacher.safetensors")), *flags])
    shutil.rmtree(photos / "eel")
    (tmp_path / "names.txt").write_text("dog\ncat\n")       # in the order of its labels
    with pytest.raises(ValueError, match=r"has classes \['cat', 'dog'\]; .* was trained on \['dog', 'cat'\]"):
        evaluate.main([str(run(source, *HEADS, "--class-names", str(tmp_path / "names.txt"), "--replace", "True")), *flags])


def test_errors_of_the_next_scripts(tmp_path):
    """What an imported teacher cannot say is asked for, and data of another shape are refused."""
    path = run(save(tmp_path, random_state()))
    with pytest.raises(ValueError, match="does not say what it was trained on; name the images with --data"):
        evaluate.main([str(path), "--device", "cpu", "--out", str(tmp_path / "out")])
    images = Images("digits", torch.zeros(1, 1, 8, 8, dtype=torch.uint8), torch.zeros(1).long(), ["0", "1"], False)
    with pytest.raises(ValueError, match="trained on 3 channels, size 8, 2 classes; --data digits has 1 channels, size 8, 2 classes"):
        check_teacher(path, read_weights(path)[1], images, None)
