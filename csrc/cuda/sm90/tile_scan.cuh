// What one thread makes of its accumulators of one tile of logits, and of a row of tiles.
//
// A warpgroup holds 64 rows x kTileColumns of a tile in registers, laid out by wgmma: thread t has
// rows 16 (t / 32) + t % 32 / 4 + {0, 8} and, of each group of 8 columns, the two at 2 (t % 4). So
// the four threads of a quad share two rows, and nothing else is shared.
//
// Everything is in bits, x scale with scale = log2(e) / T, and relative to an integer reference, so
// that a change of reference multiplies by a power of two and rounds nothing:
//
//   sum = sum_j 2^(x_j scale - ref)       dot = sum_j 2^(x_j scale - ref) (x_j scale - ref)
//
// over the entries j other than the target, kept by each thread over its columns. Sums are built
// from short ones, of eight entries: beside one dominant entry a long sum would round the small
// ones away. What is stored for the gradient, E = bf16(2^(x scale - tile reference)), is the same
// exponential times a power of two. Hence a row's statistics do not depend on whether E is stored.
//
// No CUTLASS here: python_tests/emulator runs this file on the host. That wgmma's layout is the one
// above is a static_assert of head_scan.cu.
//
// Tests: python_tests/test_cuda_emulated.py, test_head_scan.py.

#pragma once

#include "../common/device.cuh"
#include "launch.h"

namespace bupo::cuda::sm90 {

inline constexpr int kGroups = kTileColumns / 8;
inline constexpr int kScanThreads = 256;  // two warpgroups, 64 rows each

// The accumulators of a thread: [row of the pair][group of 8 columns][column of the pair].
BUPO_HOST_DEVICE constexpr int accumulator(int half, int group, int pair) {
  return group * 4 + half * 2 + pair;
}
BUPO_HOST_DEVICE constexpr int row_in_tile(int thread, int half) {
  return thread / 32 * 16 + thread % 32 / 4 + 8 * half;
}
BUPO_HOST_DEVICE constexpr int column_in_tile(int thread, int group, int pair) {
  return group * 8 + thread % 4 * 2 + pair;
}

// Keeps the compiler from gathering the loads of a long unrolled loop: registers are scarce here.
__device__ inline void keep_order() { asm volatile("" ::: "memory"); }

// What the scan's x is multiplied by to be bits: log2(e) / T, times the softcap, whose x is a tanh.
__device__ inline float bits_per_logit(const float* temperature, int64_t row, float softcap) {
  constexpr float kLog2E = 1.44269504f;
  const float scale = softcap == 0.0f ? kLog2E : kLog2E * softcap;
  return temperature ? scale / temperature[row] : scale;
}

// The exponent that E of a tile is relative to: the row's guess where the tile's largest entry is
// within reach of it, else that entry's own.
__device__ inline float tile_reference(float guess, float largest) {
  const bool within = largest <= guess + kAboveGuess && largest >= guess - kBelowGuess;
  return within || !(largest > -INFINITY) || largest == INFINITY ? guess : ceilf(largest);
}

__device__ inline uint32_t pack(float low, float high) {
  BFloat16 a, b;
  narrow(low, a);
  narrow(high, b);
  return static_cast<uint32_t>(b.bits) << 16 | a.bits;
}

// One of the two rows of a thread.
// kPlain: neither bias nor softcap. A template, for a branch among the exponentials costs more than
// they do.
template <bool kStore, bool kPlain>
class RowScan {
 public:
  // rows: how many there are, args.capacity at most.
  __device__ void begin(const ScanArgs& args, int row, int rows) {
    row_ = row;
    inside_ = row < rows;
    scale_ = inside_ ? bits_per_logit(args.temperature, row, args.softcap) : 1.0f;
    const int64_t target = inside_ ? args.targets[row] : -1;
    target_ = target < args.vocab ? static_cast<int>(target) : -1;
    sum_ = dot_ = 0.0f;
    ref_ = -INFINITY;
  }

