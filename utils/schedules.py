"""The learning rate as a pure function of the step."""


def learning_rate_factor(step: int, num_steps: int, warmup_steps: int, decay_share: float) -> float:
    """Factor in (0, 1] for update `step` (1 is the first) of `num_steps`: linear warm-up, constant, linear decay.

    The decay takes the last `decay_share` of all steps and ends just above zero, so that no update is wasted.
    """
    warmup = min(1.0, step / max(warmup_steps, 1))
    decay = min(1.0, (num_steps - step + 1) / max(decay_share * num_steps, 1))
    return min(warmup, decay)
