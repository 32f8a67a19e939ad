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
  const float factor = args.scale[k] / (args.norm ? *args.norm : 1.0f);
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

template <class T>
__global__ void __launch_bounds__(kThreads) scale_kernel(T* data, const float* scale, int64_t n) {
  const float factor = *scale;
  if (factor == 1.0f) return;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += step)
    narrow(widen(data[i]) * factor, data[i]);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    narrow_kernel(const float* in, const float* norm, T* out, int64_t n) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < n) narrow(in[i] * (norm ? *norm : 1.0f), out[i]);
}

template <class T>
__global__ void __launch_bounds__(kThreads) widen_kernel(const T* in, float* out, int64_t n) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < n) out[i] = widen(in[i]);
}

int64_t blocks_of(int64_t n) { return (n + kThreads - 1) / kThreads; }

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
    return launch(column_sums_kernel<T>, blocks_of(columns), kThreads, stream,
                  static_cast<const T*>(dz), stride, scale, count, columns, sums);
  });
}

cudaError_t launch_scale(Number number, void* data, const float* scale, int64_t count,
                         cudaStream_t stream) {
  constexpr int64_t kMostBlocks = 2048;  // most often they have nothing to do
  return with_number(number, [&]<class T>(T) {
    return launch(scale_kernel<T>, std::min(blocks_of(count), kMostBlocks), kThreads, stream,
                  static_cast<T*>(data), scale, count);
  });
}

cudaError_t launch_narrow(Number number, const float* in, const float* norm, void* out,
                          int64_t count, cudaStream_t stream) {
  return with_number(number, [&]<class T>(T) {
    return launch(narrow_kernel<T>, blocks_of(count), kThreads, stream, in, norm,
                  static_cast<T*>(out), count);
  });
}

cudaError_t launch_widen(Number number, const void* in, float* out, int64_t count,
                         cudaStream_t stream) {
  return with_number(number, [&]<class T>(T) {
    return launch(widen_kernel<T>, blocks_of(count), kThreads, stream, static_cast<const T*>(in),
                  out, count);
  });
}

}  // namespace bupo::cuda
