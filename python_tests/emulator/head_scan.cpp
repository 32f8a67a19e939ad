// csrc/cuda/sm90/head_scan.cu on the host: the same walk over the same tiles, with a plain product
// in place of the tensor cores, into registers laid out as theirs. tile_scan.cuh is the real one.

#include <vector>

#include "cuda/sm90/launch.h"
#include "cuda/sm90/tile_scan.cuh"

namespace bupo::cuda::sm90 {

int64_t scans = 0;

namespace {

struct Tile {
  int columns;
  std::vector<float> x = std::vector<float>(static_cast<size_t>(kTileRows * columns));
  float& at(int row, int column) { return x[static_cast<size_t>(row * columns + column)]; }
};

void widen_rows(const void* data, int64_t first, int64_t count, int64_t limit, int64_t width,
                int64_t stride, std::vector<float>& out) {
  out.assign(static_cast<size_t>(count * width), 0.0f);  // as TMA fills what is out of bounds
  for (int64_t r = 0; r < std::min(count, limit - first); ++r)
    for (int64_t d = 0; d < width; ++d)
      out[static_cast<size_t>(r * width + d)] =
          widen(static_cast<const BFloat16*>(data)[(first + r) * stride + d]);
}

void multiply(const std::vector<float>& a, const std::vector<float>& b, int64_t width, Tile& out) {
  for (int64_t r = 0; r < kTileRows; ++r) {
    for (int64_t c = 0; c < out.columns; ++c) {
      float sum = 0.0f;
      for (int64_t d = 0; d < width; ++d)
        sum += a[static_cast<size_t>(r * width + d)] * b[static_cast<size_t>(c * width + d)];
      out.at(static_cast<int>(r), static_cast<int>(c)) = sum;
    }
  }
}

// E from each thread's own columns.
template <Schedule kSchedule>
struct PlainStore {
  const Kept& kept;
  int64_t capacity;
  uint32_t columns[TileLayout<kSchedule>::kGroups] = {};

  void begin() {}
  void put(int group, const uint32_t (&words)[4]) { std::copy_n(words, 4, columns + group); }
  void end(int64_t row, int64_t column) const {
    row += threadIdx.x % 32 / 4;
    column += threadIdx.x % 4 * 2;
    for (int g = 0; g < TileLayout<kSchedule>::kGroups; ++g)
      if (row < capacity && column + 8 * g < kept.stride)
        std::memcpy(kept.e + row * kept.stride + column + 8 * g, &columns[g], 4);
  }
};

template <Schedule kSchedule>
void scan(const ScanArgs& args) {
  using Layout = TileLayout<kSchedule>;
  const int rows = args.places.counts[0], stored = args.places.counts[1];
  std::vector<float> a, b;
  for (int first = 0; first < rows; first += kTileRows) {
    widen_rows(args.hidden, first, kTileRows, args.places.capacity, args.width, args.hidden_stride, a);
    for (int tile = 0; tile < static_cast<int>(args.tiles); ++tile) {
      Tile product{Layout::kColumns};
      widen_rows(args.weight, int64_t{tile} * Layout::kColumns, Layout::kColumns, args.vocab,
                 args.width, args.weight_stride, b);
      multiply(a, b, args.width, product);
      emulator::run(1, Layout::kThreads, [&] {
        const int thread = static_cast<int>(threadIdx.x);
        const bool stores = args.kept.e && first < stored;
        float x[Layout::kAccumulators];
        for (int fragment = 0; fragment < Layout::kFragments; ++fragment)
          for (int half = 0; half < 2; ++half)
            for (int g = 0; g < Layout::kGroups; ++g)
              for (int pair = 0; pair < 2; ++pair)
                x[Layout::accumulator(fragment, half, g, pair)] = product.at(
                    Layout::row(thread, fragment, half), Layout::column(thread, g, pair));
        PlainStore<kSchedule> store{args.kept, args.places.capacity};
        if (args.bias)
          scan_tile<kSchedule, true, true>(args, x, thread, first, rows, tile, stores, store);
        else
          scan_tile<kSchedule, true, false>(args, x, thread, first, rows, tile, stores, store);
      });
    }
  }
}

}  // namespace

cudaError_t launch_head_scan(Schedule schedule, const ScanArgs& args, cudaStream_t) {
  ++scans;
  schedule == Schedule::kPingpong ? scan<Schedule::kPingpong>(args)
                                  : scan<Schedule::kCooperative>(args);
  return cudaSuccess;
}

}  // namespace bupo::cuda::sm90
