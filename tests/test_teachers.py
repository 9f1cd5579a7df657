"""Which teacher a student finds, and which it refuses."""

import dataclasses
import json
import os

import pytest
import torch

from utils.checkpoints import write_weights
from utils.data import Images
from utils.teachers import check_teacher, find_teacher


def teacher_run(results, name: str, age: int, size: int = 32, step: int = 1, **config):
    file = results / name / f"checkpoints/step_{step:08d}/ema.safetensors"
    file.parent.mkdir(parents=True)
    write_weights(file, {"weight": torch.zeros(1)}, {"architecture": {"image_size": size}})
    os.utime(file, (1e9 - age, 1e9 - age))
    config = {"stage": "teacher", "data": "photos", "image_size": None, "steps": 1, **config}
    (results / name / "config.json").write_text(json.dumps(config))
    return file


def test_newest_teacher_of_the_same_images_and_size(tmp_path, monkeypatch):
    large = teacher_run(tmp_path, "large", 3, size=64, image_size=64)
    plain = teacher_run(tmp_path, "plain", 2)
    named = teacher_run(tmp_path, "named", 1, data="cifar10")
    resized = teacher_run(tmp_path, "resized", 1, size=16, image_size=16, data="cifar10")
    teacher_run(tmp_path, "student", 0, stage="student")
    assert find_teacher(None, str(tmp_path), "photos", 64) == large
    assert find_teacher(None, str(tmp_path), "photos", 32) == plain
    assert find_teacher(None, str(tmp_path), "cifar10", 32) == named
    assert find_teacher(None, str(tmp_path), "cifar10", 16) == resized      # though a newer one has its own size by default
    with pytest.raises(ValueError, match=r"no teacher for --data photos of size 48: none in .* \(.*large has size 64, .*plain has size 32"):
        find_teacher(None, str(tmp_path), "photos", 48)
    plain.write_bytes(b"torn")
    assert find_teacher(None, str(tmp_path), "photos", 32) == plain         # loading it says so
    older = teacher_run(tmp_path, "older", 9)
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: path != plain)
        assert find_teacher(None, str(tmp_path), "photos", 32) == older     # one that may not be read neither
    plain.unlink()
    assert find_teacher(None, str(tmp_path), "photos", 32) == older         # a file that is gone is nothing to load


@pytest.mark.parametrize(("text", "said"), [('{"stage": "te', "is torn or no JSON"), ("", "is torn"), ("[1]", "holds no JSON object")])
def test_a_broken_config_is_named_with_what_to_do(tmp_path, text, said):
    teacher_run(tmp_path, "good", 1)
    broken = teacher_run(tmp_path, "broken", 2).parents[2] / "config.json"
    broken.write_text(text)
    with pytest.raises(ValueError, match=rf"{broken} {said}.*; repair it, or move its folder away"):
        find_teacher(None, str(tmp_path), "photos", 32)


def test_of_several_the_newest_teacher_and_its_newest_checkpoint(tmp_path):
    found = {(name, step): teacher_run(tmp_path, name, age, step=step, steps=2)
             for name, age in (("a-older", 3), ("b-newest", 1), ("c-oldest", 5)) for step in (1, 2)}
    assert find_teacher(None, str(tmp_path), "photos", 32) == found["b-newest", 2]


def test_a_finished_teacher_goes_before_a_newer_one_that_stopped(tmp_path):
    stopped = teacher_run(tmp_path, "stopped", 0, steps=5)
    assert find_teacher(None, str(tmp_path), "photos", 32) == stopped
    finished = teacher_run(tmp_path, "finished", 9, step=5, steps=5)
    assert find_teacher(None, str(tmp_path), "photos", 32) == finished


def test_released_teachers_are_of_the_named_data_sets_alone(tmp_path):
    assert find_teacher(None, str(tmp_path), "mnist", 28).name == "teacher-mnist.safetensors"
    with pytest.raises(ValueError, match="no teacher for --data clothes/mnist"):
        find_teacher(None, str(tmp_path), "clothes/mnist", 28)


@pytest.mark.parametrize("written", ["photos", "./photos", "photos/", "photos/../photos", "{here}/photos"])
def test_a_path_written_in_another_way_means_the_same_images(tmp_path, monkeypatch, written):
    monkeypatch.chdir(tmp_path)
    found = teacher_run(tmp_path, "run", 0)
    assert find_teacher(None, str(tmp_path), written.format(here=tmp_path), 32) == found


def test_shape_and_classes_must_be_the_teachers_own_in_its_order():
    images = Images("photos", torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1]), ["cat", "dog"], False)
    metadata = {"kind": "teacher", "architecture": {"preset": "DiT-Nano/4", "num_channels": 3, "image_size": 8, "num_classes": 2},
                "config": {}}
    check_teacher("t", {**metadata, "classes": ["cat", "dog"]}, images, None)
    check_teacher("t", {**metadata, "classes": ["0", "1"], "config": {"imported_from": "x.pt"}}, images, None)      # its names unknown
    with pytest.raises(ValueError, match="--teacher t knows the classes 0, 1, in this order"):                      # digits, say
        check_teacher("t", {**metadata, "classes": ["0", "1"]}, images, None)
    with pytest.raises(ValueError, match="--teacher t knows the classes dog, cat, in this order; --data photos has cat, dog"):
        check_teacher("t", {**metadata, "classes": ["dog", "cat"]}, images, None)
    for change in ({"num_channels": 1}, {"image_size": 16}, {"num_classes": 3}):
        with pytest.raises(ValueError, match="--teacher t was trained on"):
            check_teacher("t", {**metadata, "architecture": metadata["architecture"] | change, "classes": ["cat", "dog"]}, images, None)
    check_teacher("t", {**metadata, "architecture": {**metadata["architecture"], "num_classes": 0}, "classes": []},
                  dataclasses.replace(images, labels=torch.zeros(2).long(), classes=[]), None)
