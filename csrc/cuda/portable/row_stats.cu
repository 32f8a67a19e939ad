// log p(target), entropy and logsumexp of each row of a block of fp32 logits [rows, V].
//
//   max_j z_j, sum_j e^{z_j - max}, sum_j e^{z_j - max} (z_j - max)   over j != target
//   then finish_row() of row_math.h, the same function that the CPU path runs in float64.
//
// One block a row: two sweeps over the row, the second from cache. 8V bytes read and 2V
// exponentials and multiply-adds a row, so it is bound by memory. Reductions run in a fixed order,
// so a row's result does not depend on its neighbours.
//
// The first kernel of the portable path (sm_80 and newer). It is compiled in CI (BUPO_CUDA=CHECK);
// the operators that will launch it have not landed, and it has not run on a GPU.

#include "../../row_math.h"
#include "../launch.h"

namespace bupo::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Every thread's value combined in lane and warp order; all threads get the result.
template <class Combine>
__device__ float block_reduce(float value, float* shared, Combine combine) {
  for (int offset = 16; offset > 0; offset /= 2)
    value = combine(value, __shfl_xor_sync(kAllLanes, value, offset));
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  float total = shared[0];
  for (int warp = 1; warp < kWarps; ++warp) total = combine(total, shared[warp]);
  __syncthreads();
  return total;
}

__global__ void __launch_bounds__(kThreads) row_stats_kernel(RowStatsArgs args) {
  __shared__ float shared[kWarps];
  const int64_t row = blockIdx.x;
  const float* z = args.logits + row * args.stride;
  const int64_t target = args.targets[row];
  if (target < 0 || target >= args.vocab) {
    if (threadIdx.x == 0) args.logprobs[row] = args.entropy[row] = args.logsumexp[row] = 0.0f;
    return;
  }
  const auto larger = [](float a, float b) { return b > a ? b : a; };
  const auto add = [](float a, float b) { return a + b; };

  RowSums<float> sums;
  for (int64_t j = threadIdx.x; j < args.vocab; j += kThreads)
    if (j != target) sums.max = larger(sums.max, z[j]);
  sums.max = block_reduce(sums.max, shared, larger);
  const float shift = sums.max == -INFINITY ? 0.0f : sums.max;  // a row of -inf: sums of 0
  for (int64_t j = threadIdx.x; j < args.vocab; j += kThreads) {
    if (j == target) continue;
    const float d = fmaxf(z[j] - shift, -800.0f);   // keeps 0 * -inf out of the dot
    const float e = z[j] != z[j] ? z[j] : expf(d);  // fmaxf drops nan
    sums.sum += e;
    sums.dot += e * d;
  }
  sums.sum = block_reduce(sums.sum, shared, add);
  sums.dot = block_reduce(sums.dot, shared, add);
  if (threadIdx.x != 0) return;
  const Row<float> result = finish_row(sums, z[target], static_cast<long long>(args.vocab));
  args.logprobs[row] = result.logprob;
  args.entropy[row] = result.entropy;
  args.logsumexp[row] = result.logsumexp;
}

}  // namespace

cudaError_t launch_row_stats(const RowStatsArgs& args, cudaStream_t stream) {
  if (args.rows == 0) return cudaSuccess;
  row_stats_kernel<<<static_cast<unsigned>(args.rows), kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace bupo::cuda
