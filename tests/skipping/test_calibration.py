"""Calibration: counts against the op that skips, the fit and files."""

import json
import math
import re

import pytest
import torch

import sparse_fmha
from sparse_fmha.calibration import Calibration, Point, decode_sparsity, tile_sparsity
from sparse_fmha.skipping import tiles


def along_a_way(length, heads=2, heads_kv=1, dim=32, q_len=None, seed=0):
    """Queries look one way, and runs of keys lie along it at random, in fp32."""
    generator = torch.Generator().manual_seed(seed)
    way = torch.nn.functional.normalize(
        torch.randn(1, 1, heads_kv, dim, generator=generator), dim=-1
    )
    runs = torch.randn(1, -(-length // 40), heads_kv, 1, generator=generator)
    noise = 0.1 * torch.randn(1, length, heads_kv, dim, generator=generator)
    k = 3 * runs.repeat_interleave(40, 1)[:, :length] * way + noise
    q = dim**0.5 * way.repeat_interleave(heads // heads_kv, 2)
    q = q + 0.1 * torch.randn(1, q_len or length, heads, dim, generator=generator)
    return q, k, torch.randn(k.shape, generator=generator)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("q_len", "length"), [(300, 300), (1, 500), (130, 700), (400, 90)])
def test_counts_are_those_of_the_op(q_len, length, causal):
    q, k, v = (x.double() for x in along_a_way(length, q_len=q_len))
    thresholds = [0.0, 1e-3, 0.1, 0.7]
    skipped, visited = tile_sparsity(q, k, thresholds, causal=causal, scale=0.2)
    for i, threshold in enumerate(thresholds):
        _, stats = sparse_fmha.attention(
            q, k, v, causal=causal, scale=0.2, skip_threshold=threshold, return_stats=True
        )
        assert visited.equal(stats.visited)
        assert skipped[..., i].equal(stats.skipped)
    if (q_len, length) == (300, 300):
        assert (skipped[..., -1] > skipped[..., 1]).all()


def test_slices_do_not_change_counts(monkeypatch):
    q, k, _ = along_a_way(700)
    whole = tile_sparsity(q, k, causal=True)
    monkeypatch.setattr(tiles, "SLICE", 1000)
    for a, b in zip(whole, tile_sparsity(q, k, causal=True), strict=True):
        assert a.equal(b)


def test_nothing_to_measure():
    q, k, _ = along_a_way(100)
    for skipped, visited in (tile_sparsity(q[:, :0], k), tile_sparsity(q, k[:, :0])):
        assert skipped.sum() == visited.sum() == 0


@pytest.mark.parametrize("threshold", [1.0, -0.1, math.nan])
def test_thresholds_out_of_range(threshold):
    q, k, _ = along_a_way(100)
    with pytest.raises(
        ValueError, match=r"thresholds\[1\] must be at least 0 and less than 1, got .*"
    ):
        tile_sparsity(q, k, [0.5, threshold])


def by_the_law(alpha, beta, phase="prefill", lengths=(1000, 4000), gamma=1.0):
    for length in lengths:
        for sparsity in (0.02, 0.1, 0.3, 0.5, 0.8, 0.95):
            threshold = alpha * math.exp(beta * sparsity) / length**gamma
            yield Point(phase, length, threshold, sparsity, 100)


def test_the_fit_finds_the_law():
    found = Calibration([*by_the_law(0.5, 7.0), *by_the_law(2.0, 3.0, "decode")])
    fit = found.fit()
    assert (fit.alpha, fit.beta) == pytest.approx((0.5, 7.0))
    assert fit.points == 8  # 2% and 95% are outside of what is fitted
    assert fit.error == pytest.approx(0, abs=1e-9)
    assert found.fit("decode")[:2] == pytest.approx((2.0, 3.0))
    assert found.threshold_for(0.5, 8000) == pytest.approx(0.5 * math.exp(3.5) / 8000)
    assert found.threshold_for(0, 8000) == 0
    assert found.fit(gamma=None)[:3] == pytest.approx((0.5, 7.0, 1.0))
    with pytest.raises(
        ValueError, match="sparsity must be at most 76% at 100 keys, got 99%; its threshold would"
    ):
        found.threshold_for(0.99, 100)


def test_another_exponent_of_the_length():
    found = Calibration(by_the_law(0.01, 4.0, gamma=0.3))
    assert found.fit(gamma=None)[:3] == pytest.approx((0.01, 4.0, 0.3))
    assert found.fit(gamma=0.3)[:2] == pytest.approx((0.01, 4.0))
    assert found.fit().error > 0.01
    wanted = 0.01 * math.exp(2.0) / 9000**0.3
    assert found.threshold_for(0.5, 9000, gamma=None) == pytest.approx(wanted)
    one_length = Calibration(by_the_law(1.0, 5.0, lengths=(1000,)))
    with pytest.raises(
        ValueError, match="gamma=None needs points of at least two lengths, got one length"
    ):
        one_length.fit(gamma=None)


def test_points_of_one_place_are_put_together():
    """Weighed by their tiles, so that short calls do not count as much as long ones."""
    law = list(by_the_law(0.5, 7.0))
    doubled = [p._replace(sparsity=p.sparsity + d, tiles=n) for p in law for d, n in PARTS]
    assert Calibration(doubled).fit()[:2] == pytest.approx((0.5, 7.0))


PARTS = ((-0.03, 10), (0.01, 30))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.fit("training"), "phase must be prefill or decode, got 'training'"),
        (
            lambda c: c.fit("decode"),
            "a fit needs at least two different points of decode with 10% to 90% of",
        ),
        (
            lambda c: c.threshold_for(1.0, 10),
            "sparsity must be at least 0 and less than 1, got 1.0",
        ),
        (lambda c: c.threshold_for(0.5, 0), "length must be at least 1, got 0"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(Calibration(by_the_law(1.0, 5.0)))


def test_files(tmp_path):
    path = tmp_path / "calibration.json"
    saved = Calibration(by_the_law(0.5, 7.0))
    saved.save(path)
    assert Calibration.load(path).points == saved.points
    assert json.loads(path.read_text())["fits"]["prefill"]["beta"] == pytest.approx(7.0)
    wrong = {"phase": "prefill", "length": 9, "threshold": 0.1, "sparsity": None, "tiles": 1}
    for text in (
        '{"version": 99, "points": []}',
        "[]",
        '{"version": 1}',
        "no JSON",
        '{"version": 1, "points": null}',
        json.dumps({"version": 1, "points": [wrong]}),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"calibration.json must be a saved Calibration"):
            Calibration.load(path)


@pytest.mark.parametrize("wanted", [0.25, 0.5, 0.75])
def test_a_wanted_sparsity_is_met(wanted):
    """Fitted at two lengths, asked for at others, on inputs of one kind."""
    found = Calibration()
    for length in (1024, 4096):
        for seed in range(2):
            q, k, _ = along_a_way(length, seed=seed)
            found.add(q, k, causal=True)
    assert repr(found) == "Calibration(80 points, lengths [1024, 4096])"
    shares = []
    for seed in (2, 3):
        q, k, v = along_a_way(2048, seed=seed)
        threshold = found.threshold_for(wanted, 2048)
        _, stats = sparse_fmha.attention(
            q, k, v, causal=True, skip_threshold=threshold, return_stats=True
        )
        shares.append(stats.skipped.sum() / stats.visited.sum())
    assert sum(shares) / 2 == pytest.approx(wanted, abs=0.2)


@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (130, 1)])
@pytest.mark.parametrize("length", [1, 64, 700, 1333])
def test_counts_of_decode_are_those_of_its_op(length, heads):
    """All heads of a group of 64 vote together, over tiles from the first to the last."""
    q, k, v = along_a_way(length, *heads, q_len=1)
    thresholds = [0.0, 1e-3, 0.1, 0.7]
    skipped, visited = decode_sparsity(q, k, thresholds)
    lengths = torch.tensor([length], dtype=torch.int32)
    for i, threshold in enumerate(thresholds):
        _, stats = sparse_fmha.decode_attention(
            q, k, v, lengths, skip_threshold=threshold, split_tokens=1344, return_stats=True
        )
        assert stats.visited.equal(visited)
        assert stats.skipped.equal(skipped[..., i])


