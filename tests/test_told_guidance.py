"""A student that is told its guidance scale: it learns them all, and one chooses when it samples."""

import json

import numpy as np
import pytest
import torch
from runs import COMMON, make_images
from test_dit import inputs, randomised

import evaluate
import export
import sample
import train_student_mnist
from demo import prepare
from models import Classifier, DiT, SiT, student_from_teacher
from models.embeddings import TimeEmbedding
from pipeline import SplitMeanFlowPipeline
from utils.checkpoints import load_network, read_metadata, start_from, write_weights
from utils.flow import pad_like
from utils.guidance import GuidedLabels, guided_as_told, guided_velocity, told
from utils.losses import student_loss
from utils.model_card import model_card
from utils.sampling import sample_average_velocity
from utils.times import draw_between

RANGE = (1.5, 3.0)
TOLD = dict(guidance_range=RANGE, guidance_scale=2.0)
SCALES = torch.tensor([1.5, 2.0, 3.0, 2.5, 1.75, 2.0])


def teacher() -> DiT:
    return randomised(DiT("DiT-Nano/4", 8, 1, 3))


def listening(seed: int = 0) -> DiT:
    """A student whose every weight matters."""
    return randomised(student_from_teacher(teacher(), **TOLD), seed)


@pytest.mark.parametrize("first", [teacher, lambda: randomised(SiT("SiT-1x8x2/4", 8, 1, 3))])
def test_it_starts_as_its_teacher_whatever_it_is_told(first):
    network, (z, r, t, y) = first(), inputs()
    student = student_from_teacher(network, **TOLD)
    for scales in (SCALES, None):
        torch.testing.assert_close(student(z, r, t, y, guidance_scale=scales), network.velocity(z, t, y), rtol=0, atol=0)
    randomised(student)
    assert not torch.allclose(student(z, r, t, y, guidance_scale=SCALES), student(z, r, t, y), atol=1e-3)


