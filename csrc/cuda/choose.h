// How a call is cut into chunks and blocks of rows, from shapes and the workspace budget alone.
// Plain C++: tested on any machine (python_tests/test_cuda_plan.py).
//
//   block  rows whose fp32 products [block, V] are held at once
//   chunk  rows whose dz [chunk, V] is held until the two gradient products
//
// A chunk more costs one read and write of dW in fp32, so chunks are as large as the budget allows.

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
  int64_t products_stride = 0;  // elements; rows begin on 32 bytes
  int64_t slice = 0;            // rows of dW that one product makes when chunks are added up
  bool accumulate = false;      // dW needs an fp32 accumulator [V, D] beside the workspace
  int64_t bytes = 0;            // of the workspace
};

inline constexpr int64_t kRowMultiple = 128;

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

inline Plan plan_of(const Shape& s, int64_t budget) {
  const auto rows_within = [&](int64_t bytes, int64_t bytes_a_row) {
    const int64_t fitting = bytes / bytes_a_row / kRowMultiple * kRowMultiple;
    return std::clamp<int64_t>(fitting, kRowMultiple,
                               round_up(std::max<int64_t>(s.tokens, 1), kRowMultiple));
  };
  Plan p;
  p.products_stride = round_up(s.vocab, 8);
  const int64_t products = 4 * p.products_stride, columns = 4 * s.vocab;
  if (!s.gradients) {
    p.block = p.chunk = rows_within(budget - columns, products);
    p.bytes = p.block * products + columns;
    return p;
  }
  // Of a chunk's row: dz, its x times a scale, its dx in fp32, its statistics and place.
  constexpr int64_t kStatistics = 64;
  const int64_t of_chunk = s.element * p.products_stride + (s.element + 4) * s.width + kStatistics;
  const int64_t fixed = columns + (s.weight_gradient ? budget / 16 : 0);  // slice
  p.block =
      std::min(rows_within(budget / 4, products), rows_within(budget - fixed, products + of_chunk));
  const int64_t rest = budget - fixed - p.block * products;
  p.chunk = std::max(p.block, rows_within(rest, of_chunk));
  p.accumulate = s.weight_gradient && s.element != 4 && (s.half || s.tokens > p.chunk);
  if (s.weight_gradient && (p.accumulate || s.tokens > p.chunk)) {
    const int64_t left = budget - p.block * products - columns - p.chunk * of_chunk;
    const int64_t rows = std::min(budget / 16, left) / (4 * s.width) / kRowMultiple * kRowMultiple;
    p.slice = std::clamp<int64_t>(rows, kRowMultiple, round_up(s.vocab, kRowMultiple));
  }
  p.bytes = p.block * products + columns + p.chunk * of_chunk + 4 * p.slice * s.width;
  return p;
}

}  // namespace bupo::cuda
