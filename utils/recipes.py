"""The values that differ between data sets; everything else is the same recipe, a Config's defaults. "path": a user's own images.

`parse_config` puts these in place of a Config's defaults, so `--data digits --help` shows what that data set will get.
"""

TEACHER = {
    "mnist": dict(model="DiT-Ti/4", steps=8_000),
    "cifar10": dict(model="DiT-S/2", steps=13_000),
    "path": dict(model="DiT-S/2", steps=20_000),
    "digits": dict(model="DiT-Nano/4", steps=480, global_batch_size=256, sample_steps=15, warmup_steps=30, sample_every=480,
                   save_every=480),
}

STUDENT = {
    "mnist": dict(steps=4_500, guidance_scale=1.15, guidance_interval=(0.0, 1.0)),
    "cifar10": dict(steps=4_800, guidance_scale=2.0, guidance_interval=(0.2, 0.8)),
    "path": dict(steps=10_000, guidance_scale=1.5, guidance_interval=(0.0, 1.0)),
    "digits": dict(steps=240, global_batch_size=256, guidance_scale=1.5, guidance_interval=(0.0, 1.0), warmup_steps=30, sample_every=240,
                   save_every=240),
}

NAMES = tuple(name for name in TEACHER if name != "path")           # of the named data sets
