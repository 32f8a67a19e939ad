// What every kernel uses of a device: 16-bit numbers as stored bits, block-wide reductions, launch.
//
// With BUPO_EMULATED the same kernel sources compile for the host (python_tests/emulator/emulator.h
// runs threads as fibers), so that CI executes every line of them without a GPU.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../../row_math.h"

#ifdef BUPO_EMULATED
#include "emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#endif

namespace bupo::cuda {

inline constexpr unsigned kAllLanes = 0xffffffffu;

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  memcpy(&y, &bits, sizeof y);
  return y;
}
#ifdef BUPO_EMULATED
__device__ inline float widen(Float16 x) { return emulator::from_half(x.bits); }
__device__ inline void narrow(float x, BFloat16& out) { out.bits = emulator::to_bfloat16(x); }
__device__ inline void narrow(float x, Float16& out) { out.bits = emulator::to_half(x); }
#else
__device__ inline float widen(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ inline void narrow(float x, BFloat16& out) {
  out.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
__device__ inline void narrow(float x, Float16& out) {
  out.bits = __half_as_ushort(__float2half_rn(x));
}
#endif
__device__ inline void narrow(float x, float& out) { out = x; }

// 2^x to about 2^-22 relative, results below 2^-126 are 0.
__device__ inline float exp2_fast(float x) {
#ifdef BUPO_EMULATED
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.0f : y;
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// 2^n of an integer, exactly; 0 below 2^-126, infinity above 2^127.
__device__ inline float exp2_integer(float n) {
  if (!(n >= -126.0f)) return 0.0f;
  if (n > 127.0f) return INFINITY;
  const uint32_t bits = static_cast<uint32_t>(static_cast<int>(n) + 127) << 23;
  float y;
  memcpy(&y, &bits, sizeof y);
  return y;
}

// The larger of two; nan if one of them is.
__device__ inline float max_nan(float a, float b) {
#ifdef BUPO_EMULATED
  return a < b || b != b ? b : a;
#else
  float c;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
#endif
}

// The block's dynamic shared memory, aligned for TMA, whose swizzle repeats every 1024 bytes.
__device__ inline char* dynamic_shared_memory() {
#ifdef BUPO_EMULATED
  return emulator::dynamic_shared_memory();
#else
  extern __shared__ __align__(1024) char memory[];
  return memory;
#endif
}

// The block's values combined in lane and warp order: the same result in every run. Thread 0 has
// it.
template <int kThreads, class T, class Shift, class Combine>
__device__ T block_reduce(T value, T* shared, const Shift& shift, const Combine& combine) {
  for (int offset = 16; offset > 0; offset /= 2) value = combine(value, shift(value, offset));
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int warp = 1; warp < kThreads / 32; ++warp) value = combine(value, shared[warp]);
  return value;
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream,
                   const Arguments&... arguments) {
  if (blocks == 0) return cudaSuccess;
#ifdef BUPO_EMULATED
  (void)stream;
  emulator::run(blocks, threads, [&] { kernel(arguments...); });
  return cudaSuccess;
#else
  // clang-format off
  kernel<<<static_cast<unsigned>(blocks), threads, 0, stream>>>(arguments...);
  // clang-format on
  return cudaGetLastError();
#endif
}

}  // namespace bupo::cuda
