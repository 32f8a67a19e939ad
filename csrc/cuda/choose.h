// How a call is cut into chunks of rows: from shapes and a budget alone. Plain C++: tested on any
// machine (python_tests/test_cuda_plan.py). A further chunk reads and writes dW in fp32 once more,
// so chunks are as large as the budget allows, and of equal size.

#pragma once

#include <algorithm>

#include "../args.h"

namespace bupo::cuda {

struct Shape {
  int64_t tokens, width, vocab;
  int64_t element;  // bytes of an input element
  bool gradients, weight_gradient, half;
};

struct Plan {
  int64_t chunk = 0;
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

inline bool accumulates(const Shape& s, int64_t chunk) {
  return s.weight_gradient && s.element != 4 && (s.half || s.tokens > chunk);
}

inline constexpr int64_t products_stride(int64_t vocab) { return (vocab + 7) / 8 * 8; }

// Of a chunk's row: products in fp32, dz in their place; x; dx in fp32; statistics and place.
inline Plan portable_plan(const Shape& s, int64_t budget) {
  int64_t of_row = 4 * products_stride(s.vocab) + s.element * s.width + 128;
  if (s.gradients) of_row += 4 * s.width;
  const int64_t columns = 8 * s.vocab;  // bias, and its gradient
  const int64_t chunk = rows_within(s.tokens, budget - columns, of_row);
  return {chunk, accumulates(s, chunk), chunk * of_row + columns};
}

// Hopper: E, whose rows begin on 128 bytes, in place of products and dz; partial sums and
// references of every tile of `tile_columns` columns.
inline Plan sm90_plan(const Shape& s, int64_t budget, int64_t tile_columns) {
  constexpr int64_t kClusterRows = 256, kPartial = 12, kReference = 4;
  const int64_t tiles = (s.vocab + tile_columns - 1) / tile_columns;
  int64_t of_row = kPartial * tiles + s.element * s.width + 128;
  if (s.gradients) of_row += s.element * round_up(s.vocab, 64) + kReference * tiles + 4 * s.width;
  const int64_t columns = 8 * tiles * tile_columns;
  const int64_t chunk = rows_within(s.tokens, budget - columns, of_row, kClusterRows);
  return {chunk, accumulates(s, chunk), chunk * of_row + columns};
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