def test_each_row_hears_its_own_scale_and_none_means_the_usual_one():
    student, (z, r, t, y) = listening(), inputs()
    together = student(z, r, t, y, guidance_scale=SCALES)
    for i, scale in enumerate(SCALES.tolist()):
        alone = student.at_guidance(scale)(z, r, t, y)
        torch.testing.assert_close(together[i], alone[i], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(student(z, r, t, y), student.at_guidance(2.0)(z, r, t, y), rtol=0, atol=0)
    assert student.at_guidance(None) is student
    assert (student.at_guidance(1.5)(z, r, t, y) - student.at_guidance(3.0)(z, r, t, y)).abs().max() > 0.01


@pytest.mark.parametrize(("scale", "message"), [(1.4, "1.4: this student learned 1.5 to 3"), (3.1, "3.1: this student learned 1.5 to 3"),
                                                (float("nan"), "nan: this student learned")])
def test_what_it_has_not_learned_is_refused(scale, message):
    with pytest.raises(ValueError, match=message):
        listening().at_guidance(scale)


def test_a_network_of_one_scale_is_told_none():
    plain, (z, r, t, y) = student_from_teacher(teacher()), inputs()
    assert not {"guidance_range", "guidance_scale"} & set(plain.architecture)       # nor do checkpoints of before know of it
    with pytest.raises(ValueError, match="guidance scale 2.0: this student has its guidance inside, of one scale"):
        plain.at_guidance(2.0)
    with pytest.raises(ValueError, match="not told a guidance scale"):
        plain(z, r, t, y, guidance_scale=SCALES)


@pytest.mark.parametrize(("guidance_range", "scale"), [((0.5, 2.0), 1.0), ((2.0, 2.0), 2.0), ((1.5, 3.0), 1.0), ((1.0, float("inf")), 2.0)])
def test_ranges_that_make_no_sense(guidance_range, scale):
    with pytest.raises(ValueError, match="guidance range"):
        DiT("DiT-Nano/4", 8, 1, 3, interval=True, guidance_range=guidance_range, guidance_scale=scale)


@pytest.mark.parametrize("first_leg", ["self", "euler", "midpoint"])
def test_the_loss_of_a_row_is_that_of_a_student_of_its_scale(first_leg):
    """All scales in one batch, against one batch for each with every row guided alike."""
    network, student, (z, r, t, y) = teacher(), listening(1), inputs()
    share, interval = torch.full_like(t, 0.3), (0.2, 0.8)
    labels = GuidedLabels(y, SCALES)
    v = guided_as_told(network.velocity, network.null_class, interval)
    together = torch.cat(student_loss(told(student), told(student), v, z, r, t, share, labels, 2, first_leg))
    for i, scale in enumerate(SCALES.tolist()):
        u = student.at_guidance(scale)
        alone = student_loss(u, u, guided_velocity(network.velocity, network.null_class, scale, interval), z, r, t, share, y, 2, first_leg)
        torch.testing.assert_close(together[i], torch.cat(alone)[i], rtol=1e-3, atol=1e-5)
    exchanged = GuidedLabels(y, SCALES.flip(0))
    others = torch.cat(student_loss(told(student), told(student), v, z, r, t, share, exchanged, 2, first_leg))
    assert not torch.allclose(together, others, rtol=1e-2)


def test_it_learns_what_guidance_does():
    """By the boundary alone, of a velocity (y + 1) z: the difference between two of its scales becomes what guidance makes it."""
    torch.manual_seed(0)
    student = student_from_teacher(DiT("DiT-Nano/4", 8, 1, 3), guidance_range=(1.0, 4.0), guidance_scale=2.0)
    draw = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(student.parameters(), 2e-3)
    v = guided_as_told(lambda z, t, y: pad_like(y + 1.0, z) * z, 3, (0.0, 1.0))

    def rows(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return (torch.randn(count, 1, 8, 8, generator=draw), torch.rand(count, generator=draw),
                torch.randint(3, (count,), generator=draw))

    for _ in range(200):
        z, t, y = rows(32)
        labels = GuidedLabels(y, draw_between(32, 1.0, 4.0, draw))
        loss = (told(student)(z, t, t, labels) - v(z, t, labels).detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    z, t, y = rows(64)
    with torch.no_grad():
        ours = student.at_guidance(3.5)(z, t, t, y) - student.at_guidance(1.5)(z, t, t, y)
        theirs = 2 * pad_like(y - 3.0, z) * z
    assert torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), 0) > 0.8
    assert ours.std() / theirs.std() == pytest.approx(1, abs=0.3)


def test_draws_are_spread_over_the_range(draw):
    scales = draw_between(20_000, 1.5, 3.0, draw)
    assert 1.5 <= scales.min() < 1.51 and 2.99 < scales.max() <= 3.0
    counts = torch.histc(scales, 5, 1.5, 3.0)
    assert (counts / 4_000 - 1).abs().max() < 0.06


def test_what_it_is_told_is_smooth_in_the_scale():
    """Between two scales that are a tenth apart lies, nearly, the mean of both: as of times, fast features would make it rough."""
    told = listening().guidance_embed

    def roughness(embed: TimeEmbedding) -> float:
        low, middle, high = (embed(1 / torch.linspace(1.5, 2.9, 50).add(shift)) for shift in (0, 0.05, 0.1))
        return ((low + high) / 2 - middle).norm().item() / (high - low).norm().item()

    fast = TimeEmbedding(128)
    fast.load_state_dict(told.state_dict())
    assert roughness(told) < 0.05 and roughness(fast) > 0.15


@pytest.mark.parametrize("before", [None, RANGE, (1.0, 5.0)])
def test_start_from_a_student(before, tmp_path):
    theirs = randomised(student_from_teacher(teacher(), guidance_range=before, guidance_scale=2.0))
    write_weights(tmp_path / "before.safetensors", theirs.state_dict(), dict(kind="student", architecture=theirs.architecture))
    network, (z, r, t, y) = student_from_teacher(teacher(), guidance_range=RANGE, guidance_scale=1.5), inputs()
    start_from(network, tmp_path / "before.safetensors")
    expected = theirs.at_guidance(2.5 if before else None)(z, r, t, y)      # one that was told nothing is all that it does at first
    torch.testing.assert_close(network.at_guidance(2.5)(z, r, t, y), expected)


def test_what_it_was_told_is_not_dropped(tmp_path):
    """Without it the weights would be a function that nobody trained."""
    theirs = listening()
    write_weights(tmp_path / "before.safetensors", theirs.state_dict(), dict(kind="student", architecture=theirs.architecture))
    with pytest.raises(ValueError, match=r"is another network: .*guidance_range \[1.5, 3.0\], here None"):
        start_from(student_from_teacher(teacher()), tmp_path / "before.safetensors")


@pytest.fixture(scope="module")
def run(results, tmp_path_factory):
    """A run folder whose student was told 1 to 4; then noise on its weights, so that six updates do not hide what it hears."""
    folder = tmp_path_factory.mktemp("told")
    train_student_mnist.main([*COMMON, "--results-dir", str(folder), "--teacher", str(results / "teacher-digits"),
                              "--guidance-range", "1", "4", "--guidance-scale", "2.5"])
    return folder / "student-digits"


@pytest.fixture(scope="module")
def student(run, tmp_path_factory):
    network, metadata = load_network(run, DiT)
    assert network.architecture["guidance_range"] == [1, 4] and network.guidance_scale == 2.5
    assert network.guidance_embed.out.weight.abs().max() > 0            # it has begun to listen
    file = tmp_path_factory.mktemp("student") / "student.safetensors"
    write_weights(file, randomised(network).state_dict(), metadata)
    return file


def samples(student, out, *flags) -> np.ndarray:
    sample.main([str(student), "--num-steps", "2", "--num-images", "4", "--formats", "npz", "--out", str(out), "--device", "cpu", *flags])
    return np.load(out / "2step.npz")["arr_0"]


def test_samples_by_scale(student, tmp_path):
    usual, same, other = (samples(student, tmp_path / str(i), *flags) for i, flags in enumerate(
        [[], ["--guidance-scale", "2.5"], ["--guidance-scale", "4"]]))
    assert np.array_equal(usual, same) and not np.array_equal(usual, other)
    pipe = SplitMeanFlowPipeline.from_pretrained(student)
    again, stronger, none = (pipe([3], 2, torch.manual_seed(0), guidance_scale=w, output_type="pt").images for w in (2.5, 4.0, None))
    assert torch.equal(again, none) and not torch.equal(again, stronger)
    with pytest.raises(ValueError, match="guidance scale 5.0: this student learned 1 to 4"):
        samples(student, tmp_path / "refused", "--guidance-scale", "5")
    with pytest.raises(ValueError, match="guidance scale 0.5: this student learned 1 to 4"):
        pipe([3], guidance_scale=0.5)
    assert not (tmp_path / "refused").exists()


def test_a_model_folder_keeps_the_choice(student, tmp_path):
    pipe = SplitMeanFlowPipeline.from_pretrained(student)
    pipe.save_pretrained(tmp_path / "folder")
    again = SplitMeanFlowPipeline.from_pretrained(tmp_path / "folder")
    images = [one([3], 1, torch.manual_seed(0), guidance_scale=3.0, output_type="pt").images for one in (pipe, again)]
    assert torch.equal(*images) and again.network.guidance_range == (1, 4)
    card = model_card("folder", read_metadata(student), "0", tmp_path, None)
    assert "guidance, 2.5 (or any from 1 to 4), is part of it" in card and "guidance_scale=2.5, num_inference_steps=1" in card


@pytest.mark.parametrize("form", ["pt2", "onnx"])
def test_an_exported_file_has_the_scale_it_was_made_with(student, tmp_path, form):
    target = tmp_path / f"out.{form}"
    export.main([str(student), str(target), "--guidance-scale", "3.5"])     # which compares it with the network before it is kept
    noise, label = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(5)), torch.tensor([0, 7])
    network, _ = load_network(student, DiT)
    expected, usual = (sample_average_velocity(network.at_guidance(w), noise, label, 1) for w in (3.5, None))
    if form == "pt2":
        files = {"information.json": ""}
        found = torch.export.load(target, extra_files=files).module()(noise, label)
        assert json.loads(files["information.json"])["guidance_scale"] == 3.5
    else:
        import onnxruntime

        found = torch.from_numpy(onnxruntime.InferenceSession(str(target)).run(None, {"noise": noise.numpy(), "label": label.numpy()})[0])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert (expected - usual).abs().max() > 1e-3
    with pytest.raises(ValueError, match="guidance scale 9.0: this student learned 1 to 4"):
        export.main([str(student), str(tmp_path / f"refused.{form}"), "--guidance-scale", "9"])
    assert not (tmp_path / f"refused.{form}").exists()


