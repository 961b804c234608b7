"""`sparse-fmha report`: a block for a report, and faults that it must find."""

from __future__ import annotations

import pytest
import torch

import sparse_fmha
from sparse_fmha import cli
from sparse_fmha.cli import hold_outs, report_command

CALLS = {
    "dense": "attention",
    "causal": "attention",
    "neighborhood": "neighborhood_attention",
    "block_sparse": "block_sparse_attention",
    "stripe": "stripe_attention",
    "decode": "decode_attention",
}


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(hold_outs, "HEAD_DIMS", (64,))


def table(text, first):
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    start = next(n for n, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = []
    for line in lines[start + 2 :]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] in ("case", "what"):
            break
        rows.append(cells)
    return rows


def verdicts(arch="cpu", seed=0):
    """By mechanism and pass."""
    return {
        (of.case.split(",")[0], of.passed): of.verdict
        for of in hold_outs.outcomes(arch, "cpu", seed)
    }


def test_the_block(short, capsys):
    assert cli.main(["report", "--device", "cpu", "--seed", "3"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("### sparse_fmha on ")
    facts = dict(table(text, "what"))
    assert sparse_fmha.__version__ in facts["sparse_fmha"]
    assert torch.__version__ in facts["torch"]
    rows = table(text, "case")
    assert "Hold-outs, seed 3: 11 of 11 are right." in text
    found = {(row[0].split(",")[0], row[1]) for row in rows if len(row) == 6}
    assert found == {(m, p) for m in CALLS for p in ("forward", "backward") if m != "decode"} | {
        ("decode", "decode")
    }
    names = {row["name"] for row in sparse_fmha.kernels()}
    assert {name for row in rows if len(row) == 6 for name in row[2].split(", ")} <= names
    times = table(text[text.index("Times of whole calls") :], "case")
    assert [row[0] for row in times] == ["dense", "causal", "neighborhood", "block lists"]
    assert all(float(number) > 0 for row in times for number in row[1:])


def test_there_is_a_problem_of_each_mechanism(short):
    assert {mechanism for mechanism, _ in verdicts()} == set(hold_outs.MECHANISMS) == set(CALLS)
    assert set(CALLS) - {"decode"} == {
        row["mechanism"] for row in sparse_fmha.kernels() if row["pass"] == "forward"
    }


@pytest.mark.parametrize("mechanism", CALLS)
@pytest.mark.parametrize("fault", ["a value", "lse", "NaN", "gradients", "raises"])
def test_a_fault_is_found(short, monkeypatch, mechanism, fault):
    """In the mechanisms of this function, and in no other."""
    name = CALLS[mechanism]
    right = getattr(sparse_fmha, name)

    def wrong(q, *args, **options):
        if fault == "raises":
            raise RuntimeError("CUDA error:\n  an illegal | access")
        out, lse = right(q, *args, **options)
        size = out.detach().abs().max()
        if fault == "a value":
            out = torch.cat([out[:, :-1], out[:, -1:] + 1e-4 * size], 1)
        elif fault == "NaN":
            out = torch.cat([out[:, :-1], out[:, -1:] * torch.nan], 1)
        elif fault == "lse":
            lse = lse + 1e-4
        elif out.requires_grad:
            out = out + 1e-3 * (q - q.detach())
        return out, lse

    monkeypatch.setattr(sparse_fmha, name, wrong)
    found = verdicts()
    bad = {key for key, verdict in found.items() if verdict != "ok"}
    own = {m for m, call in CALLS.items() if call == name}
    passes = {
        "gradients": {"backward"},
        "lse": {"forward", "decode"},
        "a value": {"forward", "decode"},
    }
    expected = {key for key in found if key[0] in own and key[1] in passes.get(fault, {key[1]})}
    assert bad == expected
    if fault == "raises":
        assert {found[key] for key in bad} == {"raised CUDA error: an illegal | access"}


def test_faults_end_in_a_status_and_a_line(short, monkeypatch, capsys):
    right = sparse_fmha.stripe_attention
    monkeypatch.setattr(
        sparse_fmha, "stripe_attention", lambda *a, **k: [1.01 * x for x in right(*a, **k)]
    )
    assert cli.main(["report", "--device", "cpu"]) == 1
    text, line = capsys.readouterr()
    assert line == "error: 2 of 11 hold-outs are wrong; the table has them\n"
    assert "9 of 11 are right" in text
    assert text.count("WRONG, at most ") == 2


@pytest.mark.parametrize("seed", range(4))
def test_other_seeds(short, seed):
    assert set(verdicts(seed=seed).values()) == {"ok"}


def test_a_seed_draws_the_same_again(short):
    first, again, other = (
        hold_outs.Draw(seed, 64, "cpu", torch.float32).stripe() for seed in (1, 1, 2)
    )
    assert first.q.equal(again.q)
    assert first.visible.equal(again.visible)
    assert first.q.shape != other.q.shape or not first.q.equal(other.q)


def test_a_gpu_that_runs_nothing_says_why(monkeypatch):
    """What never ran is allowed, and no longer afterwards."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA L4")
    from sparse_fmha import _C

    monkeypatch.setattr(_C, "why_no_image", lambda *of: f"{of} runs none")
    with pytest.raises(RuntimeError, match=r"'sm86', 'NVIDIA L4', 8, 9\) runs none"):
        report_command.run(device=None, seed=0)
    with pytest.raises(RuntimeError, match="never run"):
        _C.arch_for_call(8, 9)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu(capsys):
    assert cli.main(["report", "--device", "cuda"]) == 1
    assert capsys.readouterr().err.startswith("error: --device cuda: torch ")
