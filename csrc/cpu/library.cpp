#include "library.h"

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <vector>

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
// looked up by name, arguments included, tried once, and its absence only costs speed.
template <class T>
BlockKernel<T> find_block_kernel([[maybe_unused]] const char* name) {
  BlockKernel<T> kernel;
#if defined(__x86_64__)
  const char* wanted = std::getenv("BUPO_CPU_PRODUCTS");
  if (wanted && std::strcmp(wanted, "library") == 0) return kernel;
  __builtin_cpu_init();
  constexpr bool paired = BlockKernel<T>::kPaired;
  if (!(paired ? __builtin_cpu_supports("avx512bf16") : __builtin_cpu_supports("avx512f")))
    return kernel;
  void* call = dlsym(RTLD_DEFAULT, name);
  void* release = dlsym(RTLD_DEFAULT, "_ZN2at6native7cpublas14brgemm_releaseEb");
  if (!call || !release) return kernel;
  kernel.call = reinterpret_cast<typename BlockKernel<T>::Call>(call);
  kernel.release = reinterpret_cast<typename BlockKernel<T>::Release>(release);
  try {  // c[32, 32] of zeros times zeros; a torch built without the kernel throws
    const std::vector<T> zeros(32 * 32);
    std::vector<float> c(32 * 32, 1.0f);
    kernel.call(32, 32, 32, 32, 32, 32, false, zeros.data(), zeros.data(), c.data(), paired);
    kernel.release(paired);
    if (c.front() != 0 || c.back() != 0) return {};
  } catch (const std::exception&) {
    return {};
  }
#endif
  return kernel;
}

}  // namespace

void multiply(const Block& c, const Block& a, const Block& b, bool accumulate) {
  // Straight to the CPU functions: no dispatcher, so grad and inference mode of a worker thread
  // play no part.
  const auto out = as_tensor(c), left = as_tensor(a), right = as_tensor(b);
  if (accumulate) {
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_cpu_addmm_out(out.get(), out.get(), left.get(), right.get(), 1.0, 1.0));
  } else {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), left.get(), right.get()));
  }
}

template <>
const BlockKernel<float>& block_kernel() {
  static const auto kernel =
      find_block_kernel<float>("_ZN2at6native7cpublas6brgemmEllllllbPKfS3_Pfb");
  return kernel;
}

template <>
const BlockKernel<uint16_t>& block_kernel() {
  static const auto kernel =
      find_block_kernel<uint16_t>("_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb");
  return kernel;
}

}  // namespace bupo::cpu
