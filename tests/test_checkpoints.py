import errno
import os
import pickle
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from saved import NAMES, NETWORKS, killed_while_writing, same, save, truncate

from utils.checkpoints import CheckpointError, is_finished, read_latest, read_weights, resolve_weights, step_folders, write_weights

FULL = OSError(28, "No space left on device")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def no_warning(text: str) -> None:
    raise AssertionError(f"warned: {text}")


# Round trip.

def test_read_latest_returns_what_was_saved(three):
    weights, found = read_latest(three, NAMES, no_warning)
    for name in NAMES:
        assert same(weights[name], NETWORKS[name].state_dict())
    assert found["step"] == 3 and found["seconds"] == 1.5
    assert torch.equal(found["optimizer"]["state"][0]["momentum"], torch.full((3,), 3.0))


@pytest.mark.parametrize("there", [True, False], ids=["empty folder", "no folder"])
def test_no_checkpoint_is_none(tmp_path, there):
    assert read_latest(tmp_path if there else tmp_path / "none", NAMES, no_warning) is None


def test_others_may_read_what_the_umask_lets_them(three):
    plain = three / "plain"
    plain.touch()
    files = list(step_folders(three)[-1].iterdir())
    assert len(files) > 2 and {file.stat().st_mode for file in files} == {plain.stat().st_mode}


def test_newest_ones_are_kept(tmp_path):
    for step in (1, 2, 30, 4):                              # 4 after 30: newest by step
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step_00000004", "step_00000030"]


def test_an_old_one_that_is_being_read_on_nfs_is_deleted_later(three, monkeypatch):
    def busy(path, **_):
        raise OSError(errno.ENOTEMPTY, "Directory not empty", path)

    monkeypatch.setattr(os, "rmdir", busy)
    with pytest.warns(UserWarning, match="could not delete .*step_00000001"):
        save(three, 4, keep=3)
    assert step_folders(three)[0].name == "step_00000001"
    monkeypatch.undo()
    save(three, 5, keep=3)
    assert [path.name for path in step_folders(three)] == ["step_00000003", "step_00000004", "step_00000005"]


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "step_00000001/stale").write_text("")
    save(tmp_path, 1)
    assert names(tmp_path / "step_00000001") == ["ema.safetensors", "raw.safetensors", "training.pt"]
    assert names(tmp_path) == ["step_00000001"]


def test_one_file_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    file, transposed = tmp_path / "a.safetensors", torch.randn(2, 3).T
    write_weights(file, {"weight": transposed}, {})
    assert torch.equal(read_weights(file)[0]["weight"], transposed)
    file.unlink()
    monkeypatch.setattr(os, "replace", lambda *_: fail_with(FULL))
    with pytest.raises(OSError, match="could not write .*a.safetensors"):
        write_weights(file, {"weight": transposed}, {})
    assert names(tmp_path) == []


# Crashes while writing.

def test_killed_process_leaves_the_earlier_checkpoint(three):
    killed_while_writing(three, 9)
    assert read_latest(three, NAMES, no_warning)[1]["step"] == 3
    assert resolve_weights(three) == three / "step_00000003/ema.safetensors"


def test_leftovers_are_cleaned_by_the_next_save(three):
    leftovers = [killed_while_writing(three, step) for step in (4, 9)]          # of this very step, and of another
    save(three, 4)
    assert not any(leftover.exists() for leftover in leftovers)
    assert read_latest(three, NAMES, no_warning)[1]["step"] == 4


@pytest.mark.parametrize(
    ("place", "name"),
    [("os", "replace"), ("torch", "save"), ("utils.checkpoints", "save_file"), ("utils.checkpoints", "flush")],
)
def test_full_disk_leaves_earlier_checkpoints_untouched(three, monkeypatch, place, name):
    def fail(*_, **__):
        raise FULL

    before = contents(three)
    monkeypatch.setattr(f"{place}.{name}", fail)
    with pytest.raises(OSError, match="could not write checkpoint .*step_00000004 .*MiB free.*No space left on device"):
        save(three, 4, keep=1)
    monkeypatch.undo()
    assert contents(three) == before
    assert names(three) == ["step_00000001", "step_00000002", "step_00000003"]


def test_full_disk_at_the_last_moment(three, monkeypatch):
    """The files are written, the rename of the folder fails."""
    before, replace = contents(three), os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: replace(a, b) if Path(a).is_file() else fail_with(FULL))
    with pytest.raises(OSError, match="step_00000004"):
        save(three, 4, keep=1)
    assert contents(three) == before and len(names(three)) == 3


def fail_with(error: Exception) -> None:
    raise error


def test_torch_save_on_a_full_disk(three, monkeypatch):
    """torch.save reports it as RuntimeError; callers see OSError all the same."""
    monkeypatch.setattr(torch, "save", lambda *_, **__: fail_with(RuntimeError("[enforce fail] unexpected pos 64 vs 0")))
    with pytest.raises(OSError, match="step_00000004.*unexpected pos"):
        save(three, 4)
    assert len(names(three)) == 3


