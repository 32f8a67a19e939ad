// Host-side entry points of the Hopper kernels; the structs are their contracts. Plain pointers.

#pragma once

#include "../launch.h"

namespace bupo::cuda::sm90 {

// Kernels of the scan. kCooperative: both warpgroups of a block multiply one tile of 256 columns,
// and reduce it together. kPingpong: each has a tile of 192 columns of its own, and one multiplies
// while the other reduces.
enum class Schedule : int { kCooperative, kPingpong };
inline constexpr int kTileRows = 128;
BUPO_HOST_DEVICE constexpr int columns_of(Schedule schedule) {
  return schedule == Schedule::kPingpong ? 192 : 256;
}
BUPO_HOST_DEVICE constexpr int64_t tiles_of(int64_t vocab, int tile_columns) {
  return (vocab + tile_columns - 1) / tile_columns;
}

// E = bf16(2^(z log2(e) - reference)), an integer reference for each row and tile. A row's guess is
// the reference of every tile whose largest entry is at most so many bits above it, or below it.
// Far below is harmless: such a tile is small beside the row.
inline constexpr float kAboveGuess = 16.0f, kBelowGuess = 64.0f;
inline constexpr float kNoMass = -1e30f;  // bits, in place of -inf

// RowSums of row_math.h in bits: max = ref, an integer.
struct BitSums {
  float ref, sum, dot;
};

// What the gradient needs of a row: p_j = E_j 2^(tile reference - ref) gain.
struct PlacedRow {
  Row<float> row;
  float ref;     // bits
  float gain;    // e^(ref ln 2 - L)
  float offset;  // ref ln 2 - max
};

// E of a chunk and what goes with it, by place. Null pointers where nothing is stored.
struct Kept {
  BFloat16* e;        // [capacity, stride]
  int64_t stride;     // a multiple of 64
  float* guess;       // [capacity]
  float* references;  // [capacity, tiles]
};

struct ScanArgs {
  const void* hidden;  // bf16 [capacity, D], by place; stride and address on 16 bytes
  const void* weight;  // bf16 [V, D], likewise
  int64_t hidden_stride, weight_stride, width, vocab;
  Places places;
  const float* bias;     // [tiles * columns of a tile], any values beyond V; or null
  BitSums* partials;     // [tiles, capacity], without the target
  float* target_logits;  // by place
  int64_t tiles;
  Kept kept;
};
cudaError_t launch_head_scan(Schedule schedule, const ScanArgs& args, cudaStream_t stream);

// Partials to results by row, and to records by place.
struct FinishArgs {
  const BitSums* partials;
  int64_t tiles;
  const float* target_logits;
  const float* guess;  // by place; null where E is not stored
  Places places;
  RowChoice choice;  // by row
  int64_t vocab;
  PlacedRow* records;
  float *logprobs, *entropy, *logsumexp;  // by row; null where not wanted
};
cudaError_t launch_finish_rows(const FinishArgs& args, cudaStream_t stream);

// E of some rows to dz / scale: the target's column, tiles of another reference, and everything if
// there is a gradient of entropy or logsumexp. In place, or elsewhere.
struct GradientRowsArgs {
  Coefficients coefficients;  // by row; on_entropy and on_logsumexp null: E scaled by row
  Places places;
  Kept kept;
  int64_t vocab, tiles;
  int tile_columns;
  const PlacedRow* records;
  int64_t rows;
  const int32_t* source;  // the place of each; null: 0, 1, ..., in place
  BFloat16* out;          // [rows, kept.stride]
  int64_t* order;         // out: the row of each; null where in place
  float* scale;           // out
};
cudaError_t launch_gradient_rows(const GradientRowsArgs& args, cudaStream_t stream);

}  // namespace bupo::cuda::sm90
