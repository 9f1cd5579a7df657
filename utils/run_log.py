"""The run folder: what was asked for, what ran, what came out.

    results/<name>/
        config.json  environment.json  metrics.jsonl  evaluations.jsonl  log.txt  curves.png  samples/  checkpoints/  comet/
"""

import json
import math
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn
from tqdm import tqdm

from utils import distributed
from utils.checkpoints import CheckpointError, read_latest, read_metadata, save_checkpoint, step_folders, write_weights
from utils.comet import start_comet
from utils.config import check_writable, short_name, to_dict, write_json, write_text, written
from utils.data import Images
from utils.distributed import Ranks, device_name
from utils.folders import few
from utils.interrupt import StopRequest
from utils.json_lines import add_line, read_lines
from utils.latents import Latents
from utils.locks import if_left_behind, lock_if_possible
from utils.pictures import save_curves, save_gif, save_grid
from utils.run_folder import check_files, check_images, check_judge, check_noise, read_began
from utils.sharding import whole_weights

SECONDS_BETWEEN_CURVES = 30


def environment(ranks: Ranks) -> dict[str, Any]:
    """What a run depends on besides its config: commit, versions, device, command."""
    def git(*command: str) -> str | None:
        here = Path(__file__).parent
        if not (here.parent / ".git").exists() or not shutil.which("git"):
            return None
        done = subprocess.run(["git", *command], cwd=here, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    return {
        "git_commit": git("rev-parse", "HEAD"), "git_changed_files": git("status", "--porcelain", "--untracked-files=no"),
        "python": platform.python_version(), "torch": torch.__version__, "torchvision": version("torchvision"),
        "device": device_name(ranks.device), "processes": ranks.world_size, "cpu_threads": torch.get_num_threads(),
        "command": sys.argv, "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


class Run:
    """One run's folder and everything written to it; on ranks above 0 nothing is written and nothing printed.

    Args:
        config: the script's Config, a `utils.config.RunConfig`.
        stage: "teacher" or "student".
        ranks: this process among all.

    Raises:
        ValueError: the folder is a finished, another or a broken run's, or holds something else, or may not be written to.
        FileNotFoundError, CheckpointError: see `utils.run_folder.check_files`.
    """

    def __init__(self, config: Any, stage: str, ranks: Ranks):
        self.config, self.ranks, self.judge = config, ranks, None
        self.name = config.name or f"{stage}-{short_name(config.data)}"
        self.folder = Path(config.results_dir) / self.name
        self.checkpoints = self.folder / "checkpoints"
        self.description = {"stage": stage, **to_dict(config)}
        self.began = read_began(self.folder, self.description)
        check_files(config, self.checkpoints)
        if ranks.is_main:
            check_writable(self.folder)
        self.bar = self.comet = None
        self.lock = FileLock(self.folder / ".lock")         # held from `start` to the end of `with run`, by rank 0
        self.seconds_before, self.opened, self.logged = 0.0, time.monotonic(), (0, time.monotonic())
        self.drawn = self.opened

    def learn_from(self, images: Images | Latents, judge: str | None = None) -> None:
        """Go on with the images and classes that the run began with.

        Args:
            judge: name of the one that `evaluation` gets its numbers from, if there are to be any.

        Raises:
            ValueError: it began with others, or its evaluations are by another judge.
        """
        self.description |= {"images": len(images), "classes": images.classes, "fingerprint": images.fingerprint()}
        check_images(self.folder, self.began, self.description)
        check_judge(self.folder, judge)
        self.judge, self.left_out = judge, images.left_out

    def latest(self, names: Sequence[str], teacher_id: str = "0") -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
        """The newest good checkpoint, see `utils.checkpoints.read_latest`; every rank reads it.

        Args:
            names: of its networks. teacher_id: `utils.checkpoints.weights_id` of a student's teacher.

        Raises:
            CheckpointError: none is good.
            ValueError: the ranks would not go on from the same place, or it learnt from another teacher, or from the nearest noise.
        """
        found = read_latest(self.checkpoints, names, self.note)
        if found:                                           # in the newest folder: bad ones are set aside
            metadata = read_metadata(step_folders(self.checkpoints)[-1] / "ema.safetensors")
            check_noise(self.folder, metadata["config"])
            its_own = metadata.get("teacher", teacher_id)
            if its_own != teacher_id:
                raise ValueError(f"{self.folder} learns from teacher {its_own}, and its own copy of it is gone; found was {teacher_id}. "
                                 f"Put the former back as {self.folder / 'teacher.safetensors'}")
        self.ranks.check_same("the number of updates done", found[1]["step"] if found else 0)
        self.ranks.check_same("the hash of the teacher's weights", int(teacher_id, 16), "x")
        self.ranks.check_same("the number of images", self.description["images"])
        return found

    def start(self, step: int, seconds: float) -> None:
        """Open the folder; training goes on after `step` updates that took `seconds`.

        Metrics of later steps, from a start that was cut off before it saved them, are dropped: they come again.

        Raises:
            ValueError: another process is training this run.
        """
        self.ranks.wait()                                   # every rank has checked before the main one writes
        if self.ranks.is_main:
            (self.folder / "samples").mkdir(parents=True, exist_ok=True)
            try:
                locked = lock_if_possible(self.lock, timeout=0)
            except Timeout:
                raise ValueError(f"{self.folder}: another process is training this run; wait for it, or choose another --name"
                                 + if_left_behind(self.lock)) from None
            if not locked:
                self.note("note: this file system has no locks; see to it that one process at a time trains this run")
            write_json(self.folder / "config.json", self.description)
            starts_file, ran_on = self.folder / "environment.json", environment(self.ranks)
            starts = json.loads(starts_file.read_text()) if starts_file.exists() else []
            write_json(starts_file, [*starts, {**ran_on, "after_step": step}])
            for file in filter(Path.exists, (self.folder / "metrics.jsonl", self.folder / "evaluations.jsonl")):
                write_text(file, "".join(json.dumps(row) + "\n" for row in read_lines(file) if row["step"] <= step))
            self.comet = start_comet(self.config.comet, self.folder, self.name, self.note)
            if self.comet:
                self.comet.log_parameters(self.description)
            count, classes = self.description["images"], self.description["classes"]
            known = f"of {len(classes)} class{'es' * (len(classes) != 1)} ({few(classes)})" if classes else "without classes"
            self.note(f"run folder {self.folder}, on {ran_on['device']}, {count} image{'s' * (count != 1)} {known}"
                      + f", going on after step {step}" * bool(step))
            if self.left_out:
                self.note(f"note: --data {self.config.data}: files that Pillow does not read as images were left out: {self.left_out}")
            self.bar = tqdm(total=self.config.steps, initial=step, unit="step", disable=None, dynamic_ncols=True)
        self.seconds_before, self.opened, self.logged = seconds, time.monotonic(), (step, time.monotonic())

    def keep_teacher(self, path: Path, metadata: dict[str, Any]) -> None:
        """Copy a student's teacher into the folder: the run goes on whatever becomes of the teacher's own folder."""
        copy = self.folder / "teacher.safetensors"
        if self.ranks.is_main and path != copy:             # one of a start that saved nothing may be there
            with written(copy) as file:
                shutil.copyfile(path, file)
            done, wanted = metadata.get("step"), metadata["config"].get("steps")
            unfinished = done is not None and wanted is not None and done < wanted
            self.note(f"teacher {path}" + (f"; note: it stopped after {done} of {wanted} updates" if unfinished else ""))

    @property
    def seconds(self) -> float:
        """Seconds of training so far, over all restarts."""
        return self.seconds_before + time.monotonic() - self.opened

    def out_of_time(self) -> bool:
        """Whether this start of the run has lasted --max-minutes."""
        return self.config.max_minutes is not None and time.monotonic() - self.opened > 60 * self.config.max_minutes

    def note(self, text: str) -> None:
        """A line for people: to the terminal and to log.txt. A class's name, which is its folder's, need not be UTF-8."""
        text = text.encode("utf-8", "backslashreplace").decode()
        if self.ranks.is_main:
            with suppress(OSError):                         # of a terminal that was closed; what is left is to save
                tqdm.write(text)
            if self.folder.exists():
                self.write_log(text)

    def write_log(self, text: str) -> None:
        with open(self.folder / "log.txt", "a") as file:
            file.write(f"{time.strftime('%H:%M:%S')} {text}\n")

    def scalars(self, step: int, **values: float) -> None:
        """One line of metrics, images/s since the last one included."""
        if not self.ranks.is_main:
            return
        now = time.monotonic()
        images = (step - self.logged[0]) * self.config.global_batch_size
        row = {"step": step, **values, "images_per_second": round(images / (now - self.logged[1]), 1), "seconds": round(self.seconds, 2)}
        if self.ranks.device.type == "cuda":
            row["memory_gib"] = round(torch.cuda.max_memory_allocated(self.ranks.device) / 2**30, 2)      # the peak so far
        self.logged = (step, now)
        add_line(self.folder / "metrics.jsonl", row)
        self.write_log("  ".join(f"{key} {value:.6g}" for key, value in row.items()))
        if self.comet:
            self.comet.log_metrics({key: value for key, value in row.items() if key != "step"}, step=step)
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {values['loss']:.4f}, {row['images_per_second']:.0f} images/s")

    def asked_to_stop(self, step: int, stop: StopRequest) -> bool:
        """Whether to save and leave now: a signal came or --max-minutes is over. Several processes agree at log lines."""
        wish = bool(stop) or self.out_of_time()
        if self.ranks.world_size == 1:
            return wish
        return step % self.config.log_every == 0 and self.ranks.agree(wish)

    def save(self, step: int, networks: dict[str, nn.Module], training: dict[str, Any], metadata: dict[str, Any]) -> None:
        """Write the checkpoint of `step`, and curves.png if it is old; see `utils.checkpoints.save_checkpoint`."""
        weights = {name: whole_weights(network) for name, network in networks.items()}
        if self.ranks.is_main:
            path = save_checkpoint(self.checkpoints, step, weights, training, metadata, self.config.keep)
            self.write_log(f"saved {path}")
            if time.monotonic() - self.drawn > SECONDS_BETWEEN_CURVES:
                self.draw_curves()

    def draw_curves(self) -> None:
        """Draw curves.png anew from the metrics so far; takes about a second."""
        save_curves(self.folder / "curves.png", self.folder)
        self.drawn = time.monotonic()

    def evaluation(self, step: int, numbers: dict[str, float], ema: nn.Module, metadata: dict[str, Any]) -> None:
        """One line of evaluations.jsonl; best.safetensors is the EMA of the step at which the first number was least."""
        weights = whole_weights(ema)
        if not self.ranks.is_main:
            return
        add_line(self.folder / "evaluations.jsonl", {"step": step, "judge": self.judge, **numbers})
        self.note(f"step {step}: " + ", ".join(f"{key} {value:.4g}" for key, value in numbers.items()))
        if self.comet:
            self.comet.log_metrics(numbers, step=step)
        name, value = next(iter(numbers.items()))
        best = self.folder / "best.safetensors"
        try:
            least = read_metadata(best)["best"][name] if best.exists() else math.inf
        except CheckpointError as error:
            least, aside = math.inf, best.replace(best.with_name(f"{best.name}.bad"))
            self.note(f"{error}. Set aside as {aside}")
        if value < least:
            write_weights(best, weights, {**metadata, "step": step, "weights": "ema", "best": numbers})

    def advance(self) -> None:
        """One update is done: move the bar."""
        if self.bar is not None:
            self.bar.update()

    def images(self, step: int, name: str, x: Tensor) -> None:
        """Save samples/<name>_step<N>.png from images (B, C, H, W) near [-1, 1]."""
        self.picture(step, self.folder / "samples" / f"{name}_step{step}.png", save_grid, x)

    def gif(self, step: int, name: str, trajectory: Tensor) -> None:
        """Save samples/<name>_step<N>.gif from states (num_steps + 1, B, C, H, W)."""
        self.picture(step, self.folder / "samples" / f"{name}_step{step}.gif", save_gif, trajectory)

    def picture(self, step: int, path: Path, save: Any, x: Tensor) -> None:
        if not self.ranks.is_main:
            return
        save(path, x)
        if self.comet:
            self.comet.log_image(str(path), name=path.name, step=step)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what is done inside, sampling and saving, out of the next images/s."""
        start = time.monotonic()
        yield
        self.logged = (self.logged[0], self.logged[1] + time.monotonic() - start)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self.lock.release()
        if self.bar is not None:
            self.bar.close()
        if error is None and self.ranks.is_main:
            self.draw_curves()
        if self.comet:
            self.comet.end()
            for archive in sorted((self.folder / "comet").glob("*.zip")):
                self.note(f"offline comet archive, to upload later: comet upload {archive}")

    def leave(self, step: int, stop: StopRequest) -> None:
        """Say how the run ended.

        Raises:
            SystemExit: it was interrupted; with the shell's code for the signal.
        """
        distributed.finish()
        if step == self.config.steps:
            self.note(f"finished {step} updates in {self.seconds / 60:.1f} minutes: {self.folder}")
            return
        self.note(f"saved after {step} of {self.config.steps} updates; the same command goes on")
        if stop:
            sys.exit(128 + stop.signal_number)
