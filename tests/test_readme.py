"""The commands of the README and of docs/: every flag is one that its script has, and a stranger's folder trains with them."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import ROOT, make_images

from benchmarks.ablations import patches
from utils.config import parse_config

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Module and arguments of each Python program in the fenced blocks and in the `inline` code of a page."""
    parts = re.split(r"^```.*$", text, flags=re.MULTILINE)      # prose and fenced blocks by turns
    lines = [line for block in parts[1::2] for line in block.replace("\\\n", " ").splitlines()]
    lines += [code.replace("\n", " ") for prose in parts[::2] for code in re.findall(r"`([^`]+)`", prose)]
    found = []
    for line in lines:
        for part in line.split("  #")[0].split("&&"):
            match = re.search(r"(?:python|torchrun.*?|uv run(?: python)?) (?:-m (?P<module>[\w.]+)|(?P<script>\w+)\.py)(?P<flags>.*)", part)
            if match:
                found.append((match["module"] or match["script"], shlex.split(match["flags"])))
    return found


ALL = [(page.relative_to(ROOT).as_posix(), name, flags) for page in PAGES for name, flags in commands(page.read_text())]


@pytest.mark.parametrize(("page", "name", "flags"), ALL, ids=[f"{name} {' '.join(flags)}" for _, name, flags in ALL])
def test_every_flag_exists(page, name, flags, monkeypatch, tmp_path):
    if any(flag in ("...", "NAME", "CHECKPOINTS") or flag.isupper() for flag in flags):
        pytest.skip("stands for others")
    if name == "benchmarks.ablations.patches":              # a patch, the script, its flags
        assert flags[0] in patches.PATCHES
        name, flags = flags[1].removesuffix(".py").replace("/", "."), flags[2:]
    module = importlib.import_module(name)
    if not hasattr(module, "Config"):                       # demo.prepare and the like, which have no flags
        assert not flags
        return
    if name == "benchmarks.scaling":                        # its file must be there
        flags = [str(tmp_path) if flag.endswith("rows.json") else flag for flag in flags]
        monkeypatch.setattr(Path, "is_file", lambda self: True)
    parse_config(module.Config, flags, None)


def test_there_are_commands():
    names = {name for _, name, _ in ALL}
    assert {"train_teacher", "train_student", "sample", "evaluate", "release", "export", "benchmarks.throughput"} <= names and len(ALL) > 40


def headings(page: Path) -> set[str]:
    """Anchors as GitHub makes them."""
    lines = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page):
    """Within the repository; in a clone, what git ignores is not there."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http:", "https:")):
            continue
        file, _, anchor = target.partition("#")
        aim = page.parent / file if file else page
        assert aim.exists(), f"{target} is not there"
        assert not anchor or anchor in headings(aim), f"{target}: no such heading"


def examples(script: Path) -> list[tuple[str, list[str]]]:
    """The commands in a script's docstring, one a line, with an explanation after some spaces."""
    lines = (ast.get_docstring(ast.parse(script.read_text())) or "").splitlines()
    return [found for line in lines if line.startswith("    ") for found in commands(f"`{re.split(r'  +', line.strip())[0]}`")]


@pytest.mark.parametrize(("name", "flags"), [
    found for script in (*ROOT.glob("*.py"), *(ROOT / "benchmarks").rglob("*.py")) for found in examples(script)])
def test_every_flag_of_a_docstring_exists(name, flags):
    module = importlib.import_module(name)
    if hasattr(module, "Config") and "rows.json" not in " ".join(flags):
        parse_config(module.Config, flags, None)


def test_a_stranger_s_folder(tmp_path, monkeypatch):
    """The three commands of "Your own images", on mixed PNG and JPEG, gray, coloured and transparent, at a size that a CPU bears."""
    make_images(tmp_path / "photos", ["cats", "dogs"])
    Image.fromarray(np.full((30, 20, 4), 128, np.uint8), "RGBA").save(tmp_path / "photos" / "cats" / "transparent.png")
    monkeypatch.chdir(tmp_path)
    section = (ROOT / "README.md").read_text().split("### Your own images")[1]
    lines = commands(section.split("Large images train")[0])
    assert [name for name, _ in lines][:3] == ["train_teacher", "train_student", "sample"]
    small = ["--image-size", "16", "--steps", "2", "--global-batch-size", "4", "--device", "cpu", "--comet", "off"]
    more = {"train_teacher": [*small, "--model", "DiT-Nano/8", "--sample-steps", "1"], "train_student": small,
            "sample": ["--num-images", "4", "--device", "cpu"]}
    for name, flags in lines[:3]:
        importlib.import_module(name).main([*flags, *more[name]])
    expected = {f"{n}step{ending}" for n in (1, 2, 4) for ending in (".png", "", ".npz", ".gif")}
    assert {path.name for path in (tmp_path / "samples").iterdir()} == expected
    assert len(list((tmp_path / "samples" / "1step").glob("*.png"))) == 4
