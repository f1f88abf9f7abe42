"""Numbers that the kernels share: what lies where in a plan's tensor, and log2 e."""

from __future__ import annotations

import math

import triton.language as tl

from pat_hf.kernels.plan import COLUMNS, HEADER, TABLES

LOG2E = tl.constexpr(math.log2(math.e))

# See `Plan` and `Tables`. In the header: a table's offset, behind which is its size.
ORIGIN = tl.constexpr(3)
CLAIMS = tl.constexpr(HEADER - 1)
_AT = {name: 4 + 2 * i for i, name in enumerate(TABLES)}
QUEUES_SIZE = tl.constexpr(_AT["queues"] + 1)
CHUNKS_AT = tl.constexpr(_AT["chunks"])
BLOCKS_AT = tl.constexpr(_AT["blocks"])
ROWS_AT = tl.constexpr(_AT["rows"])
SLOTS_AT = tl.constexpr(_AT["slots"])
MERGE_ROWS_AT = tl.constexpr(_AT["merge_rows"])
MERGE_ROWS_SIZE = tl.constexpr(_AT["merge_rows"] + 1)
MERGE_PTR_AT = tl.constexpr(_AT["merge_ptr"])

SHAPE_COLUMNS = tl.constexpr(COLUMNS["shapes"])
FIRST_QUEUE, END_QUEUE = (tl.constexpr(i) for i in (4, 5))

QUEUE_COLUMNS = tl.constexpr(COLUMNS["queues"])
QUEUE_CHUNK, QUEUE_BLOCK, QUEUE_ROW, QUEUE_END_ROW, QUEUE_PAIRED = map(tl.constexpr, range(5))

BLOCK_COLUMNS = tl.constexpr(COLUMNS["blocks"])
BLOCK_ROW, BLOCK_END_ROW, BLOCK_CHUNK, BLOCK_END_CHUNK, BLOCK_PAIRED = map(tl.constexpr, range(5))

CHUNK_COLUMNS = tl.constexpr(COLUMNS["chunks"])
PLACE, TOKENS, POSITION, FURTHEST, HINDMOST, FOR_ROWS, ROW, SLOT, FLAGS = map(
    tl.constexpr, range(9)
)
# FOR_ROWS is the first row and, from this bit on, the end row.
END_BIT = tl.constexpr(16)
FIRST_MASK = tl.constexpr((1 << 16) - 1)
# FLAGS: bits, and the number of the block's rows times the last one.
BEGINS, UNMASKED, SEEN, PAIRED, PAIR_NEXT, COUNT = (tl.constexpr(1 << i) for i in range(6))
