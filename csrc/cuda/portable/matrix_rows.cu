// Copies around the gradient products: gather and scatter of rows with a factor, column sums,
// scaling and conversion of whole matrices. Each element is touched once: bound by memory.
//
// Tests: python_tests/test_cuda_emulated.py.

#include <algorithm>

#include "../common/device.cuh"
#include "../common/logit.cuh"
#include "../launch.h"

namespace bupo::cuda {
namespace {

constexpr int kThreads = kRowThreads / 2;

template <class T>
__global__ void __launch_bounds__(kThreads) gather_kernel(GatherArgs args) {
  const int64_t k = blockIdx.x;
  const T* from = static_cast<const T*>(args.x) + (args.order ? args.order[k] : k) * args.stride;
  T* to = static_cast<T*>(args.out) + k * args.width;
  const float factor = (args.scale ? args.scale[k] : 1.0f) / (args.norm ? *args.norm : 1.0f);
  for (int64_t d = threadIdx.x; d < args.width; d += kThreads)
    narrow(factor == 0.0f ? 0.0f : widen(from[d]) * factor, to[d]);  // 0 also where x is nan
}

template <class T>
__global__ void __launch_bounds__(kThreads) scatter_kernel(ScatterArgs args) {
  const int64_t k = blockIdx.x;
  const float* from = args.in + k * args.width;
  T* to = static_cast<T*>(args.out) + args.order[k] * args.width;
  const float scale = args.scale[k];
  for (int64_t d = threadIdx.x; d < args.width; d += kThreads)
    narrow(scale == 0.0f ? 0.0f : from[d] * scale, to[d]);  // 0 also where the weight is nan
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    column_sums_kernel(const T* dz, int64_t stride, const float* scale, int64_t count,
                       int64_t columns, float* sums) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (j >= columns) return;
  float sum = 0.0f;
  for (int64_t k = 0; k < count; ++k) sum += widen(dz[k * stride + j]) * scale[k];
  sums[j] += sum;
}

// out = in * factor[0], factor null for 1. In place a factor of 1 leaves nothing to do.
template <class From, class To>
__global__ void __launch_bounds__(kThreads)
    convert_kernel(const From* in, const float* factor, To* out, int64_t n) {
  const float by = factor ? *factor : 1.0f;
  if (static_cast<const void*>(in) == out && by == 1.0f) return;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += step)
    narrow(widen(in[i]) * by, out[i]);
}

template <class From, class To>
cudaError_t convert(const void* in, const float* factor, void* out, int64_t n,
                    cudaStream_t stream) {
  constexpr int64_t kMostBlocks = 4096;
  const int64_t blocks = std::min((n + kThreads - 1) / kThreads, kMostBlocks);
  return launch(convert_kernel<From, To>, blocks, kThreads, stream, static_cast<const From*>(in),
                factor, static_cast<To*>(out), n);
}

}  // namespace

cudaError_t launch_gather_rows(Number number, const GatherArgs& args, cudaStream_t stream) {
  return with_number(number, [&]<class T>(T) {
    return launch(gather_kernel<T>, args.count, kThreads, stream, args);
  });
}

cudaError_t launch_scatter_rows(Number number, const ScatterArgs& args, cudaStream_t stream) {
  return with_number(number, [&]<class T>(T) {
    return launch(scatter_kernel<T>, args.count, kThreads, stream, args);
  });
}

cudaError_t launch_column_sums(Number number, const void* dz, int64_t stride, const float* scale,
                               int64_t count, int64_t columns, float* sums, cudaStream_t stream) {
  return with_number(number, [&]<class T>(T) {
    return launch(column_sums_kernel<T>, (columns + kThreads - 1) / kThreads, kThreads, stream,
                  static_cast<const T*>(dz), stride, scale, count, columns, sums);
  });
}

cudaError_t launch_scale(Number number, void* data, const float* scale, int64_t count,
                         cudaStream_t stream) {
  return with_number(number,
                     [&]<class T>(T) { return convert<T, T>(data, scale, data, count, stream); });
}

cudaError_t launch_narrow(Number number, const float* in, const float* norm, void* out,
                          int64_t count, cudaStream_t stream) {
  return with_number(number,
                     [&]<class T>(T) { return convert<float, T>(in, norm, out, count, stream); });
}

cudaError_t launch_widen(Number number, const void* in, float* out, int64_t count,
                         cudaStream_t stream) {
  return with_number(
      number, [&]<class T>(T) { return convert<T, float>(in, nullptr, out, count, stream); });
}

}  // namespace bupo::cuda
