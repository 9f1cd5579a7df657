"""The speed benchmark at toy size: every row runs and is reported as it ran. No times are asserted."""

import json
import sys
from functools import partial

import pytest
import torch

from benchmarks import growth, latent_cost, meanflow, profile_step, scaling, splitting_bias, textbook, throughput
from benchmarks.report import markdown
from models import DiT
from utils.config import parse_config
from utils.flow import step
from utils.losses import splitting_target

TINY = ["--model", "DiT-Nano/8", "--image-size", "16", "--batch-size", "16", "--device", "cpu"]


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    """64 random images for each benchmark, not 2,048."""
    for module in (throughput, profile_step):
        monkeypatch.setattr(module, "write_images", partial(throughput.write_images, count=64))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    throughput.write_images(folder, 16, 64)
    return folder


@pytest.mark.parametrize(("module", "flags"), [
    (textbook, ["--precision", "fp32", "--num-workers", "0"]),
    (meanflow, []),
])
def test_rivals_train(module, flags, images, tmp_path):
    module.main([*TINY, *flags, "--data", str(images), "--steps", "30", "--log-every", "10", "--results-dir", str(tmp_path), "--name", "a"])
    rows = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [10, 20, 30] and all(row["images_per_second"] > 0 for row in rows)
    if module is textbook:                                  # MeanFlow's weighted loss is no measure of progress
        assert rows[-1]["loss"] < rows[0]["loss"]


def test_throughput_of_a_training_script(tmp_path):
    throughput.main([*TINY, "--rows", "teacher", "--steps", "2", "--windows", "3", "--cold", "False", "--out", str(tmp_path)])
    row, = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert row["name"] == "teacher" and len(row["images_per_second"]) == 3 and row["first_update_cold"] is None
    assert (tmp_path / "plot.png").stat().st_size > 1000
    assert "| teacher | DiT-Nano/8 | 16 | 1 |" in (tmp_path / "table.md").read_text()


