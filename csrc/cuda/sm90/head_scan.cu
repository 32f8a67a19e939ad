// The LM head's product with the softmax statistics as its epilogue: logits are never written.
//
//   x = hidden weight^T [rows, V], and per row and kSplitColumns columns: reference, sum, dot
//   (tile_scan.cuh), the target's logit, and where a gradient may follow E [rows, V] in bf16
//
// 2 rows V D flop. Bytes: hidden and weight through L2, 2 rows V for E, 12 a row and split.
//
// Persistent: one block of three warpgroups an SM, in clusters of two that share weight tiles. The
// first warpgroup loads by TMA; the others each multiply 64 x 256 of a 128 x 256 tile (CUTLASS's
// collective mainloop) and reduce their accumulators in registers. Meanwhile the loader fills the
// stages; the other warpgroup multiplies on as far as it is behind, kStages steps at most
// (docs/performance.md). A block walks the tiles of one split and keeps the statistics of its rows
// between them, so that partial results are few. Neither the walk nor a row's place reaches a row's
// numbers: they are the same bits in any batch.
//
// Tests: python_tests/test_head_scan.py runs this file on the host, test_cuda_emulated.py
// tile_scan.cuh and all around it. Bench: bench/bench_lm_head.py.

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

using TileShape = Shape<Int<kTileRows>, Int<kTileColumns>, _64>;
using ClusterShape = Shape<_2, _1, _1>;
constexpr int kCluster = size(ClusterShape{});
constexpr int kClusterRows = kCluster * kTileRows;
constexpr int kStages = 4;
using Mainloop = cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, cutlass::bfloat16_t,
    cutlass::layout::RowMajor, 8, cutlass::bfloat16_t, cutlass::layout::ColumnMajor, 8, float,
    TileShape, ClusterShape, cutlass::gemm::collective::StageCount<kStages>,
    cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp;
using Pipeline = Mainloop::MainloopPipeline;
using TiledMma = Mainloop::TiledMma;
static_assert(size(TiledMma{}) == kScanThreads);

constexpr int kThreads = kScanThreads + cutlass::NumThreadsPerWarpGroup;
constexpr int kLoaderRegisters = 40, kScanRegisters = 232;

// That thread and accumulator of tile_scan.cuh are those of wgmma.
constexpr bool layout_is_as_stated(int thread, int half, int group, int pair) {
  // (thread, value) -> place in the tile, columns of rows
  const int place = decltype(TiledMma{}.get_layoutC_TV()){}(thread, accumulator(half, group, pair));
  return place == row_in_tile(thread, half) + kTileRows * column_in_tile(thread, group, pair);
}
constexpr bool layout_is_as_stated() {
  for (int thread = 0; thread < kScanThreads; thread += 13)
    for (int half = 0; half < 2; ++half)
      for (int group = 0; group < kGroups; group += 5)
        for (int pair = 0; pair < 2; ++pair)
          if (!layout_is_as_stated(thread, half, group, pair)) return false;
  return layout_is_as_stated(kScanThreads - 1, 1, kGroups - 1, 1);
}
static_assert(layout_is_as_stated());

struct Shared {
  alignas(128) Mainloop::TensorStorage tensors;
  alignas(16) Mainloop::PipelineStorage pipeline;
};

// The work of a cluster, unit after unit: a split of the columns for kClusterRows rows. Units that
// run at the same time share few row blocks and few splits, so that both stay in L2.
class Units {
 public:
  __device__ Units(int rows, int splits, int width)
      : splits_(splits), blocks_((rows + kClusterRows - 1) / kClusterRows) {
    // Hidden rows that are read again for every tile of the weight: a third of an H100's L2.
    constexpr int kResident = 16 << 20;
    const int most = max(2, min(16, kResident / (kClusterRows * 2) / width));
    const int groups = (blocks_ + most - 1) / most;
    together_ = groups == 0 ? 1 : (blocks_ + groups - 1) / groups;
  }

