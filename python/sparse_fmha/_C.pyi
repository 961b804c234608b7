# Types of csrc/bindings. A test compares names and arguments with the compiled module; names that
# begin with an underscore are here alone.

from typing import Any

from typing_extensions import Buffer

from sparse_fmha._build import BuildInfo, KernelRow

_Triple = tuple[int, int, int]
_Problem = tuple[
    _Triple, _Triple, _Triple, _Triple, _Triple
]  # grid, window, stride, dilation, causal
_Shape = tuple[_Triple, _Triple]  # queries, keys
_Counts = tuple[int, int, int]  # stages of both streams, of the first, of the second
_Costs = tuple[float, float, float]  # us of a full tile, a partial tile, a query tile
_TileCount = tuple[int, int, int, int]  # query tiles, visited, full, worst
_Tile = tuple[_Triple, _Triple]  # residue, origin
_Strides = tuple[int, int, int, int, int]  # of batch, head, T, Y, X
_ScoreKernels = dict[str, Any]  # name, arch, dtype, head_dim
_Visits = tuple[int, int, list[_Triple]]  # partial, full, origins

def kernel_table() -> list[KernelRow]: ...
def score_kernel_table() -> list[_ScoreKernels]: ...
def find_kernel(
    arch: str,
    mechanism: str,
    dtype: str,
    head_dim: int,
    skips: bool = False,
    pass_: str = "forward",  # its name is `pass`, a keyword of Python
    key_bias: bool = False,
    tile_q: int = 0,
    packed: bool = False,
    value_dim: int = 0,
    dilated: bool = False,
) -> KernelRow: ...
def gpu_archs() -> dict[str, list[tuple[int, int]]]: ...
def arch_of_capability(major: int, minor: int) -> str: ...
def arch_for_call(major: int, minor: int) -> str: ...
def arch_status(arch: str) -> dict[str, str]: ...
def arch_override() -> str | None: ...
def set_arch_override(arch: str | None) -> str | None: ...
def cpu_isas() -> list[str]: ...
def set_cpu_isa(name: str) -> str: ...
def allow_untested(allow: bool) -> None: ...
def why_no_image(
    arch: str,
    gpu: str,
    major: int,
    minor: int,
    driver: int | None = None,
    archs: list[str] | None = None,
    images: list[str] | None = None,
    toolkit: int | None = None,
) -> str: ...
def driver_version() -> int: ...
def build_info() -> BuildInfo: ...
def row_times(
    causal: bool,
    head_dim: int,
    instances: int,
    len_q: int,
    len_kv: int,
    multiprocessors: int = 132,
) -> list[tuple[int, float, float]]: ...
def set_tile_q_override(tile_q: int) -> int: ...
def stream_places(stages: _Counts) -> list[tuple[int, int]]: ...
def consumer_places(stages: _Counts, consumer: int) -> list[tuple[int, bool]]: ...

class QueryTileLists:
    def __init__(
        self,
        len_q: int,
        len_kv: int,
        block_q: int,
        block_kv: int,
        causal: bool,
        tile_k: int,
        q_tile: int,
        counts: Buffer,
        indices: Buffer,
        width: int,
        partial_counts: Buffer,
        partial_indices: Buffer,
        bits: Buffer,
        partial_width: int,
    ) -> None: ...
    @property
    def stages(self) -> _Counts: ...
    def origins(self, stream: int, stage: int) -> list[int]: ...
    def seen(self, stream: int, stage: int, consumer: int) -> tuple[bool, list[list[int]]]: ...
    def kept(self, consumer: int, skipped: list[int]) -> list[tuple[int, list[int]]]: ...

class ListsOfKeys:
    def __init__(
        self,
        len_q: int,
        len_kv: int,
        block_q: int,
        block_kv: int,
        causal: bool,
        counts: Buffer,
        indices: Buffer,
        width: int,
        partial_counts: Buffer,
        partial_indices: Buffer,
        bits: Buffer,
        partial_width: int,
    ) -> None: ...
    def steps(self, part: int) -> list[tuple[int, bool]]: ...
    def seen(self, part: int, step: int) -> list[int]: ...

def kept_blocks(
    len_q: int, len_kv: int, causal: bool, tile: int, skipped: list[list[int]]
) -> list[list[int]]: ...

class StripesOfKeys:
    def __init__(
        self,
        len_q: int,
        len_kv: int,
        block_q: int,
        range_size: int,
        causal: bool,
        counts: Buffer,
        columns: Buffer,
        width: int,
        range_counts: Buffer,
        range_starts: Buffer,
        range_width: int,
    ) -> None: ...
    def steps(self, part: int) -> list[tuple[int, bool]]: ...
    def seen(self, part: int, step: int) -> list[int]: ...

class QueryTileStripes:
    def __init__(
        self,
        len_q: int,
        len_kv: int,
        block_q: int,
        range_size: int,
        causal: bool,
        tile_k: int,
        q_tile: int,
        counts: list[int],
        columns: list[list[int]],
        range_counts: list[int],
        ranges: list[list[int]],
    ) -> None: ...
    @property
    def stages(self) -> _Counts: ...
    def keys(self, stream: int, stage: int, consumer: int) -> tuple[list[int], bool]: ...
    def limit(self, query: int) -> int: ...

def gathered_parts(
    batch: int, heads_q: int, heads_kv: int, head_dim: int, copies: int, shared_heads: bool
) -> list[tuple[int, int, int, int]]: ...
def gathered_blocks(
    len_q: int, len_kv: int, causal: bool, rows: int, first_row: int, tokens: list[int]
) -> tuple[list[int], list[int]]: ...