def test_growth_of_training_scripts(tmp_path, monkeypatch, capsys):
    """Every point of every curve once, and rows that the time leaves out are named."""
    sweeps = {"batch": [("DiT-Nano/8", 16)], "patches": [("DiT-Nano/8", 16), ("DiT-Nano/4", 16)]}
    monkeypatch.setattr(growth, "SWEEPS", sweeps)
    flags = ["--image-size", "16", "--device", "cpu", "--steps", "1", "--windows", "2", "--out", str(tmp_path)]
    growth.main([*flags, "--sweeps", "batch", "--minutes", "1e-9"])
    assert capsys.readouterr().err.count("not measured") == 2 and not (tmp_path / "rows.json").exists()
    growth.main([*flags, "--sweeps", "batch"])
    first = json.loads((tmp_path / "rows.json").read_text())["rows"]
    growth.main([*flags, "--sweeps", "batch", "patches"])   # goes on
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    points = [(row["name"], row["model"], row["batch_size"]) for row in rows]
    assert len(first) == 2 and rows[:2] == first
    assert sorted(points) == [(name, *point) for name in ("student", "teacher")
                              for point in (("DiT-Nano/4", 16), ("DiT-Nano/8", 16))]
    assert all(len(row["images_per_second"]) == 2 for row in rows) and (tmp_path / "plot.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="rows.json cannot be gone on with: steps 1, here 2"):
        growth.main([*flags, "--steps", "2"])


@pytest.mark.parametrize(("name", "flags"), [
    ("textbook-bf16", ["--precision", "bf16", "--num-workers", "8"]),
    ("meanflow", ["--compile", "True"]),
])
def test_command_of_a_rival(name, flags, tmp_path):
    line = throughput.command(name, "DiT-Nano/8", 16, 1, 1, throughput.Config(), tmp_path, "a")
    assert line[1:3] == ["-m", f"benchmarks.{name.split('-')[0]}"] and " ".join(flags) in " ".join(line)
    config_class = {"textbook": textbook, "meanflow": meanflow}[name.split("-")[0]].Config
    parse_config(config_class, line[3:], None)              # it takes these flags


def test_command_of_a_patched_row(tmp_path):
    plain, patched = (throughput.command(name, "DiT-Nano/8", 16, 2, 1, throughput.Config(), tmp_path, "a")
                      for name in ("student", "student+guidance-at-once"))
    i = plain.index("train_student.py")
    assert patched == [*plain[:i], "-m", "benchmarks.ablations.patches", "guidance-at-once", *plain[i:]]


@pytest.mark.parametrize("name", ["tutor", "teacher+nothing", "meanflow+ema-every-8"])
def test_unknown_rows(name):
    with pytest.raises(ValueError, match="of teacher, student, .* also as ROW\\+PATCH"):
        throughput.Config(rows=("teacher", name))


def test_rows_named_twice():
    with pytest.raises(ValueError, match="--rows teacher teacher: must be each named once"):
        throughput.Config(rows=("teacher", "teacher"))


def test_failed_row_says_why(tmp_path):
    with pytest.raises(RuntimeError, match="DiT-Huge/2"):
        throughput.launch([sys.executable, "-c", "raise SystemExit('no DiT-Huge/2')"], tmp_path / "metrics.jsonl", tmp_path)


def test_forward_flops_of_s2():
    """12 d^2 weights a block and token, 4 T d for attention, by hand."""
    tokens, width, depth = 256, 384, 12
    blocks = tokens * depth * 2 * (12 * width**2 + 2 * tokens * width)
    assert throughput.forward_flops("DiT-S/2", 32) == pytest.approx(blocks, rel=0.01)


def test_cost_on_latents_is_scaled_by_operations():
    small, large = (latent_cost.forward_flops(model, 32, 4) for model in ("DiT-S/2", "DiT-B/2"))
    first, second = latent_cost.rows(["DiT-S/2", "DiT-B/2"])
    assert first["times"] == 1 and first["teacher"] == latent_cost.MEASURED["teacher"]
    assert second["times"] == pytest.approx(large / small) and 3.5 < second["times"] < 4       # twice the width: 4 times, but for attention
    assert second["student"] == pytest.approx(latent_cost.MEASURED["student"] / second["times"])
    assert first["parameters"] < second["parameters"] / 3.5


def test_table():
    row = throughput.Row("teacher", "DiT-S/2", 512, 2, [7000.0, 8000.0, 9000.0], 20.0, 31.0, 9.6, 800.0)
    line = markdown([row], 800.0).splitlines()[2]
    assert line == "| teacher | DiT-S/2 | 512 | 2 | 8,000 (7,000 to 9,000) | 128.0 | 20.0 | 800 | 50% | 31 | 10 |"


def test_profile_of_a_training_script(tmp_path, capsys):
    profile_step.main([*TINY, "--stage", "student", "--skip", "2", "--steps", "2", "--out", str(tmp_path)])
    text = (tmp_path / "summary.md").read_text()
    assert "| matrix products |" in text and "| attention |" in text and (tmp_path / "trace.json.gz").stat().st_size > 1000
    shares = [float(line.split("|")[3].strip(" %")) for line in text.splitlines() if line.strip().endswith("% |")]
    assert sum(shares) == pytest.approx(100, abs=0.5)
    with pytest.raises(ValueError, match="--skip 0: must be at least 1"):
        profile_step.Config(skip=0)


def test_kinds_of_kernels():
    assert profile_step.kind("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma") == "attention"
    assert profile_step.kind("nvjet_sm90_tst_192x192_64x4_1x2_h_bz_coopB_TNN") == "matrix products"
    assert profile_step.kind("triton_poi_fused_gelu_12") == "compiled pointwise and reductions"
    assert profile_step.kind("aten::mm") == "matrix products"


def test_what_hosts_add():
    assert scaling.between_hosts(10**9, 8, 8, link=50, latency=20) == 0                     # one host: nothing is between
    two = scaling.between_hosts(10**9, 16, 8, link=50, latency=0)
    assert two == pytest.approx(10**9 / (8 * 50e9))                                          # half the buffer there, half back
    assert scaling.between_hosts(10**9, 512, 8, link=50, latency=0) == pytest.approx(two * 2 * 63 / 64)
    assert scaling.between_hosts(0, 64, 8, link=50, latency=20) == pytest.approx(6 * 20e-6)
    network = DiT("DiT-Nano/8", 16, 3, 10, interval=True)
    assert scaling.gradient_bytes("DiT-Nano/8", 16) == sum(p.nbytes for p in network.parameters())


def test_scaling_needs_rows_and_processes(tmp_path):
    with pytest.raises(ValueError, match=r"a rows\.json that benchmarks\.throughput wrote"):
        scaling.Config(rows=str(tmp_path / "rows.json"))
    (tmp_path / "rows.json").write_text("{}")
    with pytest.raises(ValueError, match="one process has nothing to reduce"):
        scaling.main(["--rows", str(tmp_path / "rows.json"), "--device", "cpu"])


def test_the_solver_takes_what_it_says():
    z, y = torch.randn(3, 2, dtype=torch.float64), torch.zeros(3).long()
    seen = []

    def v(z, t, y):
        seen.append(t[0].item())
        return z * t[:, None]

    assert torch.equal(splitting_bias.solve(v, z, y, 1, "euler"), z - z)                            # one Euler step: z - 1 v(z, 1)
    splitting_bias.solve(v, z, y, 0.5, "midpoint", least=0.3)
    assert seen == [1, 1, 0.75, 0.5, 0.375, 0.25, 0.125]
    seen.clear()
    splitting_bias.solve(v, z, y, 0.5, "self", "euler", least=0.3)
    assert seen == [1, 0.75, 0.5]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("leg", "share"), [("euler", 0.3), ("euler", 0.05), ("midpoint", 0.3)])
def test_an_anchored_student_is_a_solver(leg, share, last):
    """The solver whose bias is tabulated satisfies Eq. 11 exactly, with the same leg: it is what such a student converges to."""
    sd, powers = 0.5, (1 - share) ** torch.arange(600).double()
    places = (1 - powers).flip(0) if last else torch.cat([powers, powers.new_zeros(1)])             # of the interval's states, in [0, 1]

    def teachers(z, r, t, y):
        v = splitting_bias.velocity(z, t, sd)
        return splitting_bias.velocity(step(z, (r + t) / 2, t, v), (r + t) / 2, sd) if leg == "midpoint" else v

    def u(z, r, t, y):
        end = z
        for before, after in zip(places, places[1:]):
            end = step(end, r + (t - r) * after, r + (t - r) * before, teachers(end, r + (t - r) * after, r + (t - r) * before, y))
        return (z - end) / (t - r)

    z, t, r = torch.ones(3, dtype=torch.float64), torch.tensor([1.0, 0.7, 0.2]).double(), torch.tensor([0, 0.1, 0]).double()
    target = splitting_target(u, teachers, z, r, t, 1 - torch.full_like(t, share), None) if last else \
        splitting_target(teachers, u, z, r, t, torch.full_like(t, share), None)
    torch.testing.assert_close(target, u(z, r, t, None), atol=1e-8, rtol=0)
    kept = splitting_bias.kept(share, sd, *(("self", leg) if last else (leg, "self")))
    assert abs(kept - (1 - u(z, r, t, None)[0].item()) / sd) < 1e-8
