"""Where bugs are planted: the function, and the law that it breaks."""

PLANTED = []  # (kind, words of the law's name, settings, wrong function)


def breaks(like, words, **settings):
    """The function below breaks the law of that kind that has these words in its name."""

    def add(function):
        PLANTED.append((like, words, settings, function))
        return function

    return add
