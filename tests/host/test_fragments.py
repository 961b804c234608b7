"""The backward kernels of sm80 on the host: what lanes load from swizzled tiles and multiply.

Loads (ldmatrix) and products (mma.m16n8k16) are simulated from the PTX ISA, in integers.
"""

import numpy as np
import pytest

from sparse_fmha import _C

LANES = range(32)
fragments = _C.fragments


def store(tile, dim):
    """A tile as the kernels lay it out: bytes of a 16-bit element are its index times 2."""
    rows, columns = tile.shape
    memory = np.full(rows * dim, 10**6, dtype=np.int64)
    for row in range(rows):
        for chunk in range(columns // 8):
            at = fragments.swizzled(dim, row, chunk)
            memory[at : at + 8] = tile[row, 8 * chunk : 8 * chunk + 8]
    return memory


def load(memory, addresses, transposed=False):
    """[lane, register, half]: lanes 8m to 8m + 7 have the rows' addresses of matrix m."""
    assert all(a % 16 == 0 for a in addresses)
    matrices = np.array([memory[a // 2 : a // 2 + 8] for a in addresses]).reshape(4, 8, 8)
    if transposed:
        matrices = matrices.transpose(0, 2, 1)
    return np.array([matrices[:, lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2] for lane in LANES])


def multiply(a, b):
    """[lane, i] of 16 x 8 sums; a has four registers of a lane, b two."""
    left, right = np.zeros((16, 16), dtype=np.int64), np.zeros((16, 8), dtype=np.int64)
    for lane in LANES:
        g, t = divmod(lane, 4)
        for r in range(4):
            left[g + 8 * (r % 2), 2 * t + 8 * (r // 2) : 2 * t + 8 * (r // 2) + 2] = a[lane, r]
        for r in range(2):
            right[2 * t + 8 * r : 2 * t + 8 * r + 2, g] = b[lane, r]
    sums = left @ right
    return np.array(
        [[sums[lane // 4 + 8 * (i // 2), lane % 4 * 2 + i % 2] for i in range(4)] for lane in LANES]
    )


def addresses(dim, chunk_of, first_row=0):
    at = [chunk_of(lane) for lane in LANES]
    return [2 * (first_row * dim + fragments.swizzled(dim, row, chunk)) for row, chunk in at]


def advanced(base, step, rows=0):
    return [fragments.advanced(a, step) + rows for a in base]


def scores_of(left, right, dim, depth):
    """[lane, column / 8, i] of 16 rows, step by step as multiply_rows()."""
    a_base, b_base = addresses(dim, fragments.left_chunk), addresses(dim, fragments.right_chunk)
    sums = np.zeros((32, 4, 4), dtype=np.int64)
    for s in range(depth // 16):
        a = load(left, advanced(a_base, s))
        for n in range(2):
            b = load(right, advanced(b_base, s, n * 16 * dim * 2))
            for half in range(2):
                sums[:, 2 * n + half] += multiply(a, b[:, 2 * half : 2 * half + 2])
    return sums


def matrix_of(sums):
    """From [lane, column / 8, i] to rows and columns."""
    matrix = np.zeros((16, 8 * sums.shape[1]), dtype=np.int64)
    for lane in LANES:
        for n in range(sums.shape[1]):
            for i in range(4):
                matrix[lane // 4 + 8 * (i // 2), 8 * n + lane % 4 * 2 + i % 2] = sums[lane, n, i]
    return matrix


def drawn(*shape):
    return np.random.default_rng(sum(shape)).integers(-5, 6, shape)


@pytest.mark.parametrize(("dim", "depth"), [(64, 64), (128, 96), (128, 128), (256, 256)])
def test_scores(dim, depth):
    left, right = drawn(16, depth), drawn(32, depth)
    found = matrix_of(scores_of(store(left, dim), store(right, dim), dim, depth))
    np.testing.assert_array_equal(found, left @ right.T)


@pytest.mark.parametrize("columns", [32, 64, 128])
@pytest.mark.parametrize(("dim", "depth"), [(64, 64), (128, 96), (128, 128), (256, 256)])
@pytest.mark.parametrize("part", [0, 1])
def test_sums(columns, dim, depth, part):
    """The factor through shared memory; the half of the columns that a warp has."""
    factor, tile = drawn(16, columns), drawn(columns, depth)
    exchanged = np.zeros(16 * columns, dtype=np.int64)
    for lane in LANES:
        for n in range(columns // 8):
            for r in range(2):
                row, column = lane // 4 + 8 * r, 8 * n + lane % 4 * 2
                at = fragments.swizzled(columns, row, n) + lane % 4 * 2
                exchanged[at : at + 2] = factor[row, column : column + 2]
    memory = store(tile, dim)
    a_base = addresses(columns, fragments.left_chunk)
    b_base = addresses(dim, fragments.left_chunk)
    width = depth // 2
    first = part * (width // 16)
    sums = np.zeros((32, width // 8, 4), dtype=np.int64)
    for s in range(columns // 16):
        a = load(exchanged, advanced(a_base, s))
        for n in range(width // 16):
            if width % 64 == 0:  # as in multiply_columns()
                base = advanced(b_base, n, first * 32)
            else:
                base = advanced(b_base, first + n)
            b = load(memory, [x + s * 16 * dim * 2 for x in base], transposed=True)
            for half in range(2):
                sums[:, 2 * n + half] += multiply(a, b[:, 2 * half : 2 * half + 2])
    np.testing.assert_array_equal(
        matrix_of(sums), factor @ tile[:, part * width : (part + 1) * width]
    )


@pytest.mark.parametrize("queries", [32, 64])
@pytest.mark.parametrize(("dim", "depth"), [(64, 64), (128, 128)])
def test_both_factors_transposed(queries, dim, depth):
    """dQ of 16 queries and 32 columns, as AddDq::multiply(): the factors are keys by queries."""
    dscores, keys = drawn(32, queries), drawn(32, depth)
    left, right = store(dscores, queries), store(keys, dim)
    for block in range(queries // 16):
        for column in range(0, depth, 32):
            a_base = advanced(addresses(queries, fragments.right_chunk), block)
            b_base = advanced(addresses(dim, fragments.left_chunk), column // 16)
            sums = np.zeros((32, 4, 4), dtype=np.int64)
            for s in range(2):
                a = load(left, [x + s * 16 * queries * 2 for x in a_base], transposed=True)
                for n in range(2):
                    b = load(right, advanced(b_base, n, s * 16 * dim * 2), transposed=True)
                    for half in range(2):
                        sums[:, 2 * n + half] += multiply(a, b[:, 2 * half : 2 * half + 2])
            expected = dscores[:, 16 * block : 16 * block + 16].T @ keys[:, column : column + 32]
            np.testing.assert_array_equal(matrix_of(sums), expected)


def test_sums_of_scores_are_a_factor_register_by_register():
    left, right, dim = drawn(16, 64), drawn(32, 64), 64
    sums = scores_of(store(left, dim), store(right, dim), dim, 64)
    scores = left @ right.T
    for s in range(2):
        registers = np.array(
            [
                [sums[lane, 2 * s + r // 2, 2 * (r % 2) : 2 * (r % 2) + 2] for r in range(4)]
                for lane in LANES
            ]
        )
        expected = load(store(scores, 32), advanced(addresses(32, fragments.left_chunk), s))
        np.testing.assert_array_equal(registers, expected)


@pytest.mark.parametrize("dim", [32, 64, 128, 256])
@pytest.mark.parametrize("chunk_of", ["left_chunk", "right_chunk"])
def test_loads_and_stores_have_no_bank_conflicts(dim, chunk_of):
    base = addresses(dim, getattr(fragments, chunk_of))
    for step in range(dim // 16):
        at = advanced(base, step)
        for matrix in range(4):
            assert len({a // 16 % 8 for a in at[8 * matrix : 8 * matrix + 8]}) == 8
    for chunk in range(dim // 8):
        banks = {(fragments.swizzled(dim, lane // 4, chunk) // 2 + lane % 4) % 32 for lane in LANES}
        assert len(banks) == 32


@pytest.mark.parametrize("dim", [32, 64, 128, 256])
def test_every_chunk_has_a_place_of_its_own(dim):
    places = {fragments.swizzled(dim, r, c) for r in range(16) for c in range(dim // 8)}
    assert places == set(range(0, 16 * dim, 8))