@pytest.mark.parametrize("wanted", [0.25, 0.5, 0.75])
def test_a_wanted_sparsity_is_met_in_decode(wanted):
    """By thresholds of that phase, which those for prefill do not give."""
    found = Calibration()
    for length in (1024, 4096):
        for seed in range(8):
            q, k, _ = along_a_way(length, 8, 2, seed=seed, q_len=1)
            found.add(q, k, causal=True)
    assert {point.phase for point in found.points} == {"decode"}
    length, shares = 2048, []
    lengths = torch.tensor([length], dtype=torch.int32)
    for seed in range(8, 24):
        q, k, v = along_a_way(length, 8, 2, seed=seed, q_len=1)
        _, stats = sparse_fmha.decode_attention(
            q, k, v, lengths, skip_threshold=found.threshold_for(wanted, length, "decode"),
            split_tokens=length, return_stats=True,
        )  # fmt: skip
        shares.append(stats.skipped.sum() / stats.visited.sum())
    assert sum(shares) / len(shares) == pytest.approx(wanted, abs=0.15)
    with pytest.raises(ValueError, match="a fit needs at least two different points of prefill"):
        found.threshold_for(wanted, length)


def test_decode_has_one_token():
    q, k, _ = along_a_way(90)
    with pytest.raises(ValueError, match="q must have one token in decoding, got 90"):
        decode_sparsity(q, k)


