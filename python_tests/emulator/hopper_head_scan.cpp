// csrc/cuda/sm90/head_scan.cu and CUTLASS's collective mainloop on the host, and what they ask of
// CUDA: tensor maps and launches.

#include "cutlass.h"
// CUTLASS's headers first
#include "cuda/common/device.cuh"

namespace emulator {
int resident_clusters = 1;
}

extern "C" CUresult cuTensorMapEncodeTiled(CUtensorMap* out, CUtensorMapDataType type,
                                           cuuint32_t rank, void* data, const cuuint64_t* size,
                                           const cuuint64_t* bytes_apart, const cuuint32_t* box,
                                           const cuuint32_t* steps,
                                           CUtensorMapInterleave interleave,
                                           CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                                           CUtensorMapFloatOOBfill fill) {
  // What tma.h has
  bool fine = (type == CU_TENSOR_MAP_DATA_TYPE_UINT16 || type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16) &&
              (rank == 2 || rank == 3) && box[0] == 64 && (rank == 2 || box[2] == 1) &&
              interleave == CU_TENSOR_MAP_INTERLEAVE_NONE &&
              swizzle == CU_TENSOR_MAP_SWIZZLE_128B && fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE;
  // What CUDA refuses
  fine = fine && reinterpret_cast<uintptr_t>(data) % 16 == 0 && box[1] >= 1 && box[1] <= 256;
  emulator::TensorMap map{static_cast<char*>(data), {1, 1, 1}, {2}, box[1]};
  for (size_t d = 0; d < rank; ++d) {
    map.size[d] = size[d];
    fine = fine && steps[d] == 1 && size[d] >= 1 && size[d] <= uint64_t{1} << 32;
    if (d == 0) continue;
    map.bytes_apart[d] = bytes_apart[d - 1];
    fine = fine && bytes_apart[d - 1] % 16 == 0 && bytes_apart[d - 1] < uint64_t{1} << 40;
  }
  static_assert(sizeof map <= sizeof *out);
  if (!fine) return CUDA_ERROR_INVALID_VALUE;
  std::memcpy(out, &map, sizeof map);
  return CUDA_SUCCESS;
}

extern "C" cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
extern "C" cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 132;
  return cudaSuccess;
}
extern "C" cudaError_t cudaOccupancyMaxActiveClusters(int* count, const void*,
                                                      const cudaLaunchConfig_t*) {
  *count = emulator::resident_clusters;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  emulator::warpgroups.clear();
  emulator::senders.clear();
  emulator::run_clusters(config->gridDim.x, config->blockDim.x, config->attrs->val.clusterDim.x,
                         static_cast<int64_t>(config->dynamicSmemBytes), [&] {
                           kernel(arguments...);
                           emulator::leave_wgmma();
                           emulator::leave_tma();
                         });
  return cudaSuccess;
}

#include "cuda/sm90/head_scan.cu"
