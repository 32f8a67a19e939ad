// The LM head's product with the softmax statistics as its epilogue: logits are never written.
//
//   x = hidden weight^T [rows, V], and per row and tile of columns: reference, sum, dot
//   (tile_scan.cuh), the target's logit, and where a gradient may follow E [rows, V] in bf16
//
// 2 rows V D flop. Bytes: hidden and weight through L2, 2 rows V for E, 12 a row and tile.
//
// Persistent: one block of three warpgroups an SM, in clusters of two that share weight tiles. The
// first warpgroup loads by TMA; the others multiply (CUTLASS's collective mainloop) and reduce
// their accumulators in registers, by one of two schedules:
//
//   cooperative  both multiply 64 x 256 of a tile, then both reduce it, while the loader fills the
//                stages
//   ping-pong    each has every other tile, of 128 x 192; they multiply in turn, so one reduces
//                while the other multiplies. A sixth more bytes through L2. The turns are no mere
//                matter of speed: the barrier of a stage has only a parity bit, so a warpgroup that
//                waits before the other has read the tile in between may take an older lap for its
//                own.
//
// Neither the walk over the tiles nor a row's place affects a row's numbers: they are the same bits
// in any batch.
//
// Tests: python_tests/test_head_scan.py runs this file on the host, test_cuda_emulated.py
// tile_scan.cuh and all around it. Bench: bench/bench_lm_head.py, bench/variants.py.

#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/cutlass.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <cute/tensor.hpp>
#include <cutlass/cluster_launch.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>

#include "launch.h"
#include "tile_scan.cuh"

namespace bupo::cuda::sm90 {
namespace {

using namespace cute;

using ClusterShape = Shape<_2, _1, _1>;
constexpr int kCluster = size(ClusterShape{});
constexpr int kClusterRows = kCluster * kTileRows;
constexpr int kDepth = 64;  // columns of hidden in a stage
constexpr int kWarpgroup = cutlass::NumThreadsPerWarpGroup;
constexpr int kThreads = 3 * kWarpgroup;

template <Schedule kSchedule>
struct Scan : TileLayout<kSchedule> {
  using Layout = TileLayout<kSchedule>;
  static constexpr bool kPingpong = kSchedule == Schedule::kPingpong;
  static constexpr int kStages = kPingpong ? 5 : 4;
  static constexpr int kLoaderRegisters = kPingpong ? 24 : 40;
  static constexpr int kScanRegisters = kPingpong ? 240 : 232;
  using TileShape = Shape<Int<kTileRows>, Int<Layout::kColumns>, Int<kDepth>>;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, cutlass::bfloat16_t,
      cutlass::layout::RowMajor, 8, cutlass::bfloat16_t, cutlass::layout::ColumnMajor, 8, float,
      TileShape, ClusterShape, cutlass::gemm::collective::StageCount<kStages>,
      std::conditional_t<kPingpong, cutlass::gemm::KernelTmaWarpSpecializedPingpong,
                         cutlass::gemm::KernelTmaWarpSpecializedCooperative>>::CollectiveOp;
  using Pipeline = typename Mainloop::MainloopPipeline;
  using TiledMma = typename Mainloop::TiledMma;
  static_assert(size(TiledMma{}) == Layout::kThreads);
  using Turns = cutlass::OrderedSequenceBarrier<1, 2>;  // of the warpgroups, at multiplying
  // Eight rows of a warp and all columns of a tile, on their way from registers to E.
  using Outgoing = cutlass::bfloat16_t[8 * Layout::kColumns];

  struct Shared {
    alignas(128) typename Mainloop::TensorStorage tensors;
    alignas(1024) Outgoing outgoing[2 * kWarpgroup / 32];
    alignas(16) typename Mainloop::PipelineStorage pipeline;
    alignas(16) typename Turns::SharedStorage turns;
  };

