// What every kernel uses: 16-bit numbers as stored bits, powers of two, block-wide reductions.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <platform.cuh>

#include "../../row_math.h"

namespace bupo::cuda {

inline constexpr unsigned kAllLanes = 0xffffffffu;

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  memcpy(&y, &bits, sizeof y);
  return y;
}
__device__ inline float widen(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ inline void narrow(float x, BFloat16& out) {
  out.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
__device__ inline void narrow(float x, Float16& out) {
  out.bits = __half_as_ushort(__float2half_rn(x));
}
__device__ inline void narrow(float x, float& out) { out = x; }

// Entry i of an array that may be null.
__device__ inline float at(const void* array, int64_t i, float otherwise = 0.0f) {
  return array ? static_cast<const float*>(array)[i] : otherwise;
}

// 2^n of an integer, exactly; 0 below 2^-126, infinity above 2^127.
__device__ inline float exp2_integer(float n) {
  if (!(n >= -126.0f)) return 0.0f;
  if (n > 127.0f) return INFINITY;
  const uint32_t bits = static_cast<uint32_t>(static_cast<int>(n) + 127) << 23;
  float y;
  memcpy(&y, &bits, sizeof y);
  return y;
}

// The value of the lane `offset` further on.
template <class T>
__device__ T shuffle_down(const T& value, int offset) {
  uint32_t words[sizeof(T) / 4];
  memcpy(words, &value, sizeof value);
  for (uint32_t& word : words) word = __shfl_down_sync(kAllLanes, word, offset);
  T shifted;
  memcpy(&shifted, words, sizeof shifted);
  return shifted;
}

// The block's values combined in lane and warp order: the same result in every run. Thread 0 has
// it.
template <int kThreads, class T, class Combine>
__device__ T block_reduce(T value, T* shared, const Combine& combine) {
  for (int offset = 16; offset > 0; offset /= 2)
    value = combine(value, shuffle_down(value, offset));
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int warp = 1; warp < kThreads / 32; ++warp) value = combine(value, shared[warp]);
  return value;
}

// The sum over the block's threads; all of them have it.
template <int kThreads>
__device__ double block_sum(double value, double* shared) {
  __syncthreads();
  value = block_reduce<kThreads>(value, shared, [](double a, double b) { return a + b; });
  if (threadIdx.x == 0) shared[0] = value;
  __syncthreads();
  return shared[0];
}

}  // namespace bupo::cuda
