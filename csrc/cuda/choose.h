// How a call is cut into chunks and blocks of rows: from shapes and a budget alone. Plain C++:
// tested on any machine (python_tests/test_cuda_plan.py).
//
//   block  rows whose fp32 products [block, V] are held at once (portable)
//   chunk  rows whose dz or E [chunk, V] is held until the two gradient products
//
// A further chunk reads and writes dW in fp32 once more, so chunks are as large as the budget
// allows, and of equal size.

#pragma once

#include <algorithm>
#include <cstdint>

namespace bupo::cuda {

struct Shape {
  int64_t tokens, width, vocab;
  int64_t element;  // bytes of an input element
  bool gradients, weight_gradient, half;
};

struct Plan {
  int64_t block = 0, chunk = 0;
  bool accumulate = false;  // dW needs an fp32 accumulator [V, D] beside the workspace
  int64_t bytes = 0;        // of the workspace
};

inline constexpr int64_t kRowMultiple = 128;

// The default budget: a quarter of `free` bytes as a power of two, from 256 MiB to 4 GiB.
inline int64_t budget_within(int64_t free) {
  int64_t budget = int64_t{4} << 30;
  while (budget > free / 4 && budget > int64_t{256} << 20) budget /= 2;
  return budget;
}

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Rows a chunk when `bytes` are there: a multiple of kRowMultiple, or of `multiple` if they are
// that many, and no more than make all chunks equal.
inline int64_t rows_within(int64_t tokens, int64_t bytes, int64_t bytes_a_row,
                           int64_t multiple = kRowMultiple) {
  tokens = std::max<int64_t>(tokens, 1);
  const int64_t fitting = std::max(bytes / bytes_a_row, kRowMultiple);
  const int64_t step = fitting < multiple ? kRowMultiple : multiple;
  const int64_t most = fitting - fitting % step, chunks = (tokens + most - 1) / most;
  return std::min(most, round_up((tokens + chunks - 1) / chunks, kRowMultiple));
}

// Of a chunk's row beside its dz: x times a scale, dx in fp32, statistics and place.
inline int64_t row_bytes(const Shape& s) { return (s.element + 4) * s.width + 64; }

inline bool accumulates(const Shape& s, int64_t chunk) {
  return s.weight_gradient && s.element != 4 && (s.half || s.tokens > chunk);
}

inline constexpr int64_t products_stride(int64_t vocab) { return (vocab + 7) / 8 * 8; }

inline Plan portable_plan(const Shape& s, int64_t budget) {
  Plan p;
  const int64_t stride = products_stride(s.vocab), products = 4 * stride, columns = 4 * s.vocab;
  if (!s.gradients) {
    p.block = p.chunk = rows_within(s.tokens, budget - columns, products);
    p.bytes = p.block * products + columns;
    return p;
  }
  const int64_t of_chunk = s.element * stride + row_bytes(s);
  p.block = std::min(rows_within(s.tokens, budget / 4, products),
                     rows_within(s.tokens, budget - columns, products + of_chunk));
  const int64_t rest = budget - columns - p.block * products;
  p.chunk = std::max(p.block, rows_within(s.tokens, rest, of_chunk));
  p.block = std::min(p.block, rows_within(p.chunk, budget / 4, products));
  p.accumulate = accumulates(s, p.chunk);
  p.bytes = p.block * products + columns + p.chunk * of_chunk;
  return p;
}

// Hopper: E [chunk, stride], whose rows begin on 128 bytes; the rows of hidden by place; partial
// sums and references of every tile of `tile_columns` columns.
inline Plan sm90_plan(const Shape& s, int64_t budget, int64_t tile_columns) {
  constexpr int64_t kClusterRows = 256, kPerPlace = 128, kPartial = 12, kReference = 4;
  const int64_t tiles = (s.vocab + tile_columns - 1) / tile_columns;
  int64_t of_chunk = kPartial * tiles + kPerPlace + s.element * s.width;
  if (s.gradients) of_chunk += s.element * round_up(s.vocab, 64) + kReference * tiles + 4 * s.width;
  const int64_t columns = 8 * tiles * tile_columns;  // bias, and its gradient
  Plan p;
  p.block = p.chunk = rows_within(s.tokens, budget - columns, of_chunk, kClusterRows);
  p.accumulate = accumulates(s, p.chunk);
  p.bytes = p.chunk * of_chunk + columns;
  return p;
}

// One chunk where that takes no more than several and their accumulator would.
template <class PlanOf>
Plan best_plan(const Shape& s, int64_t budget, const PlanOf& plan) {
  const Plan several = plan(s, budget);
  if (!several.accumulate || s.half) return several;
  const Plan one = plan(s, budget + 4 * s.vocab * s.width);
  return one.accumulate ? several : one;
}

}  // namespace bupo::cuda
