"""Model folders, the pipeline object, the model card."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import export
import release
import sample
from models import DiT, SiT, build_network
from pipeline import SplitMeanFlowPipeline
from utils import report
from utils.checkpoints import load_network, read_weights, resolve_weights, weights_id, write_weights
from utils.guidance import guided_velocity
from utils.sampling import sample_average_velocity, sample_velocity


@pytest.fixture(scope="module")
def folder(results, tmp_path_factory):
    """The student of the trained pair, as a model folder with an evaluation in its card."""
    evaluation = tmp_path_factory.mktemp("evaluation")
    (evaluation / "table.md").write_text("| | FD |\n|---|---|\n| 1 step | 123.4 |\n")
    weights = weights_id(load_network(results / "student-digits", build_network)[0])
    (evaluation / "metrics.json").write_text(json.dumps({"protocol": {"weights": f"EMA {weights}"}}))
    target = tmp_path_factory.mktemp("hub") / "digits"
    release.main([str(results / "student-digits"), str(target), "--evaluation", str(evaluation)])
    return target


def test_a_folder_holds_the_ema_weights(results, folder):
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    ema, _ = load_network(results / "student-digits", DiT)
    network = DiT.from_pretrained(folder)
    assert not network.training and network.architecture == ema.architecture
    for name, weight in ema.state_dict().items():
        assert torch.equal(network.state_dict()[name], weight.bfloat16().float()), name
    assert all(weight.dtype == torch.bfloat16 for weight in load_file(folder / "model.safetensors").values())


def test_a_folder_is_read_where_a_checkpoint_is(results, folder, tmp_path):
    found, metadata = load_network(folder, build_network)
    network, expected = load_network(results / "student-digits", build_network)
    assert metadata["architecture"] == expected["architecture"] and metadata["classes"] == expected["classes"]
    assert {"kind", "step", "teacher", "config"} <= set(metadata)
    assert all(torch.equal(weight, network.state_dict()[name].bfloat16().float()) for name, weight in found.state_dict().items())
    sample.main([str(folder), "--num-images", "1", "--num-steps", "1", "--formats", "npz", "--out", str(tmp_path), "--device", "cpu"])
    assert (tmp_path / "1step.npz").is_file()


def test_the_card_says_what_the_run_recorded(folder):
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    assert card.data.license == "mit" and "few-step" in card.data.tags
    for text in ("| 1 step | 123.4 |", "DiT-Test/4", "6 updates of 16 images of `digits`", "\n    python ", "on cpu: ", "| seed | 0 |",
                 'from_pretrained("digits")', "Training took"):
        assert text in card.text, text
    assert "/tmp" not in card.text


def test_what_a_network_saves_by_itself(tmp_path):
    network = DiT("DiT-Nano/4", 8, 1, 3, interval=True)
    network.save_pretrained(tmp_path / "net")
    assert len({file.stat().st_mode for file in (tmp_path / "net").iterdir()}) == 1     # weights as readable as config.json
    again = DiT.from_pretrained(tmp_path / "net")
    assert again.architecture == network.architecture
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), again.state_dict().values()))
    with pytest.raises(ValueError, match="holds a network alone"):
        SplitMeanFlowPipeline.from_pretrained(tmp_path / "net")
    weights = load_file(tmp_path / "net/model.safetensors")
    save_file({name: weight for name, weight in weights.items() if name != "position"}, tmp_path / "net/model.safetensors")
    with pytest.raises(RuntimeError, match=r"Missing key.*position"):           # huggingface_hub's default would pass over it
        DiT.from_pretrained(tmp_path / "net")
    (tmp_path / "net/config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        DiT.from_pretrained(tmp_path / "net")


def test_an_imported_teacher_as_a_folder(tmp_path):
    network = SiT("SiT-2x32x4/4", 8, 1, 3, time_direction="noise-at-one", time_scale=1000.0)
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    config = dict(data=None, imported_from="theirs.pt", sha256="abc")
    write_weights(tmp_path / "teacher.safetensors", {name: weight.bfloat16() for name, weight in network.state_dict().items()},
                  dict(kind="teacher", architecture=network.architecture, classes=["a", "b", "c"], config=config, step=0))
    release.main([str(tmp_path / "teacher.safetensors"), str(tmp_path / "folder")])
    from_file, from_folder = (SplitMeanFlowPipeline.from_pretrained(tmp_path / name) for name in ("teacher.safetensors", "folder"))
    assert type(from_folder.network) is SiT and from_folder.network.architecture == network.architecture
    images = [pipe(["b"], 2, torch.manual_seed(0), 2.0, output_type="pt").images for pipe in (from_file, from_folder)]
    assert torch.equal(*images) and images[0].std() > 0.1
    assert "imported from `theirs.pt`" in (tmp_path / "folder/README.md").read_text()


def test_pipeline_of_a_student(results, folder):
    pipe = SplitMeanFlowPipeline.from_pretrained(folder)
    z = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(4))
    expected = sample_average_velocity(pipe.network, z, torch.tensor([1, 7, 7]), 2).clamp(-1, 1)
    images = pipe([1, "7", 7], 2, torch.manual_seed(4), output_type="pt").images
    assert torch.equal(images, expected)
    assert torch.equal(pipe(np.array([1, 7, 7]), np.int64(2), torch.manual_seed(4), output_type="pt").images, expected)
    for one in (7, "7", torch.tensor(7), np.int64(7), [7]):
        assert pipe.labels(one, 1).tolist() == [7]
    pictures = pipe(class_labels=torch.tensor([1, 7, 7]), num_inference_steps=2, generator=torch.manual_seed(4)).images
    arrays = pipe([1, 7, 7], 2, torch.manual_seed(4), output_type="np").images
    assert arrays.shape == (3, 8, 8, 1) and arrays.dtype == np.uint8
    for picture, array, image in zip(pictures, arrays, expected):
        assert picture.mode == "L" and np.array_equal(np.asarray(picture), array[..., 0])
        assert abs(array[..., 0] / 127.5 - 1 - image[0].numpy()).max() < 1 / 127
    each = pipe([1, 7], 1, [torch.manual_seed(5), torch.Generator().manual_seed(6)], output_type="pt").images
    alone = pipe([7], 1, torch.manual_seed(6), output_type="pt").images
    torch.testing.assert_close(each[1:], alone)


def test_pipeline_of_a_teacher_and_of_a_run_folder(results):
    pipe = SplitMeanFlowPipeline.from_pretrained(results / "teacher-digits")
    z, y = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([3, 4])
    v = guided_velocity(pipe.network.velocity, 10, 2.0)
    images = pipe([3, 4], 3, torch.manual_seed(1), guidance_scale=2.0, output_type="pt").images
    assert torch.equal(images, sample_velocity(v, z, y, 3).clamp(-1, 1))
    larger = pipe([3, 4], 3, torch.manual_seed(1), guidance_scale=2.0, output_type="pt", noise_scale=1.5).images
    assert torch.equal(larger, sample_velocity(v, 1.5 * z, y, 3).clamp(-1, 1)) and not torch.equal(larger, images)
    free = pipe(batch_size=2, generator=torch.manual_seed(1), num_inference_steps=3, output_type="pt").images
    assert torch.equal(free, sample_velocity(pipe.network.velocity, z, torch.tensor([10, 10]), 3).clamp(-1, 1))


def test_saving_a_pipeline(folder, tmp_path):
    pipe = SplitMeanFlowPipeline.from_pretrained(folder)
    pipe.save_pretrained(tmp_path / "again")
    again = SplitMeanFlowPipeline.from_pretrained(tmp_path / "again")
    assert again.information == pipe.information and again.classes == [str(digit) for digit in range(10)]
    assert json.loads((tmp_path / "again/config.json").read_text())["preset"] == "DiT-Test/4"
    network, metadata = load_network(tmp_path / "again", build_network)          # and sample.py reads it
    assert metadata == {"architecture": network.architecture, **pipe.information}


@pytest.mark.parametrize(("arguments", "message"), [
    (dict(class_labels=[10]), r"class_labels \[10\]: this model knows 0, 1"), (dict(class_labels=["x"]), "class_labels"),
    (dict(class_labels=[]), "class_labels"), (dict(num_inference_steps=0), "at least 1"), (dict(output_type="png"), "use pil, np or pt"),
    (dict(guidance_scale=2.0), "guidance scale 2.0: this student has its guidance inside"),
    (dict(class_labels=[1, 2], generator=[torch.Generator()]), "1 generators for 2 images"),
    (dict(class_labels=7.0), r"class_labels \[7.0\]: this model knows 0, 1"), (dict(class_labels=[[7]]), r"class_labels \[\[7\]\]"),
    (dict(num_inference_steps=2.5), "num_inference_steps 2.5: must be a whole number, at least 1"),
    (dict(batch_size=0), "batch_size 0: must be"), (dict(batch_size=-1), "batch_size -1: must be"),
    (dict(generator=0), "generator 0: must be a torch.Generator"), (dict(generator=[0]), "generator 0: must be a torch.Generator"),
    (dict(guidance_scale=float("nan")), "guidance_scale nan: must be a finite number, or None"),
    (dict(noise_scale=0), "noise_scale 0: must be a number above 0"), (dict(noise_scale="1"), "noise_scale '1': must be a number above 0"),
])
def test_pipeline_refuses(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        SplitMeanFlowPipeline.from_pretrained(folder)(**arguments)


def test_no_such_model(tmp_path):
    for source in (tmp_path / "nothing", "checkpoints/nothing.safetensors", "/nothing", "../nothing", "./runs/nothing", "~/nothing"):
        with pytest.raises(FileNotFoundError, match="no model at"):
            SplitMeanFlowPipeline.from_pretrained(source)


def test_a_file_without_its_ending_is_not_sought_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("checkpoints").mkdir()
    Path("checkpoints/a.safetensors").touch()
    with pytest.raises(FileNotFoundError, match="no model at checkpoints/a; checkpoints/a.safetensors is there"):
        SplitMeanFlowPipeline.from_pretrained("checkpoints/a")


def test_release_keeps_what_is_there(results, folder, tmp_path, monkeypatch):
    run = str(results / "student-digits")
    with pytest.raises(ValueError, match="exists; use --replace True"):
        release.main([run, str(folder)])
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/mine.txt").touch()
    with pytest.raises(ValueError, match="is no model folder: not overwritten"):
        release.main([run, str(tmp_path / "photos"), "--replace", "True"])
    with pytest.raises(ValueError, match="a file has no card"):
        release.Config(run, "x.safetensors", push="a/b")
    with pytest.raises(ValueError, match="user/name"):
        release.Config(run, "x", push="a")
    before = (folder / "model.safetensors").read_bytes()
    release_with = [run, str(folder), "--replace", "True", "--evaluation", str(tmp_path)]
    with pytest.raises(FileNotFoundError, match=r"holds no table\.md"):
        release.main(release_with)
    (tmp_path / "table.md").write_text("numbers")
    for said in ("EMA", "EMA 01234567"):                    # as older evaluations said it; of other weights
        (tmp_path / "metrics.json").write_text(json.dumps({"protocol": {"weights": said}}))
        with pytest.raises(ValueError, match=f"is of the weights {said}, not of these, EMA [0-9a-f]{{8}}; make it anew"):
            release.main(release_with)
    (tmp_path / "metrics.json").write_text(json.dumps({"protocol": {}}))
    with pytest.raises(ValueError, match="of an older evaluate.py, which did not say"):
        release.main(release_with)
    assert (folder / "model.safetensors").read_bytes() == before

    weights = {name: weight.clone() for name, weight in load_file(folder / "model.safetensors").items()}       # which maps the file
    (folder / ".git").mkdir()                               # a clone of the Hub's repository
    (folder / ".git/HEAD").write_text("ref")
    (folder / "model.safetensors").write_bytes(b"old")
    calls = []
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda api, repo_id, exist_ok: calls.append(repo_id))
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda api, repo_id, folder_path, allow_patterns: calls.append(
        (repo_id, folder_path, sorted(allow_patterns))))
    release.main([run, str(folder), "--replace", "True", "--push", "someone/digits"])
    assert calls == ["someone/digits", ("someone/digits", folder, ["README.md", "config.json", "model.safetensors"])]
    with pytest.raises(ValueError, match="is no model folder: not overwritten"):
        release.main([run, str(tmp_path / "photos/mine.txt"), "--replace", "True"])
    assert 'from_pretrained("someone/digits")' in (folder / "README.md").read_text()
    assert sorted(path.name for path in folder.parent.iterdir()) == ["digits"]
    (folder.parent / "empty").mkdir()
    release.main([run, str(folder.parent / "empty")])
    assert (folder / ".git/HEAD").read_text() == "ref"
    for place in (folder, folder.parent / "empty"):
        again = load_file(place / "model.safetensors")
        assert again.keys() == weights.keys() and all(torch.equal(again[name], weight) for name, weight in weights.items())


def test_release_with_a_class_name_that_is_not_utf8(results, tmp_path):
    """As Python reads the name of such a folder; the card's code is right."""
    weights, metadata = read_weights(resolve_weights(results / "student-digits"))
    metadata["classes"][0] = "caf\udce9"
    write_weights(tmp_path / "student.safetensors", weights, metadata)
    release.main([str(tmp_path / "student.safetensors"), str(tmp_path / "hub")])
    assert r"class_labels=['caf\udce9']" in (tmp_path / "hub/README.md").read_text()
    assert SplitMeanFlowPipeline.from_pretrained(tmp_path / "hub").classes[0] == "caf\udce9"


