// The rows of a chunk in the order in which the products take them.
//
//   arrange      places = rows that may have a gradient, then the others that take part; masked
//                rows have none
//   live_places  of the stored places those whose row has a gradient after all
//   place        hidden by place, and for Hopper the guess of L: log2(e) (z_t - old log-prob),
//                rounded, z_t a dot product. A block a row; a row of hidden read and written, one
//                of the weight read for the guess.
//   norm         the bound of all coefficients, for float16
//
// All but `place` are one block. The first two count by ballots: always the same order.
//
// Tests: python_tests/test_cuda_emulated.py.

#include "../common/coefficients.cuh"
#include "../common/device.cuh"
#include "../common/logit.cuh"
#include "../launch.h"

namespace bupo::cuda {
namespace {

constexpr int kThreads = 1024, kPlaceThreads = 128;

__global__ void __launch_bounds__(kThreads) arrange_kernel(ArrangeArgs args) {
  __shared__ int counts[kThreads / 32];
  const auto stores = [&](int64_t i) {
    for (const float* signal : args.signals)
      if (signal && signal[i] != 0.0f) return true;
    return args.all_store;
  };
  int base = 0;
  for (int sweep = 0; sweep < (args.only_stored ? 1 : 2); ++sweep) {
    for (int64_t start = 0; start < args.rows; start += kThreads) {
      const int64_t i = start + threadIdx.x;
      const bool placed =
          i < args.rows &&
          (args.compact ? takes_part(args.choice, i) && stores(i) == (sweep == 0) : sweep == 0);
      const int place = next_place<kThreads>(placed, base, counts);
      if (placed) args.order[place] = i;
    }
    if (threadIdx.x == 0) args.counts[0] = base;
    if (threadIdx.x == 0 && sweep == 0) args.counts[1] = base;
  }
}

__global__ void __launch_bounds__(kThreads) live_places_kernel(LivePlacesArgs args) {
  __shared__ int counts[kThreads / 32];
  const int stored = args.places.counts[1];
  int base = 0;
  for (int start = 0; start < stored; start += kThreads) {
    const int i = start + static_cast<int>(threadIdx.x);
    const bool live =
        i < stored && coefficient_of(args.coefficients, args.places.order[i]).is_live();
    const int place = next_place<kThreads>(live, base, counts);
    if (live) args.source[place] = i;
  }
  if (threadIdx.x != 0) return;
  args.counts[0] = base;
  args.counts[1] = stored;
}

__global__ void __launch_bounds__(kThreads)
    norm_kernel(Coefficients bounds, int64_t rows, float* norm) {
  __shared__ float shared[kThreads / 32];
  float mine = 0.0f;
  for (int64_t i = threadIdx.x; i < rows; i += kThreads) {
    const float size = largest(coefficient_of(bounds, i));
    if (size > mine && size < INFINITY) mine = size;
  }
  mine = block_reduce<kThreads>(mine, shared, [](float a, float b) { return a > b ? a : b; });
  if (threadIdx.x == 0) *norm = power_of_two(mine) / kHalfGain;
}

template <class T>
__global__ void __launch_bounds__(kPlaceThreads) place_kernel(PlaceArgs args) {
  __shared__ float shared[kPlaceThreads / 32];
  const int64_t place = blockIdx.x;
  if (place >= args.places.counts[0]) return;
  const int64_t row = args.places.order[place], target = args.targets[row];
  const T* x = static_cast<const T*>(args.hidden) + row * args.hidden_stride;
  const bool valid = target >= 0 && target < args.vocab;
  const T* w = static_cast<const T*>(args.weight) + (valid ? target : 0) * args.weight_stride;
  T* out = static_cast<T*>(args.out) + place * args.width;
  float dot = 0.0f;
  for (int64_t d = threadIdx.x; d < args.width; d += kPlaceThreads) {
    out[d] = x[d];
    if (args.guess) dot = fmaf(widen(x[d]), widen(w[d]), dot);
  }
  dot = block_reduce<kPlaceThreads>(dot, shared, [](float a, float b) { return a + b; });
  if (threadIdx.x != 0) return;
  const float temperature = args.temperature ? args.temperature[row] : 1.0f;
  args.places.targets[place] = target;
  if (args.places.temperature) args.places.temperature[place] = temperature;
  if (!args.guess) return;
  if (args.bias && valid) dot += args.bias[target];
  constexpr float kLog2E = 1.44269504f;
  const float old = args.old_logprobs ? args.old_logprobs[row] : 0.0f;
  const float guess =
      rintf(kLog2E * (dot / temperature - old)) + (args.old_logprobs ? 0.0f : kGuessAbove);
  args.guess[place] = guess > -1e9f && guess < 1e9f ? guess : 0.0f;  // nan and infinity too
}

}  // namespace

cudaError_t launch_arrange_rows(const ArrangeArgs& args, cudaStream_t stream) {
  return launch(arrange_kernel, 1, kThreads, stream, args);
}

cudaError_t launch_live_places(const LivePlacesArgs& args, cudaStream_t stream) {
  return launch(live_places_kernel, 1, kThreads, stream, args);
}

cudaError_t launch_norm(const Coefficients& bounds, int64_t rows, float* norm,
                        cudaStream_t stream) {
  return launch(norm_kernel, 1, kThreads, stream, bounds, rows, norm);
}

cudaError_t launch_place_rows(Number number, const PlaceArgs& args, cudaStream_t stream) {
  return with_number(number, [&]<class T>(T) {
    return launch(place_kernel<T>, args.places.capacity, kPlaceThreads, stream, args);
  });
}

}  // namespace bupo::cuda
