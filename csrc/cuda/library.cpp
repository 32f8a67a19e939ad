#include "library.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <atomic>
#include <stdexcept>
#include <string>

#include "../checks.h"
#include "../settings.h"

namespace bupo::cuda {
namespace {

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

template <class... Arguments>
void call(const char* op, const char* overload, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(arguments)> stack{torch::stable::detail::from(arguments)...};
  if (torch_call_dispatcher(op, overload, stack.data(), TORCH_ABI_VERSION) != TORCH_SUCCESS)
    throw_torch_error(std::string(op) + " failed");
  torch::stable::detail::to<Tensor>(stack[0]);  // the result is ours to release
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

}  // namespace

Device current_device(const Tensor& like) {
  const int32_t index = like.get_device();
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status));
  return {index,
          10 * attribute(cudaDevAttrComputeCapabilityMajor, index) +
              attribute(cudaDevAttrComputeCapabilityMinor, index),
          static_cast<cudaStream_t>(stream), status != cudaStreamCaptureStatusNone};
}

void multiply(const Device& device, const Matrix& out, const Matrix& a, const Matrix& b, bool add) {
  const Tensor to = as_tensor(device, out), left = as_tensor(device, a),
               right = as_tensor(device, b);
  if (add)  // addmm takes numbers, which torch's stable interface cannot hand over: by Python
    call("bupo::add_product_", "", to, left, right);
  else if (out.number == a.number)
    call("aten::mm", "out", left, right, to);
  else
    call("aten::mm", "dtype_out", left, right, ScalarType::Float, to);
}

CountReader::CountReader(const Device& device, const int32_t* counts, int64_t otherwise)
    : otherwise_(otherwise) {
  if (device.capturing) return;
  struct Buffer {  // pinned, so that the copy does not wait for the device
    int32_t* values = nullptr;
    cudaEvent_t event = nullptr;
  };
  static thread_local std::array<Buffer, 64> buffers;
  Buffer& mine = buffers[static_cast<size_t>(device.index) % buffers.size()];
  if (!mine.values) {
    check(cudaHostAlloc(reinterpret_cast<void**>(&mine.values), 2 * sizeof(int32_t), 0));
    check(cudaEventCreateWithFlags(&mine.event, cudaEventDisableTiming));
  }
  values_ = mine.values;
  event_ = mine.event;
  check(
      cudaMemcpyAsync(values_, counts, 2 * sizeof(int32_t), cudaMemcpyDeviceToHost, device.stream));
  check(cudaEventRecord(event_, device.stream));
}

std::array<int64_t, 2> CountReader::wait() {
  if (!values_) return {otherwise_, otherwise_};
  check(cudaEventSynchronize(event_));
  return {values_[0], values_[1]};
}

void set_zero(const Device& device, void* data, int64_t bytes) {
  check(cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), device.stream));
}

int64_t workspace_budget(const Device& device) {
  if (const int64_t given = workspace_bytes) return given;
  static std::array<std::atomic<int64_t>, 64> known{};
  auto& mine = known[static_cast<size_t>(device.index) % known.size()];
  if (mine == 0) {
    size_t free = 0, total = 0;
    check(cudaMemGetInfo(&free, &total));
    mine = budget_within(static_cast<int64_t>(free));
  }
  return mine;
}

void check(cudaError_t error) {
  if (error == cudaErrorMemoryAllocation)
    throw std::runtime_error("bupo.ops: out of memory: CUDA could not allocate what it needs");
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("bupo.ops: CUDA: ") + cudaGetErrorString(error));
}

}  // namespace bupo::cuda
