// What one thread makes of its accumulators of one tile of logits.
//
// A warpgroup holds 64 rows of a tile in registers, or twice 64, laid out by wgmma: of each 64 rows
// thread t has rows 16 (t / 32) + t % 32 / 4 + {0, 8} and, of each group of 8 columns, the two at
// 2 (t % 4). So the four threads of a quad share their rows, and nothing else is shared.
//
// Everything is in bits, x scale with scale = log2(e) / T, and relative to an integer reference, so
// that a change of reference multiplies by a power of two and rounds nothing:
//
//   sum = sum_j 2^(x_j scale - ref)       dot = sum_j 2^(x_j scale - ref) (x_j scale - ref)
//
// over the entries j of a row and tile other than the target; ref is at the largest of them. Sums
// are built from short ones, of eight entries: beside one dominant entry a long sum would round the
// small ones away. What is stored for the gradient, E = bf16(2^(x scale - tile reference)), is the
// same exponential times a power of two. Hence a row's statistics do not depend on whether E is
// stored. What is left out (the target, padding, a bias of -inf) is a finite number without mass;
// a logit that is -inf by overflow, without a bias, gives nan as the row's entropy, as in torch.
//
// No CUTLASS here: python_tests/emulator runs this file on the host. That wgmma's layout is the one
// above is a static_assert of head_scan.cu. How E leaves the registers is the caller's, a Store:
//
//   begin()            before the words of the next eight rows of a warp and all columns of a tile
//   put(group, words)  of these rows, the thread's two columns of each of four groups
//   end(row, column)   the place of the first of them in E
//
// Tests: python_tests/test_cuda_emulated.py, test_head_scan.py.

#pragma once

#include "../common/device.cuh"
#include "launch.h"

namespace bupo::cuda::sm90 {

// What the scan's x is multiplied by to be bits.
__device__ inline float bits_per_logit(const float* temperature, int64_t row) {
  constexpr float kLog2E = 1.44269504f;
  return temperature ? kLog2E / temperature[row] : kLog2E;
}

__device__ inline uint32_t pack(float low, float high) {
  BFloat16 a, b;
  narrow(low, a);
  narrow(high, b);
  return static_cast<uint32_t>(b.bits) << 16 | a.bits;
}

// kThreads: 128 for a warpgroup with a tile of its own, 256 for two that share one.
template <Schedule kSchedule>
struct TileLayout {
  static constexpr int kColumns = columns_of(kSchedule), kGroups = kColumns / 8;
  static constexpr int kThreads = kSchedule == Schedule::kPingpong ? 128 : 256;
  static constexpr int kFragments = 2 * kTileRows / kThreads;  // of 64 rows, in a thread
  static constexpr int kAccumulators = kFragments * 4 * kGroups;

  BUPO_HOST_DEVICE static constexpr int accumulator(int fragment, int half, int group, int pair) {
    return (fragment * kGroups + group) * 4 + half * 2 + pair;
  }
  BUPO_HOST_DEVICE static constexpr int row(int thread, int fragment, int half) {
    return fragment * 64 + thread / 32 * 16 + thread % 32 / 4 + 8 * half;
  }
  BUPO_HOST_DEVICE static constexpr int column(int thread, int group, int pair) {
    return group * 8 + thread % 4 * 2 + pair;
  }
};

// One of a thread's rows of a tile. kBias is a template parameter, for a branch among the
// exponentials costs more than they do.
template <Schedule kSchedule, bool kStore, bool kBias, int kRow, class Store>
class RowOfTile {
  using Layout = TileLayout<kSchedule>;
  static constexpr int kFragment = kRow / 2, kHalf = kRow % 2;
  static constexpr int kGroups = Layout::kGroups;

 public:
  // x: all accumulators. first: of the tile's rows, of which there are `rows` in all. Writes the
  // partial sums, the target's logit, and E if `stores`.
  __device__ RowOfTile(const ScanArgs& args, float* x, int thread, int first, int rows, int tile,
                       bool stores, Store& store)
      : args_(args),
        x_(x),
        thread_(thread),
        row_(first + Layout::row(thread, kFragment, kHalf)),
        column_(tile * Layout::kColumns),
        inside_(row_ < rows),
        scale_(inside_ ? bits_per_logit(args.places.temperature, row_) : 1.0f) {
    const float none = fmaxf(kNoMass / scale_, -3e38f);
    if constexpr (kBias) add_bias(none);
    const int64_t columns = args.vocab - column_;  // of the tile, or more
    if (columns < Layout::kColumns) mask_padding(static_cast<int>(columns), none);
    take_target(none);
    const float largest = largest_of_quad();
    const bool has_mass = largest > none * scale_ / 2 && largest < INFINITY;
    const float ref = has_mass ? ceilf(largest) : 0.0f;
    float factor = 0.0f;
    if (kStore && stores) {
      // Relative to the row's guess where the tile's largest entry is within reach of it.
      const float guess = inside_ ? args.kept.guess[row_] : 0.0f;
      const bool within = largest <= guess + kAboveGuess && largest >= guess - kBelowGuess;
      const float reference = within || !has_mass ? guess : ref;
      if (inside_ && thread % 4 == 0)
        args.kept.references[static_cast<int64_t>(row_) * args.tiles + tile] = reference;
      factor = has_mass ? exp2_integer(ref - reference) : 0.0f;
    }
    float sum = 0.0f, dot = 0.0f;
    exponentials(ref, factor, sum, dot);
    if (largest == INFINITY) sum = NAN;  // as in torch: inf - inf
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    dot += __shfl_xor_sync(kAllLanes, dot, 1);
    sum += __shfl_xor_sync(kAllLanes, sum, 2);
    dot += __shfl_xor_sync(kAllLanes, dot, 2);
    if (inside_ && thread % 4 == 0)
      args.partials[static_cast<int64_t>(tile) * args.places.capacity + row_] = {ref, sum, dot};
    if (kStore && stores) store_row(store);
  }