NO_EFFECT = [
    (lambda c: Calibration(thresholds=()), "thresholds must have at least one above 0, got []"),
    (
        lambda c: Calibration(thresholds=(0.0,)),
        "thresholds must have at least one above 0, got [0.0]",
    ),
    (
        lambda c: Calibration(thresholds=(0.1, 1.0)),
        "thresholds[1] must be at least 0 and less than 1, got 1.0",
    ),
    (
        lambda c: Calibration([("train", 9, 0.1, 0.5, 1)]),
        "points[0].phase must be prefill or decode, got 'train'",
    ),
    (
        lambda c: Calibration([("decode", -1, 0.1, 0.5, 1)]),
        "points[0].length must be at least 0, got -1",
    ),
    (
        lambda c: Calibration([("decode", 9, -0.1, 0.5, 1)]),
        "points[0].threshold must be finite and at least 0, got -0.1",
    ),
    (
        lambda c: Calibration([("decode", 9, 0.1, math.nan, 1)]),
        "points[0].sparsity must be finite, got nan",
    ),
    (
        lambda c: Calibration([("decode", 0, 0.1, 0.5, 1)]),
        "points[0] must have tiles of at least 1 key, got 1 tiles of 0 keys",
    ),
    (lambda c: c.fit(gamma=-1.0), "gamma must be finite and at least 0, got -1.0"),
    (lambda c: c.fit(gamma=math.inf), "gamma must be finite and at least 0, got inf"),
    (
        lambda c: c.threshold_for(0, 10, "training"),
        "phase must be prefill or decode, got 'training'",
    ),
    (
        lambda c: c.threshold_for(0, 10, gamma=math.nan),
        "gamma must be finite and at least 0, got nan",
    ),
    (lambda c: tile_sparsity(*along_a_way(9)[:2], tile_k=0), "tile_k must be at least 1, got 0"),
]


