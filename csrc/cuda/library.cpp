#include "library.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <stdexcept>
#include <string>

namespace bupo::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor as_tensor(const Device& device, const Matrix& m) {
  std::array<int64_t, 2> sizes{m.rows, m.columns}, strides{m.stride, 1};
  if (m.transposed) {
    std::swap(sizes[0], sizes[1]);
    std::swap(strides[0], strides[1]);
  }
  const ScalarType dtype = m.number == Number::kFloat      ? ScalarType::Float
                           : m.number == Number::kBfloat16 ? ScalarType::BFloat16
                                                           : ScalarType::Half;
  return torch::stable::from_blob(
      const_cast<void*>(m.data), {sizes.data(), 2}, {strides.data(), 2},
      torch::stable::Device(torch::headeronly::DeviceType::CUDA, device.index), dtype);
}

}  // namespace

Device current_device(const Tensor& like) {
  const int32_t index = like.get_device();
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status));
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index));
  return {index, 10 * major + minor, static_cast<cudaStream_t>(stream),
          status != cudaStreamCaptureStatusNone};
}

void multiply(const Device& device, const Matrix& out, const Matrix& a, const Matrix& b) {
  const Tensor to = as_tensor(device, out), left = as_tensor(device, a),
               right = as_tensor(device, b);
  if (out.number == a.number) {
    std::array<StableIValue, 3> stack{torch::stable::detail::from(left),
                                      torch::stable::detail::from(right),
                                      torch::stable::detail::from(to)};
    TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);  // the result is ours to release
  } else {
    std::array<StableIValue, 4> stack{
        torch::stable::detail::from(left), torch::stable::detail::from(right),
        torch::stable::detail::from(ScalarType::Float), torch::stable::detail::from(to)};
    TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::mm", "dtype_out", stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);
  }
}

int64_t read_count(const Device& device, const int32_t* count) {
  int32_t value = 0;
  check(cudaMemcpyAsync(&value, count, sizeof value, cudaMemcpyDeviceToHost, device.stream));
  check(cudaStreamSynchronize(device.stream));
  return value;
}

void set_zero(const Device& device, void* data, int64_t bytes) {
  check(cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), device.stream));
}

void check(cudaError_t error) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("bupo.ops: CUDA: ") + cudaGetErrorString(error));
}

}  // namespace bupo::cuda
