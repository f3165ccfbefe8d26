"""Rewards that `rlhf-fn grpo --reward rewards_of_text:...` is given in tests, good and bad."""


def kindness(completions):
    words = ("kind", "gentle", "brave", "warm", "patient")
    return [sum(word in text for word in words) for text in completions]


def ends(ended):
    return [float(done) for done in ended]


def equal(completions, answer):
    return [float(a in text) for text, a in zip(completions, answer)]


def of_everything(**given):
    names = {"prompts", "completions", "completion_ids", "ended", "answer", "level"}
    assert set(given) == names, given.keys()
    assert len({len(column) for column in given.values()}) == 1
    assert all(prompt.startswith("about the") for prompt in given["prompts"])
    return [len(ids) / 10 for ids in given["completion_ids"]]


def raises(completions):
    raise KeyError("no such word")


def too_few(completions):
    return [0.0] * (len(completions) - 1)


def one_number(completions):
    return 1.0


def nothing(completions):
    return [None] * len(completions)


def not_a_number(completions):
    return [float("nan")] * len(completions)


def words(completions):
    return ["good"] * len(completions)


NO_FUNCTION = 3
