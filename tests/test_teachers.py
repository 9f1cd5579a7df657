"""Which teacher a student finds, and which it refuses."""

import dataclasses
import json
import os

import pytest
import torch
from runs import make_images

from utils.config import RunConfig
from utils.data import Images
from utils.teachers import check_teacher, find_teacher


def teacher_run(results, name: str, age: int, **config):
    file = results / name / "checkpoints/step_00000001/ema.safetensors"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"")
    os.utime(file, (1e9 - age, 1e9 - age))
    (results / name / "config.json").write_text(json.dumps({"stage": "teacher", "data": "photos", "image_size": None, **config}))
    return file


def test_newest_teacher_of_the_same_images_and_size(tmp_path):
    large = teacher_run(tmp_path, "large", 3, image_size=64)
    plain = teacher_run(tmp_path, "plain", 2)                   # of a path: 32 pixels
    named = teacher_run(tmp_path, "named", 1, data="cifar10")
    teacher_run(tmp_path, "student", 0, stage="student")
    assert find_teacher(None, str(tmp_path), "photos", 64) == large
    assert find_teacher(None, str(tmp_path), "photos", 32) == plain
    assert find_teacher(None, str(tmp_path), "cifar10", 32) == named
    with pytest.raises(ValueError, match="no teacher for --data photos: none in"):
        find_teacher(None, str(tmp_path), "photos", 48)


def test_a_slash_at_the_end_means_the_same_images(tmp_path):
    make_images(tmp_path / "photos", ["cat", "dog"])
    assert RunConfig(data=f"{tmp_path}/photos/") == RunConfig(data=f"{tmp_path}/photos")
    assert RunConfig(data="/").data == "/"


def test_classes_must_be_the_teachers_own_in_its_order():
    images = Images("photos", torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1]), ["cat", "dog"], False)
    metadata = {"kind": "teacher", "architecture": {"preset": "DiT-Nano/4", "num_channels": 3, "image_size": 8, "num_classes": 2}}
    check_teacher("t", {**metadata, "classes": ["cat", "dog"]}, images, None)
    check_teacher("t", {**metadata, "classes": ["0", "1"]}, images, None)      # imported, its names unknown
    with pytest.raises(ValueError, match="--teacher t knows the classes dog, cat, in this order; --data photos has cat, dog"):
        check_teacher("t", {**metadata, "classes": ["dog", "cat"]}, images, None)
    check_teacher("t", {**metadata, "architecture": {**metadata["architecture"], "num_classes": 0}, "classes": []},
                  dataclasses.replace(images, labels=torch.zeros(2).long(), classes=[]), None)
