#include "products.h"

#include <algorithm>
#include <cstring>

#include "library.h"
#include "vector_math.h"
#include "vocab_tile.h"

namespace bupo::cpu {
namespace {

constexpr int64_t kPanel = 64;         // columns of a packed right operand
constexpr int64_t kKernelRows = 128;   // rows of one block product
constexpr int64_t kKernelDepth = 512;  // summed dimension of one block product
constexpr int64_t kLiveMultiple = 32;  // few distinct depths, so few kernels are generated

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
int64_t panels(int64_t columns) { return (columns + kPanel - 1) / kPanel; }

template <class T>
const T* row_of(const void* base, int64_t row, int64_t stride) {
  return static_cast<const T*>(base) + row * stride;
}

template <class T>
T* row_of(void* base, int64_t row, int64_t stride) {
  return static_cast<T*>(base) + row * stride;
}

void upcast(const uint16_t* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = from_bfloat16(from[i]);
}

// The weight's tile in fp32, in memory of the calling thread.
const float* upcast_weight(const HeadArgs& args, int64_t first, int64_t rows) {
  thread_local std::vector<float> tile;
  tile.resize(static_cast<size_t>(rows * args.width));
  for (int64_t j = 0; j < rows; ++j)
    upcast(row_of<uint16_t>(args.weight, first + j, args.weight_stride),
           tile.data() + j * args.width, args.width);
  return tile.data();
}

// a [rows, depth] times packed panels, on the calling thread.
void multiply_panels(const uint16_t* a, int64_t lda, int64_t rows, int64_t depth, const uint16_t* b,
                     int64_t columns, float* c, int64_t ldc, bool accumulate) {
  const Bfloat16Kernel& kernel = bfloat16_kernel();
  for (int64_t m = 0; m < rows; m += kKernelRows)
    for (int64_t k = 0; k < depth; k += kKernelDepth)
      for (int64_t n = 0; n < columns; n += kPanel)
        kernel.call(std::min(kKernelRows, rows - m), std::min(kPanel, columns - n),
                    std::min(kKernelDepth, depth - k), lda, kPanel, ldc, accumulate || k > 0,
                    a + m * lda + k, b + n * depth + k * kPanel, c + m * ldc + n, true);
  kernel.release(true);
}

}  // namespace

// ---- float and double: torch's BLAS -----------------------------------------------------------

template <class T>
void LibraryProducts<T>::load_tokens(const int64_t* rows, int64_t count) {
  count_ = count;
  tokens_.resize(static_cast<size_t>(count * args_.width));
  for (int64_t i = 0; i < count; ++i)
    std::memcpy(tokens_.data() + i * args_.width,
                row_of<T>(args_.hidden, rows[i], args_.hidden_stride), args_.width * sizeof(T));
}

template <class T>
void LibraryProducts<T>::logits(int64_t first, int64_t rows, T* out, int64_t ld) const {
  multiply(block(out, rows, count_, ld),
           block(row_of<T>(args_.weight, first, args_.weight_stride), rows, args_.width,
                 args_.weight_stride),
           transposed(block(tokens_.data(), count_, args_.width, args_.width)));
}

template <class T>
void LibraryProducts<T>::load_live(const std::vector<int64_t>& rows) {
  live_rows_ = rows;
  live_.resize(rows.size() * args_.width);
  for (size_t i = 0; i < rows.size(); ++i)
    std::memcpy(live_.data() + i * args_.width,
                row_of<T>(args_.hidden, rows[i], args_.hidden_stride), args_.width * sizeof(T));
}

template <class T>
void LibraryProducts<T>::weight_gradient(int64_t first, int64_t rows, T* dz, int64_t ld, T* out,
                                         bool accumulate) const {
  const int64_t live = static_cast<int64_t>(live_rows_.size());
  multiply(block(out + first * args_.width, rows, args_.width, args_.width),
           block(dz, rows, live, ld), block(live_.data(), live, args_.width, args_.width),
           accumulate);
}

template <class T>
void LibraryProducts<T>::hidden_gradient(const T* dz, int64_t ld, void* out) const {
  const int64_t live = static_cast<int64_t>(live_rows_.size());
  std::vector<T> dx(static_cast<size_t>(live * args_.width));
  multiply(
      block(dx.data(), live, args_.width, args_.width),
      transposed(block(dz, args_.vocab, live, ld)),
      block(static_cast<const T*>(args_.weight), args_.vocab, args_.width, args_.weight_stride));
  for (int64_t i = 0; i < live; ++i)
    std::memcpy(row_of<T>(out, live_rows_[i], args_.width), dx.data() + i * args_.width,
                args_.width * sizeof(T));
}

template class LibraryProducts<float>;
template class LibraryProducts<double>;

// ---- bfloat16 with hardware dot products ------------------------------------------------------

bool Bfloat16Products::usable(const HeadArgs& args) {
  return bfloat16_kernel().call != nullptr && args.width % 2 == 0;
}

void Bfloat16Products::load_tokens(const int64_t* rows, int64_t count) {
  count_ = count;
  const int64_t pairs = args_.width / 2;
  tokens_.assign(static_cast<size_t>(panels(count) * kPanel * args_.width), 0);
  for_each(panels(count), [&](int64_t p) {
    uint16_t* panel = tokens_.data() + p * kPanel * args_.width;
    for (int64_t i = p * kPanel; i < std::min(count, (p + 1) * kPanel); ++i) {
      const uint16_t* from = row_of<uint16_t>(args_.hidden, rows[i], args_.hidden_stride);
      uint16_t* to = panel + 2 * (i - p * kPanel);
      for (int64_t d = 0; d < pairs; ++d) std::memcpy(to + 2 * kPanel * d, from + 2 * d, 4);
    }
  });
}

void Bfloat16Products::logits(int64_t first, int64_t rows, float* out, int64_t ld) const {
  multiply_panels(row_of<uint16_t>(args_.weight, first, args_.weight_stride), args_.weight_stride,
                  rows, args_.width, tokens_.data(), panels(count_) * kPanel, out, ld, false);
}

void Bfloat16Products::load_live(const std::vector<int64_t>& rows) {
  live_rows_ = rows;
  const int64_t live = static_cast<int64_t>(rows.size()), depth = round_up(live, kLiveMultiple);
  live_.assign(static_cast<size_t>(panels(args_.width) * kPanel * depth), 0);
  for_each(panels(args_.width), [&](int64_t p) {
    uint16_t* panel = live_.data() + p * kPanel * depth;
    const int64_t width = std::min(kPanel, args_.width - p * kPanel);
    for (int64_t i = 0; i < live; ++i) {
      const uint16_t* from = row_of<uint16_t>(args_.hidden, rows[i], args_.hidden_stride);
      uint16_t* to = panel + (i / 2) * 2 * kPanel + i % 2;
      for (int64_t d = 0; d < width; ++d) to[2 * d] = from[p * kPanel + d];
    }
  });
}

void Bfloat16Products::weight_gradient(int64_t first, int64_t rows, float* dz, int64_t ld,
                                       float* out, bool accumulate) const {
  const int64_t live = static_cast<int64_t>(live_rows_.size());
  const int64_t depth = round_up(live, kLiveMultiple);
  uint16_t* a = reinterpret_cast<uint16_t*>(dz);
  for (int64_t j = 0; j < rows; ++j)
    std::memset(a + j * 2 * ld + live, 0, (depth - live) * sizeof(uint16_t));
  multiply_panels(a, 2 * ld, rows, depth, live_.data(), args_.width, out + first * args_.width,
                  args_.width, accumulate);
}

void Bfloat16Products::hidden_gradient(const float* dz, int64_t ld, void* out) const {
  const int64_t live = static_cast<int64_t>(live_rows_.size());
  std::vector<uint16_t> dx(static_cast<size_t>(live * args_.width));
  multiply(block(dx.data(), live, args_.width, args_.width),
           transposed(block(reinterpret_cast<const uint16_t*>(dz), args_.vocab, live, 2 * ld)),
           block(static_cast<const uint16_t*>(args_.weight), args_.vocab, args_.width,
                 args_.weight_stride));
  for (int64_t i = 0; i < live; ++i)
    std::memcpy(row_of<uint16_t>(out, live_rows_[i], args_.width), dx.data() + i * args_.width,
                args_.width * sizeof(uint16_t));
}

// ---- bfloat16 in memory, fp32 products --------------------------------------------------------

void UpcastProducts::load_tokens(const int64_t* rows, int64_t count) {
  count_ = count;
  tokens_.resize(static_cast<size_t>(count * args_.width));
  for (int64_t i = 0; i < count; ++i)
    upcast(row_of<uint16_t>(args_.hidden, rows[i], args_.hidden_stride),
           tokens_.data() + i * args_.width, args_.width);
}

void UpcastProducts::logits(int64_t first, int64_t rows, float* out, int64_t ld) const {
  multiply(block(out, rows, count_, ld),
           block(upcast_weight(args_, first, rows), rows, args_.width, args_.width),
           transposed(block(tokens_.data(), count_, args_.width, args_.width)));
}

void UpcastProducts::load_live(const std::vector<int64_t>& rows) {
  live_rows_ = rows;
  live_.resize(rows.size() * args_.width);
  for (size_t i = 0; i < rows.size(); ++i)
    upcast(row_of<uint16_t>(args_.hidden, rows[i], args_.hidden_stride),
           live_.data() + i * args_.width, args_.width);
}

void UpcastProducts::weight_gradient(int64_t first, int64_t rows, float* dz, int64_t ld, float* out,
                                     bool accumulate) const {
  const int64_t live = static_cast<int64_t>(live_rows_.size());
  multiply(block(out + first * args_.width, rows, args_.width, args_.width),
           block(dz, rows, live, ld), block(live_.data(), live, args_.width, args_.width),
           accumulate);
}

void UpcastProducts::hidden_gradient(const float* dz, int64_t ld, void* out) const {
  const int64_t live = static_cast<int64_t>(live_rows_.size());
  std::vector<float> dx(static_cast<size_t>(live * args_.width));
  for (int64_t first = 0; first < args_.vocab; first += kTileRows) {
    const int64_t rows = std::min(kTileRows, args_.vocab - first);
    multiply(block(dx.data(), live, args_.width, args_.width),
             transposed(block(dz + first * ld, rows, live, ld)),
             block(upcast_weight(args_, first, rows), rows, args_.width, args_.width), first > 0);
  }
  for (int64_t i = 0; i < live; ++i)
    round_to_bfloat16(dx.data() + i * args_.width,
                      row_of<uint16_t>(out, live_rows_[i], args_.width), args_.width);
}

}  // namespace bupo::cpu
