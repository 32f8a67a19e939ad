// Compaction: which rows of a block have a gradient, and where each of them goes.
//
//   live_i   a coefficient is not 0              place_i = live rows before i, in this chunk
//   scale_i  2^floor(log2(largest |coefficient| / T))
//
// One block of threads, tile after tile of rows: an exclusive count by ballots. Places are in the
// order of rows, hence the same in every run. launch_norm is here because it reads the same arrays.
//
// Tests: python_tests/test_cuda_emulated.py.

#include "../common/coefficients.cuh"
#include "../common/device.cuh"
#include "../common/logit.cuh"
#include "../launch.h"

namespace bupo::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr float kHalfGain = 1024.0f;

__global__ void __launch_bounds__(kThreads) live_places_kernel(LiveArgs args) {
  __shared__ int counts[kWarps];
  int base = args.compact ? *args.places.count : static_cast<int>(args.first);
  for (int64_t start = 0; start < args.rows; start += kThreads) {
    const int64_t i = start + threadIdx.x;
    const bool live =
        i < args.rows && takes_part(args.choice, i) && Coefficient(args.coefficients, i).is_live();
    const bool placed = i < args.rows && (live || !args.compact);
    const int place = next_place<kThreads>(placed, base, counts);
    if (i < args.rows) args.places.position[i] = placed ? place : -1;
    if (!placed) continue;
    float size = Coefficient(args.coefficients, i).largest();
    if (args.temperature) size /= args.temperature[i];
    args.places.order[place] = args.first + i;
    args.places.scale[place] = live ? power_of_two(size) / (args.half ? kHalfGain : 1.0f) : 0.0f;
  }
  if (threadIdx.x == 0) *args.places.count = base;
}

__global__ void __launch_bounds__(kThreads)
    norm_kernel(Coefficients bounds, int64_t rows, float* norm) {
  __shared__ float shared[kWarps];
  float mine = 0.0f;
  for (int64_t i = threadIdx.x; i < rows; i += kThreads) {
    const float size = Coefficient(bounds, i).largest();
    if (size > mine && size < INFINITY) mine = size;
  }
  mine = block_reduce<kThreads>(
      mine, shared, [](float x, int offset) { return __shfl_down_sync(kAllLanes, x, offset); },
      [](float a, float b) { return a > b ? a : b; });
  if (threadIdx.x == 0) *norm = power_of_two(mine) / kHalfGain;
}

}  // namespace

cudaError_t launch_live_places(const LiveArgs& args, cudaStream_t stream) {
  return launch(live_places_kernel, 1, kThreads, stream, args);
}

cudaError_t launch_norm(const Coefficients& bounds, int64_t rows, float* norm,
                        cudaStream_t stream) {
  return launch(norm_kernel, 1, kThreads, stream, bounds, rows, norm);
}

}  // namespace bupo::cuda
