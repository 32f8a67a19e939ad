#include "vocab_tile.h"

#include <type_traits>

#include "vector_math.h"

namespace bupo::cpu {
namespace {

// Rows whose terms are summed before they meet the larger sum: small terms beside a large one are
// not lost one by one.
constexpr int64_t kShortSum = 16;

template <class V, class T>
BUPO_INLINE void map_logits(T* tile, int64_t ld, int64_t rows, int64_t i, const LogitMap<T>& map) {
  const V scale = map.scale ? load<V>(map.scale + i) : fill<V>(T(1));
  for (int64_t j = 0; j < rows; ++j) {
    T* p = tile + j * ld + i;
    V z = load<V>(p);
    if (map.bias) z = z + map.bias[j];
    store(p, map.softcap != T(0) ? tanh<V>(z / map.softcap) : z * scale);
  }
}

template <class V, class T>
BUPO_INLINE void stats(T* tile, int64_t ld, int64_t rows, int64_t columns, const LogitMap<T>& map,
                       int64_t first, const int64_t* targets, T* targets_kept, RowSums<T>* sums) {
  constexpr T inf = T(INFINITY);
  const bool capped = map.softcap != T(0);
  for (int64_t i = 0; i < columns; i += kLanes<V>) {
    if (map.bias || map.scale || capped) map_logits<V>(tile, ld, rows, i, map);
    for (int64_t l = i; l < i + kLanes<V> && l < columns; ++l) {
      const int64_t target = targets[l] - first;
      if (target < 0 || target >= rows) continue;
      T* place = tile + target * ld + l;
      targets_kept[l] = *place;
      *place = -inf;
    }
    const V scale = capped && map.scale ? load<V>(map.scale + i) : fill<V>(T(1));
    V max = fill<V>(-inf);
    for (int64_t j = 0; j < rows; ++j) {
      const V z = load<V>(tile + j * ld + i);
      max = z > max ? z : max;
    }
    max = max * scale;  // scales are positive
    // A column of -inf only has no maximum to subtract; shift 0 makes its sum 0 instead of nan.
    const V shift = max == -inf ? V{} : max;
    V sum{}, dot{};
    for (int64_t start = 0; start < rows; start += kShortSum) {
      const int64_t stop = start + kShortSum < rows ? start + kShortSum : rows;
      V short_sum{}, short_dot{};
      for (int64_t j = start; j < stop; ++j) {
        V d = load<V>(tile + j * ld + i) * scale - shift;
        d = d < T(-800) ? fill<V>(T(-800)) : d;  // e^-800 = 0; keeps 0 * -inf out of the dot
        const V e = exp_nonpositive<V>(d);
        short_sum = short_sum + e;
        short_dot = short_dot + e * d;
      }
      sum = sum + short_sum;
      dot = dot + short_dot;
    }
    for (int64_t l = 0; l < kLanes<V> && i + l < columns; ++l)
      sums[i + l] = {max[l], sum[l], dot[l]};
  }
}

template <class V, bool kBfloat16, class T>
BUPO_INLINE void gradient(T* tile, int64_t ld, int64_t rows, int64_t base, int64_t out,
                          const GradientColumns<T>& c, double* row_sums) {
  constexpr int kW = kLanes<V>;
  const bool capped = !c.scale.empty();
  for (int64_t i = 0; i < c.count; i += kW) {
    const int64_t valid = c.count - i < kW ? c.count - i : kW;
    const bool whole = valid == kW && c.column[i + kW - 1] - c.column[i] == kW - 1;
    const auto at = [i](const std::vector<T>& values) { return load<V>(values.data() + i); };
    const V max = at(c.max), log_total = at(c.log_total), mean = at(c.mean);
    const V on_p = at(c.on_p), on_gap = at(c.on_gap);
    const V scale = capped ? at(c.scale) : fill<V>(T(1));
    for (int64_t j = 0; j < rows; ++j) {
      T* row = tile + j * ld;
      V kept = max;
      if (whole) {
        kept = load<V>(row + base + c.column[i]);
      } else {
        for (int64_t l = 0; l < valid; ++l) kept[l] = row[base + c.column[i + l]];
      }
      V d = kept * scale - max;
      d = d < T(-800) ? fill<V>(T(-800)) : d;
      V dz = exp_nonpositive<V>(d - log_total) * (on_p + on_gap * (d - mean));
      if (capped) {
        const V u = d == T(-800) ? V{} : kept;  // no -inf * 0
        dz = dz - dz * u * u;
      }
      if (row_sums) {
        T total = 0;
        for (int64_t l = 0; l < valid; ++l) total += dz[l];
        row_sums[j] += static_cast<double>(total);
      }
      if constexpr (kBfloat16) {
        store_bfloat16(reinterpret_cast<uint16_t*>(row) + out + i, dz);
      } else {
        store(row + out + i, dz);
      }
    }
  }
}

// One square block: in stage s, entries whose row and column differ in bit s change places.
template <class V>
BUPO_INLINE void transpose_square(const float* in, int64_t ld, float* out, int64_t out_ld) {
  using Bits = BitsOf<V>;
  constexpr int kSide = kLanes<V>;
  V row[kSide];
  for (int r = 0; r < kSide; ++r) row[r] = load<V>(in + r * ld);
#pragma GCC unroll 4
  for (int s = 1; s < kSide; s *= 2) {
    Bits low, high;  // lanes of the two rows laid end to end
    for (int l = 0; l < kSide; ++l) {
      low[l] = l & s ? kSide + l - s : l;
      high[l] = l & s ? kSide + l : l + s;
    }
#pragma GCC unroll 16
    for (int r = 0; r < kSide; ++r) {
      if (r & s) continue;
      const V a = row[r], b = row[r + s];
      row[r] = __builtin_shuffle(a, b, low);
      row[r + s] = __builtin_shuffle(a, b, high);
    }
  }
  for (int r = 0; r < kSide; ++r) store(out + r * out_ld, row[r]);
}

template <class V>
BUPO_INLINE void transpose_blocks(const float* in, int64_t ld, int64_t rows, int64_t columns,
                                  float* out, int64_t out_ld) {
  constexpr int64_t kSide = kLanes<V>;
  for (int64_t j = 0; j < rows; j += kSide) {
    for (int64_t i = 0; i < columns; i += kSide) {
      if (j + kSide <= rows && i + kSide <= columns) {
        transpose_square<V>(in + j * ld + i, ld, out + i * out_ld + j, out_ld);
        continue;
      }
      for (int64_t r = j; r < rows && r < j + kSide; ++r)
        for (int64_t c = i; c < columns && c < i + kSide; ++c) out[c * out_ld + r] = in[r * ld + c];
    }
  }
}

}  // namespace

#define BUPO_EACH [&](auto bytes) __attribute__((always_inline))

void transpose(const float* in, int64_t ld, int64_t rows, int64_t columns, float* out,
               int64_t out_ld) {
  with_vectors(
      BUPO_EACH { transpose_blocks<Vec<float, bytes>>(in, ld, rows, columns, out, out_ld); });
}

template <class T>
void tile_stats(T* tile, int64_t ld, int64_t rows, int64_t columns, const LogitMap<T>& map,
                int64_t first, const int64_t* targets, T* targets_kept, RowSums<T>* sums) {
  with_vectors(BUPO_EACH {
    stats<Vec<T, bytes>>(tile, ld, rows, columns, map, first, targets, targets_kept, sums);
  });
}
template decltype(tile_stats<float>) tile_stats<float>;
template decltype(tile_stats<double>) tile_stats<double>;

template <bool kBfloat16, class T>
void tile_gradient(T* tile, int64_t ld, int64_t rows, int64_t base, int64_t out,
                   const GradientColumns<T>& columns, double* row_sums) {
  with_vectors(BUPO_EACH {
    gradient<Vec<T, bytes>, kBfloat16>(tile, ld, rows, base, out, columns, row_sums);
  });
}
template decltype(tile_gradient<true, float>) tile_gradient<true, float>;
template decltype(tile_gradient<false, float>) tile_gradient<false, float>;
template decltype(tile_gradient<false, double>) tile_gradient<false, double>;

void round_to_bfloat16(const float* from, uint16_t* to, int64_t count) {
  with_vectors(BUPO_EACH {
    using V = Vec<float, bytes>;
    int64_t i = 0;
    for (; i + kLanes<V> <= count; i += kLanes<V>) store_bfloat16(to + i, load<V>(from + i));
    for (; i < count; ++i) to[i] = to_bfloat16(from[i]);
  });
}

}  // namespace bupo::cpu