  __device__ int count() const { return blocks_ * splits_; }
  __device__ void at(int unit, int& block, int& split) const {
    const int first = unit / (together_ * splits_) * together_;
    const int size = min(together_, blocks_ - first);
    const int rest = unit - first * splits_;
    split = rest / size;
    block = first + rest % size;
  }

 private:
  int splits_, blocks_, together_;
};

template <bool kStore, bool kPlain>
__global__ void __launch_bounds__(kThreads, 1)
    head_scan_kernel(const __grid_constant__ Mainloop::Params mainloop_params,
                     const __grid_constant__ ScanArgs args) {
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared_memory());
  const int warpgroup = cutlass::canonical_warp_group_idx();
  const int warp = cutlass::canonical_warp_idx_sync();
  const bool loads = warpgroup == 0;

  if (warp == 0 && elect_one_sync()) Mainloop::prefetch_tma_descriptors(mainloop_params);
  Pipeline::Params pipeline_params;
  pipeline_params.role = !loads      ? Pipeline::ThreadCategory::Consumer
                         : warp == 0 ? Pipeline::ThreadCategory::Producer
                                     : Pipeline::ThreadCategory::NonParticipant;
  pipeline_params.is_leader = threadIdx.x % cutlass::NumThreadsPerWarpGroup == 0;
  pipeline_params.num_consumers = kScanThreads;
  pipeline_params.num_producers = Mainloop::NumProducerThreadEvents;
  pipeline_params.transaction_bytes = mainloop_params.tma_transaction_bytes;
  Pipeline pipeline(shared.pipeline, pipeline_params, ClusterShape{});
  cluster_arrive_relaxed();  // barriers are there before another block of the cluster uses them
  cluster_wait();

  const int rows = args.counts ? args.counts[0] : static_cast<int>(args.capacity);
  const int stored = args.counts ? args.counts[1] : 0;
  const int rank = block_rank_in_cluster();
  const int splits = static_cast<int>((args.vocab + kSplitColumns - 1) / kSplitColumns);
  const Units units(rows, splits, static_cast<int>(args.width));
  const int clusters = gridDim.x / kCluster;
  const int steps =
      (static_cast<int>(args.width) + size<2>(TileShape{}) - 1) / size<2>(TileShape{});
  constexpr int kTilesOfSplit = kSplitColumns / kTileColumns;
  Mainloop mainloop;

  if (loads) {
    cutlass::arch::warpgroup_reg_dealloc<kLoaderRegisters>();
    if (warp == 0) {
      const auto shape = make_shape(static_cast<int>(args.capacity), static_cast<int>(args.vocab),
                                    static_cast<int>(args.width), 1);
      const auto inputs = mainloop.load_init(shape, mainloop_params);
      auto state = cutlass::make_producer_start_state<Pipeline>();
      for (int unit = blockIdx.x / kCluster; unit < units.count(); unit += clusters) {
        int block, split;
        units.at(unit, block, split);
        const int row_tile = block * kCluster + rank;
        const int first = split * kTilesOfSplit;
        for (int tile = first; tile < min(first + kTilesOfSplit, static_cast<int>(args.tiles));
             ++tile) {
          mainloop.load(mainloop_params, pipeline, state, inputs, make_coord(row_tile, tile, _, 0),
                        make_coord_iterator(steps), steps, threadIdx.x % 32, rank, shared.tensors);
          state.advance(steps);
        }
      }
      mainloop.load_tail(pipeline, state);
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<kScanRegisters>();
    const int thread = threadIdx.x - cutlass::NumThreadsPerWarpGroup;
    Mainloop::PipelineState state;
    for (int unit = blockIdx.x / kCluster; unit < units.count(); unit += clusters) {
      int block, split;
      units.at(unit, block, split);
      const int row_tile = block * kCluster + rank;
      const int first = split * kTilesOfSplit;
      const bool store = kStore && row_tile * kTileRows < stored;
      RowScan<kStore, kPlain> upper, lower;
      upper.begin(args, row_tile * kTileRows + row_in_tile(thread, 0), rows);
      lower.begin(args, row_tile * kTileRows + row_in_tile(thread, 1), rows);
      for (int tile = first; tile < min(first + kTilesOfSplit, static_cast<int>(args.tiles));
           ++tile) {
        auto sums = partition_fragment_C(TiledMma{}, take<0, 2>(TileShape{}));
        mainloop.mma(pipeline, state, sums, steps, thread, shared.tensors, mainloop_params);
        mainloop.mma_tail(pipeline, state, steps);
        state.advance(steps);
        upper.template add<0>(args, sums.data(), thread, tile, store);
        lower.template add<1>(args, sums.data(), thread, tile, store);
      }
      upper.finish(args, thread, split);
      lower.finish(args, thread, split);
    }
  }
}

