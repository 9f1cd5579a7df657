import ast
import dataclasses
import json
import re
from functools import partial
from pathlib import Path

import pytest

import evaluate
import sample
import train_classifier
import train_student
import train_student_mnist
import train_teacher
import train_teacher_mnist
from benchmarks.ablations.run import Config as AblationsConfig
from utils import recipes
from utils.config import FREE_FIELDS, differences, parse_config, to_dict

ROOT = Path(__file__).parent.parent
SCRIPTS = {
    "train_teacher_mnist": (train_teacher_mnist.Config, recipes.TEACHER),
    "train_teacher": (train_teacher.Config, recipes.TEACHER),
    "train_student_mnist": (train_student_mnist.Config, recipes.STUDENT),
    "train_student": (train_student.Config, recipes.STUDENT),
}
TEACHER, STUDENT = train_teacher_mnist.Config, train_student_mnist.Config
EVALUATION, CLASSIFIER = partial(evaluate.Config, "x"), train_classifier.Config


def parse(config_class, *argv: str):
    return parse_config(config_class, argv, "", dict(SCRIPTS.values())[config_class])


def refusal(config_class, argv, capsys, monkeypatch) -> str:
    """What the user reads when the program ends with a failure, on one line."""
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as left:
        parse(config_class, *argv)
    assert left.value.code not in (0, None)
    printed = "".join(capsys.readouterr()) + (left.value.code if isinstance(left.value.code, str) else "")
    return " ".join(re.sub("[─│╭╮╰╯]", " ", printed).split())


# Recipes.

@pytest.mark.parametrize("argv", [["--data", "digits"], ["--data=digits"], ["--seed", "1", "--data", "digits", "--comet=off"]])
@pytest.mark.parametrize("script", SCRIPTS)
def test_data_chooses_the_recipe(script, argv):
    config_class, table = SCRIPTS[script]
    found = to_dict(parse(config_class, *argv))
    asked = {"data": "digits"} | ({"seed": 1, "comet": "off"} if "--seed" in argv else {})
    assert found == to_dict(config_class(**{**table["digits"], **asked}))


@pytest.mark.parametrize("argv", [["--data", "digits", "--steps", "7"], ["--steps=7", "--data=digits"]])
def test_flags_override_the_recipe(argv):
    config = parse(TEACHER, *argv)
    assert (config.steps, config.model) == (7, recipes.TEACHER["digits"]["model"])


def test_an_existing_path_has_its_own_recipe(tmp_path):
    assert parse(TEACHER, "--data", str(tmp_path)) == TEACHER(data=str(tmp_path), **recipes.TEACHER["path"])


def test_a_folder_named_like_a_data_set_does_not_matter(tmp_path, monkeypatch):
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    assert parse(TEACHER, "--data", "digits").steps == recipes.TEACHER["digits"]["steps"]


@pytest.mark.parametrize(("script", "data"), [("train_teacher_mnist", "mnist"), ("train_student_mnist", "mnist"),
                                              ("train_teacher", "cifar10"), ("train_student", "cifar10")])
def test_defaults_are_the_recipe_of_the_scripts_own_data_set(script, data):
    config_class, table = SCRIPTS[script]
    config = config_class()
    assert config.data == data
    assert {key: getattr(config, key) for key in table[data]} == table[data]
    assert parse(config_class) == config


@pytest.mark.parametrize("data", recipes.TEACHER)
@pytest.mark.parametrize("stage", ["teacher", "student"])
def test_a_data_set_gets_one_recipe_from_either_script_of_a_stage(stage, data, tmp_path):
    asked = str(tmp_path) if data == "path" else data
    first, second = (to_dict(parse(SCRIPTS[f"train_{stage}{ending}"][0], "--data", asked)) for ending in ("", "_mnist"))
    assert first == second


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_recipe_is_valid(script):
    config_class, table = SCRIPTS[script]
    for data, recipe in table.items():
        assert set(recipe) <= {field.name for field in dataclasses.fields(config_class)}
        config_class(data=data, **recipe)


# What a user can get wrong.

