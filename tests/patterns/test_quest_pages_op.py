"""The op of Quest's choice against its definition, and what it refuses."""

import pytest
import quest_cases
import torch
from layouts import amid, at_byte, with_gaps

from sparse_fmha import patterns
from sparse_fmha._ops import quest_pages

OP = torch.ops.sparse_fmha.quest_pages
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PLAIN = quest_cases.CASES["plain"].arguments(torch.float32)


@pytest.mark.parametrize("name", quest_cases.CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_definition(name, dtype):
    case = quest_cases.CASES[name]
    given = case.arguments(dtype)
    quest_cases.check(quest_pages.choose(**given), quest_cases.expected(**given), case.best)


@pytest.mark.parametrize("q_dtype", DTYPES)
def test_bounds_of_another_dtype(q_dtype):
    given = quest_cases.CASES["plain"].arguments(torch.float32, q_dtype)
    quest_cases.check(OP(*given.values()), quest_cases.expected(**given), 7)


def test_the_same_for_any_number_of_threads():
    given = quest_cases.CASES["many heads"].arguments(torch.bfloat16)
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            found.append(OP(*given.values()))
    finally:
        torch.set_num_threads(threads)
    for x, y in zip(*found, strict=True):
        assert x.equal(y)


def test_strides():
    found = OP(*PLAIN.values())
    for key in ("q", "low", "high"):
        for view in (
            amid(PLAIN[key], float("nan")),
            PLAIN[key].transpose(0, 1).contiguous().transpose(0, 1),
            *(with_gaps(PLAIN[key], d) for d in range(2)),
        ):
            again = OP(*{**PLAIN, key: view}.values())
            assert all(x.equal(y) for x, y in zip(again, found, strict=True))
    again = OP(*{**PLAIN, "page_table": with_gaps(PLAIN["page_table"], 1)}.values())
    assert all(x.equal(y) for x, y in zip(again, found, strict=True))


def test_no_requests_and_no_pages():
    empty = {**PLAIN, "q": PLAIN["q"][:0], "seq_lens": PLAIN["seq_lens"][:0]}
    indices, counts = OP(*{**empty, "page_table": PLAIN["page_table"][:0]}.values())
    assert indices.shape == (0, 2, 8)
    assert counts.shape == (0, 2)
    indices, counts = OP(*{**PLAIN, "low": PLAIN["low"][:0], "high": PLAIN["high"][:0]}.values())
    assert counts.eq(1).all()  # the newest one; no bounds exist
    assert indices[..., 1:].eq(-1).all()


def test_integers_of_64_bits_are_not_cut():
    bounds = patterns.PageBounds(4, 16, 1, 8)
    bounds.write(torch.randn(64, 1, 8), torch.arange(64))
    q = torch.randn(1, 1, 2, 8)
    table = torch.tensor([[2, 2**32 + 1, 0, 3]])
    lengths = torch.tensor([2**33 + 1])
    indices, counts, _ = patterns.quest(q, bounds, lengths, table, budget=64)
    assert indices.tolist() == [[[3, 0, 2, -1, -1]]]
    assert counts.tolist() == [[3]]


def test_opcheck():
    torch.library.opcheck(OP, tuple(PLAIN.values()))
    given = quest_cases.CASES["without a table"].arguments(torch.bfloat16)
    torch.library.opcheck(OP, tuple(given.values()))


def test_without_gradients():
    q = PLAIN["q"].clone().requires_grad_()
    indices, _ = OP(*{**PLAIN, "q": q}.values())
    assert not indices.requires_grad


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"high": PLAIN["high"].double()}, "high must have the dtype and shape of low, Float, "),
        ({"high": PLAIN["high"][1:]}, r"high must have the dtype and shape of low, .*\[121, 2, 64"),
        ({"q": PLAIN["q"][..., :8]}, "low must have q's head dim, 8, got 64"),
        ({"q": PLAIN["q"][..., :12]}, "head dim of q must be"),
        ({"q": PLAIN["q"][:, :3]}, "heads of q must be a multiple of those of low, got 3 and 2"),
        ({"q": PLAIN["q"].int()}, "q must have dtype float16, .*, got Int"),
        ({"q": PLAIN["q"][0]}, "q must have 3 dimensions"),
        ({"seq_lens": PLAIN["seq_lens"].long()}, "seq_lens must have dtype Int, got Long"),
        ({"seq_lens": PLAIN["seq_lens"][:2]}, r"seq_lens must have shape \[3\], got \[2\]"),
        ({"page_table": PLAIN["page_table"].long()}, "page_table must have dtype int32, got Long"),
        (
            {"page_table": PLAIN["page_table"][:2]},
            r"page_table must have shape \[3, any\], got \[2, 40\]",
        ),
        (
            {"page_table": at_byte(PLAIN["page_table"], 2)},
            "page_table must start at a multiple of 4 bytes, the size of its entries",
        ),
        ({"page_table": None}, "low must have a multiple of 3 pages without a page_table, got 122"),
        ({"page": 0}, "page must be from 1 to 1073741824, got 0"),
        ({"best": -1}, "best must be from 0 to 1073741824, got -1"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(RuntimeError, match=message):
        OP(*{**PLAIN, **changes}.values())
