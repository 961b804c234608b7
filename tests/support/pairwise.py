"""Fewer cases than a product: each two values of two parameters meet in at least one of them."""

import itertools

import pytest


def pairwise(*parameters):
    """Rows with a value of each parameter, the same in every run.

    Any value of one parameter and any of another stand together in some row. There are at least as
    many rows as the two longest parameters have pairs, and seldom many more.
    """
    parameters = [list(values) for values in parameters]
    places = range(len(parameters))
    if len(parameters) < 2 or not all(parameters):
        return list(itertools.product(*parameters))
    met = {
        ((i, a), (j, b)): 0
        for i, j in itertools.combinations(places, 2)
        for a, b in itertools.product(range(len(parameters[i])), range(len(parameters[j])))
    }

    def cost(row, place, value):
        """Fewer new pairs, then more that have met already."""
        times = [met[tuple(sorted((item, (place, value))))] for item in row.items()]
        return -times.count(0), sum(times)

    rows = []
    for pair in met:
        if met[pair]:
            continue
        row = dict(pair)
        for place in places:
            if place not in row:
                values = range(len(parameters[place]))
                row[place] = min(values, key=lambda value: cost(row, place, value))
        for other in itertools.combinations(sorted(row.items()), 2):
            met[other] += 1
        rows.append(tuple(parameters[place][row[place]] for place in places))
    return rows


def parametrize(**parameters):
    """As pytest.mark.parametrize of each, but pairwise."""
    return pytest.mark.parametrize(list(parameters), pairwise(*parameters.values()), ids=_label)


def _label(value):
    return getattr(value, "__name__", None) or str(value).removeprefix("torch.")