@pytest.mark.parametrize(
    ("flag", "nearest"),
    [("--label-droput", "--label-dropout"), ("--step", "--steps"), ("--batch-size", "--global-batch-size")],
)
def test_unknown_flag_offers_the_nearest(flag, nearest, capsys, monkeypatch):
    text = refusal(TEACHER, [flag, "1"], capsys, monkeypatch)
    assert re.search(rf"{flag}\b.*{nearest} ", text)


BOTH = [
    (["--steps", "0"], "--steps 0: must be at least 1"),
    (["--steps", "many"], "'many'"),
    (["--global-batch-size", "-8"], "--global-batch-size -8: must be at least 1"),
    (["--keep", "0"], "--keep 0: must be at least 1"),
    (["--max-minutes", "0"], "--max-minutes 0.0: must be above 0, or None"),
    (["--image-size", "0"], "--image-size 0: must be at least 1, or None"),
    (["--classifier", "c.safetensors"], "--classifier c.safetensors: must be left out without --eval-every"),
    (["--name", "a/b"], "--name a/b: must be a folder's name, without slashes"),
    (["--name", ".."], "--name ..: must be a folder's name, without slashes"),
    (["--data", ""], "--data '': must not be empty"),
    (["--data-root", ""], "--data-root '': must not be empty"),
    (["--start-from", ""], "--start-from '': must not be empty"),
    (["--optimizer", "sgd"], "'sgd'", "'muon', 'adamw'"),
    (["--lr", "0"], "--lr 0.0: must be above 0"),
    (["--lr", "nan"], "--lr nan: must be above 0"),
    (["--muon-lr", "-1"], "--muon-lr -1.0: must be above 0"),
    (["--max-grad-norm", "0"], "--max-grad-norm 0.0: must be above 0"),
    (["--weight-decay", "-1"], "--weight-decay -1.0: must be at least 0"),
    (["--ema-decay", "1"], "--ema-decay 1.0: must be in [0, 1)"),
    (["--decay-share", "-0.1"], "--decay-share -0.1: must be in [0, 1)"),
    (["--warmup-steps", "-1"], "--warmup-steps -1: must be at least 0"),
    (["--guidance-scale", "nan"], "nan"),
    (["--t-law", "nonsense"], "nonsense", "known are uniform"),
    (["--t-law", "logit-normal(0)"], "logit-normal(0)", "2 numbers"),
]
TEACHERS = [
    (["--label-dropout", "1.5"], "--label-dropout 1.5: must be in [0, 1)"),
    (["--num-noises", "0"], "--num-noises 0: must be at least 1"),
    (["--augment", "1"], "--augment 1.0: must be in [0, 1)"),
    (["--sample-steps", "0"], "--sample-steps 0: must be at least 1"),
    (["--model", "DiT-M/2"], "DiT-M/2", "DiT-Ti/2"),
    (["--image-size", "12", "--model", "DiT-Nano/8"], "--image-size 12: must be a multiple of 8, the patch size of --model DiT-Nano/8"),
]
STUDENTS = [
    (["--boundary-share", "1"], "--boundary-share 1.0: must be such that of 512 samples at least one is boundary and one is not"),
    (["--boundary-share", "0.0001"], "--boundary-share 0.0001: must be such that of 512 samples"),
    (["--target-decay", "1"], "--target-decay 1.0: must be in [0, 1)"),
    (["--edge-weight", "-1"], "--edge-weight -1.0: must be at least 0"),
    (["--adaptive-power", "-1"], "--adaptive-power -1.0: must be at least 0"),
    (["--pinned-share", "1.5"], "--pinned-share 1.5: must be in [0, 1]"),
    (["--pinned-share", "-1"], "--pinned-share -1.0: must be in [0, 1]"),
    (["--pinned-steps", "0"], "0: must be one or more counts, each at least 1"),
    (["--one-step-from", "1"], "--one-step-from 1: must be 0, or at least 2 where --pinned-share and --pinned-steps pin one step"),
    (["--one-step-from", "4", "--pinned-share", "0"], "--one-step-from 4: must be 0, or at least 2 where --pinned-share"),
    (["--one-step-from", "4", "--pinned-steps", "2"], "--one-step-from 4: must be 0, or at least 2 where --pinned-share"),
    (["--one-step-from", "4", "--pinned-share", "1", "--pinned-steps", "1"], "--one-step-from 4: must be 0", "splitting rows, here"),
    (["--target", "start"], "--target start: must be online or ema without --start-from"),
    (["--num-steps", "1", "0"], "1 0: must be one or more counts, each at least 1"),
    (["--guidance-interval", "0.8", "0.2"], "0.8 0.2: must be two times, 0 <= low <= high <= 1"),
    (["--guidance-range", "0.5", "2"], "--guidance-range 0.5 2.0: must be two numbers, 1 <= low < high, or None"),
    (["--guidance-range", "2", "2"], "--guidance-range 2.0 2.0: must be two numbers, 1 <= low < high, or None"),
    (["--guidance-range", "1.3", "1.8"], "must be in --guidance-range 1.3 1.8"),
    (["--first-leg", "both"], "'both'", "'self', 'euler', 'midpoint'"),
    (["--first-leg", "midpoint", "--last-leg", "euler"], "--last-leg euler: must be self where --first-leg is midpoint"),
    (["--r-law", "logit-normal(0, -1)"], "logit-normal(0, -1)", "above 0"),
    (["--lam-law", "constant(2)"], "constant(2)", "(0, 1]"),
]