def test_the_card_of_a_network_of_latents(results, tmp_path):
    weights, metadata = read_weights(resolve_weights(results / "student-digits"))
    write_weights(tmp_path / "student.safetensors", weights, metadata | {"autoencoder": {"source": "vae"}})
    release.main([str(tmp_path / "student.safetensors"), str(tmp_path / "hub")])
    assert "latents 8 x 8 x 1, 10 classes" in (tmp_path / "hub/README.md").read_text()


def test_a_release_does_not_tell_where_on_this_machine_things_were(results, tmp_path, monkeypatch):
    """Absolute paths: of the images, the teacher, what was started from, the autoencoder, in commands, and in the evaluation's table."""
    run, away = tmp_path / "project/run", tmp_path / "away"
    shutil.copytree(results / "student-digits", run)
    monkeypatch.chdir(run.parent)
    weights, metadata = read_weights(resolve_weights(run))
    config = {**metadata["config"], "data": f"{away}/mnist/", "teacher": str(run.parent / "results/teacher"), "start_from": "../away/start"}
    write_weights(resolve_weights(run), weights, {**metadata, "config": config, "autoencoder": {"source": f"{away}/vae", "weights": "0"}})
    starts = json.loads((run / "environment.json").read_text())
    starts[0]["command"] = [f"{away}/train_student.py", "--data", f"{away}/mnist/", f"--results-dir={away}/results", "--model", "DiT-S/4"]
    (run / "environment.json").write_text(json.dumps(starts))
    protocol = {"checkpoint": str(run), "data": f"{away}/mnist", "weights": f"EMA {weights_id(load_network(run, build_network)[0])}"}
    (run / "table.md").write_text(report.table([], {}, protocol))
    (run / "metrics.json").write_text(json.dumps({"protocol": protocol}))
    release.main([str(run), "hub", "--evaluation", str(run)])
    release.main([str(run), "x.safetensors"])
    export.main([str(run), "x.pt2"])
    released = [*(run.parent / "hub").iterdir(), *run.parent.glob("x.*")]
    code = Path(torch.__file__).parent, Path(export.__file__).parent
    told = [(file, place) for file in released for place in (tmp_path, *code) if str(place).encode() in file.read_bytes()]
    assert len(released) == 5 and told == []
    for file in ("hub", "x.safetensors"):
        found = read_weights(resolve_weights(file))[1]
        assert {key: found["config"][key] for key in ("data", "teacher", "start_from")} == {
            "data": "./mnist", "teacher": "results/teacher", "start_from": "../away/start"}
        assert found["autoencoder"] == {"source": "vae", "weights": "0"}
    card = (run.parent / "hub/README.md").read_text()
    assert "checkpoint run; data ./mnist;" in card
    assert "python train_student.py --data ./mnist --results-dir=results --model DiT-S/4\n" in card
    release.main(["x.safetensors", "mean.safetensors", "--mean-with", str(run)])            # of the same data still


