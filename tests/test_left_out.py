"""Files among a user's own images that are not read."""

from pathlib import Path

import pytest
from own_images import zipped
from photos import make_photo_latents

import train_classifier
from utils.folders import open_folder


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"no image")


@pytest.mark.parametrize("in_zip", [False, True], ids=["folder", "zip"])
def test_files_that_are_left_out_are_counted(class_folders, tmp_path, in_zip):
    def told() -> str:
        return open_folder(zipped(tmp_path / "photos.zip", class_folders) if in_zip else class_folders, "--data").left_out

    write(class_folders, ".DS_Store", "cat/.hidden.heic", "__MACOSX/._1.heic")
    assert told() == ""
    write(class_folders, "labels.csv", "cat/3.HEIC", "cat/4.heic", "eel/1.heic", "owl/LICENSE")
    assert told() == "3 .heic, 1 .csv, 1 without ending (no image at all in eel)"
    write(class_folders, *(f"{i}.x{i}" for i in range(4)))
    assert told().startswith("3 .heic, 1 ") and told().count(",") == 5 and told().endswith(", ... (no image at all in eel)")


def test_what_is_told_can_be_printed(class_folders):
    """Also of names that are not UTF-8."""
    write(class_folders, "caf\udce9/1.\udce9")
    assert open_folder(class_folders, "--data").left_out == r"1 .\udce9 (no image at all in caf\udce9)"


def test_a_folder_of_other_files_says_of_which(tmp_path):
    write(tmp_path, "1.heic", "2.heic")
    with pytest.raises(ValueError, match="holds no image that Pillow knows by its ending .*; it holds 2 .heic"):
        open_folder(tmp_path, "--data")


def test_other_scripts_that_read_images_tell_it_too(tmp_path, capsys):
    write(tmp_path, "photos/cat/1.heic")
    photos = make_photo_latents(tmp_path) / "photos"
    said = f"{photos}: files that Pillow does not read as images were left out: 1 .heic\n"
    assert capsys.readouterr().out.count(f"note: SOURCE {said}") == 1
    train_classifier.main(["--data", str(photos), "--image-size", "8", "--epochs", "0.1", "--width", "2", "--min-accuracy", "0",
                           "--out", str(tmp_path / "judge.safetensors"), "--device", "cpu"])
    assert capsys.readouterr().out.count(f"note: --data {said}") == 1