 private:
  __device__ float& value(int group, int pair) const {
    return x_[Layout::accumulator(kFragment, kHalf, group, pair)];
  }

  // visit(logit, its column in the tile, the number of the visit)
  template <class Visit>
  __device__ void each(const Visit& visit) const {
#pragma unroll
    for (int i = 0; i < 2 * kGroups; ++i)
      visit(value(i / 2, i % 2), Layout::column(thread_, i / 2, i % 2), i);
  }

  __device__ void add_bias(float none) const {
    each([&](float& x, int column, int i) {
      // Else the loads are gathered, and registers spill.
      if (i % 2 == 0) asm volatile("" ::: "memory");
      x = max_nan(x + args_.bias[column_ + column], none);
    });
  }

  __device__ void mask_padding(int columns, float none) const {
    each([&](float& x, int column, int) {
      if (column >= columns) x = none;
    });
  }

  // Takes the target's logit out of the sums. Its place in E is overwritten later.
  __device__ void take_target(float none) const {
    const int64_t place = (inside_ ? args_.places.targets[row_] : -1) - column_;
    if (place < 0 || place >= Layout::kColumns || column_ + place >= args_.vocab ||
        place % 8 / 2 != thread_ % 4)
      return;
    float logit = none;
    each([&](float& x, int column, int) {
      if (static_cast<int>(place) == column) logit = std::exchange(x, none);
    });
    args_.target_logits[row_] = logit == none ? -INFINITY : logit;
  }

  __device__ float largest_of_quad() const {
    constexpr int kChains = 4;
    float most[kChains] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
    each([&](const float& x, int, int i) { most[i % kChains] = fmaxf(most[i % kChains], x); });
    float largest = fmaxf(fmaxf(most[0], most[1]), fmaxf(most[2], most[3])) * scale_;
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1));
    return fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 2));
  }

  // x -> E before rounding, and the sums.
  __device__ void exponentials(float ref, float factor, float& sum, float& dot) const {
    constexpr int kTogether = 4;
#pragma unroll
    for (int first = 0; first < kGroups; first += kTogether) {
      float short_sum = 0.0f, short_dot = 0.0f;
#pragma unroll
      for (int g = first; g < first + kTogether; ++g) {
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
          const float d = fmaf(value(g, pair), scale_, -ref), e = exp2_fast(d);
          short_sum += e;
          short_dot = fmaf(e, d, short_dot);
          value(g, pair) = e * factor;
        }
      }
      sum += short_sum;
      dot += short_dot;
    }
  }

  // A row beyond the last one has any numbers: it may have come from any hidden state.
  __device__ void store_row(Store& store) const {
    store.begin();
#pragma unroll
    for (int g = 0; g < kGroups; g += 4) {
      uint32_t words[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) words[k] = pack(value(g + k, 0), value(g + k, 1));
      store.put(g, words);
    }
    store.end(row_ - thread_ % 32 / 4, column_);
  }

  const ScanArgs& args_;
  float* x_;
  int thread_, row_, column_;
  bool inside_;
  float scale_;
};

// Rows kRow and following of a thread.
template <Schedule kSchedule, bool kStore, bool kBias, class Store, int kRow = 0>
__device__ inline void scan_tile(const ScanArgs& args, float* x, int thread, int first, int rows,
                                 int tile, bool stores, Store& store) {
  RowOfTile<kSchedule, kStore, kBias, kRow, Store>(args, x, thread, first, rows, tile, stores,
                                                   store);
  if constexpr (kRow + 1 < 2 * TileLayout<kSchedule>::kFragments)
    scan_tile<kSchedule, kStore, kBias, Store, kRow + 1>(args, x, thread, first, rows, tile, stores,
                                                         store);
}

}  // namespace bupo::cuda::sm90
