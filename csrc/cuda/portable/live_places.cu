// Compaction: which rows of a block have a gradient, and where each of them goes.
//
//   live_i   a coefficient is not 0              place_i = live rows before i, in this chunk
//   scale_i  2^floor(log2(largest |coefficient| / T))
//
// One block of threads, tile after tile of rows: an exclusive count by ballots. Places are in the
// order of rows, hence the same in every run. launch_norm is here because it reads the same arrays.
//
// Tests: python_tests/test_cuda_emulated.py.

#include "../common/device.cuh"
#include "../common/logit.cuh"
#include "../launch.h"

namespace bupo::cuda {
namespace {

#ifdef BUPO_EMULATED
constexpr int kThreads = 64;
#else
constexpr int kThreads = 1024;
#endif
constexpr int kWarps = kThreads / 32;
constexpr float kHalfGain = 1024.0f;

__device__ float largest(const Coefficients& c, int64_t i) {
  const float a = fmaxf(fabsf(c.on_logprob[i]), fabsf(c.on_entropy[i]));
  return c.on_logsumexp ? fmaxf(a, fabsf(c.on_logsumexp[i])) : a;
}

__device__ bool is_nan(const Coefficients& c, int64_t i) {
  const float sum = c.on_logprob[i] + c.on_entropy[i] + (c.on_logsumexp ? c.on_logsumexp[i] : 0.0f);
  return sum != sum;
}

// A finite power of two not above x; 1 for 0, nan and infinity.
__device__ float power_of_two(float x) {
  if (!(x > 0.0f) || x == INFINITY) return 1.0f;
  const int exponent = ilogbf(x);
  return ldexpf(1.0f, exponent < -100 ? -100 : exponent);
}

__global__ void __launch_bounds__(kThreads) live_places_kernel(LiveArgs args) {
  __shared__ int counts[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int base = args.compact ? *args.places.count : static_cast<int>(args.first);
  for (int64_t start = 0; start < args.rows; start += kThreads) {
    const int64_t i = start + threadIdx.x;
    float size = 0.0f;
    bool live = false;
    if (i < args.rows && takes_part(args.choice, i)) {
      size = largest(args.coefficients, i);
      live = size != 0.0f || is_nan(args.coefficients, i);
      if (args.temperature) size /= args.temperature[i];
    }
    const bool placed = i < args.rows && (live || !args.compact);
    const unsigned warp_live = __ballot_sync(kAllLanes, placed);
    if (lane == 0) counts[warp] = __popc(warp_live);
    __syncthreads();
    int place = base + __popc(warp_live & ((1u << lane) - 1));
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) place += counts[w];
      base += counts[w];
    }
    if (i < args.rows) args.places.position[i] = placed ? place : -1;
    if (placed) {
      args.places.order[place] = args.first + i;
      args.places.scale[place] = power_of_two(size) / (args.half ? kHalfGain : 1.0f);
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) *args.places.count = base;
}

__global__ void __launch_bounds__(kThreads)
    norm_kernel(Coefficients bounds, int64_t rows, float* norm) {
  __shared__ float shared[kWarps];
  float mine = 0.0f;
  for (int64_t i = threadIdx.x; i < rows; i += kThreads) {
    const float size = largest(bounds, i);
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
