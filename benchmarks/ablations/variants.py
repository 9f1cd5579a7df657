"""What is varied, one choice at a time, against the scripts' defaults."""

from typing import NamedTuple


class Variant(NamedTuple):
    """A row of the table: its name, the training script's stage, the flags that make it differ, and what it asks.

    `patch` names a change that no flag makes (`patches.py`); `cost` the variant whose speed it shares, so that it needs no
    probe of its own.
    """

    name: str
    stage: str                  # "teacher" or "student"
    flags: list[str]
    question: str
    patch: str | None
    cost: str


def student(name: str, flags: str, question: str, patch: str | None = None, cost: str = "student") -> Variant:
    return Variant(name, "student", flags.split(";") if flags else [], question, patch, name if cost == "own" else cost)


def teacher(name: str, flags: str, question: str, patch: str | None = None, cost: str = "teacher") -> Variant:
    return Variant(name, "teacher", flags.split(";") if flags else [], question, patch, name if cost == "own" else cost)


# Flags and their values are separated by ";", because laws hold spaces.
VARIANTS = [
    student("student", "", "the defaults"),
    student("algorithm-1", "--first-leg;self;--lam-law;uniform;--adaptive-power;0;--edge-weight;0;--t-law;uniform;--r-law;uniform;"
            "--pinned-share;0", "Algorithm 1, times uniform", cost="self"),
    student("self", "--first-leg;self", "first leg from the student itself", cost="own"),
    student("self-uniform", "--first-leg;self;--lam-law;uniform", "its own first leg, with the paper's lam", cost="self"),
    student("self-uniform-power-0", "--first-leg;self;--lam-law;uniform;--adaptive-power;0;--edge-weight;0",
            "and with its squared error", cost="self"),
    student("self-uniform-target-ema", "--first-leg;self;--lam-law;uniform;--target;ema", "its own first leg, targets from a fast EMA",
            cost="self-target-ema"),
    student("mixed", "", "first leg from the teacher in every other update", patch="mixed-leg", cost="own"),
    student("euler", "--first-leg;euler;--lam-law;anneal(0.3, 0.05, 0.8)", "first leg to first order: lam must end small", cost="own"),
    student("euler-constant-0.05", "--first-leg;euler;--lam-law;constant(0.05)", "lam small from the start", cost="euler"),
    student("euler-constant-0.3", "--first-leg;euler;--lam-law;constant(0.3)", "lam never small", cost="euler"),
    student("euler-end-0.1", "--first-leg;euler;--lam-law;anneal(0.3, 0.1, 0.8)", "end sooner: less is divided by lam^2", cost="euler"),
    student("euler-end-0.02", "--first-leg;euler;--lam-law;anneal(0.3, 0.02, 0.8)", "end nearer to the derivative", cost="euler"),
    student("euler-start-0.7", "--first-leg;euler;--lam-law;anneal(0.7, 0.05, 0.8)", "start from more than halves", cost="euler"),
    student("midpoint-0.3", "--first-leg;midpoint;--lam-law;constant(0.3)", "first leg to second order: lam large", cost="own"),
    student("midpoint-0.5", "--first-leg;midpoint;--lam-law;constant(0.5)", "lam larger still", cost="midpoint-0.3"),
    student("midpoint-0.5-0.2", "--first-leg;midpoint;--lam-law;anneal(0.5, 0.2, 0.8)", "lam from 0.5 to 0.2", cost="midpoint-0.3"),
    student("two-midpoints-0.5", "--first-leg;midpoint;--lam-law;constant(0.5)", "first leg by two midpoint steps: lam larger still",
            patch="two-steps", cost="own"),
    student("last-midpoint-0.3", "--first-leg;self;--last-leg;midpoint;--lam-law;constant(0.3)", "the teacher's leg is the last one",
            cost="midpoint-0.3"),
    student("last-midpoint-0.2", "--first-leg;self;--last-leg;midpoint;--lam-law;constant(0.2)", "the last one, a little shorter",
            cost="midpoint-0.3"),
    student("last-midpoint-0.15", "--first-leg;self;--last-leg;midpoint;--lam-law;constant(0.15)", "the last one, shorter",
            cost="midpoint-0.3"),
    student("last-euler", "--first-leg;self;--last-leg;euler;--lam-law;anneal(0.3, 0.05, 0.8)", "the last one, to first order",
            cost="euler"),
    student("two-hops", "--lam-law;constant(0.51)", "two hops of the unrolled target in one leg", patch="two-hops", cost="own"),
    student("three-hops", "--lam-law;constant(0.657)", "three of them", patch="three-hops", cost="own"),
    student("own-leg-in-two", "", "the student makes its own leg in two steps", patch="own-leg-in-two", cost="own"),
    student("lam-0.2", "--lam-law;constant(0.2)", "lam 0.2: a finer solver, more hops"),
    student("lam-0.3-to-0.1", "--lam-law;anneal(0.3, 0.1, 0.8)", "lam from 0.3 to 0.1"),
    student("midpoint-uniform", "--first-leg;midpoint;--lam-law;uniform", "lam uniform", cost="midpoint-0.3"),
    student("former-defaults", "--boundary-share;0.5;--pinned-share;0.4;--edge-weight;0;--lr;0.0005;--muon-lr;0.01;--decay-share;0.4",
            "more boundary, fewer pinned intervals, no edges, learning rates that fall later"),
    student("cifar10-recipe", "--pinned-share;0.6;--boundary-share;0.25;--edge-weight;4;--lr;7e-4;--muon-lr;0.014;--decay-share;0.8",
            "what CIFAR-10 has by default", cost="boundary-0.25"),
    student("cifar10-recipe-lr-5e-4", "--pinned-share;0.6;--boundary-share;0.25;--edge-weight;4;--lr;5e-4;--muon-lr;0.01;--decay-share;0.4",
            "the same with MNIST's learning rates", cost="boundary-0.25"),
    student("boundary-0.25", "--boundary-share;0.25", "a quarter of each batch boundary", cost="own"),
    student("boundary-0.5", "--boundary-share;0.5", "half of each batch boundary", cost="own"),
    student("boundary-0.75", "--boundary-share;0.75", "three quarters of each batch boundary", cost="own"),
    student("t-high", "--t-law;logit-normal(0.6, 1.2)", "times nearer to the noise"),
    student("t-uniform", "--t-law;uniform", "times uniform"),
    student("r-uniform", "--r-law;uniform", "interval ends uniform"),
    student("r-as-t", "--r-law;logit-normal(-0.6, 1.6)", "both ends by one law"),
    student("pinned-0", "--pinned-share;0", "no pinned intervals"),
    student("pinned-0.15", "--pinned-share;0.15", "15 % of the intervals pinned"),
    student("pinned-0.4", "--pinned-share;0.4", "40 % of the intervals pinned"),
    student("pinned-0.6", "--pinned-share;0.6", "60 % of the intervals pinned"),
    student("pinned-1-step", "--pinned-steps;1", "only the interval of one step is pinned"),
    student("pinned-0.7", "--pinned-share;0.7", "most intervals pinned"),
    student("told-1-to-3", "--guidance-range;1;3", "the student is told its guidance, 1 to 3"),
    student("pinned-data-0.7", "--pinned-share;0.7", "r alone pinned, t uniform above it", patch="pin-data-end"),
    student("pinned-data-1", "--pinned-share;1", "the same in every row", patch="pin-data-end"),
    student("pinned-chain", "", "half of the pinned intervals are what the others' targets ask for", patch="pin-chain"),
    student("pinned-by-count", "--pinned-steps;1;1;2", "the interval of one step pinned as often as both of two"),
    student("one-step-from-4", "--pinned-steps;1;1;2;--one-step-from;4", "one step learns from four of the student's own", cost="own"),
    student("one-step-from-2", "--pinned-steps;1;1;2;--one-step-from;2", "from two", cost="own"),
    student("more-to-data", "", "a quarter of the intervals from late times to the data", patch="more-to-data"),
    student("pinned-0.6-uniform-boundary-0.25", "--pinned-steps;1;1;2;--pinned-share;0.6;--t-law;uniform;--boundary-share;0.25",
            "the same, more of them, times uniform, less boundary", cost="boundary-0.25"),
    student("shared-states", "--boundary-share;0.5", "half of each batch boundary, at the states of the splitting", patch="shared-states",
            cost="own"),
    student("power-0", "--adaptive-power;0;--edge-weight;0", "squared error"),
    student("edges-0", "--edge-weight;0", "differences between neighbouring pixels do not count"),
    student("edges-1", "--edge-weight;1", "differences between neighbouring pixels count too"),
    student("edges-4", "--edge-weight;4", "differences between neighbouring pixels count too, by a weight of 4"),
    student("edges-16", "--edge-weight;16", "by a weight of 16"),
    student("edges-1-by-count", "--pinned-steps;1;1;2;--edge-weight;1",
            "edge weight 1, the interval of one step pinned as often as both of two"),
    student("edges-4-by-count", "--pinned-steps;1;1;2;--edge-weight;4", "edge weight 4, likewise"),
    student("edges-4-pinned-0.6-uniform-boundary-0.25",
            "--pinned-steps;1;1;2;--edge-weight;4;--pinned-share;0.6;--t-law;uniform;--boundary-share;0.25",
            "the same, more of them, times uniform, less boundary", cost="boundary-0.25"),
    student("power-0.5", "--adaptive-power;0.5", "a milder adaptive weight"),
    student("power-1", "--adaptive-power;1", "a stronger adaptive weight"),
    student("target-ema", "--target;ema", "targets from a fast EMA", cost="own"),
    student("self-target-ema", "--first-leg;self;--target;ema", "whether it keeps self-splitting from collapse", cost="own"),
    student("guidance-1", "--guidance-scale;1", "no guidance inside", cost="own"),
    student("guidance-1.75", "--guidance-scale;1.75", "guidance 1.75"),
    student("guidance-2.5", "--guidance-scale;2.5", "guidance 2.5"),
    student("guidance-1.5-always", "--guidance-scale;1.5;--guidance-interval;0;1", "guidance 1.5 at all times"),
    student("guidance-late", "--guidance-interval;0;0.8", "guidance at times 0 to 0.8"),
    student("guidance-soft", "", "guidance that rises and falls gradually", patch="soft-guidance"),
    student("guidance-mean", "", "a leg is guided as its interval is on average", patch="mean-guidance"),
    student("guidance-mean-0.7", "--guidance-interval;0.2;0.7", "the same, at times 0.2 to 0.7", patch="mean-guidance"),
    student("modulation-wide", "", "a student's adaLN of four times its teacher's rank", patch="wider-modulation", cost="own"),
    student("deeper", "--extra-blocks;6", "a student of 6 more blocks than its teacher's", cost="own"),
    student("input-skip", "--input-skip;True", "a share of the input is added to the output"),
    student("lr-half", "--lr;0.00025;--muon-lr;0.005", "learning rates of 2.5e-4 and 0.005"),
    student("decay-0.4", "--decay-share;0.4", "learning rates fall late"),
    student("decay-0.8", "--decay-share;0.8", "learning rates fall over nearly all of the run"),
    student("lr-double", "--lr;0.001;--muon-lr;0.02", "learning rates of 1e-3 and 0.02"),
    student("lr-double-decay-0.8", "--lr;0.001;--muon-lr;0.02;--decay-share;0.8", "the same, falling over nearly all of the run"),
    student("adamw", "--optimizer;adamw", "AdamW for everything", cost="own"),
    student("teacher-features-0.3", "--edge-weight;0", "also compared as the teacher sees them, in place of edges",
            patch="teacher-features-0.3", cost="own"),
    student("teacher-features-1", "--edge-weight;1", "and more so, with weaker edges", patch="teacher-features-1",
            cost="teacher-features-0.3"),
    student("warm-start", "", "100 updates on the teacher's own trajectories first", patch="warm-start"),
    teacher("teacher", "", "the defaults"),
    teacher("teacher-adamw", "--optimizer;adamw", "AdamW for everything", cost="own"),
    teacher("teacher-b-4", "--model;DiT-B/4", "wider, fewer patches", cost="own"),
    teacher("teacher-ti-2", "--model;DiT-Ti/2", "smaller, more images", cost="own"),
    teacher("teacher-b-2", "--model;DiT-B/2", "twice as wide", cost="own"),
    teacher("teacher-s-4", "--model;DiT-S/4", "patches of 4 pixels", cost="own"),
    teacher("teacher-depth-0.5", "", "6 blocks for 12", patch="depth-0.5", cost="own"),
    teacher("teacher-depth-1.5", "", "18 blocks for 12", patch="depth-1.5", cost="own"),
    teacher("teacher-batch-256", "--global-batch-size;256", "half the batch, twice the updates", cost="own"),
    teacher("teacher-lr-half", "--lr;0.0005;--muon-lr;0.01", "half the learning rates"),
    teacher("teacher-lr-double", "--lr;0.002;--muon-lr;0.04", "twice the learning rates"),
    teacher("teacher-decay-0.8", "--decay-share;0.8", "learning rates fall over nearly all of the run"),
    teacher("teacher-t-low", "--t-law;logit-normal(-0.5, 1.2)", "times nearer to the data"),
    teacher("teacher-t-uniform", "--t-law;uniform", "times uniform"),
    teacher("teacher-label-dropout-0.2", "--label-dropout;0.2", "more steps without a label"),
    teacher("teacher-ema-short", "", "averaged over about the last 4 % of the updates so far, for 10 %", patch="ema-short"),
    teacher("teacher-ema-long", "", "over the last 20 %", patch="ema-long"),
    teacher("teacher-dropout-0.1", "", "dropout of the MLP's hidden values", patch="dropout-0.1", cost="own"),
    teacher("teacher-augment", "--augment;0.12", "moved images, of which the network is told", cost="own"),
    teacher("teacher-long-skips", "", "later blocks see earlier ones", patch="long-skips", cost="own"),
    teacher("teacher-shift", "", "MLPs see the patches around", patch="shift", cost="own"),
    teacher("teacher-nearest-of-4", "", "noise near its image", patch="nearest-of-4", cost="own"),
    teacher("teacher-silu", "", "SiLU for squared ReLU", patch="silu", cost="own"),
    teacher("teacher-gelu", "", "GELU for squared ReLU", patch="gelu", cost="own"),
    teacher("teacher-parallel", "", "attention and MLP side by side", patch="parallel", cost="own"),
    teacher("teacher-heads-of-128", "", "3 heads of 128 for 6 of 64", patch="heads-of-128", cost="own"),
]
