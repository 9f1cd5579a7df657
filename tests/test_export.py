"""Exported files against the network they came from, and without PyTorch."""

import copy
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

import export
from demo import prepare, reference
from models import DiT
from utils import onnx_graph
from utils.checkpoints import write_weights
from utils.data import to_pixels
from utils.sampling import sample_average_velocity


@pytest.fixture(scope="module", autouse=True)
def fast_translation():
    """Translating takes many seconds: all tests share one step of a network."""
    real, once = onnx_graph.to_onnx, []

    def to_onnx(*args, **kwargs):
        if not once:
            once.append(real(*args, **kwargs))
        return copy.deepcopy(once[0])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "to_onnx", to_onnx)
        yield


def save(path: Path, kind: str, **changes) -> DiT:
    """A small network with random weights everywhere (an untrained one's output is zero), saved as a checkpoint."""
    torch.manual_seed(0)
    network = DiT("DiT-Test/4", 8, 1, 3, interval=kind == "student").eval()
    for parameter in network.parameters():
        parameter.data = (torch.randn(parameter.shape) * 0.15).half().float()
    metadata = dict(kind=kind, architecture=network.architecture, classes=["a", "b", "c"], step=7, config=dict(guidance_scale=1.5))
    write_weights(path, network.state_dict(), {**metadata, **changes})
    return network


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> tuple[Path, DiT]:
    path = tmp_path_factory.mktemp("export") / "student.safetensors"
    return path, save(path, "student")


def run(path: Path, **inputs: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(str(path))
    return torch.from_numpy(session.run(None, {name: value.numpy() for name, value in inputs.items()})[0])


@pytest.mark.parametrize("num_steps, half", [(1, False), (4, True)])
def test_sampler_and_its_file(student, tmp_path, num_steps, half):
    source, network = student
    target = tmp_path / "out.onnx"
    export.main([str(source), str(target), "--num-steps", str(num_steps), "--half", str(half)])
    size = sum(p.numel() * (2 if half and p.numel() >= 1024 else 4) for p in network.parameters())
    assert size < target.stat().st_size < size + 50_000
    noise, label = torch.randn(5, 1, 8, 8), torch.tensor([0, 1, 2, 3, 0])
    expected = sample_average_velocity(network, noise, label, num_steps)
    assert (expected - noise).abs().max() > 0.1
    torch.testing.assert_close(run(target, noise=noise, label=label), expected, atol=1e-4, rtol=0)
    information = onnxruntime.InferenceSession(str(target)).get_modelmeta().custom_metadata_map
    assert json.loads(information["classes"]) == ["a", "b", "c"] and json.loads(information["num_steps"]) == num_steps

    # Where there is no PyTorch.
    np.savez(tmp_path / "in.npz", noise=noise.numpy(), label=label.numpy())
    code = ("import sys; sys.modules['torch'] = None\nimport numpy as np, onnxruntime as ort\n"
            "z = np.load('in.npz')\nimage, = ort.InferenceSession('out.onnx').run(None, dict(z))\nnp.save('image.npy', image)")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert abs(np.load(tmp_path / "image.npy") - expected.numpy()).max() < 1e-4


def test_half_rounds_nothing(student):
    """Weights that float16 holds, and a table that it does not."""
    import onnx
    from onnx import helper, numpy_helper

    fits, table = np.arange(2048, dtype=np.float32) / 8, np.sin(np.arange(2048, dtype=np.float32))
    nodes = [helper.make_node("Mul", ["x", "fits"], ["y"]), helper.make_node("Add", ["y", "table"], ["z"])]
    x, z = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2048]) for name in "xz")
    weights = [numpy_helper.from_array(value, name) for value, name in ((fits, "fits"), (table, "table"))]
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [z], weights), ir_version=10,
                              opset_imports=[helper.make_opsetid("", 20)])
    onnx_graph.store_half(model)
    assert [t.data_type for t in model.graph.initializer] == [onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT]
    session = onnxruntime.InferenceSession(model.SerializeToString())
    assert np.array_equal(session.run(None, {"x": np.full(2048, 3, np.float32)})[0], 3 * fits + table)


def test_step_makes_a_sampler(student, tmp_path):
    source, network = student
    export.main([str(source), str(tmp_path / "step.onnx"), "--form", "step"])
    z, label = torch.randn(3, 1, 8, 8), torch.tensor([2, 0, 1])
    expected = sample_average_velocity(network, z, label, [1, 0.7, 0])
    for t, r in ((1.0, 0.7), (0.7, 0.0)):
        z = run(tmp_path / "step.onnx", z=z, r=torch.tensor(r), t=torch.tensor(t), label=label)
    torch.testing.assert_close(z, expected, atol=1e-4, rtol=0)


