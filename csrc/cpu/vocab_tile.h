// The element-wise work on one tile of logits: rows are vocabulary entries, columns are tokens, so
// that one vector instruction advances up to sixteen tokens and no horizontal sum is needed.
//
// tile_stats     raw products -> logits in place, and each token's RowSums over the tile
// tile_gradient  logits -> dLoss/dz of the chosen tokens, in place and packed to the left
//
// About 20 instructions an element against 2D multiply-adds in the products: 2 % at D = 1024.

#pragma once

#include <cstdint>
#include <vector>

#include "../row_math.h"

namespace bupo::cpu {

// Columns are padded to this many, so vector loads and stores may pass the last token.
inline constexpr int64_t kColumnPad = 64;

// How raw products become logits: z = softcap(x + bias_j) / temperature_i. With a softcap the tile
// keeps u = tanh((x + bias_j) / softcap) and z = u scale_i, so that the slope 1 - u^2 is as exact
// as u; without one it keeps z.
template <class T>
struct LogitMap {
  const T* bias;   // of the tile's first row, or null
  const T* scale;  // [columns] padded to kColumnPad: 1 or softcap, over temperature; null for 1
  T softcap;       // 0: none, then scale is applied to the tile
};

// tile [rows, ld]: columns [0, columns) are read, mapped and written back. `first` is the
// tile's first vocabulary entry. What the tile keeps of a target that lies in it goes to
// targets_kept [i] and stays out of the sums; its place in the tile is set to -inf (tile_gradient
// never reads it).
template <class T>
void tile_stats(T* tile, int64_t ld, int64_t rows, int64_t columns, const LogitMap<T>& map,
                int64_t first, const int64_t* targets, T* targets_kept, RowSums<T>* sums);

// One token's part in the gradient: dz_j = p_j (on_p + on_gap (d_j - mean)) f'(z_j), where
// d_j = z_j - max, p_j = e^{d_j - log_total} and f' = 1 - u_j^2 with a softcap, arrays of a
// multiple of kColumnPad tokens. `column` is where its logits stand in the tile, ascending.
template <class T>
struct GradientColumns {
  int64_t count;
  std::vector<int32_t> column;
  std::vector<T> max, log_total, mean, on_p, on_gap;
  std::vector<T> scale;  // with a softcap z = u scale; empty without
};

// Reads tile[j * ld + base + column[i]] and writes element out + i of row j, where a row of the
// result starts where the row of the tile starts (out <= base, so nothing unread is overwritten);
// the last vector is filled up with zeros. Elements are T, or bfloat16. row_sums[j], if wanted,
// grows by the row's sum.
template <bool kBfloat16, class T>
void tile_gradient(T* tile, int64_t ld, int64_t rows, int64_t base, int64_t out,
                   const GradientColumns<T>& columns, double* row_sums);

// out[i * out_ld + j] = in[j * ld + i] for j < rows, i < columns.
void transpose(const float* in, int64_t ld, int64_t rows, int64_t columns, float* out,
               int64_t out_ld);

// Round to nearest even; nan stays nan.
void round_to_bfloat16(const float* from, uint16_t* to, int64_t count);

}  // namespace bupo::cpu
