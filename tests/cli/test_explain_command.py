"""`sparse-fmha explain`."""

import pytest
import torch

import sparse_fmha
from sparse_fmha import BlockGrid, cli


def output(capsys, *arguments):
    assert cli.main(["explain", *map(str, arguments)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out


def tokens(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def test_neighborhood(capsys):
    arguments = "neighborhood 12x20 --window 5x7 --stride 2x3 --dilation 2 --causal 0x1 --extra 9"
    arguments += " --heads 4 --heads-kv 2 --batch 3 --head-dim 64 --dtype float16"
    q, k, extra = (tokens(*s, dtype=torch.float16)
                   for s in ((3, 12, 20, 4, 64), (3, 12, 20, 2, 64), (3, 9, 2, 64)))  # fmt: skip
    found = sparse_fmha.explain(
        sparse_fmha.neighborhood_attention, q, k, k, (5, 7), stride=(2, 3), dilation=2,
        causal=(False, True), extra_k=extra, extra_v=extra, arch="sm90",
    )  # fmt: skip
    assert output(capsys, *arguments.split()) == f"{found}\n"
    assert len(str(found).splitlines()) == 4


def test_dense(capsys):
    q = tokens(1, 300, 1, 128)
    for causal in (False, True):
        found = sparse_fmha.explain(sparse_fmha.attention, q, q, q, causal=causal, arch="cpu")
        arguments = ["dense", 300, "--arch", "cpu", *(["--causal", 1] if causal else [])]
        assert output(capsys, *arguments) == f"{found}\n"
        assert output(capsys, *arguments, "--why-not") == f"{found}\n{found.why_not()}\n"
        assert found.why_not().count("\n") == len(found.rejected) - 1 > 0


def test_block_sparse_has_the_density_of_what_causality_leaves(capsys):
    text = output(capsys, "block-sparse", 32768, "--density", 0.25, "--block-kv", 64, "--causal", 1)
    assert "(25.1% of those that causality leaves); " in text
    assert len(text.splitlines()) <= 5
    assert "12.6% of blocks are listed" in text
    grid = BlockGrid(32768, 32768, 128, 64, causal=True)
    assert 0.125 < grid.reachable().double().mean() * 0.251 < 0.127


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_machine_it_runs_on(capsys):
    assert output(capsys, "dense", 8, "--arch", "auto").startswith("dense on cpu: cpu_dense_bfl")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("dense 8x8", "TOKENS must be one number for dense, got 2 axes"),
        ("dense 8 --window 3", "options of dense must be among --causal, got --window"),
        ("dense 0", "TOKENS must be at least 1, got 0"),
        ("dense 8 --heads 0", "--heads must be at least 1, got 0"),
        ("dense 8 --arch sm33", "arch must be cpu or sm90 or sm80 or sm86 for q on meta, got sm33"),
        ("dense 8 --head-dim 12", "head dim of q must be a multiple of 8 from 8 to 256, got 12"),
        ("neighborhood 8", "--window must be given for neighborhood"),
        (
            "neighborhood 8 --window 9",
            "window[0] * dilation[0] must be at most the 8 tokens of that axis, got 9 * 1",
        ),
        ("neighborhood 8 --window 3 --extra -1", "--extra must be at least 0, got -1"),
        ("neighborhood 8xa --window 3", "TOKENS must be numbers such as 30x48x80, got '8xa'"),
        ("block-sparse 80", "--density must be given for block-sparse"),
        ("block-sparse 80 --density 2", "density must be from 0 to 1, got 2.0"),
        ("block-sparse 80 --density 1 --block-q 3", "block_q must be 64 or 128, got 3"),
        (
            "block-sparse 80 --density 1 --causal 0x1",
            "--causal must have one entry for block-sparse, got several",
        ),
    ],
)
def test_errors(capsys, arguments, words):
    assert cli.main(["explain", *arguments.split()]) == 2
    printed = capsys.readouterr()
    assert words in printed.err
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert printed.out == ""
