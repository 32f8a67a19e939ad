// What the policy loss makes of its rows' log-probs: coefficients of the gradient, losses, metrics.
//
// A thread a row for the coefficients, or a block a sequence; one block for the sums, in double and
// in a fixed order. A few dozen bytes a row: their time is their launch.
//
// Tests: python_tests/test_cuda_emulated.py; policy_token() itself: test_policy_loss.py and
// test_every_loss.py.

#include "../common/device.cuh"
#include "../common/logit.cuh"
#include "../launch.h"

namespace bupo::cuda {
namespace {

constexpr int kSumThreads = 512;

__device__ double weight_of(const PolicyRows& r, int64_t i) {
  return at(r.policy.token_weights, i);
}

__device__ PolicyInput<double> input_of(const PolicyRows& r, int64_t i) {
  const PolicyArgs& p = r.policy;
  return {r.logprobs[i], at(p.old_logprobs, i, r.logprobs[i]), at(p.advantages, i),
          at(p.ref_logprobs, i), at(p.importance_weights, i, 1)};
}

__device__ void set_coefficients(const PolicyRows& r, int64_t i, double on_logprob) {
  const double weight = weight_of(r, i);
  r.on_logprob[i] = static_cast<float>(on_logprob);
  if (!r.on_entropy) return;
  const double of_entropy = at(r.policy.entropy_weights, i, static_cast<float>(weight));
  r.on_entropy[i] =
      weight == 0 ? 0.0f : static_cast<float>(-r.policy.settings.entropy_coef * of_entropy);
}

__global__ void token_kernel(PolicyRows rows) {
  const int64_t offset = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  if (offset >= rows.rows) return;
  const int64_t i = rows.first + offset;
  const double weight = weight_of(rows, i);
  double on_logprob = 0;
  if (weight != 0) {
    const PolicySettings& s = rows.policy.settings;
    const PolicyInput<double> in = input_of(rows, i);
    const auto token = policy_token(s, in, in.logprob - in.old_logprob);
    on_logprob = coefficient(s, token, weight, in, {});
  }
  set_coefficients(rows, i, on_logprob);
}

// The end of the sequence that begins with row `begin`; `begin` itself if none does. Where ids do
// not ascend the rows from the last larger one on are part of it.
__device__ int64_t end_of_sequence(const int64_t* ids, int64_t begin, int64_t rows) {
  if (begin > 0 && ids[begin] == ids[begin - 1]) return begin;
  int64_t low = begin + 1, high = rows;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (ids[middle] > ids[begin]) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

__global__ void __launch_bounds__(kRowThreads) sequence_kernel(PolicyRows rows) {
  __shared__ double shared[kRowThreads / 32];
  const PolicySettings& s = rows.policy.settings;
  const int64_t* ids = rows.policy.sequence_ids;
  const int64_t begin = blockIdx.x, end = end_of_sequence(ids, begin, rows.rows);
  const int64_t first = begin + threadIdx.x;
  if (begin == end) return;
  SequenceSums whole;
  for (int64_t i = first; i < end; i += kRowThreads) {
    if (ids[i] != ids[begin]) whole.log_ratio = NAN;  // what a wrong order gives
    if (weight_of(rows, i) == 0) continue;
    whole.log_ratio += ratio_part(s, input_of(rows, i)).value;
    whole.count += 1;
  }
  whole.log_ratio = block_sum<kRowThreads>(whole.log_ratio, shared);
  whole.count = block_sum<kRowThreads>(whole.count, shared);
  const double log_ratio = whole.log_ratio / whole.divisor(s);
  for (int64_t i = first; i < end; i += kRowThreads)
    if (const double weight = weight_of(rows, i); weight != 0)
      whole.on_ratio += weight * policy_token(s, input_of(rows, i), log_ratio).on_ratio;
  whole.on_ratio = block_sum<kRowThreads>(whole.on_ratio, shared);
  for (int64_t i = first; i < end; i += kRowThreads) {
    const double weight = weight_of(rows, i);
    const PolicyInput<double> in = input_of(rows, i);
    const double on_logprob =
        weight == 0 ? 0 : coefficient(s, policy_token(s, in, log_ratio), weight, in, whole);
    rows.log_ratios[i] = log_ratio;
    set_coefficients(rows, i, on_logprob);
  }
}

__global__ void __launch_bounds__(kRowThreads) signal_kernel(PolicyRows rows, float* signal) {
  __shared__ double shared[kRowThreads / 32];
  const int64_t begin = blockIdx.x;
  const int64_t end = end_of_sequence(rows.policy.sequence_ids, begin, rows.rows);
  if (begin == end) return;
  double found = 0;
  for (int64_t i = begin + threadIdx.x; i < end; i += kRowThreads)
    if (weight_of(rows, i) != 0 && at(rows.policy.advantages, i) != 0.0f) found = 1;
  found = block_sum<kRowThreads>(found, shared);
  for (int64_t i = begin + threadIdx.x; i < end; i += kRowThreads)
    signal[i] = found != 0 ? 1.0f : 0.0f;
}

__global__ void __launch_bounds__(kSumThreads)
    sums_kernel(PolicyRows rows, float* loss, float* metrics) {
  __shared__ PolicySums shared[kSumThreads / 32];
  PolicySums mine;
  for (int64_t i = threadIdx.x; i < rows.rows; i += kSumThreads) {
    const double weight = weight_of(rows, i);
    if (weight == 0) continue;
    const PolicyInput<double> in = input_of(rows, i);
    const double log_ratio = rows.log_ratios ? rows.log_ratios[i] : in.logprob - in.old_logprob;
    const auto token = policy_token(rows.policy.settings, in, log_ratio);
    const double on_entropy = rows.on_entropy ? rows.on_entropy[i] : 0, entropy = rows.entropy[i];
    rows.losses[i] = static_cast<float>(token.loss);
    // Live as the gradient sees it: coefficients are floats there.
    const Coefficient<float> c{rows.on_logprob[i], static_cast<float>(on_entropy), 0};
    const double of_entropy = -rows.policy.settings.entropy_coef *
                              at(rows.policy.entropy_weights, i, static_cast<float>(weight)) *
                              entropy;
    mine.add(token, weight * token.loss + of_entropy, entropy, c.is_live());
  }
  const PolicySums all =
      block_reduce<kSumThreads>(mine, shared, [](PolicySums a, const PolicySums& b) {
        a.merge(b);
        return a;
      });
  if (threadIdx.x == 0) all.write(rows.rows, loss, metrics);
}

}  // namespace

cudaError_t launch_policy_coefficients(const PolicyRows& rows, cudaStream_t stream) {
  if (rows.log_ratios) return launch(sequence_kernel, rows.rows, kRowThreads, stream, rows);
  const int64_t blocks = (rows.rows + kRowThreads - 1) / kRowThreads;
  return launch(token_kernel, blocks, kRowThreads, stream, rows);
}

cudaError_t launch_sequence_signals(const PolicyRows& rows, float* signal, cudaStream_t stream) {
  return launch(signal_kernel, rows.rows, kRowThreads, stream, rows, signal);
}

cudaError_t launch_policy_sums(const PolicyRows& rows, float* loss, float* metrics,
                               cudaStream_t stream) {
  return launch(sums_kernel, 1, kSumThreads, stream, rows, loss, metrics);
}

}  // namespace bupo::cuda
