#include "library.h"

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <array>
#include <cstdlib>
#include <cstring>

namespace bupo::cpu {
namespace {

torch::stable::Tensor as_tensor(const Block& b) {
  const std::array<int64_t, 2> sizes{b.rows, b.columns};
  const std::array<int64_t, 2> strides{b.row_stride, b.column_stride};
  return torch::stable::from_blob(const_cast<void*>(b.data), {sizes.data(), 2}, {strides.data(), 2},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU, 0),
                                  b.dtype);
}

// The block product is exported by libtorch_cpu but is not part of its stable interface: it is
// looked up by name, arguments included, and its absence only costs speed.
Bfloat16Kernel find_bfloat16_kernel() {
  Bfloat16Kernel kernel;
#if defined(__x86_64__)
  const char* mode = std::getenv("BUPO_CPU_BFLOAT16");
  if (mode && std::strcmp(mode, "upcast") == 0) return kernel;
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx512bf16")) return kernel;
  void* call = dlsym(RTLD_DEFAULT, "_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb");
  void* release = dlsym(RTLD_DEFAULT, "_ZN2at6native7cpublas14brgemm_releaseEb");
  if (!call || !release) return kernel;
  kernel.call = reinterpret_cast<Bfloat16Kernel::Call>(call);
  kernel.release = reinterpret_cast<Bfloat16Kernel::Release>(release);
#endif
  return kernel;
}

}  // namespace

void multiply(const Block& c, const Block& a, const Block& b, bool accumulate) {
  // Straight to the CPU functions: no dispatcher, so grad and inference mode of a worker thread
  // play no part.
  const auto out = as_tensor(c), left = as_tensor(a), right = as_tensor(b);
  if (accumulate) {
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_cpu_addmm_out(out.get(), out.get(), left.get(), right.get(), 1.0, 1.0));
  } else {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), left.get(), right.get()));
  }
}

const Bfloat16Kernel& bfloat16_kernel() {
  static const Bfloat16Kernel kernel = find_bfloat16_kernel();
  return kernel;
}

}  // namespace bupo::cpu
