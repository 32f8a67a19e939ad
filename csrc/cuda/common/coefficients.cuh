// Which rows have a gradient, and of what size.

#pragma once

#include "../launch.h"
#include "device.cuh"

namespace bupo::cuda {

// One row's.
__device__ inline Coefficient<float> coefficient_of(const Coefficients& c, int64_t row) {
  return {at(c.on_logprob, row), at(c.on_entropy, row), at(c.on_logsumexp, row)};
}
__device__ inline float largest(const Coefficient<float>& c) {
  return fmaxf(fmaxf(fabsf(c.on_logprob), fabsf(c.on_entropy)), fabsf(c.on_logsumexp));
}

// What float16's values are larger by, so that small ones survive.
inline constexpr float kHalfGain = 1024.0f;

// A finite power of two not above x; 1 for 0, nan and infinity.
__device__ inline float power_of_two(float x) {
  if (!(x > 0.0f) || x == INFINITY) return 1.0f;
  const int exponent = ilogbf(x);
  return ldexpf(1.0f, exponent < -100 ? -100 : exponent);
}

// Where the threads of a block place those of their items that are marked: behind one another, in
// the order of the threads, from `base` on, which grows. All threads call it; shared: an int a
// warp.
template <int kThreads>
__device__ int next_place(bool marked, int& base, int* shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const unsigned votes = __ballot_sync(kAllLanes, marked);
  if (lane == 0) shared[warp] = __popc(votes);
  __syncthreads();
  int place = base + __popc(votes & ((1u << lane) - 1));
  for (int w = 0; w < kThreads / 32; ++w) {
    if (w < warp) place += shared[w];
    base += shared[w];
  }
  __syncthreads();
  return place;
}

}  // namespace bupo::cuda