@pytest.mark.parametrize(
    ("config_class", "argv", "said"),
    [pytest.param(config_class, argv, said, id=f"{stage} {' '.join(argv)}")
     for stage, config_class, cases in (("teacher", TEACHER, BOTH + TEACHERS), ("student", STUDENT, BOTH + STUDENTS))
     for argv, *said in cases],
)
def test_invalid_value_is_refused_with_flag_value_and_what_is_allowed(config_class, argv, said, capsys, monkeypatch):
    text = refusal(config_class, argv, capsys, monkeypatch)
    assert [part for part in (argv[0], *said) if part not in text] == [], text


@pytest.mark.parametrize(("config_class", "argv", "said"), [
    (sample.Config, ["a.safetensors", "--classes", "3", ""], "--classes ''"), (sample.Config, ["a.safetensors", "--out", ""], "--out ''"),
    (sample.Config, [""], "--checkpoint ''"), (train_classifier.Config, ["--data", "digits", "--out", ""], "--out ''")])
def test_no_program_takes_an_empty_text(config_class, argv, said):
    with pytest.raises(SystemExit, match=f"error: {said}: must not be empty"):
        parse_config(config_class, argv, None)


def test_a_text_that_is_empty_by_default_may_be():
    assert parse_config(AblationsConfig, ["--flags", ""], None) == AblationsConfig()


def test_config_made_in_code_is_checked_too():
    with pytest.raises(ValueError, match="--steps 0: must be at least 1"):
        TEACHER(steps=0)


# The object itself.

@pytest.mark.parametrize("script", SCRIPTS)
def test_frozen(script):
    with pytest.raises(dataclasses.FrozenInstanceError):
        SCRIPTS[script][0]().steps = 5


@pytest.mark.parametrize("data", ["mnist", "digits"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_json_round_trip(script, data):
    """What config.json holds makes the same Config again, and counts as the same run."""
    config = parse(SCRIPTS[script][0], "--data", data)
    kept = json.loads(json.dumps(to_dict(config)))
    assert kept == to_dict(config) and kept.keys() == {field.name for field in dataclasses.fields(config)}
    again = {key: tuple(value) if isinstance(value, list) else value for key, value in kept.items()}
    assert type(config)(**again) == config
    assert differences(kept, to_dict(config)) == []


def test_differences_pass_over_free_fields():
    changed = dict(max_minutes=1.0, device="cpu", compile=False, cuda_graph=False, shard=True, results_dir="r", name="n", log_every=1,
                   sample_every=1, save_every=1, keep=1, num_workers=1, comet="off", data_root="d", eval_every=5, classifier="c",
                   autoencoder="a")
    assert set(changed) == FREE_FIELDS
    assert differences(to_dict(STUDENT()), to_dict(STUDENT(**changed))) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(lr=0.25), "lr: 0.25, was 0.125"),
        (dict(num_steps=(1, 3)), "num_steps: [1, 3], was [1, 2, 4]"),
        (dict(teacher="t.safetensors"), "teacher: t.safetensors, was None"),
        (dict(data="cifar10"), "data: cifar10, was mnist"),
    ],
)
def test_differences_name_the_field_and_both_values(change, said):
    assert differences(to_dict(STUDENT(lr=0.125)), to_dict(STUDENT(**{"lr": 0.125, **change}))) == [said]