  // That thread and accumulator of tile_scan.cuh are those of wgmma.
  static constexpr bool layout_is_as_stated() {
    constexpr int kRows = Layout::kThreads / 2;  // of a fragment
    for (int thread = 0; thread < Layout::kThreads; thread += 13)
      for (int half = 0; half < 2; ++half)
        for (int group = 0; group < Layout::kGroups; group += 5)
          for (int pair = 0; pair < 2; ++pair) {
            // (thread, value) -> place in the tile, columns of rows
            const int place = decltype(TiledMma{}.get_layoutC_TV()){}(
                thread, Layout::accumulator(0, half, group, pair));
            if (place != Layout::row(thread, 0, half) + kRows * Layout::column(thread, group, pair))
              return false;
          }
    return true;
  }
  static_assert(layout_is_as_stated());
};

// E as TMA writes it: boxes of 8 rows x 64 columns, which shared memory holds swizzled.
constexpr int kBoxColumns = 64, kBoxSize = 8 * kBoxColumns;
TmaDescriptor map_of(const Kept& kept, int64_t capacity) {
  const auto e = make_tensor(make_gmem_ptr(reinterpret_cast<cutlass::bfloat16_t*>(kept.e)),
                             make_shape(static_cast<int>(capacity), static_cast<int>(kept.stride)),
                             make_stride(kept.stride, _1{}));
  constexpr auto box = GMMA::Layout_K_SW128_Atom<cutlass::bfloat16_t>{};
  static_assert(size(box) == kBoxSize);
  return *make_tma_copy(SM90_TMA_STORE{}, e, box).get_tma_descriptor();
}

// The Store of tile_scan.cuh: stmatrix to shared memory, TMA from there, while the warp goes on.
// Rows beyond the capacity and columns beyond the stride are left out by TMA.
template <int kColumns>
struct StoreByTma {
  const TmaDescriptor& map;
  cutlass::bfloat16_t* outgoing;
  int lane;

  __device__ void begin() const {
    finish();
    __syncwarp();
  }
  // A lane gives the address of one of the 32 rows of four 8 x 8 matrices. The swizzle: 16 bytes
  // change places with the row.
  __device__ void put(int group, const uint32_t (&words)[4]) const {
    const int row = lane % 8, chunk = (group % 8 + lane / 8) ^ row;
    auto* to = outgoing + group / 8 * kBoxSize + row * kBoxColumns + chunk * 8;
    SM90_U32x4_STSM_N::copy(words[0], words[1], words[2], words[3],
                            *reinterpret_cast<uint128_t*>(to));
  }
  __device__ void end(int row, int column) const {
    tma_store_fence();
    __syncwarp();
    if (lane != 0) return;
#pragma unroll
    for (int box = 0; box < kColumns / kBoxColumns; ++box)
      SM90_TMA_STORE::copy(&map, outgoing + box * kBoxSize, column + kBoxColumns * box, row);
    tma_store_arrive();
  }
  // Until TMA has read what was sent.
  __device__ void finish() const {
    if (lane == 0) tma_store_wait<0>();
  }
};

// The work of a cluster, unit after unit: a tile of the columns for kClusterRows rows. Units that
// run at the same time share few row blocks and few tiles, so that both stay in L2.
class Units {
 public:
  __device__ Units(int rows, int tiles, int width)
      : tiles_(tiles), blocks_((rows + kClusterRows - 1) / kClusterRows) {
    // Hidden rows that are read again for every tile of the weight: a third of an H100's L2.
    constexpr int kResident = 16 << 20;
    const int most = max(2, min(16, kResident / (kClusterRows * 2) / width));
    const int groups = (blocks_ + most - 1) / most;
    together_ = groups == 0 ? 1 : (blocks_ + groups - 1) / groups;
  }

  __device__ int count() const { return blocks_ * tiles_; }
  __device__ void at(int unit, int& block, int& tile) const {
    const int first = unit / (together_ * tiles_) * together_;
    const int size = min(together_, blocks_ - first);
    const int rest = unit - first * tiles_;
    tile = rest / size;
    block = first + rest % size;
  }

