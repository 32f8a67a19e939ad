// Thin access to torch's libraries: matrix products on raw blocks, threads, oneDNN's block product.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

namespace bupo::cpu {

using torch::headeronly::ScalarType;
template <class T>
inline constexpr ScalarType kScalarType = ScalarType::Float;
template <>
inline constexpr ScalarType kScalarType<double> = ScalarType::Double;
template <>
inline constexpr ScalarType kScalarType<uint16_t> = ScalarType::BFloat16;  // as raw bits

// A matrix in memory; the strides may be in any order.
struct Block {
  const void* data;
  int64_t rows, columns, row_stride, column_stride;
  ScalarType dtype;
};

template <class T>
Block block(const T* data, int64_t rows, int64_t columns, int64_t row_stride) {
  return {data, rows, columns, row_stride, 1, kScalarType<T>};
}

inline Block transposed(const Block& b) {
  return {b.data, b.columns, b.rows, b.column_stride, b.row_stride, b.dtype};
}

// c = a b, or c += a b. One dtype for all three; a bfloat16 result is rounded once. Inside
// for_each it runs on the calling thread, otherwise on all of torch's threads.
void multiply(const Block& c, const Block& a, const Block& b, bool accumulate = false);

// body(i) for i in [0, count), shared among torch's threads.
template <class Body>
void for_each(int64_t count, const Body& body) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  });
}

// oneDNN's kernel c[m, n] (+)= a[m, k] b[k, n], T in, fp32 out, on the calling thread. bfloat16
// holds b in pairs of rows: element (k, n) at b[(k / 2) * 2 ldb + 2 n + k % 2]; k even.
template <class T>
struct BlockKernel {
  static constexpr bool kPaired = sizeof(T) == 2;
  using Call = void (*)(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc,
                        bool accumulate, const T* a, const T* b, float* c, bool paired);
  using Release = void (*)(bool paired);
  Call call = nullptr;
  Release release = nullptr;  // gives the matrix unit's tile state back, once per thread
};

// T is float or uint16_t (bfloat16). Null where this CPU or this torch has none, or where
// BUPO_CPU_PRODUCTS=library forbids it.
template <class T>
[[gnu::visibility("default")]] const BlockKernel<T>& block_kernel();

}  // namespace bupo::cpu
