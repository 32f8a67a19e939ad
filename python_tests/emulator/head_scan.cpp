// csrc/cuda/sm90/head_scan.cu on the host: the same walk over the same tiles, with a plain product
// in place of the tensor cores, into registers laid out as theirs. tile_scan.cuh is the real one.

#include <vector>

#include "cuda/sm90/launch.h"
#include "cuda/sm90/tile_scan.cuh"

namespace bupo::cuda::sm90 {

int64_t scans = 0;

namespace {

struct Tile {
  std::vector<float> x = std::vector<float>(kTileRows * kTileColumns);
  float& at(int row, int column) { return x[static_cast<size_t>(row * kTileColumns + column)]; }
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
    for (int64_t c = 0; c < kTileColumns; ++c) {
      float sum = 0.0f;
      for (int64_t d = 0; d < width; ++d)
        sum += a[static_cast<size_t>(r * width + d)] * b[static_cast<size_t>(c * width + d)];
      out.at(static_cast<int>(r), static_cast<int>(c)) = sum;
    }
  }
}

}  // namespace

cudaError_t launch_head_scan(const ScanArgs& args, cudaStream_t) {
  const int rows = args.counts ? args.counts[0] : static_cast<int>(args.capacity);
  const int stored = args.counts ? args.counts[1] : 0;
  const int tiles = static_cast<int>(args.tiles), together = kSplitColumns / kTileColumns;
  std::vector<float> a, b;
  ++scans;
  for (int row = 0; row < rows; row += kTileRows) {
    widen_rows(args.hidden, row, kTileRows, args.capacity, args.width, args.hidden_stride, a);
    for (int first = 0; first < tiles; first += together) {
      std::vector<Tile> products(static_cast<size_t>(std::min(together, tiles - first)));
      for (size_t t = 0; t < products.size(); ++t) {
        widen_rows(args.weight, (first + static_cast<int64_t>(t)) * kTileColumns, kTileColumns,
                   args.vocab, args.width, args.weight_stride, b);
        multiply(a, b, args.width, products[t]);
      }
      emulator::run(1, kScanThreads, [&] {
        const int thread = static_cast<int>(threadIdx.x);
        const bool store = args.kept.e && row < stored;
        const auto walk = [&]<bool kPlain>() {
          RowScan<true, kPlain> upper, lower;
          upper.begin(args, row + row_in_tile(thread, 0), rows);
          lower.begin(args, row + row_in_tile(thread, 1), rows);
          for (size_t t = 0; t < products.size(); ++t) {
            float x[4 * kGroups];
            for (int half = 0; half < 2; ++half)
              for (int g = 0; g < kGroups; ++g)
                for (int pair = 0; pair < 2; ++pair)
                  x[accumulator(half, g, pair)] =
                      products[t].at(row_in_tile(thread, half), column_in_tile(thread, g, pair));
            const int tile = first + static_cast<int>(t);
            upper.template add<0>(args, x, thread, tile, store);
            lower.template add<1>(args, x, thread, tile, store);
          }
          upper.finish(args, thread, first / together);
          lower.finish(args, thread, first / together);
        };
        if (args.bias == nullptr && args.softcap == 0.0f)
          walk.template operator()<true>();
        else
          walk.template operator()<false>();
      });
    }
  }
  return cudaSuccess;
}

}  // namespace bupo::cuda::sm90
