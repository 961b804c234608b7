"""Groups of rows and tiles of keys of neighborhoods that skip, in the order of a group's walk."""

import itertools

import pytest
import torch

_C = pytest.importorskip("sparse_fmha._C")


def neighborhood_tiles(grid, window, extra, stride=1, dilation=1, causal=False, head_dim=128):
    """Halves of the 128-row boxes, and the key boxes in the order of the walk."""
    axes = len(grid)

    def triple(value, filler):
        value = value if isinstance(value, tuple) else (value,) * axes
        return (filler,) * (3 - axes) + tuple(value)

    tiles_of = _C.tiles
    grid3, dilation3 = triple(grid, 1), triple(dilation, 1)
    causal3 = tuple(int(c) for c in triple(causal, False))
    problem = grid3, triple(window, 1), triple(stride, 1), dilation3, causal3
    tile_k = 128 if head_dim <= 128 else 32  # of the kernel that skips
    shape_q, shape_k = tiles_of.choose(
        problem, 128, tile_k, tiles_of.max_box(grid3, dilation3), tiles_of.costs(head_dim)
    )
    walk = _C.walks.Neighborhood(*problem, shape_q, shape_k)
    length = torch.Size(grid).numel()
    groups = torch.full((length,), -1)
    tiles = []

    def tokens(residue, origin, shape):
        """Token numbers of a box in row-major order; None where there is none."""
        for offset in itertools.product(*(range(n) for n in shape)):
            at = walk.token(residue, tuple(o + i for o, i in zip(origin, offset, strict=True)))
            inside = all(c < n for c, n in zip(at, grid3, strict=True))
            yield (at[0] * grid3[1] + at[1]) * grid3[2] + at[2] if inside else None

    whole = extra // tile_k * tile_k
    for i in range(walk.num_query_tiles()):
        residue, origin = walk.query_tile(i)
        ranks = torch.full((length + extra,), -1)
        ranks[length + whole :] = 0
        boxes = walk.walk(i)[2]
        for rank, box in enumerate(boxes):
            places = [t for t in tokens(residue, box, shape_k) if t is not None]
            ranks[places] = rank + 1
        for n in range(0, whole, tile_k):
            ranks[length + n : length + n + tile_k] = len(boxes) + 1 + n // tile_k
        members = list(tokens(residue, origin, shape_q))
        for half in (members[:64], members[64:]):
            there = [t for t in half if t is not None]
            if there:
                groups[there] = len(tiles)
                tiles.append(ranks)
    assert (groups >= 0).all()
    return groups, torch.stack(tiles)[None]