def test_release_of_a_run_whose_last_row_is_torn(results, tmp_path):
    """As of a full disk; its checkpoints are whole, and the row before says what the card needs. Of weights that are gone it is told."""
    run = tmp_path / "run"
    shutil.copytree(results / "student-digits", run)
    with open(run / "metrics.jsonl", "a") as rows:
        rows.write('{"step": 7, "lo')
    release.main([str(run), str(tmp_path / "hub")])
    assert "Training took" in (tmp_path / "hub/README.md").read_text()
    resolve_weights(run).unlink()
    with pytest.raises(ValueError, match="no checkpoint file .*previous one is .*step_00000004$"):
        release.main([str(run), str(tmp_path / "other")])


def test_a_release_that_fails_leaves_nothing(results, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(release, "save_model_folder", full)
    with pytest.raises(OSError, match="No space left"):
        release.main([str(results / "student-digits"), str(tmp_path / "hub")])
    assert not list(tmp_path.iterdir())


def test_release_of_a_mean(results, tmp_path):
    run, step = results / "student-digits", results / "student-digits/checkpoints"
    first, last = sorted(step.glob("step_*"))[0], sorted(step.glob("step_*"))[-1]
    assert first != last
    release.main([str(run), str(tmp_path / "mean.safetensors"), "--mean-with", str(first)])
    release.main([str(run), str(tmp_path / "folder"), "--mean-with", str(first)])
    parts = [load_network(path, build_network)[0] for path in (last, first)]
    expected = {name: ((weight + parts[1].state_dict()[name]) / 2).bfloat16() for name, weight in parts[0].state_dict().items()}
    for found in (load_file(tmp_path / "mean.safetensors"), load_file(tmp_path / "folder/model.safetensors")):
        assert found.keys() == expected.keys() and all(torch.equal(found[name], weight) for name, weight in expected.items())
    ids = [weights_id(part) for part in parts]
    assert load_network(tmp_path / "mean.safetensors", build_network)[1]["mean_of"] == ids and ids[0] != ids[1]
    assert f"The mean of the weights {', '.join(ids)}, of runs" in (tmp_path / "folder/README.md").read_text()
    assert load_network(tmp_path / "folder", build_network)[1]["mean_of"] == ids
    with pytest.raises(ValueError, match="has kind teacher, .* student: their mean means nothing"):
        release.main([str(run), str(tmp_path / "x.safetensors"), "--mean-with", str(results / "teacher-digits")])
    weights, metadata = read_weights(tmp_path / "mean.safetensors")
    for change, said in (({"teacher": "01234567"}, "teacher 01234567, .* [0-9a-f]{8}"), ({"classes": ["a"]}, r"classes \['a'\], .*"),
                         ({"config": {**metadata["config"], "guidance_scale": 9}}, r"guidance_scale 9, .* 1\.5")):
        write_weights(tmp_path / "other.safetensors", weights, metadata | change)
        with pytest.raises(ValueError, match=f"other.safetensors has {said}: their mean means nothing"):
            release.main([str(run), str(tmp_path / "x.safetensors"), "--mean-with", str(tmp_path / "other.safetensors")])
    of_photos = {name: str(tmp_path / f"{name}.safetensors") for name in ("one", "other")}
    for name, file in of_photos.items():                    # as runs have them: their data lie elsewhere
        config = {**metadata["config"], "data": str(tmp_path / name / "photos")}
        autoencoder = {"source": str(tmp_path / name / "vae"), "weights": "0"}              # one, read from two places
        write_weights(Path(file), weights, metadata | {"config": config, "autoencoder": autoencoder})
    released = str(tmp_path / "photos.safetensors")
    release.main([of_photos["one"], released])
    for first, *others in (of_photos.values(), (released, *of_photos.values())):
        with pytest.raises(ValueError, match=r"other.safetensors has data \S*other/photos, \S*one.safetensors \S*one/photos: their mean"):
            release.main([first, str(tmp_path / "x.safetensors"), "--mean-with", *others])
    release.main([of_photos["other"], str(tmp_path / "y.safetensors"), "--mean-with", released])        # of which the name is all one knows
    weights, metadata = read_weights(resolve_weights(results / "teacher-digits"))          # whose guidance is that of its sample grids
    write_weights(tmp_path / "other.safetensors", weights, {**metadata, "config": {**metadata["config"], "guidance_scale": [9.0]}})
    release.main([str(results / "teacher-digits"), str(tmp_path / "t.safetensors"), "--mean-with", str(tmp_path / "other.safetensors")])
    with pytest.raises(FileNotFoundError):
        release.main([str(run), str(tmp_path / "x.safetensors"), "--mean-with", str(tmp_path / "nothing")])
    assert not (tmp_path / "x.safetensors").exists()
