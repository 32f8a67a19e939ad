"""Predicts the LM-head ops on an H200 from clocks and bytes: `python bench/scan_model.py`.

None of our kernels has been measured for it. Two rates have: a large bf16 product reaches about 790
TFLOP/s on an H200, and a copy about 4.3 TB/s (read and written bytes counted). The rest is
arithmetic:

    time = products + what their epilogues show + bytes of the other kernels / copy rate + launches

A 128-row tile of C columns keeps a tensor core busy for 128 C D 2 / 4096 clocks. An epilogue of e
clocks adds to each tile where both warpgroups run it at the same time (cooperative), and only once,
at the end, where one multiplies meanwhile (ping-pong). A cuBLAS product, the unit of every ratio,
has one of 900 clocks. A grid takes as long as its busiest cluster. The library's products dX and dW
count as bare ones. The model leaves out L2, and power: after a rest, a product runs faster.
"""

import dataclasses
import math

from rows import aligned, table

SHAPES = (
    (8192, 4096, 151936),
    (8192, 2560, 151936),
    (8192, 4096, 128256),
    (32768, 4096, 151936),
    (32768, 2560, 151936),
    (1024, 4096, 151936),
    (256, 4096, 151936),
)
FLOPS, BYTES = 790e12, 4.3e12  # a second, of a large bf16 product and of a copy
CLUSTERS, TENSOR_FLOPS_A_CLOCK, LIBRARY_EPILOGUE, FILL = 66, 4096, 900, 1500
LAUNCH, WAIT = 3e-6, 25e-6
"""seconds of a small kernel, and of a bubble in which the host waits and then launches"""


@dataclasses.dataclass(frozen=True)
class Design:
    """What differs between states of the sources. The defaults are of the cooperative kernel."""

    name: str
    columns: int = 256  # of a tile
    tiles_a_unit: int = 1
    epilogue: tuple[int, int] = (2700, 3450)  # clocks without and with E stored
    hidden: bool = False  # behind the other warpgroup's product
    budget: float = 2**32
    row_bytes_beside_e: int = 10000  # at D = 0
    row_bytes_a_width: int = 6
    sums_again: int = 8  # bytes an entry of dW that a further chunk reads and writes
    scales: bool = False  # backward multiplies dW and dX by 1
    waits_late: bool = False
    small_kernels: int = 11  # of a chunk


COOPERATIVE = Design("cooperative 128 x 256")
PINGPONG = Design("ping-pong 128 x 192", columns=192, epilogue=(2500, 3020), hidden=True)
BEFORE = Design(
    "before: cooperative 128 x 256, units of 4 tiles, slices",
    tiles_a_unit=4,
    epilogue=(3000, 4150),
    budget=2**30 * 15 / 16,
    row_bytes_beside_e=6500,
    row_bytes_a_width=8,
    sums_again=16,
    scales=True,
    waits_late=True,
    small_kernels=15,
)
DESIGNS = (BEFORE, COOPERATIVE, PINGPONG)


def tile_clocks(columns: int, width: int) -> float:
    """Of the product of one tile of 128 rows."""
    return 128 * columns * width * 2 / TENSOR_FLOPS_A_CLOCK


def library_clocks(tokens: int, width: int, vocab: int) -> float:
    """A bare product of 128 x 256 tiles."""
    tiles = math.ceil(tokens / 128) * math.ceil(vocab / 256)
    return math.ceil(tiles / (2 * CLUSTERS)) * (tile_clocks(256, width) + LIBRARY_EPILOGUE) + FILL


def scan_clocks(d: Design, tokens: int, width: int, vocab: int, stored: float) -> float:
    """stored: the share of the rows that write E."""
    blocks, tiles = math.ceil(tokens / 256), math.ceil(vocab / d.columns)
    units = math.ceil(blocks * math.ceil(tiles / d.tiles_a_unit) / CLUSTERS) * d.tiles_a_unit
    epilogue = d.epilogue[0] + (d.epilogue[1] - d.epilogue[0]) * stored
    exposed = epilogue if d.hidden else units * epilogue
    return units * tile_clocks(d.columns, width) + exposed + FILL


def chunks(d: Design, tokens: int, width: int, vocab: int) -> int:
    a_row = 2 * vocab + d.row_bytes_beside_e + d.row_bytes_a_width * width
    if tokens * a_row <= d.budget + 4 * vocab * width:  # then there is no accumulator
        return 1
    return math.ceil(tokens / (d.budget // a_row // 128 * 128))


def product_seconds(tokens: float, width: int, vocab: int) -> float:
    return 2 * tokens * width * vocab / FLOPS


def policy_loss(d: Design, tokens: int, width: int, vocab: int, live: float = 1.0) -> float:
    """Forward and backward over three bare products."""
    bare = product_seconds(tokens, width, vocab)
    forward = scan_clocks(d, tokens, width, vocab, live) / library_clocks(tokens, width, vocab)
    count = chunks(d, tokens, width, vocab)
    rows = tokens * width
    moved = 2 * rows + 6 * rows  # dX zeroed; hidden placed
    moved += live * rows * (4 + 2 + 4)  # dX gathered up, x scaled
    moved += tokens * math.ceil(vocab / d.columns) * (24 + 4 * live)  # partials, references
    if count > 1:
        moved += (count - 1) * d.sums_again * vocab * width + 6 * vocab * width
    if d.scales:
        moved += 4 * (vocab * width + rows)
    seconds = bare * (forward + 2 * live) + moved / BYTES
    seconds += count * (d.small_kernels * LAUNCH + WAIT * d.waits_late)
    return seconds / (3 * bare)


def forward(d: Design, tokens: int, width: int, vocab: int) -> float:
    """Over one bare product."""
    bare = product_seconds(tokens, width, vocab)
    ratio = scan_clocks(d, tokens, width, vocab, 0) / library_clocks(tokens, width, vocab)
    moved = 6 * tokens * width + tokens * math.ceil(vocab / d.columns) * 24
    return ratio + (moved / BYTES + 5 * LAUNCH) / bare


def predictions() -> str:
    titles = ("N, D, V", "design", "forward", "forward and backward", "live 0.25", "chunks")
    cells = [
        [
            *(", ".join(map(str, shape)), design.name, f"{forward(design, *shape):.3f}"),
            *(f"{policy_loss(design, *shape, live=live):.3f}" for live in (1.0, 0.25)),
            str(chunks(design, *shape)),
        ]
        for shape in SHAPES
        for design in DESIGNS
    ]
    return table(titles, cells, 2)


if __name__ == "__main__":
    print("PREDICTED, not measured: ratios to one bare product (forward) and to three.\n")
    print(aligned(predictions()))
