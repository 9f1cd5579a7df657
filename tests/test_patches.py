"""The variants that no flag makes: each trains, and changes what it says."""

import math
import shutil

import pytest
import torch
from oracle import ORACLE, batch
from runs import COMMON, TEACHER, losses

import train_student_mnist
import train_teacher_mnist
from benchmarks.ablations import changes, patches, student_patches
from models import DiT
from utils import losses as losses_module
from utils.checkpoints import read_metadata, step_folders
from utils.flow import step
from utils.losses import anchored_splitting_loss, squared_error

OF_STUDENTS = {"mixed-leg", "more-to-data", "own-leg-in-two", "pin-chain", "pin-data-end", "soft-guidance", "teacher-features-0.3",
               "teacher-features-1", "three-hops", "two-hops", "warm-start", "whole-below-0.1"}
TESTED_BELOW = {"heads-of-128", "compile-whole", "two-steps", "shared-states", "mean-guidance", "wider-modulation", "guidance-at-once",
                "ema-every-8", "ema-short", "ema-long", "attention-cudnn", "attention-flash", "attention-plain", "whole-features-1"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Losses of a teacher and a student as they are, and the teacher."""
    folder = tmp_path_factory.mktemp("plain")
    train_teacher_mnist.main([*TEACHER, "--results-dir", str(folder), "--name", "teacher"])
    train_student_mnist.main([*COMMON, "--results-dir", str(folder), "--name", "student", "--teacher", str(folder / "teacher")])
    return folder


@pytest.mark.parametrize("name", sorted(set(patches.PATCHES) - TESTED_BELOW))
def test_a_patched_script_trains_another_way(name, plain, undo, tmp_path):
    if name in OF_STUDENTS:
        stage, flags = "student", [*COMMON, "--teacher", str(plain / "teacher")]
    else:
        stage, flags = "teacher", TEACHER
    patches.main([name, f"train_{stage}_mnist.py", *flags, "--results-dir", str(tmp_path), "--name", "changed"])
    changed, unchanged = losses(tmp_path / "changed"), losses(plain / stage)
    assert len(changed) == len(unchanged) and all(torch.tensor(changed).isfinite())
    assert changed != unchanged


def test_a_run_goes_on_with_its_own_patch_only(plain, undo, tmp_path):
    def weights(folder):
        return step_folders(folder / "checkpoints")[-1] / "ema.safetensors"

    flags = ["train_teacher_mnist.py", *TEACHER, "--results-dir", str(tmp_path), "--name"]
    shutil.copytree(plain / "teacher", tmp_path / "plain")
    patches.main(["silu", *flags, "patched"])
    assert read_metadata(weights(tmp_path / "patched"))["config"]["patch"] == "silu"
    for name, other, said in (("patched", "gelu", "patch: gelu, was silu"), ("plain", "silu", "patch: silu, was None")):
        shutil.rmtree(weights(tmp_path / name).parent)
        with pytest.raises(ValueError, match=said):
            patches.main([other, *flags, name])
    patches.main(["silu", *flags, "patched"])
    assert read_metadata(weights(tmp_path / "patched"))["step"] == 6


@pytest.mark.parametrize("name", ["noise-nearest", "noise-direction"])
def test_a_choice_of_noise_needs_several(name, undo, tmp_path):
    with pytest.raises(ValueError, match="the patch chooses among noises, but there is 1; --num-noises of the teacher must be at least 2"):
        patches.main([name, "train_teacher_mnist.py", *TEACHER, "--num-noises", "1", "--results-dir", str(tmp_path)])


def test_heads(undo):
    patches.PATCHES["heads-of-128"]()
    small, none = DiT("DiT-S/8", 32, 3, 10), DiT("DiT-Ti/8", 32, 3, 10)
    assert [block.attention.num_heads for block in small.blocks] == [3] * 12 and small.rotary_cos.shape == (16, 64)
    assert none.blocks[0].attention.num_heads == 3                              # 192 is no multiple of 128


def test_compile_whole(undo, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append((type(self), options)))
    patches.PATCHES["compile-whole"]()
    DiT("DiT-Nano/4", 8, 1, 10).compile_blocks()
    assert compiled == [(DiT, {"dynamic": False})]


def test_long_skips_start_as_the_plain_network(undo):
    plain = DiT("DiT-Nano/4", 8, 1, 10)
    patches.PATCHES["long-skips"]()
    changed = DiT("DiT-Nano/4", 8, 1, 10)
    same = {f"{key.replace(key.split('.')[1], key.split('.')[1] + '.block', 1) if key.startswith('blocks.') else key}": value
            for key, value in plain.state_dict().items()}
    missing = changed.load_state_dict(same, strict=False)
    assert set(missing.missing_keys) == {f"blocks.{i}.join.{kind}" for i in (2, 3) for kind in ("weight", "bias")}
    for block in (*plain.blocks, *(layer.block for layer in changed.blocks)):
        torch.nn.init.normal_(block.modulation.up.weight, generator=torch.Generator().manual_seed(1))
    for network in (plain, changed):
        torch.nn.init.normal_(network.final.out.weight, generator=torch.Generator().manual_seed(2))
    z, t, y = torch.randn(3, 1, 8, 8), torch.rand(3), torch.arange(3)
    assert torch.allclose(plain.velocity(z, t, y), changed.velocity(z, t, y), atol=1e-5)
    with torch.no_grad():
        changed.blocks[3].join.weight[:, 128:] = torch.eye(128)
    assert not torch.allclose(plain.velocity(z, t, y), changed.velocity(z, t, y), atol=1e-2)


def test_the_average_of_a_teacher_reaches_back_as_far_as_it_says(undo):
    """By what share of the updates an average lags behind a weight that rises by 1 in each."""
    lags = []
    for name in (None, "ema-short", "ema-long"):
        if name:
            patches.PATCHES[name]()
        line = torch.nn.Linear(1, 1, bias=False).requires_grad_(False)
        ema = train_teacher_mnist.ModelEmaV3(line, decay=0.9995, use_warmup=True, warmup_gamma=9, warmup_power=1)
        for update in range(1, 1001):
            line.weight.fill_(update)
            ema.update(line, update)
        lags.append((1000 - ema.module.weight.item()) / 1000)
    assert lags == pytest.approx([1 / 10, 1 / 25, 1 / 5], rel=0.05)


def test_warm_start_asks_for_the_trajectory(undo, monkeypatch):
    """The exact average velocity is its solution: the error is the Euler solver's, and falls with its steps."""
    z_t, r, t, lam, y = batch(64)
    errors = []
    for substeps in (4, 32):
        student_patches.warm_start(updates=1, substeps=substeps)
        loss = train_student_mnist.student_loss
        parts = loss(ORACLE.u, ORACLE.u, ORACLE.v, z_t, r, t, lam, y, 16, "euler", "self")
        assert parts.boundary.max() < 1e-20
        errors.append(parts.splitting.mean())
    assert errors[1] < errors[0] / 30                                           # first order: the square of 1 / 8
    args = ORACLE.u, ORACLE.u, ORACLE.v, z_t, r, t, lam, y, 16, "euler", "self"
    assert torch.equal(loss(*args).splitting, student_patches.student_loss(*args).splitting)


@pytest.mark.parametrize("name", ["mixed-leg", "warm-start"])
def test_what_changes_from_update_to_update_is_not_recorded(name, undo):
    patches.PATCHES[name]()
    assert train_student_mnist.Replay(patches.main, None) is patches.main


@pytest.mark.parametrize("legs", [("midpoint", "self"), ("self", "midpoint")])
def test_two_midpoint_steps_are_a_finer_leg(legs, undo):
    """Against the exact average velocity: half the step, a quarter of the leg's error or (Gaussian data) less, a sixteenth of the loss."""
    z_t, r, t, _, y = batch(256)
    args = ORACLE.u, ORACLE.v, z_t, r, t, torch.full_like(t, 0.3), y, *legs
    one = anchored_splitting_loss(*args).mean()
    patches.PATCHES["two-steps"]()
    two = anchored_splitting_loss(*args).mean()
    assert one / two > 12


def test_hops_are_the_unrolled_target(undo):
    """A leg of two hops is what the target is when the student's leg, from where the teacher's ends, is put into itself once more."""
    z_t, r, t, _, y = batch(64)
    plain = losses_module.one_step(ORACLE.v, "midpoint")
    s, end = torch.lerp(t, r, 0.3), torch.lerp(t, r, 0.51)
    there = step(z_t, s, t, plain(z_t, s, t, y))
    there = step(there, end, s, plain(there, end, s, y))
    patches.PATCHES["two-hops"]()
    leg = losses_module.one_step(ORACLE.v, "midpoint")
    torch.testing.assert_close(step(z_t, end, t, leg(z_t, end, t, y)), there)


def test_an_own_leg_in_two_steps(undo):
    """No matter where the student is right; where its error grows with the interval, the target lies nearer to the truth."""
    z_t, r, t, _, y = batch(256)
    share = torch.full_like(t, 0.3)

    def errors(u) -> torch.Tensor:
        target = losses_module.splitting_target(*losses_module.legs(u, ORACLE.v, "midpoint", "self"), z_t, r, t, share, y)
        return squared_error(target, ORACLE.u(z_t, r, t, y)).mean()

    def euler(z, r, t, y):
        return ORACLE.v(z, t, y)

    right, wrong = errors(ORACLE.u), errors(euler)
    patches.PATCHES["own-leg-in-two"]()
    torch.testing.assert_close(errors(ORACLE.u), right)
    assert errors(euler) < wrong / 2


def test_short_intervals_are_the_teacher_s_alone(undo):
    """Below the length a student's own leg, however wrong, is not asked; above it nothing changes."""
    z_t, r, t, _, y = batch(256)
    share = torch.full_like(t, 0.3)
    short = t - r < 0.1

    def losses_by(own) -> torch.Tensor:
        args = ORACLE.u, own, ORACLE.v, z_t, r, t, share, y, 16, "midpoint", "self"
        return train_student_mnist.student_loss(*args).splitting

    plain_wrong = losses_by(lambda z, r, t, y: 0 * z)
    patches.PATCHES["whole-below-0.1"]()
    right, wrong = losses_by(ORACLE.u), losses_by(lambda z, r, t, y: 0 * z)
    assert 10 < short[16:].sum() < 230
    assert torch.equal(right[short[16:]], wrong[short[16:]]) and right[short[16:]].max() < 1e-4
    assert torch.equal(wrong[~short[16:]], plain_wrong[~short[16:]]) and not torch.equal(wrong, plain_wrong)


def test_data_ends_pinned(undo):
    """r is 0 for two of the three intervals of 1 and 2 steps, 1/2 for one; t is uniform above it, and other rows stay as they were."""
    laws = "logit-normal(-0.6, 1.6)", "logit-normal(-4, 1.6)"
    patches.PATCHES["pin-data-end"]()
    r, t = train_student_mnist.draw_intervals(40_000, *laws, 1, (1, 2), torch.Generator().manual_seed(0))
    assert set(r.tolist()) == {0, 0.5} and (r == 0).float().mean().item() == pytest.approx(2 / 3, abs=0.01)
    for end in (0, 0.5):
        place = (t[r == end] - end) / (1 - end)
        assert place.min() >= 0 and place.max() <= 1
        assert place.mean().item() == pytest.approx(1 / 2, abs=0.01) and place.var().item() == pytest.approx(1 / 12, rel=0.03)
    r, t = train_student_mnist.draw_intervals(40_000, *laws, 0.3, (1, 2), torch.Generator().manual_seed(1))
    plain_r, plain_t = student_patches.draw_intervals(40_000, *laws, 0.3, (1, 2), torch.Generator().manual_seed(1))
    assert torch.equal(r, plain_r) and (t == plain_t).float().mean().item() == pytest.approx(0.7, abs=0.01)


def test_chains_pinned(undo):
    """Half of the pinned rows stay, a quarter is one hop shorter, and so on; each keeps its r."""
    laws = "logit-normal(-0.6, 1.6)", "logit-normal(-4, 1.6)"
    patches.PATCHES["pin-chain"]()
    r, t = train_student_mnist.draw_intervals(40_000, *laws, 1, (1, 2), torch.Generator().manual_seed(0))
    plain_r, plain_t = student_patches.draw_intervals(40_000, *laws, 1, (1, 2), torch.Generator().manual_seed(0))
    assert torch.equal(r, plain_r)
    hops = ((t - r) / (plain_t - r)).log() / math.log(0.7)
    torch.testing.assert_close(hops, hops.round(), rtol=0, atol=1e-3)
    for count in range(4):
        assert (hops.round() == count).float().mean().item() == pytest.approx(2.0 ** -(count + 1), abs=0.01)
    unpinned = [draw(40_000, *laws, 0, (1, 2), torch.Generator().manual_seed(0))
                for draw in (train_student_mnist.draw_intervals, student_patches.draw_intervals)]
    assert torch.equal(torch.stack(unpinned[0]), torch.stack(unpinned[1]))


def test_soft_guidance_has_no_edge(undo):
    """Whole in the middle of the interval, none outside, half at its ends, and nowhere a jump."""
    patches.PATCHES["soft-guidance"]()
    guided = train_student_mnist.guided_velocity(lambda z, t, y: (y == 0).double().view(-1, 1) + 0 * z, 3, 2.0, (0.2, 0.8))
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    w = guided(torch.zeros(1001, 1, dtype=torch.float64), t, torch.zeros(1001).long())[:, 0]        # v is 1 with the label, 0 without
    torch.testing.assert_close(w[[0, 100, 200, 300, 500, 700, 800, 900, 1000]], torch.tensor([1, 1, 1.5, 2, 2, 2, 1.5, 1, 1]).double())
    assert w.diff().abs().max() < 0.006


@pytest.mark.parametrize("leg", ["euler", "midpoint"])
def test_mean_guidance_of_a_leg_is_that_of_its_parts(leg, undo):
    """Of legs that follow one another, weighted by their lengths, as much as of the leg from their start to their end."""
    patches.PATCHES["mean-guidance"]()
    guided = train_student_mnist.guided_velocity(lambda z, t, y: (y == 0).double().view(-1, 1) + 0 * z, 3, 2.0, (0.2, 0.8))
    average = losses_module.one_step(guided, leg)
    times = torch.tensor([0, 0.1, 0.3, 0.5, 0.7, 0.9, 1], dtype=torch.float64)
    parts = average(torch.zeros(6, 1).double(), times[:-1], times[1:], torch.zeros(6).long())[:, 0]
    torch.testing.assert_close(parts, torch.tensor([1, 1.5, 2, 2, 1.5, 1], dtype=torch.float64))
    whole = average(torch.zeros(1, 1).double(), times[:1], times[-1:], torch.zeros(1).long())[0, 0]
    torch.testing.assert_close(whole, (parts * times.diff()).sum())
    at_times = guided(torch.zeros(7, 1).double(), times, torch.zeros(7).long())[:, 0]                  # the boundary's, as ever
    torch.testing.assert_close(at_times, torch.tensor([1, 1, 2, 2, 2, 1, 1], dtype=torch.float64))


def test_wider_modulation_starts_as_the_teacher(plain, undo, tmp_path):
    teacher, batch_of_two = DiT("DiT-Nano/4", 8, 1, 10), (torch.randn(2, 1, 8, 8), torch.rand(2), torch.ones(2), torch.tensor([3, 10]))
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(0.02 * torch.randn_like(p))
    patches.PATCHES["wider-modulation"]()
    student = train_student_mnist.student_from_teacher(teacher)
    torch.testing.assert_close(student(*batch_of_two), teacher(*batch_of_two))
    assert student.blocks[0].modulation.up.weight.shape == (6 * 128, 64) and student.final.modulation.down.weight.shape == (64, 128)
    assert student.architecture["modulation_rank"] == 64
    student(*batch_of_two).square().mean().backward()
    assert student.blocks[0].modulation.up.weight.grad[:, 16:].abs().max() > 0       # the new channels learn
    train_student_mnist.main([*COMMON, "--teacher", str(plain / "teacher"), "--results-dir", str(tmp_path), "--name", "wide"])
    changed = losses(tmp_path / "wide")
    assert all(torch.tensor(changed).isfinite()) and changed != losses(plain / "student")


def test_shared_states_are_the_same_losses_at_the_same_states(undo):
    patches.PATCHES["shared-states"]()
    z_t, r, t, lam, y = (torch.cat([x, x]) for x in batch(32))
    args = lambda z, r, t, y: ORACLE.v(z, t, y), ORACLE.u, ORACLE.v, z_t, r, t, lam, y, 32, "midpoint", "self"   # a student that is wrong
    found, expected = train_student_mnist.student_loss(*args), student_patches.student_loss(*args)
    assert expected.boundary.max() < 1e-20 and expected.splitting.mean() > 1e-3
    for mine, theirs in zip(found, expected):
        torch.testing.assert_close(mine, theirs)
    with pytest.raises(ValueError, match="16 of 64 rows are boundary, legs midpoint and self"):
        train_student_mnist.student_loss(*args[:8], 16, *args[9:])


@pytest.mark.parametrize(("change", "flags", "message"), [
    ("pin-chain", ["--one-step-from", "2", "--pinned-share", "0.5"], "moved pins: 2 rows must stay"),
    ("teacher-features-1", ["--one-step-from", "2", "--pinned-share", "0.5"], "teacher features: .*without --one-step-from"),
    ("whole-features-1", [], "the patch whole-features-1 needs --guidance-range and --one-step-from"),
    ("whole-features-1", ["--one-step-from", "2", "--pinned-share", "0.5"], "the patch whole-features-1 needs --guidance-range$"),
    ("more-to-data", ["--pinned-share", "0.8"], "a share of 0.25 does not fit beside --pinned-share 0.8"),
])
def test_what_a_patch_cannot_do(change, flags, message, plain, undo, tmp_path):
    with pytest.raises(ValueError, match=message):
        patches.main([change, "train_student_mnist.py", *COMMON, *flags, "--teacher", str(plain / "teacher"),
                      "--results-dir", str(tmp_path)])


def test_more_to_data(undo):
    """A quarter of all rows, of those that are not pinned, ends at the data; what was pinned stays."""
    patches.PATCHES["more-to-data"]()
    draws = torch.Generator().manual_seed(0)
    r, t = train_student_mnist.draw_intervals(20_000, "logit-normal(-0.6, 1.6)", "uniform", 0.6, (1, 2), draws)
    pinned = torch.stack([(r == low) & (t == high) for low, high in ((0, 1), (0, 0.5), (0.5, 1))]).any(0)
    chosen = ~pinned & (r == 0)
    assert pinned.float().mean().item() == pytest.approx(0.6, abs=0.01) and chosen.float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert t[chosen].min() >= 0.4 and t[chosen].mean().item() == pytest.approx(0.7, abs=0.01)


def test_a_patch_that_no_longer_fits_says_so():
    with pytest.raises(AttributeError, match="has no gone any more"):
        changes.change([train_teacher_mnist], "gone", None)
    with pytest.raises(ValueError, match="unknown patch 'nonsense'; known are silu"):
        patches.main(["nonsense", "train_teacher.py"])


@pytest.mark.parametrize("name", sorted(patches.OF_ONE_SCALE))
def test_what_knows_one_guidance_scale_refuses_several(name, tmp_path):
    assert name in patches.PATCHES
    with pytest.raises(ValueError, match=f"--guidance-range: the patch {name}"):
        patches.main([name, "train_student_mnist.py", *COMMON, "--guidance-range", "1", "4", "--results-dir", str(tmp_path)])
