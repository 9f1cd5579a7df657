"""The best known recipe for each data set: the values that differ between data sets. "path" stands for a user's own images.

`parse_config` puts these in place of a Config's defaults, so `--data digits --help` shows what that data set will get.
"""

TEACHER = {
    "mnist": dict(model="DiT-Ti/4", steps=8_000, global_batch_size=512, guidance_scale=(1.0, 2.5, 5.0)),
    "cifar10": dict(model="DiT-S/2", steps=13_000, global_batch_size=512, guidance_scale=(1.0, 2.5, 5.0)),
    "path": dict(model="DiT-S/2", steps=20_000, global_batch_size=512, guidance_scale=(1.0, 2.5, 5.0)),
    "digits": dict(model="DiT-Nano/4", steps=480, global_batch_size=256, guidance_scale=(1.0, 2.5, 5.0), sample_steps=15,
                   warmup_steps=30, sample_every=480, save_every=480),
}

MIDPOINT = dict(first_leg="midpoint", lam_law="constant(0.2)", pinned_share=0.6, boundary_share=0.25, edge_weight=4.0,
                lr=7e-4, muon_lr=0.014, decay_share=0.8)
EULER = dict(first_leg="euler", lam_law="anneal(0.3, 0.05, 0.8)", pinned_share=0.15, boundary_share=0.5, edge_weight=0.0,
             lr=5e-4, muon_lr=0.01, decay_share=0.4)

STUDENT = {
    "mnist": dict(steps=6_000, global_batch_size=512, guidance_scale=1.3, guidance_interval=(0.0, 1.0), **EULER),
    "cifar10": dict(steps=4_800, global_batch_size=512, guidance_scale=2.0, guidance_interval=(0.2, 0.8), **MIDPOINT),
    "path": dict(steps=10_000, global_batch_size=512, guidance_scale=1.5, guidance_interval=(0.0, 1.0), **MIDPOINT),
    "digits": dict(steps=280, global_batch_size=256, guidance_scale=2.5, guidance_interval=(0.0, 1.0), warmup_steps=30,
                   sample_every=280, save_every=280, **EULER),
}