@pytest.mark.parametrize("field", ["data", "teacher", "start_from"])
@pytest.mark.parametrize("ways", ["./mnist", "photos ./photos", "path ./path"])        # mnist is a named data set
def test_differences_pass_over_how_a_path_is_written(field, ways):
    *_, name = ways.split("./")
    ways = [*ways.split(), f"{name}/", f"{name}/../{name}", str(Path.cwd() / name)]
    configs = [to_dict(STUDENT(**{field: way})) for way in ways]
    assert [differences(configs[0], config) for config in configs] == [[]] * len(ways)


def test_differences_know_a_named_set_from_a_folder_of_its_name():
    assert differences(to_dict(STUDENT(data="mnist")), to_dict(STUDENT(data="./mnist"))) == ["data: ./mnist, was mnist"]


def test_differences_see_a_field_that_one_of_them_lacks():
    config = to_dict(STUDENT())
    without = {key: value for key, value in config.items() if key != "first_leg"}
    assert differences(without, config) == ["first_leg: midpoint, was None"]
    assert differences(config, without) == ["first_leg: None, was midpoint"]


@pytest.mark.parametrize("file", [*(f"{script}.py" for script in SCRIPTS), "sample.py", "utils/config.py"])
def test_every_field_has_its_help_text(file):
    source = (ROOT / file).read_text()
    (config_class,) = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    fields = [node for node in config_class.body if isinstance(node, ast.AnnAssign)]
    assert len(fields) > 5
    comments = {node.target.id: source.splitlines()[node.end_lineno - 1][node.end_col_offset :] for node in fields}
    assert [name for name, comment in comments.items() if not re.match(r"\s*# \w", comment)] == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_the_recipe_in_force(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    config_class, table = SCRIPTS[script]
    with pytest.raises(SystemExit) as left:
        parse(config_class, "--data", "digits", "--help")
    assert left.value.code == 0
    assert re.search(rf"--steps INT\W+updates in all \(default: {table['digits']['steps']}\)", capsys.readouterr().out)


@pytest.mark.parametrize(("config_class", "fields", "message"), [
    (EVALUATION, dict(num_workers=0), "--num-workers 0: must be at least 1"),
    (EVALUATION, dict(guidance_scale=(2.0, float("nan"))), "--guidance-scale 2.0 nan: must be a number"),
    (EVALUATION, dict(noise_scale=0), "--noise-scale 0: must be above 0"),
    (partial(sample.Config, "x"), dict(noise_scale=float("inf")), "--noise-scale inf: must be above 0"),
    (EVALUATION, dict(out=__file__), f"--out {__file__}: must be a folder, not a file"),
    (EVALUATION, dict(cache=f"{__file__}/features"), f"--cache {__file__}/features: must be a folder, not a file"),
    (CLASSIFIER, dict(num_workers=0), "--num-workers 0: must be at least 1"),
    (CLASSIFIER, dict(image_size=1), "--image-size 1: must be at least 2, or None"),
    (CLASSIFIER, dict(epochs=float("inf")), "--epochs inf: must be above 0, and finite"),
    (CLASSIFIER, dict(lr=float("inf")), "--lr inf: must be above 0, and finite"),
    (CLASSIFIER, dict(weight_decay=float("nan")), "--weight-decay nan: must be at least 0, and finite"),
    (CLASSIFIER, dict(out=str(ROOT), replace=True), f"--out {ROOT}: must be a file, not a folder"),
])
def test_bad_flags_of_what_measures(config_class, fields, message):
    with pytest.raises(ValueError, match=message):
        config_class(**fields)


def test_flags_of_the_other_feature_space_are_refused():
    for fields, message in ((dict(inception_weights="x"), "without"), (dict(classifier="x", features="inception"), "with")):
        with pytest.raises(ValueError, match=f"must be left out {message} --features inception"):
            evaluate.Config("x", **fields)
