"""Whether a run may begin, or go on, in its folder: what needs no images is told before they are read, which can take minutes."""

from pathlib import Path
from typing import Any

from utils.checkpoints import is_finished, read_metadata, resolve_weights, step_folders
from utils.config import ADDED_LATER, differences, is_vacant, read_config
from utils.data import NAMES
from utils.evaluation import find_classifier
from utils.json_lines import read_lines
from utils.latents import is_latents

LEARNED = ("images", "classes", "fingerprint")              # what config.json says besides the flags: of the images
OTHER_NAME = "choose another --name, or move the folder away"


def check_files(config: Any, checkpoints: Path) -> None:
    """Whether the files that flags name are there, and of the right kind.

    Args:
        config: a `utils.config.RunConfig`.
        checkpoints: of the run; once it has any, what it started from may be gone.

    Raises:
        FileNotFoundError, CheckpointError: one is not.
    """
    for field in ("start_from", "teacher"):
        if (path := getattr(config, field, None)) and not step_folders(checkpoints):
            read_metadata(resolve_weights(path))
    if config.eval_every and not is_latents(Path(config.data)):
        find_classifier(config.classifier, config.data, config.image_size)


def check_noise(folder: Path, config: dict[str, Any]) -> None:
    """Raise ValueError if a run's images had the nearest of several noises, by a former flag. config: of it or its checkpoint."""
    if (candidates := config.get("noise_candidates", 1)) > 1:
        raise ValueError(f"{folder} began with the nearest of {candidates} noises for each image, which no flag makes any more; "
                         f"{OTHER_NAME}")


def read_began(folder: Path, description: dict[str, Any]) -> dict[str, Any]:
    """What config.json says of the run that began in a folder; nothing if none did.

    Args:
        description: of the run that is to go on: stage and flags.

    Raises:
        ValueError: the folder is a finished, another or a broken run's, or holds something else.
    """
    file = folder / "config.json"
    if is_vacant(folder):
        return {}
    if not file.exists():
        left = {path.name for path in folder.iterdir() if not is_vacant(path)} if folder.is_dir() else {folder.name}
        if left <= {".lock", "log.txt", f".{file.name}.writing"}:      # of a start that was cut off before it had written anything
            return {}
        raise ValueError(f"{folder} exists and is no run folder; {OTHER_NAME}")
    began = read_config(file)
    before = {key: value for key, value in ADDED_LATER.items() if key in description}
    before |= {key: value for key, value in began.items() if key not in LEARNED}
    check_noise(folder, before)
    before.pop("noise_candidates", None)
    if not {before.get("data"), description["data"]} & set(NAMES):      # of two paths `check_images` knows whether the images are the same
        before["data"] = description["data"]
    if changed := differences(before, description):
        raise ValueError(f"{folder} is another run ({'; '.join(changed)}); {OTHER_NAME}")
    if is_finished(folder / "checkpoints", description["steps"]):
        raise ValueError(f"{folder} is finished at step {description['steps']}; {OTHER_NAME}")
    return began


def check_images(folder: Path, began: dict[str, Any], description: dict[str, Any]) -> None:
    """Whether a run goes on with the images and classes that it began with, wherever they lie by now.

    Args:
        began: what `read_began` found. description: stage, flags and `LEARNED`.

    Raises:
        ValueError: they are others.
    """
    moved = began.get("fingerprint") == description["fingerprint"]
    now = {key: description[key] for key in (LEARNED if moved else ("data", *LEARNED))}
    changed = differences({key: began.get(key, value) for key, value in now.items()}, now)
    if [text.split(":")[0] for text in changed] == ["fingerprint"]:
        file = folder / "config.json"
        raise ValueError(f"{folder} began with other images than are in --data {description['data']} ({changed[0]}); {OTHER_NAME}. "
                         f"If they are the same, but for how they were read or encoded, delete \"fingerprint\" from {file}")
    if changed:
        raise ValueError(f"{folder} is another run ({'; '.join(changed)}); {OTHER_NAME}")


def check_judge(folder: Path, judge: str | None) -> None:
    """Raise ValueError if a run's evaluations so far are by another judge. judge: its name; None if there are to be no more."""
    evaluations = folder / "evaluations.jsonl"
    others = {row["judge"] for row in read_lines(evaluations) if "judge" in row} - {judge}
    if judge and others:
        raise ValueError(f"--eval-every: the judge of {evaluations} is {others.pop()}, this command's is {judge}; name the former "
                         "with --classifier, or leave --eval-every out, or move the file and best.safetensors away")