 private:
  int tiles_, blocks_, together_;
};

template <Schedule kSchedule, bool kStore, bool kBias>
__global__ void __launch_bounds__(kThreads, 1)
    head_scan_kernel(const __grid_constant__ typename Scan<kSchedule>::Mainloop::Params map,
                     const __grid_constant__ TmaDescriptor map_of_e,
                     const __grid_constant__ ScanArgs args) {
  using S = Scan<kSchedule>;
  using Pipeline = typename S::Pipeline;
  auto& shared = *reinterpret_cast<typename S::Shared*>(dynamic_shared_memory());
  const int warpgroup = cutlass::canonical_warp_group_idx();
  const int warp = cutlass::canonical_warp_idx_sync();
  const bool loads = warpgroup == 0;

  if (warp == 0 && elect_one_sync()) S::Mainloop::prefetch_tma_descriptors(map);
  typename Pipeline::Params pipeline_params;
  pipeline_params.role = !loads      ? Pipeline::ThreadCategory::Consumer
                         : warp == 0 ? Pipeline::ThreadCategory::Producer
                                     : Pipeline::ThreadCategory::NonParticipant;
  pipeline_params.is_leader = threadIdx.x % kWarpgroup == 0;
  pipeline_params.num_consumers = S::kThreads;  // of a stage
  pipeline_params.num_producers = S::Mainloop::NumProducerThreadEvents;
  pipeline_params.transaction_bytes = map.tma_transaction_bytes;
  Pipeline pipeline(shared.pipeline, pipeline_params, ClusterShape{});
  typename S::Turns turns(shared.turns, {static_cast<uint32_t>(warpgroup - 1), kWarpgroup});
  cluster_arrive_relaxed();  // barriers are there before another block of the cluster uses them
  cluster_wait();

  const int rows = args.places.counts[0], stored = args.places.counts[1];
  const int rank = block_rank_in_cluster();
  const Units units(rows, static_cast<int>(args.tiles), static_cast<int>(args.width));
  const int clusters = gridDim.x / kCluster;
  const int steps = (static_cast<int>(args.width) + kDepth - 1) / kDepth;
  int unit = blockIdx.x / kCluster, block, tile;
  typename S::Mainloop mainloop;

  if (loads) {
    cutlass::arch::warpgroup_reg_dealloc<S::kLoaderRegisters>();
    if (warp == 0) {
      const auto shape = make_shape(static_cast<int>(args.places.capacity),
                                    static_cast<int>(args.vocab), static_cast<int>(args.width), 1);
      const auto inputs = mainloop.load_init(shape, map);
      auto state = cutlass::make_producer_start_state<Pipeline>();
      for (; unit < units.count(); unit += clusters) {
        units.at(unit, block, tile);
        mainloop.load(map, pipeline, state, inputs, make_coord(block * kCluster + rank, tile, _, 0),
                      make_coord_iterator(steps), steps, threadIdx.x % 32, rank, shared.tensors);
        state.advance(steps);
      }
      mainloop.load_tail(pipeline, state);
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<S::kScanRegisters>();
    const int thread = (threadIdx.x - kWarpgroup) % S::kThreads;
    auto* outgoing = shared.outgoing[warp - kWarpgroup / 32];
    StoreByTma<S::kColumns> store{map_of_e, outgoing, static_cast<int>(threadIdx.x % 32)};
    typename S::Mainloop::PipelineState state;
    if (S::kPingpong && warpgroup == 2) {
      state.advance(steps);
      unit += clusters;
    }
    for (; unit < units.count(); unit += S::kPingpong ? 2 * clusters : clusters) {
      units.at(unit, block, tile);
      const int first = (block * kCluster + rank) * kTileRows;
      auto sums = partition_fragment_C(typename S::TiledMma{}, take<0, 2>(typename S::TileShape{}));
      static_assert(decltype(size(sums))::value == S::kAccumulators);
      if constexpr (S::kPingpong) turns.wait();
      mainloop.mma(pipeline, state, sums, steps, thread, shared.tensors, map);
      if constexpr (S::kPingpong) turns.arrive();
      mainloop.mma_tail(pipeline, state, steps);
      state.advance(S::kPingpong ? 2 * steps : steps);
      scan_tile<kSchedule, kStore, kBias>(args, sums.data(), thread, first, rows, tile,
                                          kStore && first < stored, store);
    }
    if constexpr (kStore) store.finish();
  }
}

bool is_zero(const TmaDescriptor& map) {
  const TmaDescriptor zero{};
  return std::memcmp(&map, &zero, sizeof zero) == 0;
}

cudaLaunchConfig_t config_of(int blocks, int shared, cudaLaunchAttribute& cluster,
                             cudaStream_t stream) {
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {kCluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(blocks);
  config.blockDim = kThreads;
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return config;
}

// Clusters that the current device holds at a time. Asked, not computed: an SM whose neighbour is
// missing from the chip holds none.
template <class Kernel>
cudaError_t resident_clusters(Kernel* kernel, int shared, std::array<std::atomic<int>, 64>& known,
                              int& clusters) {
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const size_t slot = static_cast<size_t>(device) % known.size();
  clusters = known[slot];
  if (clusters > 0) return cudaSuccess;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cluster;
  const cudaLaunchConfig_t config =
      config_of(multiprocessors / kCluster * kCluster, shared, cluster, nullptr);
  error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
  if (error == cudaSuccess && clusters < 1) error = cudaErrorInvalidConfiguration;
  if (error == cudaSuccess) known[slot] = clusters;
  return error;
}

template <Schedule kSchedule, bool kStore, bool kBias>
cudaError_t launch(const ScanArgs& args, cudaStream_t stream) {
  using Mainloop = typename Scan<kSchedule>::Mainloop;
  using Strides = Stride<int64_t, _1, int64_t>;
  static_assert(is_same_v<Strides, typename Mainloop::StrideA> &&
                is_same_v<Strides, typename Mainloop::StrideB>);
  const auto shape = make_shape(static_cast<int>(args.places.capacity),
                                static_cast<int>(args.vocab), static_cast<int>(args.width), 1);
  const auto params =
      Mainloop::to_underlying_arguments(shape,
                                        {static_cast<const cutlass::bfloat16_t*>(args.hidden),
                                         {args.hidden_stride, _1{}, 0},
                                         static_cast<const cutlass::bfloat16_t*>(args.weight),
                                         {args.weight_stride, _1{}, 0}},
                                        nullptr);
  const TmaDescriptor map_of_e = kStore ? map_of(args.kept, args.places.capacity) : TmaDescriptor{};
  // CUTLASS prints a refused tensor map and goes on with zeros, which would fault on the device.
  if (is_zero(*params.tma_load_a.get_tma_descriptor()) ||
      is_zero(*params.tma_load_b.get_tma_descriptor()) || (kStore && is_zero(map_of_e)))
    return cudaErrorInvalidValue;
  const auto kernel = head_scan_kernel<kSchedule, kStore, kBias>;
  constexpr int kShared = sizeof(typename Scan<kSchedule>::Shared);
  static_assert(kShared <= 227 << 10);
  static std::array<std::atomic<int>, 64> known{};
  int clusters = 0;
  const cudaError_t error = resident_clusters(kernel, kShared, known, clusters);
  if (error != cudaSuccess) return error;
  const int64_t units = (args.places.capacity + kClusterRows - 1) / kClusterRows * args.tiles;
  cudaLaunchAttribute cluster;
  const cudaLaunchConfig_t config = config_of(
      static_cast<int>(std::min<int64_t>(clusters, units)) * kCluster, kShared, cluster, stream);
  return cudaLaunchKernelEx(&config, kernel, params, map_of_e, args);
}

template <Schedule kSchedule>
cudaError_t launch(const ScanArgs& args, cudaStream_t stream) {
  if (args.kept.e)
    return args.bias ? launch<kSchedule, true, true>(args, stream)
                     : launch<kSchedule, true, false>(args, stream);
  return args.bias ? launch<kSchedule, false, true>(args, stream)
                   : launch<kSchedule, false, false>(args, stream);
}

}  // namespace

cudaError_t launch_head_scan(Schedule schedule, const ScanArgs& args, cudaStream_t stream) {
  if (args.places.capacity == 0) return cudaSuccess;
  return schedule == Schedule::kPingpong ? launch<Schedule::kPingpong>(args, stream)
                                         : launch<Schedule::kCooperative>(args, stream);
}

}  // namespace bupo::cuda::sm90
