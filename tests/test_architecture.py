"""The layout's own rules."""

import ast
import io
import re
import subprocess
import sys
import tokenize
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ["train_teacher_mnist.py", "train_teacher.py", "train_student_mnist.py", "train_student.py"]
SOURCES = sorted([*ROOT.glob("*.py"), *ROOT.glob("models/*.py"), *ROOT.glob("utils/*.py"), *ROOT.glob("benchmarks/**/*.py")])
OURS = {"models", "utils", "benchmarks", *(path.stem for path in ROOT.glob("*.py"))}


def imports(path: Path) -> set[str]:
    """Project modules that a file imports, such as "utils.flow"."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if node.module in ("utils", "models") else {node.module}
    return {name for name in found if name and name.split(".")[0] in OURS}


@pytest.mark.parametrize(("file", "allowed"), [
    ("models/embeddings.py", set()),
    ("models/transformer.py", {"models.embeddings", "models.hub", "models.fused"}),
    ("models/dit.py", {"models.embeddings", "models.transformer"}),
    ("models/fused_mlp.py", {"models.dit"}),
    ("models/fused_attention.py", {"models.dit"}),
    ("models/sit.py", {"models.dit", "models.embeddings", "models.transformer"}),
    ("models/foreign.py", {"models.sit"}),
    ("utils/flow.py", set()),
    ("utils/times.py", set()),
    ("utils/guidance.py", {"utils.flow"}),
    ("utils/losses.py", {"utils.flow", "utils.guidance"}),
    ("utils/sampling.py", {"utils.flow", "utils.guidance", "utils.losses"}),
])
def test_the_method_imports_down_only(file, allowed):
    assert imports(ROOT / file) <= allowed


def test_models_and_utils_do_not_know_each_other_or_the_scripts():
    for path in ROOT.glob("utils/*.py"):
        assert {name for name in imports(path) if not name.startswith("utils")} == set(), path
    for path in ROOT.glob("models/*.py"):
        assert {name for name in imports(path) if not name.startswith("models")} == set(), path


def parts(script: str) -> tuple[str, list[tuple[str, str]], str]:
    """Source of `main`; name and type and comment of each field of Config; source of the rest of Config."""
    text = (ROOT / script).read_text()
    config, main = (node for node in ast.parse(text).body if getattr(node, "name", None) in ("Config", "main"))
    lines = text.splitlines()
    fields = [(ast.unparse(node.target), ast.unparse(node.annotation), lines[node.end_lineno - 1].partition("#")[2].strip())
              for node in config.body if isinstance(node, ast.AnnAssign)]
    rest = "\n".join(ast.get_source_segment(text, node) for node in config.body if isinstance(node, ast.FunctionDef))
    return ast.get_source_segment(text, main), fields, rest


@pytest.mark.parametrize("stage", ["teacher", "student"])
def test_twins(stage):
    """The two scripts of a stage own the same loop; they differ in defaults and docstring only."""
    assert parts(f"train_{stage}_mnist.py") == parts(f"train_{stage}.py")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_defines_its_config_and_main(script):
    body = ast.parse((ROOT / script).read_text()).body
    assert [node.name for node in body if isinstance(node, (ast.ClassDef, ast.FunctionDef))] == ["Config", "main"]
    assert all(comment for _, _, comment in parts(script)[1])


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_loop_waits_for_the_gpu_in_one_place(script):
    """No value of a tensor is asked for inside the loop, but by meter.read()."""
    main = parts(script)[0]
    loop = main[main.index("for step in range") :]
    assert loop.count("meter.read()") == 1
    assert re.findall(r"\.(item|cpu|tolist|numpy|synchronize)\(|float\(", loop) == []


def code_only(path: Path) -> str:
    """A file's source without comments and strings."""
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
    return " ".join(token.string for token in tokens if token.type not in (tokenize.COMMENT, tokenize.STRING))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_house_rules(path):
    code, name = code_only(path), path.relative_to(ROOT).as_posix()
    assert len(path.read_text().splitlines()) <= 330
    if name != "utils/flow.py":
        assert not re.search(r"1 - t \) \* |\* \( 1 - t \)|lerp \( x , eps|eps - x", code), "the convention lives in utils/flow.py"
    if name.startswith(("models/", "utils/")):
        assert not re.search(r"\bprint \(", code)
    assert not re.search(r"except :", code)
    assert len(re.findall(r"except Exception", code)) == (1 if name == "utils/checkpoints.py" else 0)


def test_environment_names_what_pyproject_names():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = re.findall(r"^ *- ([a-z][\w-]*[>=<.\d]*)$", (ROOT / "environment.yml").read_text(), re.M)
    assert [line for line in listed if line != "pip"] == [f"python{project['requires-python']}", *project["dependencies"]]


def test_sampling_starts_without_what_only_training_needs():
    """Each of these takes about as long to import as PyTorch itself."""
    code = ("import sys, sample, pipeline, evaluate; "
            "print(*{'torchvision', 'timm', 'torch._dynamo', 'torch.distributed.fsdp'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
