"""The op of HiP's search against its definition, and what it refuses."""

import hip_cases
import pytest
import torch
from layouts import amid, with_gaps

from sparse_fmha._ops import hip_search

OP = torch.ops.sparse_fmha.hip_search
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PLAIN = hip_cases.CASES["plain"].arguments(torch.float32)
PAGED = hip_cases.CASES["pages"].arguments(torch.float32)


@pytest.mark.parametrize("name", hip_cases.CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_definition(name, dtype):
    case = hip_cases.CASES[name]
    given = case.arguments(dtype)
    found = hip_search.search(**given)
    hip_cases.check(found, hip_cases.expected(**given), case.first + case.chunks * case.granule)


def test_one_begin_for_all():
    begin = PLAIN["begin"][:1]
    found = OP(*{**PLAIN, "begin": begin}.values())
    alone = OP(*{**PLAIN, "begin": begin.expand(2, -1).contiguous()}.values())
    for x, y in zip(found, alone, strict=True):
        assert x.equal(y)


def test_fewer_halvings():
    """Chunks are longer then, and of each the first `granule` keys are listed."""
    given = {**PLAIN, "halvings": 2}
    hip_cases.check(OP(*given.values()), hip_cases.expected(**given), 19)
    given = {**PLAIN, "halvings": 0}
    hip_cases.check(OP(*given.values()), hip_cases.expected(**given), 19)


@pytest.mark.parametrize("name", ["plain", "pages"])
def test_strides(name):
    given = hip_cases.CASES[name].arguments(torch.float32)
    found = OP(*given.values())
    for key in ("q", "k"):
        for view in (
            amid(given[key], float("nan")),
            given[key].transpose(1, 2).contiguous().transpose(1, 2),
            *(with_gaps(given[key], d) for d in range(3)),
        ):
            again = OP(*{**given, key: view}.values())
            assert all(x.equal(y) for x, y in zip(again, found, strict=True))
    if name == "pages":
        table = with_gaps(given["page_table"], 2)
        again = OP(*{**given, "page_table": table}.values())
        assert all(x.equal(y) for x, y in zip(again, found, strict=True))


def test_nothing_to_search():
    empty = {**PLAIN, "q": PLAIN["q"][:0], "k": PLAIN["k"][:0], "begin": PLAIN["begin"][:1]}
    columns, counts = OP(*empty.values())
    assert columns.shape == (0, 4, 2, 19)
    assert counts.shape == (0, 4, 2)
    columns, counts = OP(*{**PLAIN, "k": PLAIN["k"][:, :0]}.values())
    assert counts.eq(0).all()
    assert columns.eq(-1).all()
    columns, counts = OP(*{**PAGED, "k": PAGED["k"][:0]}.values())
    assert counts.eq(3).all()  # the first keys; no page exists
    assert columns[..., 3:].eq(-1).all()


@pytest.mark.parametrize("given", [PLAIN, PAGED], ids=["plain", "pages"])
def test_opcheck(given):
    torch.library.opcheck(OP, tuple(given.values()))


def test_without_gradients_and_by_vmap():
    q = PLAIN["q"].clone().requires_grad_()
    columns, _ = OP(*{**PLAIN, "q": q}.values())
    assert not columns.requires_grad
    others = list(PLAIN.values())[1:]
    stacked = torch.stack([PLAIN["q"], -PLAIN["q"]])
    found, _ = torch.vmap(lambda q: OP(q, *others))(stacked)
    assert found[0].equal(columns)
    assert found[1].equal(OP(-PLAIN["q"], *others)[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": PLAIN["k"].double()}, "k must have q's dtype, Float, got Double"),
        ({"k": PLAIN["k"][..., :8]}, "k must have q's head dim, 16, got 8"),
        (
            {"q": PLAIN["q"][..., :12], "k": PLAIN["k"][..., :12]},
            "head dim of q must be",
        ),
        ({"k": PLAIN["k"][:1]}, "k must have q's batch without a page_table, 2, got 1"),
        ({"q": PLAIN["q"][:, :, :3]}, "heads of q must be a multiple of those of k, got 3 and 2"),
        ({"q": PLAIN["q"].int(), "k": PLAIN["k"].int()}, "q must have dtype float16, .*, got Int"),
        ({"begin": PLAIN["begin"].long()}, "begin must have dtype Int, got Long"),
        ({"begin": PLAIN["begin"][:, :1]}, r"begin must have shape \[any, 2\], got \[2, 1\]"),
        ({"begin": PLAIN["begin"].repeat(2, 1)}, "begin must have 1 or q's 2 in its batch"),
        ({"block_q": 4096}, "block_q must be from 1 to 2048, got 4096"),
        ({"sample": 0}, "sample must be from 1 to 1073741824, got 0"),
        ({"chunks": 0}, "chunks must be from 1 to 1073741824, got 0"),
        ({"granule": -1}, "granule must be from 1 to 1073741824, got -1"),
        ({"first": -1}, "first must be from 0 to 1073741824, got -1"),
        ({"halvings": 33}, "halvings must be from 0 to 32, got 33"),
        ({"chunks": 1 << 20, "granule": 1 << 11}, r"chunks \* granule \+ first must be at most"),
        (
            {"page_table": PAGED["page_table"].long()},
            "page_table must have dtype int32, got Long",
        ),
        (
            {"page_table": PAGED["page_table"][0]},
            r"page_table must have shape \[2, 1 or 2, any\], got \[1, 31\]",
        ),
        (
            {"page_table": PAGED["page_table"][..., :1].expand(-1, -1, 1 << 22)},
            r"page_table must have pages for at most 2\^30 keys, got shape \[2, 1, 4194304\]",
        ),
    ],
)
def test_errors(changes, message):
    with pytest.raises(RuntimeError, match=message):
        OP(*{**PLAIN, **changes}.values())