  // Takes a tile in: statistics, the target's logit, and E if `store`. x: all 128 accumulators.
  template <int kHalf>
  __device__ void add(const ScanArgs& args, float* x, int thread, int tile, bool store) {
    const int column = tile * kTileColumns;
    const int columns = static_cast<int>(args.vocab) - column;  // of the tile, or more
    if constexpr (!kPlain) to_logits<kHalf>(args, x, thread, column);
    if (columns < kTileColumns) mask_padding<kHalf>(x, thread, columns);
    take_target<kHalf>(args, x, thread, column);
    float largest = -INFINITY;
#pragma unroll
    for (int g = 0; g < kGroups; ++g)
      largest = fmaxf(largest, fmaxf(x[accumulator(kHalf, g, 0)], x[accumulator(kHalf, g, 1)]));
    largest *= scale_;
    if (largest == INFINITY) sum_ = NAN;  // as in torch: inf - inf
    if (largest > ref_ && largest < INFINITY) shift_to(ceilf(largest));
    float factor = 0.0f;
    if (kStore && store) {
      float shared = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1));
      shared = fmaxf(shared, __shfl_xor_sync(kAllLanes, shared, 2));
      const float reference = tile_reference(inside_ ? args.kept.guess[row_] : 0.0f, shared);
      if (inside_ && thread % 4 == 0)
        args.kept.references[static_cast<int64_t>(row_) * args.tiles + tile] = reference;
      // Beyond 2^126 the tile has no mass beside what this thread has seen, and 0 inf is nan.
      factor = ref_ - reference > 126.0f ? 0.0f : exp2_integer(ref_ - reference);
    }
    exponentials<kHalf>(args, x, factor);
    if (kStore && store) {
      __syncwarp();  // else the packing begins among the exponentials, and registers spill
      store_row<kHalf>(args, x, thread, column);
    }
  }

  // The quad's four parts in a fixed order, written by its first thread.
  __device__ void finish(const ScanArgs& args, int thread, int64_t split) {
    const float ref =
        fmaxf(fmaxf(__shfl_xor_sync(kAllLanes, ref_, 1), ref_),
              fmaxf(__shfl_xor_sync(kAllLanes, ref_, 2), __shfl_xor_sync(kAllLanes, ref_, 3)));
    shift_to(ref);
    float sum = sum_ + __shfl_xor_sync(kAllLanes, sum_, 1);
    float dot = dot_ + __shfl_xor_sync(kAllLanes, dot_, 1);
    sum += __shfl_xor_sync(kAllLanes, sum, 2);
    dot += __shfl_xor_sync(kAllLanes, dot, 2);
    if (inside_ && thread % 4 == 0) args.partials[split * args.capacity + row_] = {ref, sum, dot};
  }

 private:
  template <int kHalf>
  __device__ static void to_logits(const ScanArgs& args, float* x, int thread, int column) {
    if (args.bias) {
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        keep_order();
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
          x[accumulator(kHalf, g, pair)] += args.bias[column + column_in_tile(thread, g, pair)];
        }
      }
    }
    if (args.softcap == 0.0f) return;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      keep_order();
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        float& value = x[accumulator(kHalf, g, pair)];
        value = tanhf(value / args.softcap);
      }
    }
  }

  template <int kHalf>
  __device__ static void mask_padding(float* x, int thread, int columns) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int pair = 0; pair < 2; ++pair)
        if (column_in_tile(thread, g, pair) >= columns) x[accumulator(kHalf, g, pair)] = -INFINITY;
    }
  }

  // Takes the target's logit out of the sums. Its place in E is overwritten later.
  template <int kHalf>
  __device__ void take_target(const ScanArgs& args, float* x, int thread, int column) const {
    const int place = target_ - column;
    if (place < 0 || place >= kTileColumns || place % 8 / 2 != thread % 4) return;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        if (place != column_in_tile(thread, g, pair)) continue;
        args.target_logits[row_] = x[accumulator(kHalf, g, pair)];
        x[accumulator(kHalf, g, pair)] = -INFINITY;
      }
    }
  }

  // Another reference; exact, since references are integers.
  __device__ void shift_to(float ref) {
    if (ref == ref_) return;
    if (sum_ != 0.0f && ref_ != -INFINITY) {  // nan too
      const float shift = ref_ - ref, scale = exp2_integer(shift);
      dot_ = scale == 0.0f ? 0.0f : scale * fmaf(sum_, shift, dot_);
      sum_ *= scale;
    }
    ref_ = ref;
  }

  // x -> E before rounding, and the sums.
  template <int kHalf>
  __device__ void exponentials(const ScanArgs& args, float* x, float factor) {
    constexpr int kTogether = 4;
    const float bend = args.softcap == 0.0f ? 0.0f : 1.0f;
    const float ref = ref_ == -INFINITY ? 0.0f : ref_;  // no mass yet: every d is -inf, or nan
    float sum = 0.0f, dot = 0.0f;
#pragma unroll
    for (int first = 0; first < kGroups; first += kTogether) {
      float short_sum = 0.0f, short_dot = 0.0f;
#pragma unroll
      for (int g = first; g < first + kTogether; ++g) {
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
          float& value = x[accumulator(kHalf, g, pair)];
          const float d = max_nan(fmaf(value, scale_, -ref), kNoMass);  // 0 (-inf) would be nan
          const float e = exp2_fast(d);
          short_sum += e;
          short_dot = fmaf(e, d, short_dot);
          if constexpr (kPlain) {
            value = e * factor;
          } else {  // times the softcap's slope, which -inf, a padding column, has not
            value = e == 0.0f ? 0.0f : e * factor * fmaf(-bend * value, value, 1.0f);
          }
        }
      }
      sum += short_sum;
      dot += short_dot;
    }
    sum_ += sum;
    dot_ += dot;
  }

  // A quad has 8 columns of each group, two a thread. It trades them, so that thread q ends up with
  // all of group q of four neighbouring ones: 16 bytes a thread, 64 contiguous bytes a quad.
  template <int kHalf>
  __device__ void store_row(const ScanArgs& args, const float* x, int thread, int column) const {
    const int lane = thread % 4;
    const bool odd = lane & 1, upper = lane & 2;
    BFloat16* row = args.kept.e + row_ * args.kept.stride;
#pragma unroll
    for (int g = 0; g < kGroups; g += 4) {
      uint32_t w[4];
#pragma unroll
      for (int k = 0; k < 4; ++k)
        w[k] = pack(x[accumulator(kHalf, g + k, 0)], x[accumulator(kHalf, g + k, 1)]);
      // 4 x 4 transpose: words w[k] of thread q become word q of thread k.
      const uint32_t a = __shfl_xor_sync(kAllLanes, odd ? w[0] : w[1], 1);
      const uint32_t b = __shfl_xor_sync(kAllLanes, odd ? w[2] : w[3], 1);
      const uint32_t m0 = odd ? a : w[0], m1 = odd ? w[1] : a;
      const uint32_t m2 = odd ? b : w[2], m3 = odd ? w[3] : b;
      const uint32_t c = __shfl_xor_sync(kAllLanes, upper ? m0 : m2, 2);
      const uint32_t d = __shfl_xor_sync(kAllLanes, upper ? m1 : m3, 2);
      const Words words = upper ? Words{c, d, m2, m3} : Words{m0, m1, c, d};
      const int j = column + (g + lane) * 8;
      if (inside_ && j < args.kept.stride) *reinterpret_cast<Words*>(row + j) = words;
    }
  }

  struct alignas(16) Words {
    uint32_t a, b, c, d;
  };

  int row_, target_;  // -1: none, or not in the vocabulary
  float scale_, ref_, sum_, dot_;
  bool inside_;
};

}  // namespace bupo::cuda::sm90
