// A thread's part of the sums over a row of logits.

#pragma once

#include "../../row_math.h"
#include "device.cuh"

namespace bupo::cuda {

// A thread's part of a row, with compensated sums: beside one dominant entry the hundreds of small
// ones that follow would otherwise be rounded away one by one.
struct RunningSums {
  RowSums<float> sums;
  float lost_sum = 0.0f, lost_dot = 0.0f;  // what the last additions rounded away, negated

  __device__ static void add(float& total, float& lost, float x) {
    const float y = x - lost, next = total + y;
    lost = (next - total) - y;
    total = next;
  }

  // One more entry. -inf has no mass; nan stays in sum and dot.
  __device__ void add(float z) {
    if (z == -INFINITY) return;
    if (z > sums.max) {
      const float shift = sums.max - z, scale = sums.sum == 0.0f ? 0.0f : expf(shift);
      sums.dot = sums.sum == 0.0f ? 0.0f : scale * (sums.dot + sums.sum * shift);
      sums.sum *= scale;
      lost_sum = lost_dot = 0.0f;
      sums.max = z;
    }
    const float d = z - sums.max, e = expf(d);
    add(sums.sum, lost_sum, e);
    add(sums.dot, lost_dot, e == 0.0f ? 0.0f : e * d);
  }
};

// Those of the block's threads together; thread 0 has them.
template <int kThreads>
__device__ RowSums<float> merged(const RowSums<float>& mine, RowSums<float>* shared) {
  return block_reduce<kThreads>(mine, shared, [](RowSums<float> a, const RowSums<float>& b) {
    merge(a, b);
    return a;
  });
}

}  // namespace bupo::cuda