# Bad checkpoints.

class Exploit:
    """Unpickling it would create a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def harm(folder: Path, how: str) -> str:
    """Harm the checkpoint in `folder`; the name of the bad file."""
    name, _, harm = how.partition(" ")
    file = folder / name
    if harm == "missing":
        file.unlink()
    elif harm == "torch pickle":
        torch.save({"step": 3, "optimizer": Exploit(folder / "executed")}, file)
    elif harm == "plain pickle":
        file.write_bytes(pickle.dumps(Exploit(folder / "executed"), protocol=2))
    elif harm == "foreign":
        save_file({"weight": torch.zeros(3)}, file)
    else:
        size = file.stat().st_size
        truncate(file, {"empty": 0, "header": 6, "half": size // 2, "last byte": size - 1}[harm])
    return name


HARMS = [f"{name} {harm}" for name in ("ema.safetensors", "raw.safetensors", "training.pt")
         for harm in ("empty", "header", "half", "last byte", "missing")]
HARMS += ["ema.safetensors foreign", "training.pt torch pickle", "training.pt plain pickle"]


@pytest.mark.parametrize("how", HARMS)
def test_bad_newest_checkpoint_is_set_aside(three, how):
    """The previous one is returned, the bad and the good one are named, and nothing is deleted."""
    bad = harm(three / "step_00000003", how)
    before, warnings = contents(three / "step_00000003"), []
    weights, found = read_latest(three, NAMES, warnings.append)
    assert found["step"] == 2 and weights.keys() == set(NAMES)
    assert names(three) == ["step_00000001", "step_00000002", "step_00000003.bad"]
    assert contents(three / "step_00000003.bad") == before
    (warning,) = warnings
    assert f"step_00000003/{bad}" in warning and f"{three}/step_00000002" in warning


@pytest.mark.parametrize("how", ["torch pickle", "plain pickle"])
def test_foreign_pickle_is_not_executed(three, how):
    harm(three / "step_00000003", f"training.pt {how}")
    executed = three / "step_00000003/executed"
    with suppress(RuntimeError):
        torch.load(three / "step_00000003/training.pt", weights_only=False)
    executed.unlink()                                       # it is there: the pickle is a live one
    read_latest(three, NAMES, lambda _: None)
    assert not executed.exists() and not (three / "step_00000003.bad/executed").exists()


def test_two_bad_ones_are_both_set_aside(three):
    harm(three / "step_00000003", "ema.safetensors half")
    harm(three / "step_00000002", "training.pt missing")
    warnings = []
    assert read_latest(three, NAMES, warnings.append)[1]["step"] == 1
    assert names(three) == ["step_00000001", "step_00000002.bad", "step_00000003.bad"]
    assert len(warnings) == 2 and all("step_00000001" in warning for warning in warnings)


def test_all_bad_is_an_error_that_names_each(three):
    for step in (1, 2, 3):
        harm(three / f"step_0000000{step}", "raw.safetensors half")
    with pytest.raises(CheckpointError, match="no checkpoint in .* is good: .*step_00000003.*step_00000002.*step_00000001"):
        read_latest(three, NAMES, no_warning)
    assert names(three) == ["step_00000001", "step_00000002", "step_00000003"]


def test_a_run_with_a_torn_end_is_not_finished(three):
    last = step_folders(three)[-1]
    steps = int(last.name.removeprefix("step_"))
    assert is_finished(three, steps) and not is_finished(three, steps + 1)
    (last / "ema.safetensors").write_bytes(b"")
    assert not is_finished(three, steps)


def test_run_goes_on_over_a_bad_one(three):
    """Set aside twice at the same step, with a good save in between."""
    for _ in range(2):
        harm(three / "step_00000003", "ema.safetensors half")
        assert read_latest(three, NAMES, lambda _: None)[1]["step"] == 2
        save(three, 3)
        assert read_latest(three, NAMES, no_warning)[1]["step"] == 3


def test_bad_ones_of_the_same_step_are_all_kept(three):
    first = contents(shutil.copytree(three / "step_00000001", three / "step_00000003.bad"))
    harm(three / "step_00000003", "ema.safetensors foreign")
    read_latest(three, NAMES, lambda text: None)
    assert names(three) == ["step_00000001", "step_00000002", "step_00000003.bad", "step_00000003.bad2"]
    assert contents(three / "step_00000003.bad") == first


def test_another_rank_may_set_it_aside_first(three):
    harm(three / "step_00000003", "ema.safetensors foreign")
    _, found = read_latest(three, NAMES, lambda text: (three / "step_00000003").rename(three / "step_00000003.bad"))
    assert found["step"] == 2 and names(three) == ["step_00000001", "step_00000002", "step_00000003.bad"]
