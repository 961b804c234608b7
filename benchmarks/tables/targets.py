"""What block-sparse attention is to reach: a rate relative to the dense kernel's, or a time."""

from __future__ import annotations

RATES = {  # percent of our dense rate in the same run, over the listed blocks
    **{f"bs/128x128/{density}": 93 for density in (50, 25, 10)},
    "bs/128x128/5": 85,
    **{f"bs/64x64/{density}": 85 for density in (50, 25, 10)},
    **{f"bs/128x16/{density}": 75 for density in (50, 25, 10)},
}
# Relative to the rate of another case of the same run.
RELATIVE = {"bs/partial/25": ("bs/128x128/25", 0.6), "bs/heavy/10": ("bs/uniform/10", 1 / 1.15)}
SHARES = {"select/128k": 3}  # percent of the time of our dense kernel


def rate(name: str, measured: dict[str, float]) -> float | None:
    """Percent of the dense rate that a case is to reach; `measured` has what the others did."""
    if name in RELATIVE:
        other, factor = RELATIVE[name]
        return measured[other] * factor if other in measured else None
    return RATES.get(name)
