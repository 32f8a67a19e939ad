// Which path a call takes, and how it is cut into chunks and blocks of rows: from shapes, device
// and workspace budget alone. Plain C++: tested on any machine (python_tests/test_cuda_plan.py).
//
//   block  rows whose fp32 products [block, V] are held at once (portable)
//   chunk  rows whose dz or E [chunk, V] is held until the two gradient products
//
// A chunk more costs one read and write of dW in fp32, so chunks are as large as the budget allows.

#pragma once

#include <algorithm>
#include <cstdint>

namespace bupo::cuda {

// portable: library products in fp32, then one sweep. sm90: statistics in the product's epilogue.
enum class Path : int { kPortable, kSm90 };

struct PathRequest {
  int capability;          // 10 major + minor
  bool bfloat16, aligned;  // aligned: the weight's address, rows and D are multiples of 16 bytes
  int64_t width, vocab;
  bool softcap, entropy_gradient;
};

// sm90 needs Hopper itself (later chips have no wgmma), bfloat16, and rows that TMA can read. With
// a softcap E holds the slope too, which no gradient of the entropy can be read from.
inline Path path_of(const PathRequest& r) {
  constexpr int64_t kLargest = int64_t{1} << 30;  // its places and columns are 32-bit
  const bool served =
      r.capability == 90 && r.bfloat16 && r.aligned && r.vocab < kLargest && r.width < kLargest;
  return served && !(r.softcap && r.entropy_gradient) ? Path::kSm90 : Path::kPortable;
}

struct Shape {
  int64_t tokens, width, vocab;
  int64_t element;  // bytes of an input element
  bool gradients, weight_gradient, half;
  bool placed = true;  // sm90: rows of hidden are copied to their places
};

struct Plan {
  int64_t block = 0, chunk = 0;
  int64_t products_stride = 0;  // elements; rows begin on 32 bytes, E's on 128
  int64_t slice = 0;            // rows of dW that one product makes when chunks are added up
  bool accumulate = false;      // dW needs an fp32 accumulator [V, D] beside the workspace
  int64_t bytes = 0;            // of the workspace
};

inline constexpr int64_t kRowMultiple = 128;

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Rows that fit, a multiple of kRowMultiple (or of `multiple`, if they are that many), no more than
// there are.
inline int64_t rows_within(int64_t tokens, int64_t bytes, int64_t bytes_a_row,
                           int64_t multiple = kRowMultiple) {
  int64_t fitting = bytes / bytes_a_row;
  fitting -= fitting % (fitting > multiple ? multiple : kRowMultiple);
  return std::clamp<int64_t>(fitting, kRowMultiple,
                             round_up(std::max<int64_t>(tokens, 1), kRowMultiple));
}

// How dW is made, once the chunk is known: `left` bytes are free for a slice.
inline void plan_weight_gradient(const Shape& s, int64_t left, int64_t budget, Plan& p) {
  p.accumulate = s.weight_gradient && s.element != 4 && (s.half || s.tokens > p.chunk);
  if (!s.weight_gradient || (!p.accumulate && s.tokens <= p.chunk)) return;
  const int64_t rows = std::min(budget / 16, left) / (4 * s.width) / kRowMultiple * kRowMultiple;
  p.slice = std::clamp<int64_t>(rows, kRowMultiple, round_up(s.vocab, kRowMultiple));
}

// Of a chunk's row beside its dz: x times a scale, dx in fp32, statistics and place.
inline int64_t row_bytes(const Shape& s) {
  constexpr int64_t kStatistics = 64;
  return (s.element + 4) * s.width + kStatistics;
}

inline Plan portable_plan(const Shape& s, int64_t budget) {
  Plan p;
  p.products_stride = round_up(s.vocab, 8);
  const int64_t products = 4 * p.products_stride, columns = 4 * s.vocab;
  if (!s.gradients) {
    p.block = p.chunk = rows_within(s.tokens, budget - columns, products);
    p.bytes = p.block * products + columns;
    return p;
  }
  const int64_t of_chunk = s.element * p.products_stride + row_bytes(s);
  const int64_t fixed = columns + (s.weight_gradient ? budget / 16 : 0);  // slice
  p.block = std::min(rows_within(s.tokens, budget / 4, products),
                     rows_within(s.tokens, budget - fixed, products + of_chunk));
  const int64_t rest = budget - fixed - p.block * products;
  p.chunk = std::max(p.block, rows_within(s.tokens, rest, of_chunk));
  plan_weight_gradient(s, budget - p.block * products - columns - p.chunk * of_chunk, budget, p);
  p.bytes = p.block * products + columns + p.chunk * of_chunk + 4 * p.slice * s.width;
  return p;
}

// sm90: E, the rows of hidden by place, partial sums and references of tiles.
inline Plan sm90_plan(const Shape& s, int64_t budget) {
  constexpr int64_t kTileColumns = 256, kSplitColumns = 1024, kClusterRows = 256, kPerPlace = 128;
  const int64_t partials = 12 * (round_up(s.vocab, kSplitColumns) / kSplitColumns);
  Plan p;
  p.products_stride = round_up(s.vocab, 64);
  int64_t of_chunk = partials + kPerPlace + (s.placed ? s.element * s.width : 0);
  if (s.gradients) {
    const int64_t references = 4 * (round_up(s.vocab, kTileColumns) / kTileColumns);
    of_chunk += s.element * p.products_stride + references + row_bytes(s);
  }
  const int64_t columns = 8 * round_up(s.vocab, kTileColumns);  // bias, and its gradient
  const int64_t fixed = columns + (s.weight_gradient ? budget / 16 : 0);
  p.block = p.chunk = rows_within(s.tokens, budget - fixed, of_chunk, kClusterRows);
  if (s.gradients) plan_weight_gradient(s, budget - columns - p.chunk * of_chunk, budget, p);
  p.bytes = p.chunk * of_chunk + columns + 4 * p.slice * s.width;
  return p;
}

// One chunk where that takes no more than several and their accumulator would.
inline Plan plan_of(Path path, const Shape& s, int64_t budget) {
  const auto plan = path == Path::kSm90 ? sm90_plan : portable_plan;
  const Plan several = plan(s, budget);
  if (!several.accumulate || s.half) return several;
  const Plan one = plan(s, budget + 4 * s.vocab * s.width);
  return one.accumulate ? several : one;
}

}  // namespace bupo::cuda
