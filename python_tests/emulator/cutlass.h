// CUTLASS's headers with hopper.h in place of PTX: the wrappers of the instructions that
// head_scan.cu comes to are replaced, by name; all above them is CUTLASS's own. A wrapper that is
// not replaced ends the program: CUTLASS has an assertion in most, for the host.

#pragma once

#ifdef NDEBUG
#error "assertions are needed: CUTLASS's wrappers do nothing on a host without them"
#endif

#define __DEVICE_LAUNCH_PARAMETERS_H__  // CUDA's threadIdx
#include <cuda.h>
#include <cuda_runtime_api.h>

#include "hopper.h"
#include "tma.h"
#include "wgmma.h"

#ifdef __x86_64__  // CUTLASS's checks of a thread's role
asm(".macro brkpt\n ud2\n .endm");
#else
asm(".macro brkpt\n brk #1\n .endm");
#endif

#undef __shared__  // not static: dynamic
#define __shared__

#include <cutlass/arch/wmma.h>   // before the version, which lets it ask for nvcc's own types
#define __CUDACC_VER_MAJOR__ 12  // TMA and clusters are there
#define __CUDACC_VER_MINOR__ 0
#define CUTLASS_ENABLE_DIRECT_CUDA_DRIVER_CALL 1

// Headers in an order in which each comes after the replacements that it needs.
#define canonical_lane_idx replaced_canonical_lane_idx
#define canonical_warp_idx_sync replaced_canonical_warp_idx_sync
#define canonical_warp_idx replaced_canonical_warp_idx
#define canonical_warp_group_idx replaced_canonical_warp_group_idx
#include <cutlass/cutlass.h>
#undef canonical_lane_idx
#undef canonical_warp_idx_sync
#undef canonical_warp_idx
#undef canonical_warp_group_idx
namespace cutlass {
inline int canonical_lane_idx() { return static_cast<int>(threadIdx.x % 32); }
inline int canonical_warp_idx() { return static_cast<int>(threadIdx.x / 32); }
inline int canonical_warp_idx_sync() { return __shfl_sync(~0u, canonical_warp_idx(), 0); }
inline int canonical_warp_group_idx() {
  return __shfl_sync(~0u, static_cast<int>(threadIdx.x / 128), 0);
}
}  // namespace cutlass

#define cast_smem_ptr_to_uint replaced_cast_smem_ptr_to_uint
#include <cute/arch/util.hpp>
#undef cast_smem_ptr_to_uint
namespace cute {
inline uint32_t cast_smem_ptr_to_uint(const void* p) { return emulator::shared_address(p); }
}  // namespace cute

#define cluster_arrive_relaxed replaced_cluster_arrive_relaxed
#define cluster_wait replaced_cluster_wait
#define block_id_in_cluster replaced_block_id_in_cluster
#define cluster_shape replaced_cluster_shape
#define block_rank_in_cluster replaced_block_rank_in_cluster
#define elect_one_sync replaced_elect_one_sync
#include <cute/arch/cluster_sm90.hpp>
#undef cluster_arrive_relaxed
#undef cluster_wait
#undef block_id_in_cluster
#undef cluster_shape
#undef block_rank_in_cluster
#undef elect_one_sync
namespace cute {
inline void cluster_arrive_relaxed() { emulator::cluster_arrive(); }
inline void cluster_wait() { emulator::cluster_wait(); }
inline uint32_t block_rank_in_cluster() { return emulator::own_rank(); }
inline dim3 block_id_in_cluster() { return {block_rank_in_cluster(), 0, 0}; }
inline dim3 cluster_shape() { return {static_cast<uint32_t>(emulator::cluster.size()), 1, 1}; }
inline uint32_t elect_one_sync() {
  emulator::offer(0, "elect.sync");
  return threadIdx.x % 32 == 0;
}
}  // namespace cute

#define warpgroup_arrive replaced_warpgroup_arrive
#define warpgroup_wait replaced_warpgroup_wait
#define warpgroup_commit_batch replaced_warpgroup_commit_batch
#define MMA_64x256x16_F32BF16BF16_SS Replaced_MMA_64x256x16_F32BF16BF16_SS
#define MMA_64x192x16_F32BF16BF16_SS Replaced_MMA_64x192x16_F32BF16BF16_SS
#include <cute/arch/mma_sm90_gmma.hpp>
#undef warpgroup_arrive
#undef warpgroup_wait
#undef warpgroup_commit_batch
#undef MMA_64x256x16_F32BF16BF16_SS
#undef MMA_64x192x16_F32BF16BF16_SS
namespace cute {
inline void warpgroup_arrive() { emulator::wgmma_fence(); }
inline void warpgroup_commit_batch() { emulator::wgmma_commit(); }
template <int kLeft>
void warpgroup_wait() {
  emulator::wgmma_wait(kLeft);
}
namespace SM90::GMMA {
template <size_t>
using Accumulator = float;
template <class>
struct Fma;
template <size_t... kIndex>
struct Fma<std::index_sequence<kIndex...>> {
  static void fma(const uint64_t& a, const uint64_t& b, Accumulator<kIndex>&... sums,
                  const ScaleOut scale) {
    float* const all[] = {&sums...};
    for (size_t i = 0; i < sizeof...(kIndex); ++i)
      emulator::require(all[i] == all[0] + i, "accumulators are not an array");
    emulator::wgmma(a, b, all[0], 2 * sizeof...(kIndex), scale == ScaleOut::One);
  }
};
template <int kColumns, Major kA, Major kB, ScaleIn kScaleA, ScaleIn kScaleB>
struct Mma : Fma<std::make_index_sequence<kColumns / 2>> {
  static_assert(kA == Major::K && kB == Major::K);
  static_assert(kScaleA == ScaleIn::One && kScaleB == ScaleIn::One);
  using DRegisters = void;
  using ARegisters = uint64_t[1];
  using BRegisters = uint64_t[1];
  using CRegisters = float[kColumns / 2];
};
template <Major kA, Major kB, ScaleIn kScaleA = ScaleIn::One, ScaleIn kScaleB = ScaleIn::One>
struct MMA_64x256x16_F32BF16BF16_SS : Mma<256, kA, kB, kScaleA, kScaleB> {};
template <Major kA, Major kB, ScaleIn kScaleA = ScaleIn::One, ScaleIn kScaleB = ScaleIn::One>
struct MMA_64x192x16_F32BF16BF16_SS : Mma<192, kA, kB, kScaleA, kScaleB> {};
}  // namespace SM90::GMMA
}  // namespace cute