@pytest.mark.parametrize(("call", "message"), NO_EFFECT)
def test_options_without_an_effect(call, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        call(Calibration(by_the_law(1.0, 5.0)))


WRONG_TYPES = [
    (lambda c: Calibration(thresholds=0.5), "thresholds must be a sequence of numbers, got 0.5"),
    (lambda c: Calibration(thresholds="0.5"), "thresholds[0] must be a number, got '0'"),
    (
        lambda c: Calibration([("decode", "9", 0.1, 0.5, 1)]),
        "points[0].length must be an int, got '9'",
    ),
    (
        lambda c: Calibration([("decode", 9, 0.1, None, 1)]),
        "points[0].sparsity must be a number, got None",
    ),
    (lambda c: c.fit(gamma="x"), "gamma must be a number, got 'x'"),
    (lambda c: c.threshold_for("x", 10), "sparsity must be a number, got 'x'"),
    (lambda c: c.threshold_for(0.5, 10.5), "length must be an int, got 10.5"),
    (
        lambda c: c.collect(None, [1], progress=False),
        "run must be a function of one input, got None",
    ),
]


@pytest.mark.parametrize(("call", "message"), WRONG_TYPES)
def test_wrong_types(call, message):
    with pytest.raises(TypeError, match=f"^{re.escape(message)}"):
        call(Calibration(by_the_law(1.0, 5.0)))


@pytest.mark.parametrize(
    "shares", [(0.5, 0.3), (0.8, 0.2), (0.5, 0.5 - 1e-9)], ids=["falls", "falls fast", "steep"]
)
def test_points_that_follow_no_law(shares):
    """Larger thresholds that skip less; a threshold would be nonsense, or overflow."""
    points = [("prefill", 100, t, s, 10) for t, s in zip((0.01, 0.1), shares, strict=True)]
    with pytest.raises(ValueError, match=r"alpha and beta must be positive, got .* from the 2"):
        Calibration(points).threshold_for(0.4, 1000)
    rising = [("prefill", 100, t, s, 10) for t, s in zip((0.1, 0.01), shares, strict=True)]
    if shares[0] - shares[1] > 0.1:
        assert Calibration(rising).threshold_for(0.4, 1000) > 0


def test_a_picture(tmp_path):
    pyplot = pytest.importorskip("matplotlib.image")
    from sparse_fmha.plot_calibration import plot

    path = tmp_path / "law.png"
    plot(Calibration(by_the_law(0.5, 7.0)), path)
    picture = pyplot.imread(path)
    assert picture.shape[:2] == (340, 520)
    assert picture[..., :3].std() > 0.05
    with pytest.raises(ValueError, match=r"path must end in .png, got"):
        plot(Calibration(by_the_law(0.5, 7.0)), tmp_path / "law.jpg")
    with pytest.raises(TypeError, match="calibration must be a Calibration, got NoneType"):
        plot(None, path)
    with pytest.raises(ValueError, match="two different points of decode"):
        plot(Calibration(by_the_law(0.5, 7.0)), path, "decode")


def test_thresholds_published_for_a_model(tmp_path):
    """The law through them is the published one."""
    name = "Qwen/Qwen3-30B-A3B-Instruct-2507"
    found = Calibration.published(name)
    for phase, alpha, beta in (("prefill", 7.91, 8.62), ("decode", 0.119, 9.86)):
        fit = found.fit(phase)
        assert fit.alpha == pytest.approx(alpha, rel=0.01)
        assert fit.beta == pytest.approx(beta, rel=0.01)
    assert found.threshold_for(0.5, 65536) == pytest.approx(587.18 / 65536, rel=0.02)
    assert Calibration.of(name).points == found.points
    assert Calibration.of(found) is found
    found.save(tmp_path / "a.json")
    assert Calibration.of(str(tmp_path / "a.json")).points == found.points
    with pytest.raises(ValueError, match=r"model must be one of .*, got 'gpt'"):
        Calibration.published("gpt")