@pytest.mark.parametrize("target", ["out.pt2", "out.onnx", "step.onnx"])
def test_an_exported_file_may_be_told_its_scale(student, tmp_path, target):
    """One number for all images; and the page's model of it says which it may be."""
    network, _ = load_network(student, DiT)
    if target == "step.onnx":                               # the page's weights are float16
        for weight in network.parameters():
            weight.data = weight.half().float()
    noise, label = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(5)), torch.tensor([0, 7])
    expected = {w: sample_average_velocity(network.at_guidance(w), noise, label, 2) for w in (1.0, 3.5)}
    if target == "step.onnx":
        prepare.main([str(student), "--out", str(tmp_path / "models")])
        model, = json.loads((tmp_path / "models" / "models.json").read_text())
        assert model["guidance"] == {"range": [1, 4], "usual": 2.5}
        file = tmp_path / "models" / model["file"]
    else:
        file = tmp_path / target
        export.main([str(student), str(file), "--num-steps", "2", "--guidance-input", "True"])
    if target == "out.pt2":
        run = torch.export.load(file).module()
    else:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(file))
        assert json.loads(session.get_modelmeta().custom_metadata_map["guidance_range"]) == [1, 4]

        def run(*inputs: torch.Tensor) -> torch.Tensor:
            names = [each.name for each in session.get_inputs()]
            return torch.from_numpy(session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})[0])
    for w, images in expected.items():
        scale = torch.tensor(w)
        if target == "step.onnx":
            half, one, zero = (torch.tensor(t) for t in (0.5, 1.0, 0.0))
            found = run(run(noise, half, one, label, scale), zero, half, label, scale)
        else:
            found = run(noise, label, scale)
        torch.testing.assert_close(found, images, atol=1e-4, rtol=0)
    assert (expected[1.0] - expected[3.5]).abs().max() > 0.01


