#include "products.h"

#include <algorithm>
#include <cstring>

#include "library.h"
#include "vector_math.h"
#include "vocab_tile.h"

namespace bupo::cpu {
namespace {

constexpr int64_t kPanel = 64;         // columns of a packed right operand
constexpr int64_t kKernelRows = 128;   // weight rows of one block product
constexpr int64_t kKernelDepth = 256;  // summed dimension of one: fp32 sums stay short
constexpr int64_t kTransposed = 256;   // tokens of a transposed block of dz
constexpr int64_t kColumns = 1024;     // of the weight, with such a block: 512 KiB in cache
constexpr int64_t kLiveMultiple = 32;  // few distinct sizes, so few kernels are generated

int64_t panels(int64_t columns) { return (columns + kPanel - 1) / kPanel; }

template <class T>
const T* row_of(const void* base, int64_t row, int64_t stride) {
  return static_cast<const T*>(base) + row * stride;
}

// from[0, count) as Acc: a copy, or bfloat16 to fp32.
template <class T, class Acc>
void widen(const T* from, Acc* to, int64_t count) {
  if constexpr (std::is_same_v<T, Acc>) {
    std::memcpy(to, from, static_cast<size_t>(count) * sizeof(T));
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = from_bfloat16(from[i]);
  }
}

// Chosen rows of `hidden`, one after another, as Acc.
template <class T, class Acc>
void gather(const HeadArgs& args, const int64_t* rows, int64_t count, std::vector<Acc>& out) {
  out.resize(static_cast<size_t>(count * args.width));
  for (int64_t i = 0; i < count; ++i)
    widen(row_of<T>(args.hidden, rows[i], args.hidden_stride), out.data() + i * args.width,
          args.width);
}

// A tile of the weight as Acc: in place, or in memory of the calling thread.
template <class T, class Acc>
Block weight_tile(const HeadArgs& args, int64_t first, int64_t rows) {
  const T* weight = row_of<T>(args.weight, first, args.weight_stride);
  if constexpr (std::is_same_v<T, Acc>) {
    return block(weight, rows, args.width, args.weight_stride);
  } else {
    thread_local std::vector<Acc> tile;
    tile.resize(static_cast<size_t>(rows * args.width));
    for (int64_t j = 0; j < rows; ++j)
      widen(weight + j * args.weight_stride, tile.data() + j * args.width, args.width);
    return block(tile.data(), rows, args.width, args.width);
  }
}

// dx holds one row for each of `rows`; out [N, D] gets them, rounded if T is bfloat16.
template <class T, class Acc>
void scatter(const std::vector<Acc>& dx, const std::vector<int64_t>& rows, int64_t width,
             void* out) {
  for (size_t i = 0; i < rows.size(); ++i) {
    const Acc* from = dx.data() + static_cast<int64_t>(i) * width;
    T* to = static_cast<T*>(out) + rows[i] * width;
    if constexpr (std::is_same_v<T, Acc>) {
      std::memcpy(to, from, static_cast<size_t>(width) * sizeof(T));
    } else {
      round_to_bfloat16(from, to, width);
    }
  }
}

// a [rows, depth] times packed panels, on the calling thread.
template <class T>
void multiply_panels(const T* a, int64_t lda, int64_t rows, int64_t depth, const T* b,
                     int64_t columns, float* c, int64_t ldc, bool accumulate) {
  const BlockKernel<T>& kernel = block_kernel<T>();
  constexpr bool paired = BlockKernel<T>::kPaired;
  for (int64_t m = 0; m < rows; m += kKernelRows)
    for (int64_t n = 0; n < columns; n += kPanel)
      for (int64_t k = 0; k < depth; k += kKernelDepth)
        kernel.call(std::min(kKernelRows, rows - m), std::min(kPanel, columns - n),
                    std::min(kKernelDepth, depth - k), lda, kPanel, ldc, accumulate || k > 0,
                    a + m * lda + k, b + n * depth + k * kPanel, c + m * ldc + n, paired);
  kernel.release(paired);
}

}  // namespace

// ---- torch's BLAS -----------------------------------------------------------------------------

template <class T, class Acc>
void LibraryProducts<T, Acc>::load_tokens(const int64_t* rows, int64_t count) {
  count_ = count;
  gather<T>(args_, rows, count, tokens_);
}

template <class T, class Acc>
void LibraryProducts<T, Acc>::logits(int64_t first, int64_t rows, Acc* out, int64_t ld) const {
  multiply(block(out, rows, count_, ld), weight_tile<T, Acc>(args_, first, rows),
           transposed(block(tokens_.data(), count_, args_.width, args_.width)));
}

template <class T, class Acc>
void LibraryProducts<T, Acc>::load_live(const std::vector<int64_t>& rows) {
  live_rows_ = rows;
  gather<T>(args_, rows.data(), static_cast<int64_t>(rows.size()), live_);
}

template <class T, class Acc>
void LibraryProducts<T, Acc>::weight_gradient(int64_t first, int64_t rows, Acc* dz, int64_t ld,
                                              Acc* out, bool accumulate) const {
  const int64_t live = static_cast<int64_t>(live_rows_.size());
  multiply(block(out + first * args_.width, rows, args_.width, args_.width),
           block(dz, rows, live, ld), block(live_.data(), live, args_.width, args_.width),
           accumulate);
}

template <class T, class Acc>
void LibraryProducts<T, Acc>::hidden_gradient(const Acc* dz, int64_t ld, void* out) const {
  const int64_t live = static_cast<int64_t>(live_rows_.size());
  // One product over the whole vocabulary, unless the weight has to be widened tile by tile.
  const int64_t step = std::is_same_v<T, Acc> ? args_.vocab : kTileRows;
  std::vector<Acc> dx(static_cast<size_t>(live * args_.width));
  for (int64_t first = 0; first < args_.vocab; first += step) {
    const int64_t rows = std::min(step, args_.vocab - first);
    multiply(block(dx.data(), live, args_.width, args_.width),
             transposed(block(dz + first * ld, rows, live, ld)),
             weight_tile<T, Acc>(args_, first, rows), first > 0);
  }
  scatter<T>(dx, live_rows_, args_.width, out);
}

template class LibraryProducts<float>;
template class LibraryProducts<double>;
template class LibraryProducts<uint16_t, float>;

// ---- oneDNN's block product -------------------------------------------------------------------

template <class T>
bool BlockProducts<T>::usable(const HeadArgs& args) {
  return block_kernel<T>().call != nullptr && (!BlockKernel<T>::kPaired || args.width % 2 == 0);
}

template <class T>
void BlockProducts<T>::load_tokens(const int64_t* rows, int64_t count) {
  constexpr int64_t kGroup = BlockKernel<T>::kPaired ? 2 : 1;
  count_ = count;
  tokens_.assign(static_cast<size_t>(panels(count) * kPanel * args_.width), T(0));
  for_each(panels(count), [&](int64_t p) {
    T* panel = tokens_.data() + p * kPanel * args_.width;
    for (int64_t i = p * kPanel; i < std::min(count, (p + 1) * kPanel); ++i) {
      const T* from = row_of<T>(args_.hidden, rows[i], args_.hidden_stride);
      T* to = panel + kGroup * (i - p * kPanel);
      for (int64_t d = 0; d < args_.width; d += kGroup)
        std::memcpy(to + kPanel * d, from + d, kGroup * sizeof(T));
    }
  });
}

template <class T>
void BlockProducts<T>::logits(int64_t first, int64_t rows, float* out, int64_t ld) const {
  multiply_panels(row_of<T>(args_.weight, first, args_.weight_stride), args_.weight_stride, rows,
                  args_.width, tokens_.data(), panels(count_) * kPanel, out, ld, false);
}

template <class T>
void BlockProducts<T>::load_live(const std::vector<int64_t>& rows) {
  constexpr int64_t kGroup = BlockKernel<T>::kPaired ? 2 : 1;
  live_rows_ = rows;
  const int64_t live = static_cast<int64_t>(rows.size()), depth = round_up(live, kLiveMultiple);
  live_.assign(static_cast<size_t>(panels(args_.width) * kPanel * depth), T(0));
  for_each(panels(args_.width), [&](int64_t p) {
    T* panel = live_.data() + p * kPanel * depth;
    const int64_t width = std::min(kPanel, args_.width - p * kPanel);
    for (int64_t i = 0; i < live; ++i) {
      const T* from = row_of<T>(args_.hidden, rows[i], args_.hidden_stride) + p * kPanel;
      T* to = panel + (i / kGroup) * kGroup * kPanel + i % kGroup;
      for (int64_t d = 0; d < width; ++d) to[kGroup * d] = from[d];
    }
  });
}

template <class T>
void BlockProducts<T>::weight_gradient(int64_t first, int64_t rows, float* dz, int64_t ld,
                                       float* out, bool accumulate) const {
  const int64_t live = static_cast<int64_t>(live_rows_.size());
  const int64_t depth = round_up(live, kLiveMultiple);
  const int64_t lda = ld * static_cast<int64_t>(sizeof(float) / sizeof(T));
  T* a = reinterpret_cast<T*>(dz);
  for (int64_t j = 0; j < rows; ++j) std::fill_n(a + j * lda + live, depth - live, T(0));
  multiply_panels(a, lda, rows, depth, live_.data(), args_.width, out + first * args_.width,
                  args_.width, accumulate);
}

// fp32: blocks of dx, each a sum over the vocabulary of blocks of dz, transposed in cache, times
// the weight where it lies. bfloat16 leaves it to the library: the weight would have to be packed
// too.
template <class T>
void BlockProducts<T>::hidden_gradient(const float* dz, int64_t ld, void* out) const {
  const int64_t live = static_cast<int64_t>(live_rows_.size()), width = args_.width;
  if constexpr (BlockKernel<T>::kPaired) {
    std::vector<T> dx(static_cast<size_t>(live * width));
    multiply(block(dx.data(), live, width, width),
             transposed(block(reinterpret_cast<const T*>(dz), args_.vocab, live, 2 * ld)),
             block(static_cast<const T*>(args_.weight), args_.vocab, width, args_.weight_stride));
    scatter<T>(dx, live_rows_, width, out);
  } else {
    const int64_t padded = round_up(live, kLiveMultiple),
                  threads = torch::stable::get_num_threads();
    const int64_t share = std::min(kTransposed, round_up((live + threads - 1) / threads, kPanel));
    std::vector<T> dx(static_cast<size_t>(padded * width));
    for_each((live + share - 1) / share, [&](int64_t task) {
      const int64_t first = task * share, rows = std::min(share, padded - first);
      thread_local std::vector<T> dz_rows(static_cast<size_t>(kTransposed * kKernelRows));
      for (int64_t j = 0; j < args_.vocab; j += kKernelRows) {
        const int64_t depth = std::min(kKernelRows, args_.vocab - j);
        transpose(dz + j * ld + first, ld, depth, rows, dz_rows.data(), kKernelRows);
        for (int64_t d = 0; d < width; d += kColumns)
          block_kernel<T>().call(rows, std::min(kColumns, width - d), depth, kKernelRows,
                                 args_.weight_stride, width, j > 0, dz_rows.data(),
                                 row_of<T>(args_.weight, j, args_.weight_stride) + d,
                                 dx.data() + first * width + d, false);
      }
      block_kernel<T>().release(false);
    });
    scatter<T>(dx, live_rows_, width, out);
  }
}

template class BlockProducts<float>;
template class BlockProducts<uint16_t>;

}  // namespace bupo::cpu