#define prefetch_tma_descriptor replaced_prefetch_tma_descriptor
#define SM90_TMA_LOAD Replaced_SM90_TMA_LOAD
#define SM90_TMA_LOAD_MULTICAST Replaced_SM90_TMA_LOAD_MULTICAST
#define SM90_TMA_STORE Replaced_SM90_TMA_STORE
#define SM90_U32x4_STSM_N Replaced_SM90_U32x4_STSM_N
#define tma_store_fence replaced_tma_store_fence
#define tma_store_arrive replaced_tma_store_arrive
#define tma_store_wait replaced_tma_store_wait
#include <cute/arch/copy_sm90.hpp>
#undef prefetch_tma_descriptor
#undef SM90_TMA_LOAD
#undef SM90_TMA_LOAD_MULTICAST
#undef SM90_TMA_STORE
#undef SM90_U32x4_STSM_N
#undef tma_store_fence
#undef tma_store_arrive
#undef tma_store_wait
namespace cute {
inline void prefetch_tma_descriptor(const TmaDescriptor*) {}
struct SM90_TMA_LOAD {
  static void copy(const void* map, uint64_t* barrier, uint64_t, void* to, int32_t x, int32_t y,
                   int32_t z) {
    emulator::load_tile(map, {x, y, z}, cast_smem_ptr_to_uint(to), cast_smem_ptr_to_uint(barrier),
                        1u << emulator::own_rank());
  }
  struct PREFETCH {};
};
struct SM90_TMA_LOAD_MULTICAST {
  static void copy(const void* map, uint64_t* barrier, uint16_t mask, uint64_t, void* to, int32_t x,
                   int32_t y, int32_t z) {
    emulator::load_tile(map, {x, y, z}, cast_smem_ptr_to_uint(to), cast_smem_ptr_to_uint(barrier),
                        mask);
  }
  using PREFETCH = SM90_TMA_LOAD::PREFETCH;
};
struct SM90_TMA_STORE {
  static void copy(const void* map, const void* from, int32_t x, int32_t y) {
    emulator::store_tile(map, {x, y, 0}, cast_smem_ptr_to_uint(from));
  }
};
struct SM90_U32x4_STSM_N {
  using SRegisters = uint32_t[4];
  using DRegisters = uint128_t[1];
  static void copy(uint32_t a, uint32_t b, uint32_t c, uint32_t d, uint128_t& to) {
    emulator::stmatrix({a, b, c, d}, cast_smem_ptr_to_uint(&to));
  }
};
inline void tma_store_fence() { emulator::store_fence(); }
inline void tma_store_arrive() { emulator::store_commit(); }
template <int kLeft>
void tma_store_wait() {
  static_assert(kLeft == 0);
  emulator::store_wait();
}
}  // namespace cute

#define ClusterBarrier ReplacedClusterBarrier
#define ClusterTransactionBarrier ReplacedClusterTransactionBarrier
#define fence_barrier_init replaced_fence_barrier_init
#include <cutlass/arch/barrier.h>
#undef ClusterBarrier
#undef ClusterTransactionBarrier
#undef fence_barrier_init
namespace cutlass::arch {
struct ClusterBarrier {
  using ValueType = uint64_t;
  ClusterBarrier() = delete;
  void init(uint32_t count) const { emulator::mbarrier_init(address(), count); }
  bool try_wait(uint32_t parity) const { return emulator::mbarrier_passed(address(), parity); }
  bool test_wait(uint32_t parity) const;  // declared for templates, defined nowhere
  void wait(uint32_t parity) const { emulator::mbarrier_wait(address(), parity); }
  void arrive() const { emulator::mbarrier_arrive(emulator::own_rank(), address()); }
  void arrive(uint32_t rank, uint32_t predicate) const {
    if (predicate) emulator::mbarrier_arrive_later(rank, address());
  }

 protected:
  uint32_t address() const { return cute::cast_smem_ptr_to_uint(&value_); }
  ValueType value_;
};
struct ClusterTransactionBarrier : ClusterBarrier {
  void expect_transaction(uint32_t bytes) const;
  void arrive_and_expect_tx(uint32_t bytes) const {
    emulator::mbarrier_arrive(cute::block_rank_in_cluster(), address(), bytes);
  }
};
inline void fence_barrier_init() { emulator::mbarrier_fence(); }
}  // namespace cutlass::arch

#define warpgroup_reg_alloc replaced_warpgroup_reg_alloc
#define warpgroup_reg_dealloc replaced_warpgroup_reg_dealloc
#include <cutlass/arch/reg_reconfig.h>
#undef warpgroup_reg_alloc
#undef warpgroup_reg_dealloc
namespace cutlass::arch {
template <uint32_t kCount>
void warpgroup_reg_alloc() {
  emulator::set_registers(kCount);
}
template <uint32_t kCount>
void warpgroup_reg_dealloc() {
  emulator::set_registers(kCount);
}
}  // namespace cutlass::arch
