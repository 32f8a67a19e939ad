// The little that a GPU and the host do differently. python_tests/emulator has a header of this
// name, and of each CUDA header that is included here and elsewhere, so that the tests execute the
// same sources, kernels included, on a machine without a GPU.

#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#define BUPO_DISPATCH_KEY CUDA

#ifdef __CUDACC__
namespace bupo::cuda {

// 2^x to about 2^-22 relative; results below 2^-126 are 0.
__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The larger of two; nan if one of them is.
__device__ inline float max_nan(float a, float b) {
  float c;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}

// The block's dynamic shared memory, aligned for TMA, whose swizzle repeats every 1024 bytes.
__device__ inline char* dynamic_shared_memory() {
  extern __shared__ __align__(1024) char memory[];
  return memory;
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream,
                   const Arguments&... arguments) {
  if (blocks == 0) return cudaSuccess;
  // clang-format off
  kernel<<<static_cast<unsigned>(blocks), threads, 0, stream>>>(arguments...);
  // clang-format on
  return cudaGetLastError();
}

}  // namespace bupo::cuda
#endif
