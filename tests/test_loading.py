"""Networks by path: from one file, a checkpoint folder, a run."""

import errno
import os
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved import NAMES, killed_while_writing, same, save, training, truncate, weights_of
from torch import nn

from models import DiT
from utils.checkpoints import CheckpointError, load_network, read_latest, resolve_weights, save_checkpoint, step_folders


def test_resolve_weights(tmp_path):
    for step in (1, 2):
        save(tmp_path / "run/checkpoints", step)
    first, newest = (tmp_path / f"run/checkpoints/step_0000000{step}/ema.safetensors" for step in (1, 2))
    assert resolve_weights(first) == first                                      # a file
    assert resolve_weights(str(first.parent)) == first                          # a checkpoint folder
    assert resolve_weights(first.with_name("raw.safetensors")) == first.with_name("raw.safetensors")
    assert resolve_weights(tmp_path / "run") == newest                          # a run folder
    assert resolve_weights(tmp_path / "run/checkpoints") == newest


def test_resolve_weights_passes_over_bad_and_unfinished_ones(three):
    shutil.copytree(three / "step_00000003", three / "step_00000004.bad")
    killed_while_writing(three, 9)
    assert resolve_weights(three) == three / "step_00000003/ema.safetensors"
    assert [path.name for path in step_folders(three)] == ["step_00000001", "step_00000002", "step_00000003"]


def test_resolve_weights_of_an_empty_folder(tmp_path):
    with pytest.raises(CheckpointError, match=f"{re.escape(str(tmp_path))} holds no checkpoint"):
        resolve_weights(tmp_path)


def test_resolve_weights_of_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*none"):
        resolve_weights(tmp_path / "none")


@pytest.mark.parametrize("size", [0, 6, 10_000, -1])
def test_torn_file_offers_the_previous_one(three, size):
    torn = three / "step_00000003/ema.safetensors"
    truncate(torn, size)
    previous = three / "step_00000002"
    with pytest.raises(CheckpointError, match=f"{re.escape(str(torn))} is torn.*previous one is {re.escape(str(previous))}$"):
        load_network(three, nn.Linear)
    assert load_network(previous, nn.Linear)[1]["step"] == 2


def test_a_missing_file_does_too(three):
    (three / "step_00000003/ema.safetensors").unlink()
    with pytest.raises(CheckpointError, match=f"no checkpoint file .*previous one is {re.escape(str(three / 'step_00000002'))}$"):
        load_network(three, nn.Linear)


def test_a_file_that_may_not_be_read_is_not_called_torn(three, monkeypatch):
    """Nor is it set aside."""
    file = three / "step_00000003/ema.safetensors"
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != file)            # root may read any
    for load in (lambda: load_network(three, nn.Linear), lambda: read_latest(three, ["ema"], pytest.fail)):
        with pytest.raises(PermissionError, match="ema.safetensors may not be read"):
            load()
    assert file.exists()


def test_nor_is_a_training_state(three, monkeypatch):
    def load(path, **_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(PermissionError, match=r"denied: .*step_00000003/training\.pt"):
        read_latest(three, NAMES, pytest.fail)
    assert (three / "step_00000003").exists()


def test_torn_first_file_offers_none(three):
    torn = three / "step_00000001/ema.safetensors"
    truncate(torn, 100)
    with pytest.raises(CheckpointError, match="is torn") as raised:
        load_network(torn, nn.Linear)
    assert "previous" not in str(raised.value)


def test_foreign_safetensors_is_refused(three):
    foreign = three / "foreign.safetensors"
    save_file(load_file(three / "step_00000003/ema.safetensors"), foreign)      # the right weights, no metadata
    with pytest.raises(CheckpointError, match="foreign.safetensors is no checkpoint of this project"):
        load_network(foreign, nn.Linear)


def test_no_safetensors_at_all(tmp_path):
    (tmp_path / "model.pt").write_text("no checkpoint")
    with pytest.raises(CheckpointError, match="model.pt is torn or no safetensors"):
        load_network(tmp_path / "model.pt", nn.Linear)


def test_weights_must_fit_strictly(three):
    """A network that lacks one of the file's weights is refused."""
    with pytest.raises(RuntimeError, match="Unexpected key.*bias"):
        load_network(three, partial(nn.Linear, bias=False))


@pytest.mark.parametrize("name", NAMES)
def test_one_file_rebuilds_the_network(tmp_path, name):
    networks = {"ema": DiT("DiT-Nano/8", 8, 1, 3), "raw": DiT("DiT-Nano/8", 8, 1, 3, interval=True, modulation_rank=5)}
    for weight in (weight for network in networks.values() for weight in network.parameters()):
        nn.init.normal_(weight)                             # no two alike: none can be lost or exchanged unseen
    metadata = dict(kind="teacher", architecture=networks[name].architecture, classes=["a", "b", "ü"],
                    config={"steps": 10, "guidance_scale": [1.0, 2.5], "name": None})
    path = save_checkpoint(tmp_path, 7, weights_of(networks), training(7), metadata, keep=1)
    loaded, found = load_network(path / f"{name}.safetensors", DiT)
    assert same(loaded.state_dict(), networks[name].state_dict())
    assert found == {**metadata, "step": 7, "weights": name}


def test_loaded_network_is_for_use_not_for_training(tmp_path):
    loaded, _ = load_network(save(tmp_path, 7), nn.Linear)
    assert not loaded.training and not any(weight.requires_grad for weight in loaded.parameters())
