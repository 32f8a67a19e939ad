// Thin access to torch and CUDA: matrix products, the current stream, memory, counters.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>

#include "choose.h"
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
// Or out += a b, by the product itself; out is fp32 then.
void multiply(const Device& device, const Matrix& out, const Matrix& a, const Matrix& b,
              bool add = false);

// Two counters on the device as they were when the reader was made, for the host, which waits until
// the device has come to them; under capture it cannot, and `otherwise` stands for both.
class CountReader {
 public:
  CountReader(const Device& device, const int32_t* counts, int64_t otherwise);
  std::array<int64_t, 2> wait();

 private:
  int64_t otherwise_;
  int32_t* values_ = nullptr;
  cudaEvent_t event_ = nullptr;
};

void set_zero(const Device& device, void* data, int64_t bytes);

// The setting; without one a quarter of the memory that was free at the first call on the device,
// in whole powers of two from 256 MiB to 4 GiB, so that calls of one process are cut alike.
int64_t workspace_budget(const Device& device);

// Throws std::runtime_error with CUDA's words for a failed launch.
void check(cudaError_t error);

}  // namespace bupo::cuda
