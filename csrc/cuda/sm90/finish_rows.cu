// The partial sums of each row to its log-prob, entropy and logsumexp, and to what its gradient
// needs.
//
// A warp a row: a lane merges every 32nd tile, then lanes are merged pairwise, in double and always
// in this order. 12 bytes a row and tile; neighbouring rows share the lines they are read from.
//
// Tests: python_tests/test_cuda_emulated.py.

#include "../common/device.cuh"
#include "../common/logit.cuh"
#include "launch.h"
#include "tile_scan.cuh"

namespace bupo::cuda::sm90 {
namespace {

constexpr int kThreads = 256, kRows = kThreads / 32;
constexpr double kLn2 = 0.693147180559945309;

// Relative to an integer, so that a change of reference rounds nothing but what it loses.
struct Sums {
  float ref = -INFINITY;
  double sum = 0, dot = 0;

  __device__ void merge(const Sums& other) {
    if (other.sum == 0) return;  // no mass; nan is some
    const float next = fmaxf(ref, other.ref);
    shift_to(next);
    Sums part = other;
    part.shift_to(next);
    sum += part.sum;
    dot += part.dot;
  }
  __device__ void shift_to(float next) {
    if (sum != 0 && next != ref) {
      const double down = static_cast<double>(ref) - next, scale = exp2_integer(ref - next);
      dot = scale == 0 ? 0 : scale * (dot + sum * down);
      sum *= scale;
    }
    ref = next;
  }
};

__device__ Sums sums_of(const FinishArgs& args, int64_t place) {
  Sums sums;
#pragma unroll 4
  for (int64_t tile = threadIdx.x % 32; tile < args.tiles; tile += 32) {
    const BitSums part = args.partials[tile * args.places.capacity + place];
    sums.merge({part.ref, part.sum, part.dot});
  }
  for (int offset = 16; offset > 0; offset /= 2) sums.merge(shuffle_down(sums, offset));
  return sums;  // lane 0 has all
}

__global__ void __launch_bounds__(kThreads) finish_kernel(FinishArgs args) {
  const int64_t place = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / 32;
  if (place >= args.places.counts[0]) return;
  const Sums sums = sums_of(args, place);
  if (threadIdx.x % 32 != 0) return;
  const int64_t row = args.places.order[place], target = args.places.targets[place];
  const bool included = takes_part(args.choice, row);
  Row<double> exact{};
  double ref = 0, gain = 0;
  if (!included || target < 0 || target >= args.vocab) {
    exact.logprob = exact.entropy = exact.logsumexp = included ? NAN : 0.0;
  } else {
    const double bits = bits_per_logit(args.places.temperature, place);
    exact = finish_row<double>({sums.ref * kLn2, sums.sum, sums.dot * kLn2},
                               args.target_logits[place] * bits * kLn2, args.vocab);
    if (args.guess) {
      const double largest = exact.max / kLn2, guess = args.guess[place];
      const bool within = largest <= guess + kAboveGuess && largest >= guess - kBelowGuess;
      ref = within ? guess : ceil(largest);
      gain = exp(ref * kLn2 - exact.max - exact.log_total);
    }
  }
  if (args.records)
    args.records[place] = {in_float(exact), float(ref), float(gain), float(ref * kLn2 - exact.max)};
  if (args.logprobs) args.logprobs[row] = static_cast<float>(exact.logprob);
  if (args.entropy) args.entropy[row] = static_cast<float>(exact.entropy);
  if (args.logsumexp) args.logsumexp[row] = static_cast<float>(exact.logsumexp);
}

}  // namespace

cudaError_t launch_finish_rows(const FinishArgs& args, cudaStream_t stream) {
  return launch(finish_kernel, (args.places.capacity + kRows - 1) / kRows, kThreads, stream, args);
}

}  // namespace bupo::cuda::sm90
