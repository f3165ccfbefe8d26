"""Rewards that are functions of text, for `rlhf-fn grpo --reward examples.rewards:...`."""


def happy(completions, ended):
    """1 where the sentence says "happy" and comes to its end within the limit."""
    return [float("happy" in text and done) for text, done in zip(completions, ended)]
