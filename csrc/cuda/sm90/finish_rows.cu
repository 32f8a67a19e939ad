// The partial sums of each row to its log-prob, entropy and logsumexp, and to what its gradient
// needs.
//
// A thread a row, partials in the order of the columns, in double: 12 bytes a row and split.
//
// Tests: python_tests/test_cuda_emulated.py.

#include "../common/device.cuh"
#include "../common/logit.cuh"
#include "launch.h"
#include "tile_scan.cuh"

namespace bupo::cuda::sm90 {
namespace {

constexpr int kThreads = 64;  // few a block: a row is a long chain of merges
constexpr double kLn2 = 0.693147180559945309;

__device__ Row<double> row_of(const FinishArgs& args, int64_t place) {
  float ref = -INFINITY;
  double sum = 0, dot = 0;
  for (int64_t split = 0; split < splits_of(args.vocab); ++split) {
    const BitSums part = args.partials[split * args.places.capacity + place];
    if (part.sum == 0.0f) continue;  // no mass
    const float next = fmaxf(ref, part.ref), down = ref - next, part_down = part.ref - next;
    if (sum != 0) {
      const double scale = exp2_integer(down);
      dot = scale == 0 ? 0 : scale * (dot + sum * down);
      sum *= scale;
    }
    const double scale = next == -INFINITY ? 1.0f : exp2_integer(part_down);
    dot += scale == 0 ? 0 : scale * (part.dot + static_cast<double>(part.sum) * part_down);
    sum += scale * part.sum;
    ref = next;
  }
  const RowSums<double> sums{ref * kLn2, sum, dot * kLn2};
  const double bits = bits_per_logit(args.places.temperature, place, args.softcap);
  return finish_row<double>(sums, args.target_logits[place] * bits * kLn2, args.vocab);
}

__global__ void __launch_bounds__(kThreads) finish_kernel(FinishArgs args) {
  const int64_t place = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (place >= (args.places.counts ? args.places.counts[0] : args.places.capacity)) return;
  const int64_t row = args.places.order ? args.places.order[place] : place;
  const int64_t target = args.places.targets[place];
  const bool included = takes_part(args.choice, row);
  Row<double> exact{};
  double ref = 0, gain = 0;
  if (!included || target < 0 || target >= args.vocab) {
    exact.logprob = exact.entropy = exact.logsumexp = included ? NAN : 0.0;
  } else {
    exact = row_of(args, place);
    if (args.guess) {
      const double largest = exact.max / kLn2, guess = args.guess[place];
      const bool within = largest <= guess + kAboveGuess && largest >= guess - kBelowGuess;
      ref = within ? guess : ceil(largest);
      gain = exp(ref * kLn2 - exact.max - exact.log_total);
    }
  }
  if (args.records) {
    args.records[place] = {{float(exact.max), float(exact.log_total), float(exact.mean),
                            float(exact.target), float(exact.target_prob), float(exact.target_rest),
                            float(exact.logprob), float(exact.entropy), float(exact.logsumexp)},
                           float(ref),
                           float(gain),
                           float(ref * kLn2 - exact.max)};
  }
  if (args.logprobs) args.logprobs[row] = static_cast<float>(exact.logprob);
  if (args.entropy) args.entropy[row] = static_cast<float>(exact.entropy);
  if (args.logsumexp) args.logsumexp[row] = static_cast<float>(exact.logsumexp);
}

}  // namespace

cudaError_t launch_finish_rows(const FinishArgs& args, cudaStream_t stream) {
  return launch(finish_kernel, (args.places.capacity + kThreads - 1) / kThreads, kThreads, stream,
                args);
}

}  // namespace bupo::cuda::sm90
