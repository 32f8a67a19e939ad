// Host-side entry points of the Hopper kernels; the structs are their contracts. Plain pointers.
//
// Rows are addressed by place: arrange_rows puts the rows of a chunk that take part first, those
// that may have a gradient before all others. Arrays by place hold `capacity` entries; those by
// row begin with the chunk's first row.

#pragma once

#include "../launch.h"

namespace bupo::cuda {
struct BFloat16;
}

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

// What the rows of a chunk are, by place.
struct Places {
  int32_t* counts;     // [2]: rows that take part, and how many of them come first and store E
  int64_t* order;      // the row of each place
  int64_t* targets;    // outside [0, V) allowed
  float* temperature;  // null for 1
  int64_t capacity;
};

struct ArrangeArgs {
  RowChoice choice;  // of the chunk
  int64_t rows;
  const float* signals[3];  // by row: a row may have a gradient if one of them is not 0
  bool all_store;           // every row that takes part does
  bool only_stored;         // leave the others out
  bool compact;             // false: places are rows, all of them (CUDA-graph capture)
  int32_t* counts;
  int64_t* order;
};
cudaError_t launch_arrange_rows(const ArrangeArgs& args, cudaStream_t stream);

// Of the places that store E those whose row has a gradient, in the order of places.
struct LivePlacesArgs {
  Coefficients coefficients;  // by row
  Places places;
  int32_t* count;   // [1]
  int32_t* source;  // [capacity]: the place of each
};
cudaError_t launch_live_places(const LivePlacesArgs& args, cudaStream_t stream);

// Rows of hidden to their places, and the guess of each row that stores E, in bits: the logit of
// the target less its old log-prob, which is near L; without one, the logit and kGuessAbove.
inline constexpr float kGuessAbove = 8.0f;
struct PlaceArgs {
  const BFloat16* hidden;  // of the chunk
  int64_t hidden_stride, width;
  const BFloat16* weight;
  int64_t weight_stride, vocab;
  const float *bias, *temperature, *old_logprobs;  // [vocab] and by row; null where not given
  const int64_t* targets;                          // by row
  Places places;
  BFloat16* out;  // [capacity, width]
  float* guess;   // by place; null: none
};
cudaError_t launch_place_rows(const PlaceArgs& args, cudaStream_t stream);

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
