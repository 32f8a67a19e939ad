// What the policy loss makes of its rows' log-probs: coefficients of the gradient, loss, metrics.
//
// A thread a row for the coefficients; one block for the sums, in double and in a fixed order. A
// few dozen bytes a row: their time is their launch.
//
// Tests: python_tests/test_cuda_emulated.py; policy_token() itself:
// python_tests/test_policy_loss.py.

#include "../common/device.cuh"
#include "../common/logit.cuh"
#include "../launch.h"

namespace bupo::cuda {
namespace {

constexpr int kSumThreads = 512;

__device__ PolicyToken<double> token_of(const PolicyRows& r, int64_t i) {
  const PolicyArgs& p = r.policy;
  return policy_token<double>(p.settings, r.logprobs[i], r.entropy[i],
                              at(p.old_logprobs, i, r.logprobs[i]), at(p.advantages, i),
                              at(p.ref_logprobs, i), at(p.importance_weights, i, 1));
}

__global__ void coefficients_kernel(PolicyRows rows, float* on_logprob, float* on_entropy) {
  const int64_t offset = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  if (offset >= rows.rows) return;
  const int64_t i = rows.first + offset;
  const double weight = at(rows.policy.token_weights, i);
  PolicyToken<double> token{};
  if (weight != 0) token = token_of(rows, i);
  on_logprob[i] = static_cast<float>(weight * token.d_logprob);
  if (on_entropy) on_entropy[i] = static_cast<float>(weight * token.d_entropy);
}

__global__ void __launch_bounds__(kSumThreads)
    sums_kernel(PolicyRows rows, float* loss, float* metrics) {
  __shared__ PolicySums shared[kSumThreads / 32];
  PolicySums mine;
  for (int64_t i = threadIdx.x; i < rows.rows; i += kSumThreads) {
    const double weight = at(rows.policy.token_weights, i);
    if (weight == 0) continue;
    const PolicyToken<double> token = token_of(rows, i);
    // Live as the gradient sees it: coefficients are floats there.
    const Coefficient<float> c{float(weight * token.d_logprob), float(weight * token.d_entropy), 0};
    mine.add(token, weight, rows.entropy[i], c.is_live());
  }
  const PolicySums all =
      block_reduce<kSumThreads>(mine, shared, [](PolicySums a, const PolicySums& b) {
        a.merge(b);
        return a;
      });
  if (threadIdx.x == 0) all.write(rows.rows, loss, metrics);
}

}  // namespace

cudaError_t launch_policy_coefficients(const PolicyRows& rows, float* on_logprob, float* on_entropy,
                                       cudaStream_t stream) {
  const int64_t blocks = (rows.rows + kRowThreads - 1) / kRowThreads;
  return launch(coefficients_kernel, blocks, kRowThreads, stream, rows, on_logprob, on_entropy);
}

cudaError_t launch_policy_sums(const PolicyRows& rows, float* loss, float* metrics,
                               cudaStream_t stream) {
  return launch(sums_kernel, 1, kSumThreads, stream, rows, loss, metrics);
}

}  // namespace bupo::cuda
