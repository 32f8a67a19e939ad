// csrc/cuda/library.h on the host: products through torch's CPU library, a counter that is simply
// read, and a switch that plays the recording of a CUDA graph.

#include "cuda/library.h"

#include <cstring>
#include <stdexcept>
#include <vector>

#include "cpu/library.h"
#include "settings.h"

namespace bupo::cuda::sm90 {
extern int64_t scans;  // calls of the Hopper path's product
}

namespace {
bool capturing = false;
int capability = 80;
int64_t reads = 0, logit_rows = 0;
}  // namespace

#define BUPO_EXPORT extern "C" __attribute__((visibility("default")))
BUPO_EXPORT void emulator_capturing(bool yes) { capturing = yes; }
BUPO_EXPORT void emulator_capability(int value) { capability = value; }
BUPO_EXPORT int64_t emulator_scans() { return bupo::cuda::sm90::scans; }
BUPO_EXPORT int64_t emulator_reads() { return reads; }
BUPO_EXPORT int64_t emulator_logit_rows() { return logit_rows; }

namespace bupo::cuda {
namespace {

float element(const Matrix& m, int64_t i) {
  if (m.number == Number::kFloat) return static_cast<const float*>(m.data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(m.data)[i];
  if (m.number == Number::kFloat16) return emulator::from_half(bits);
  return emulator::from_bfloat16(bits);
}

std::vector<float> copy(const Matrix& m) {
  std::vector<float> dense(static_cast<size_t>(m.rows * m.columns));
  for (int64_t r = 0; r < m.rows; ++r)
    for (int64_t c = 0; c < m.columns; ++c)
      dense[static_cast<size_t>(r * m.columns + c)] = element(m, r * m.stride + c);
  return dense;
}

cpu::Block view(const std::vector<float>& dense, const Matrix& m) {
  const cpu::Block plain = cpu::block(dense.data(), m.rows, m.columns, m.columns);
  return m.transposed ? cpu::transposed(plain) : plain;
}

}  // namespace

Device current_device(const torch::stable::Tensor&) { return {0, capability, nullptr, capturing}; }

void multiply(const Device&, const Matrix& out, const Matrix& a, const Matrix& b, bool add) {
  if (b.transposed) logit_rows += out.rows;
  const std::vector<float> left = copy(a), right = copy(b);
  std::vector<float> result(static_cast<size_t>(out.rows * out.columns));
  cpu::multiply(cpu::block(result.data(), out.rows, out.columns, out.columns), view(left, a),
                view(right, b));
  for (int64_t r = 0; r < out.rows; ++r) {
    for (int64_t c = 0; c < out.columns; ++c) {
      const float x = result[static_cast<size_t>(r * out.columns + c)];
      const int64_t at = r * out.stride + c;
      void* data = const_cast<void*>(out.data);
      if (out.number == Number::kFloat) {
        static_cast<float*>(data)[at] = add ? static_cast<float*>(data)[at] + x : x;
      } else {
        static_cast<uint16_t*>(data)[at] =
            out.number == Number::kBfloat16 ? emulator::to_bfloat16(x) : emulator::to_half(x);
      }
    }
  }
}

CountReader::CountReader(const Device& device, const int32_t* counts, int64_t otherwise)
    : otherwise_(otherwise), values_(device.capturing ? nullptr : const_cast<int32_t*>(counts)) {}

std::array<int64_t, 2> CountReader::wait() {
  if (!values_) return {otherwise_, otherwise_};
  ++reads;
  return {values_[0], values_[1]};
}

int64_t workspace_budget(const Device&) { return workspace_bytes; }

void set_zero(const Device&, void* data, int64_t bytes) {
  std::memset(data, 0, static_cast<size_t>(bytes));
}

void check(cudaError_t) {}

}  // namespace bupo::cuda