bool is_zero(const TmaDescriptor& map) {
  const TmaDescriptor zero{};
  return std::memcmp(&map, &zero, sizeof zero) == 0;
}

cudaLaunchConfig_t config_of(int blocks, cudaLaunchAttribute& cluster, cudaStream_t stream) {
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {kCluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(blocks);
  config.blockDim = kThreads;
  config.dynamicSmemBytes = sizeof(Shared);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return config;
}

// Clusters that the current device holds at a time. Asked, not computed: an SM whose neighbour is
// missing from the chip holds none.
template <bool kStore, bool kPlain>
cudaError_t resident_clusters(int& clusters) {
  const auto kernel = head_scan_kernel<kStore, kPlain>;
  static std::array<std::atomic<int>, 64> known{};
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const size_t slot = static_cast<size_t>(device) % known.size();
  clusters = known[slot];
  if (clusters > 0) return cudaSuccess;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cluster;
  const cudaLaunchConfig_t config =
      config_of(multiprocessors / kCluster * kCluster, cluster, nullptr);
  error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
  if (error == cudaSuccess && clusters < 1) error = cudaErrorInvalidConfiguration;
  if (error == cudaSuccess) known[slot] = clusters;
  return error;
}

template <bool kStore, bool kPlain>
cudaError_t launch(const ScanArgs& args, cudaStream_t stream) {
  using Strides = Stride<int64_t, _1, int64_t>;
  static_assert(is_same_v<Strides, Mainloop::StrideA> && is_same_v<Strides, Mainloop::StrideB>);
  const auto shape = make_shape(static_cast<int>(args.capacity), static_cast<int>(args.vocab),
                                static_cast<int>(args.width), 1);
  const Mainloop::Params params =
      Mainloop::to_underlying_arguments(shape,
                                        {static_cast<const cutlass::bfloat16_t*>(args.hidden),
                                         {args.hidden_stride, _1{}, 0},
                                         static_cast<const cutlass::bfloat16_t*>(args.weight),
                                         {args.weight_stride, _1{}, 0}},
                                        nullptr);
  const auto kernel = head_scan_kernel<kStore, kPlain>;
  // CUTLASS prints a refused tensor map and goes on with zeros, which would fault on the device.
  if (is_zero(*params.tma_load_a.get_tma_descriptor()) ||
      is_zero(*params.tma_load_b.get_tma_descriptor()))
    return cudaErrorInvalidValue;
  int clusters = 0;
  const cudaError_t error = resident_clusters<kStore, kPlain>(clusters);
  if (error != cudaSuccess) return error;
  const int64_t units = (args.capacity + kClusterRows - 1) / kClusterRows * splits_of(args.vocab);
  cudaLaunchAttribute cluster;
  const cudaLaunchConfig_t config =
      config_of(static_cast<int>(std::min<int64_t>(clusters, units)) * kCluster, cluster, stream);
  return cudaLaunchKernelEx(&config, kernel, params, args);
}

}  // namespace

cudaError_t launch_head_scan(const ScanArgs& args, cudaStream_t stream) {
  if (args.capacity == 0) return cudaSuccess;
  const bool plain = args.bias == nullptr && args.softcap == 0.0f;
  if (args.kept.e)
    return plain ? launch<true, true>(args, stream) : launch<true, false>(args, stream);
  return plain ? launch<false, true>(args, stream) : launch<false, false>(args, stream);
}

}  // namespace bupo::cuda::sm90