def test_released_student(tmp_path, monkeypatch):
    """Its four steps multiply PyTorch's own rounding to more than the tolerance on some processors; the file is not to blame."""
    monkeypatch.setattr(export, "to_onnx", onnx_graph.to_onnx)
    released = Path(__file__).parents[1] / "checkpoints/student-mnist.safetensors"
    export.main([str(released), str(tmp_path / "mnist.onnx"), "--num-steps", "4", "--half", "True"])
    assert (tmp_path / "mnist.onnx").stat().st_size < 9e6


def test_exported_program(student, tmp_path):
    source, network = student
    export.main([str(source), str(tmp_path / "two.pt2"), "--num-steps", "2"])
    loaded = torch.export.load(tmp_path / "two.pt2").module()
    noise, label = torch.randn(4, 1, 8, 8), torch.tensor([2, 0, 1, 3])
    torch.testing.assert_close(loaded(noise, label), sample_average_velocity(network, noise, label, 2))


def test_a_file_that_differs_is_not_kept(student, tmp_path, monkeypatch):
    target = tmp_path / "out.onnx"
    target.write_text("precious")
    with pytest.raises(ValueError, match="exists; use --replace True"):
        export.main([str(student[0]), str(target)])
    monkeypatch.setattr(export, "time_grid", lambda num_steps: [0.9, 0.0])          # a wrong graph
    with pytest.raises(RuntimeError, match="differs from the network"):
        export.main([str(student[0]), str(target), "--replace", "True"])
    assert target.read_text() == "precious" and list(tmp_path.iterdir()) == [target]


def test_refusals(student, tmp_path, monkeypatch):
    teacher = tmp_path / "teacher.safetensors"
    save(teacher, "teacher")
    with pytest.raises(ValueError, match="is a teacher; a student"):
        export.main([str(teacher), str(tmp_path / "t.onnx")])
    for fields, message in [(dict(target="x.bin"), "ends in .onnx or .pt2"), (dict(target="x.onnx", num_steps=0), "at least 1"),
                            (dict(target="x.onnx", form="step", num_steps=4), "--num-steps 4: must be left out with --form step"),
                            (dict(target="x.pt2", half=True), "False for .pt2")]:
        with pytest.raises(ValueError, match=message):
            export.Config(str(student[0]), **fields)
    monkeypatch.setattr(onnx_graph, "PACKAGES", ("onnx", "no_such_package"))
    with pytest.raises(ValueError, match="ONNX needs no_such_package: pip install"):
        export.main([str(student[0]), str(tmp_path / "x.onnx")])
    monkeypatch.setattr(onnx_graph, "MOST_BYTES", 1000)
    with pytest.raises(ValueError, match="larger than 2 GiB"):
        onnx_graph.to_onnx(student[1], {}, "image")


def test_models_of_the_page(student, tmp_path):
    out = tmp_path / "models"
    (out).mkdir()
    (out / "old.onnx").write_text("of an earlier student")
    with pytest.raises(ValueError, match=f"--out {out}: must be new, empty, or a folder that this program made"):
        prepare.main([str(student[0]), "--out", str(out)])
    (out / "models.json").write_text("[]")                  # as such a folder has
    prepare.main([str(student[0]), "--out", str(out)])
    model, = json.loads((out / "models.json").read_text())
    assert sorted(path.name for path in out.iterdir()) == ["models.json", "student.onnx"]
    assert (model["name"], model["shape"], model["classes"]) == ("student", [1, 8, 8], ["a", "b", "c"])
    file = out / model["file"]
    assert model["bytes"] == file.stat().st_size and hashlib.sha256(file.read_bytes()).hexdigest().startswith(model["sha256"])

    # The comparison that the page's own test makes: the right image differs by nothing, another class's by much.
    noise = torch.randn(1, 1, 8, 8)
    rgba = torch.full((8, 8, 4), 255)
    rgba[..., :3] = to_pixels(sample_average_velocity(student[1], noise, torch.tensor([1]), 2))[0].permute(1, 2, 0)
    page = {"label": 1, "noise": noise.flatten().tolist(), "images": {"2": rgba.flatten().tolist()}}
    assert reference.differences(str(student[0]), page) == {"2": 0}
    assert reference.differences(str(student[0]), {**page, "label": 2})["2"] > 10

    save(tmp_path / "latents.safetensors", "student", autoencoder={"source": "x"})
    with pytest.raises(ValueError, match="makes latents; the page shows pixels only"):
        prepare.main([str(tmp_path / "latents.safetensors"), "--out", str(out)])
    assert file.exists() and [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["models"]      # what was there still is


def test_models_are_named_by_their_folder_and_each_once(student, tmp_path):
    for folder in ("a/student-cats", "b/cats"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "model.safetensors").write_bytes(student[0].read_bytes())
    out = tmp_path / "models"
    prepare.main([str(tmp_path / "a/student-cats"), "--out", str(out)])
    model, = json.loads((out / "models.json").read_text())
    assert (model["name"], model["file"]) == ("cats", "cats.onnx")
    with pytest.raises(ValueError, match="b/cats: another student has the name cats too; rename one"):
        prepare.main([str(tmp_path / "a/student-cats"), str(tmp_path / "b/cats"), "--out", str(out)])
