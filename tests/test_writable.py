"""Where nothing may be written is told before the work."""

import os

import pytest

import evaluate
import export
import import_teacher
import prepare_latents
import release
import sample
import train_classifier
from utils.config import check_writable


@pytest.mark.parametrize(("script", "argv"), [
    (release, ["x", "{target}"]), (release, ["x", "{target}.safetensors"]), (export, ["x", "{target}.onnx"]),
    (import_teacher, ["x", "{target}.safetensors", "--time-direction", "data-at-one"]),
    (train_classifier, ["--data", "x", "--out", "{target}.safetensors"])])
@pytest.mark.parametrize("place", ["", "file", "made/on/the/way"])
def test_where_nothing_may_be_written_is_told_before_what_is_read(script, argv, place, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)              # root may write to any
    with pytest.raises(ValueError, match=rf"target\S*: {tmp_path}\S* is no folder, or may not be written to; choose another place"):
        script.main([part.format(target=tmp_path / place / "target") for part in argv])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("out", [None, "target", "made/on/the/way"])
@pytest.mark.parametrize(("script", "default"), [(sample, "samples"), (evaluate, "results/evaluation-x")])
def test_so_it_is_of_folders_and_without_a_flag(script, default, out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(ValueError, match=f"^{out or default}: {tmp_path} is no folder, or may not be written to"):
        script.main(["x", *(["--out", out] if out else [])])


@pytest.mark.parametrize(("script", "argv"), [(prepare_latents, ["photos", "{}"]), (evaluate, ["x", "--out", "out", "--cache", "{}"])])
def test_so_it_is_of_folders_by_other_names(script, argv, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "closed").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: path.absolute() != tmp_path / "closed")
    for out in ("closed", "closed/made/on/the/way"):
        with pytest.raises(ValueError, match=rf"^{out}: \S*closed is no folder, or may not be written to"):
            script.main([part.format(out) for part in argv])
    with pytest.raises(ValueError, match=f"{__file__}: must be a folder, not a file"):
        script.Config("x", **{"out" if script is prepare_latents else "cache": __file__})


def test_a_folder_that_is_there_must_be_writable_too(tmp_path, monkeypatch):
    check_writable(tmp_path / "target")
    (tmp_path / "target").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "target")
    with pytest.raises(ValueError, match="may not be written to"):
        check_writable(tmp_path / "target")


@pytest.mark.parametrize("script", [export, release, import_teacher])
def test_a_folder_in_place_of_a_file_is_refused(script, tmp_path):
    folder = tmp_path / ("a.onnx" if script is export else "a.safetensors")
    folder.mkdir()
    more = dict(time_direction="data-at-one") if script is import_teacher else {}
    with pytest.raises(ValueError, match=f"--target {folder}: must be a file, not a folder"):
        script.Config("x", str(folder), replace=True, **more)


def test_a_source_that_is_not_there_is_told_of_though_the_target_is(tmp_path):
    (tmp_path / "a.safetensors").touch()
    with pytest.raises(FileNotFoundError, match=r"^no file nope.pt$"):
        import_teacher.main(["nope.pt", str(tmp_path / "a.safetensors"), "--replace", "True", "--time-direction", "data-at-one"])
