// Thin access to torch on the GPU: matrix products, the current stream, memory, the live-row count.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "launch.h"

namespace bupo::cuda {

// A row-major matrix on the device of a call, or its transpose.
struct Matrix {
  const void* data;
  int64_t rows, columns, stride;
  Number number;
  bool transposed = false;
};

inline Matrix transpose(Matrix m) {
  m.transposed = !m.transposed;
  return m;
}

inline int64_t bytes_of(Number number) { return number == Number::kFloat ? 4 : 2; }

// The device and stream that a call runs on.
struct Device {
  int32_t index;
  int capability;  // 10 major + minor
  cudaStream_t stream;
  bool capturing;  // a CUDA graph is being recorded: the host must not wait
};
Device current_device(const torch::stable::Tensor& like);

// out = a b, summed in fp32; out is fp32, or of the dtype of a and b: then rounded once, unless
// torch.backends.cuda.matmul.allow_*_reduced_precision_reduction lets the library split the sum.
void multiply(const Device& device, const Matrix& out, const Matrix& a, const Matrix& b);

// The value of a counter on the device, once everything before it has run: the one place where the
// host waits.
int64_t read_count(const Device& device, const int32_t* count);

void set_zero(const Device& device, void* data, int64_t bytes);

// Throws std::runtime_error with CUDA's words for a failed launch.
void check(cudaError_t error);

}  // namespace bupo::cuda
