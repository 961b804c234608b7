"""The op of SSA's choice against its definition, and what it refuses."""

import pytest
import ssa_cases
import torch
from layouts import amid, with_gaps

from sparse_fmha._ops import ssa_choices

OP = torch.ops.sparse_fmha.ssa_choices
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PLAIN = ssa_cases.CASES["plain"].arguments(torch.float32)


@pytest.mark.parametrize("name", ssa_cases.CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_definition(name, dtype):
    given = ssa_cases.CASES[name].arguments(dtype)
    chosen = ssa_cases.check(ssa_choices.choices(**given), given)
    assert chosen > 0 or given["few"] == 0


def test_a_group_that_is_wider_than_a_thread_has_rows():
    given = ssa_cases.Case(heads=70, q_len=9, batch=1).arguments(torch.float32)
    assert ssa_cases.check(ssa_choices.choices(**given), given)


def test_strides():
    found = OP(*PLAIN.values())
    for key in ("q", "means"):
        for view in (
            amid(PLAIN[key], float("nan")),
            PLAIN[key].transpose(1, 2).contiguous().transpose(1, 2),
            *(with_gaps(PLAIN[key], d) for d in range(3)),
        ):
            assert OP(*{**PLAIN, key: view}.values()).equal(found)


def test_nothing_to_choose():
    empty = {**PLAIN, "q": PLAIN["q"][:0], "means": PLAIN["means"][:, :0]}
    assert OP(*empty.values()).shape == (0, 1, 70, 6)
    found = OP(*{**PLAIN, "means": PLAIN["means"][:, :, :0]}.values())
    assert found[..., :-1].eq(-1).all()
    assert found[0, 0, :, -1].equal(torch.arange(400, 470).div(16, rounding_mode="floor").int())


def test_opcheck():
    torch.library.opcheck(OP, tuple(PLAIN.values()))


def test_without_gradients_and_by_vmap():
    q = PLAIN["q"].clone().requires_grad_()
    found = OP(*{**PLAIN, "q": q}.values())
    assert not found.requires_grad
    others = list(PLAIN.values())[1:]
    stacked = torch.vmap(lambda q: OP(q, *others))(torch.stack([PLAIN["q"], -PLAIN["q"]]))
    assert stacked[0].equal(found)
    assert stacked[1].equal(OP(-PLAIN["q"], *others))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"means": PLAIN["means"].double()}, "means must have q's dtype, Float, got Double"),
        (
            {"means": PLAIN["means"][..., :8]},
            r"means must have shape \[any, 2, any, any, 16\], got \[2, 2, 31, 1, 8\]",
        ),
        (
            {"means": PLAIN["means"][:, :1]},
            r"means must have shape \[any, 2, any, any, 16\], got \[2, 1, 31, 1, 16\]",
        ),
        ({"means": PLAIN["means"][0]}, "means must have 5 dimensions"),
        ({"means": PLAIN["means"][:0]}, "the parts of means must be from 1 to 3, got 0"),
        (
            {"means": PLAIN["means"].repeat(1, 1, 1, 3, 1)},
            "heads of q must be a multiple of those of means, got 4 and 3",
        ),
        (
            {"q": PLAIN["q"].int(), "means": PLAIN["means"].int()},
            "q must have dtype float16, .*, got Int",
        ),
        ({"block": 0}, "block must be from 1 to 1073741824, got 0"),
        ({"at": 1 << 30}, "at must be from -1073741824 to 1073741823, got 1073741824"),
        ({"few": -1}, "few must be from 0 to 1073741824, got -1"),
        ({"scale": float("inf")}, "scale must be a finite number, got inf"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(RuntimeError, match=message):
        OP(*{**PLAIN, **changes}.values())