def test_a_scale_is_an_input_or_chosen(student, tmp_path):
    with pytest.raises(ValueError, match="--guidance-input True: must be False with --guidance-scale"):
        export.Config(str(student), "x.onnx", guidance_scale=2.0, guidance_input=True)
    network = student_from_teacher(teacher())
    write_weights(tmp_path / "plain.safetensors", network.state_dict(), dict(kind="student", architecture=network.architecture, config={}))
    with pytest.raises(ValueError, match="--guidance-input True: .*plain.safetensors has its guidance inside, of one scale"):
        export.main([str(tmp_path / "plain.safetensors"), str(tmp_path / "x.onnx"), "--guidance-input", "True"])


def test_another_range_is_another_run(run, results):
    flags = [*COMMON, "--results-dir", str(run.parent), "--teacher", str(results / "teacher-digits"), "--steps", "8"]
    with pytest.raises(ValueError, match=r"guidance_range: \[1.0, 3.0\], was \[1.0, 4.0\]"):
        train_student_mnist.main([*flags, "--guidance-range", "1", "3", "--guidance-scale", "2.5"])


def test_without_classes_there_is_nothing_to_tell(results, tmp_path):
    data = make_images(tmp_path / "plain", [""])
    (data / "torn.png").touch()                             # told before any image is decoded
    with pytest.raises(ValueError, match="guidance needs at least 2 classes"):
        train_student_mnist.main([*COMMON, "--data", str(data), "--guidance-scale", "1", "--guidance-range", "1", "3",
                                  "--results-dir", str(tmp_path / "results")])
    assert not (tmp_path / "results").exists()


def test_rows_of_an_evaluation(student):
    rows = evaluate.rows_of(load_network(student, DiT)[0], True,
                            evaluate.Config(str(student), num_steps=(1, 2), guidance_scale=(1.0, 3.0)))
    assert [(name, count, scale) for name, count, scale, _ in rows] == [
        ("1 step, guidance 1", 1, 1.0), ("1 step, guidance 3", 1, 3.0), ("2 steps, guidance 1", 2, 1.0), ("2 steps, guidance 3", 2, 3.0)]
    z, y = torch.randn(2, 1, 8, 8), torch.tensor([0, 1])
    weak, strong = (draw(z, y) for *_, draw in rows[:2])
    assert not torch.allclose(weak, strong, atol=1e-3)


def test_an_evaluation_by_scale(student, results, tmp_path):
    """Each row has its scale and is compared with its teacher guided as much."""
    judge, architecture = tmp_path / "classifier.safetensors", dict(num_channels=1, num_classes=10, width=8)
    write_weights(judge, Classifier(**architecture).state_dict(),
                  dict(kind="classifier", architecture=architecture, image_size=8, classes=[str(digit) for digit in range(10)]))
    flags = [str(student), "--data", "digits", "--classifier", str(judge), "--num-images", "200", "--seeds", "1", "--num-steps", "1", "2",
             "--teacher", str(results / "teacher-digits"), "--cache", str(tmp_path / "cache"), "--device", "cpu"]
    found = {}
    for scales in ([], ["1", "4"]):
        evaluate.main([*flags, *(["--guidance-scale", *scales] if scales else []), "--out", str(tmp_path / f"out{len(scales)}")])
        found |= {(row["evaluations"], row["guidance_scale"]): row
                  for row in json.loads((tmp_path / f"out{len(scales)}" / "metrics.json").read_text())["rows"]}
    assert set(found) == {(n, w) for n in (1, 2) for w in (1.0, 2.5, 4.0)}
    for metric in ("frechet_distance", "teacher_distance"):
        key = next(key for key in found[1, 1.0] if key.startswith(metric))
        assert len({row[key]["mean"] for row in found.values()}) == 6
    names = [row["name"] for row in found.values()]
    assert names == ["1 step", "2 steps", "1 step, guidance 1", "1 step, guidance 4", "2 steps, guidance 1", "2 steps, guidance 4"]
    assert (tmp_path / "out2/plot.png").stat().st_size > 1000 and (tmp_path / "out2/residual.png").stat().st_size > 1000