class _Decode:
    class Parts:
        def __init__(self, units: int, workers: int, short_parts: int) -> None: ...
        def count(self) -> int: ...
        def begin(self, part: int) -> int: ...
        def part_of(self, unit: int) -> int: ...

    @staticmethod
    def short_parts(rows: int) -> int: ...
    @staticmethod
    def most_count(most_units: int, workers: int, short_parts: int) -> int: ...
    @staticmethod
    def each_unit(units: int) -> _Decode.Parts: ...
    @staticmethod
    def place(part: int, begins: bool) -> int: ...
    @staticmethod
    def places(parts: int) -> int: ...
    @staticmethod
    def group_of(first: list[int], unit: int) -> int: ...
    @staticmethod
    def tiles(
        length: int,
        capacity: int,
        len_q: int,
        group: int,
        causal: bool,
        window: int,
        split: int,
        span: tuple[int, int] | None,
        block: int,
        counts: list[int] | None,
        width: int,
    ) -> list[tuple[int, int]]: ...
    @staticmethod
    def few_rows_blocks(
        batch: int,
        heads_kv: int,
        len_q: int,
        group: int,
        capacity: int,
        page: int = 0,
        block: int = 0,
        width: int = 0,
        tokens: bool = False,
        by_query: bool = False,
        spans: bool = False,
        tree: bool = False,
        split: int = 0,
    ) -> int: ...

class _Fragments:
    @staticmethod
    def left_chunk(lane: int) -> tuple[int, int]: ...
    @staticmethod
    def right_chunk(lane: int) -> tuple[int, int]: ...
    @staticmethod
    def swizzled(dim: int, row: int, chunk: int) -> int: ...
    @staticmethod
    def advanced(address: int, step: int) -> int: ...

class _Tiles:
    @staticmethod
    def why_two_kernels(problem: _Problem, extra: int) -> str | None: ...
    @staticmethod
    def why_two_kernels_for_blocks(block_kv: int) -> str | None: ...
    @staticmethod
    def why_not_gathered(block_q: int, listed: int, len_kv: int) -> str | None: ...
    @staticmethod
    def axis(
        problem: _Problem, axis: int, residue: int, shape: _Shape, static: bool, q_origin: int
    ) -> tuple[int, int, int, int]: ...
    @staticmethod
    def count(problem: _Problem, shape: _Shape, static: bool = False) -> _TileCount: ...
    @staticmethod
    def groups(
        problem: _Problem, shape: _Shape, static: bool = False
    ) -> list[tuple[int, int, int]]: ...
    @staticmethod
    def costs(head_dim: int) -> _Costs: ...
    @staticmethod
    def max_box(grid: _Triple, dilation: _Triple) -> _Triple: ...
    @staticmethod
    def one_launch_box(grid: _Triple, dilation: _Triple) -> _Triple: ...
    @staticmethod
    def launches(grid: _Triple, dilation: _Triple) -> int: ...
    @staticmethod
    def skip_sizes(
        problem: _Problem, extra_len: int, head_dim: int, value_dim: int
    ) -> tuple[int, int]: ...
    @staticmethod
    def class_map(
        problem: _Problem, heads: int, batch: int, strides: _Strides
    ) -> tuple[int, int, _Strides, bool]: ...
    @staticmethod
    def class_kind(problem: _Problem, residue: _Triple) -> tuple[int, _Triple]: ...
    @staticmethod
    def order(problem: _Problem, shape: _Shape, blocks: int) -> list[int]: ...
    @staticmethod
    def next_in_turns(index: int, blocks: int) -> int: ...
    @staticmethod
    def boxes(rows: int, max_extent: _Triple) -> list[_Triple]: ...
    @staticmethod
    def rank(
        problem: _Problem,
        rows_q: int,
        rows_k: int,
        max_extent: _Triple,
        costs: _Costs,
        static: bool = False,
    ) -> list[tuple[_Triple, _Triple, _TileCount, float]]: ...
    @staticmethod
    def choose(
        problem: _Problem, rows_q: int, rows_k: int, max_extent: _Triple, costs: _Costs
    ) -> _Shape: ...

class _Walk:
    def num_query_tiles(self) -> int: ...
    def query_tile(self, index: int) -> _Tile: ...
    def num_key_tiles(self) -> int: ...
    def key_tile(self, index: int) -> _Tile: ...
    def walk(self, query_tile: int) -> _Visits: ...
    def walk_transposed(self, key_tile: int) -> _Visits: ...
    def token(self, residue: _Triple, position: _Triple) -> _Triple: ...
    def visible(
        self, residue: _Triple, queries: list[_Triple], keys: list[_Triple]
    ) -> list[list[bool]]: ...

class _Walks:
    class Dense(_Walk):
        def __init__(self, len_q: int, len_kv: int, tile_q: int, tile_k: int) -> None: ...

    class Causal(_Walk):
        def __init__(self, len_q: int, len_kv: int, tile_q: int, tile_k: int) -> None: ...

    class Neighborhood(_Walk):
        def __init__(
            self,
            grid: _Triple,
            window: _Triple,
            stride: _Triple,
            dilation: _Triple,
            causal: _Triple,
            tile_q: _Triple,
            tile_k: _Triple,
        ) -> None: ...

# Submodules.
decode: _Decode
fragments: _Fragments
tiles: _Tiles
walks: _Walks
