// Host-side entry points of the CUDA kernels: plain pointers, sizes and a stream. No torch types.
// All matrices are row-major with inner stride 1; strides count elements.
//
// Rows are addressed by place: arrange_rows puts the rows of a chunk that take part first, those
// that may have a gradient before all others, and gives masked rows no place (under graph capture
// every row keeps its own). Arrays by place hold `capacity` entries; those by
// row begin with the chunk's first row.

#pragma once

#include <cstdint>
#include <platform.cuh>

#include "../args.h"
#include "../row_math.h"

namespace bupo::cuda {

struct BFloat16;
enum class Number : int { kFloat, kBfloat16, kFloat16 };

// Which rows take part: those whose target is not ignore_index (token_weights null), or those whose
// token weight is not 0.
struct RowChoice {
  const int64_t* targets;
  int64_t ignore_index;
  const float* token_weights;
};

// Products of some rows with the whole vocabulary, and how they become logits:
// z = softcap(x + bias_j) / temperature_i.
struct LogitBlock {
  const float* products;  // [rows, vocab], fp32 accumulators of the product
  int64_t rows, vocab, stride;
  const float* bias;         // [vocab] or null
  const float* temperature;  // [rows] or null
  float softcap;             // 0: none
};

// Rows [first, first + rows) of a call; with sequences these are all its rows.
struct PolicyRows {
  PolicyArgs policy;
  const float *logprobs, *entropy;
  int64_t first, rows;
  // d loss / d logprob and d loss / d entropy, the token's weight included; on_entropy null: none.
  float *on_logprob, *on_entropy;
  double* log_ratios;  // L of each row's sequence; null without sequences
  float* losses;       // of each token
};
// on_logprob, on_entropy and log_ratios.
cudaError_t launch_policy_coefficients(const PolicyRows& rows, cudaStream_t stream);
// signal[i] = 1 where a row of weight in row i's sequence has an advantage, else 0.
cudaError_t launch_sequence_signals(const PolicyRows& rows, float* signal, cudaStream_t stream);
// The losses, their sum and the kPolicyMetrics metrics, from all rows at once, summed in double.
cudaError_t launch_policy_sums(const PolicyRows& rows, float* loss, float* metrics,
                               cudaStream_t stream);

// What the rows of a chunk are, by place.
struct Places {
  int32_t* counts;     // [2]: rows that take part, and how many of them come first and are stored
  int64_t* order;      // the row of each place
  int64_t* targets;    // outside [0, V) allowed
  float* temperature;  // null for 1
  int64_t capacity;
};

struct ArrangeArgs {
  RowChoice choice;  // of the chunk
  int64_t rows;
  const float* signals[3];  // by row: a row may have a gradient if one of them is not 0
  bool all_store;           // every row that takes part is stored
  bool only_stored;         // leave the others out
  bool compact;             // false: places are rows, all of them (CUDA-graph capture)
  int32_t* counts;
  int64_t* order;
};
cudaError_t launch_arrange_rows(const ArrangeArgs& args, cudaStream_t stream);

// Of the stored places those whose row has a gradient, in the order of places.
struct LivePlacesArgs {
  Coefficients coefficients;  // by row
  Places places;
  int32_t* counts;  // [2]: how many, and how many places are stored
  int32_t* source;  // [capacity]: the place of each
};
cudaError_t launch_live_places(const LivePlacesArgs& args, cudaStream_t stream);

// Rows of hidden to their places; and where wanted a guess of each row's L in bits: the logit of
// the target less its old log-prob, which is near L; without one, the logit plus kGuessAbove.
inline constexpr float kGuessAbove = 8.0f;
struct PlaceArgs {
  const void* hidden;  // of the chunk
  int64_t hidden_stride, width;
  const void* weight;
  int64_t weight_stride, vocab;
  const float *bias, *temperature, *old_logprobs;  // [vocab] and by row; null where not given
  const int64_t* targets;                          // by row
  Places places;
  void* out;     // [capacity, width]
  float* guess;  // by place; null: none
};
cudaError_t launch_place_rows(Number number, const PlaceArgs& args, cudaStream_t stream);

// Statistics of the first logits.rows places, to the rows that are there. Rows that take no part
// give 0; a target outside [0, vocab) gives nan.
struct RowStatsArgs {
  LogitBlock logits;  // by place
  Places places;
  RowChoice choice;                       // by row
  Row<float>* records;                    // by place, for logit_gradient; null without gradient
  float *logprobs, *entropy, *logsumexp;  // by row; null where not wanted
};
cudaError_t launch_row_stats(const RowStatsArgs& args, cudaStream_t stream);

// dz_j / scale of some rows, in the dtype of the inputs. scale is a power of two, so that dz /
// scale and x * scale round as dz and x do.
struct LogitGradientArgs {
  LogitBlock logits;  // by place; logits.rows of them
  Places places;
  const Row<float>* records;  // by place
  Coefficients coefficients;  // by row
  const int32_t* source;      // the place of each; null: 0, 1, ...
  bool half;                  // values for float16: 2^10 larger, so that small ones survive
  void* out;                  // [rows, out_stride]; without source it may be the products, in place
  int64_t out_stride;         // rows as long as those of the products, or longer
  int64_t* order;             // out: the row of each; null: not wanted
  float* scale;               // out
};
cudaError_t launch_logit_gradient(Number number, const LogitGradientArgs& args,
                                  cudaStream_t stream);

// One side of a divergence, and its dz / scale, which takes the place of the products.
struct DivergenceSide {
  LogitBlock logits;   // by place; temperature by row
  bool gradient;       // wanted?
  int64_t out_stride;  // of dz, in its number
  float* scale;        // by place, out
};
// Of the first student.logits.rows places, in the order of the rows' places.
struct DivergenceRowsArgs {
  DivergenceSide student, teacher;
  DivergenceKind kind;
  float beta;
  bool half;             // values for float16: larger, so that small ones survive
  const int64_t* order;  // the row of each place
  const float* weights;  // by row; 0: no part in anything
  float* divergence;     // by row, out
};
cudaError_t launch_divergence_rows(Number number, const DivergenceRowsArgs& args,
                                   cudaStream_t stream);
// loss[0] = sum_i weights[i] divergence[i] over the rows with weight, in double.
cudaError_t launch_weighted_sum(const float* weights, const float* divergence, int64_t rows,
                                float* loss, cudaStream_t stream);

// norm[0] = the power of two not above the largest finite |coefficient| of all rows, 1 where there
// is none, over 2^10. float16 only: it keeps x * scale / norm in range.
cudaError_t launch_norm(const Coefficients& bounds, int64_t rows, float* norm, cudaStream_t stream);

// out[k, :] = x[order[k], :] * scale[k] / norm; order null: x[k, :], and out may be x; scale or
// norm null: 1.
struct GatherArgs {
  const void* x;
  int64_t stride, width, count;
  const int64_t* order;
  const float *scale, *norm;
  void* out;  // [count, width]
};
cudaError_t launch_gather_rows(Number number, const GatherArgs& args, cudaStream_t stream);

// out[order[k], :] = in[k, :] * scale[k]
struct ScatterArgs {
  const float* in;  // [count, width]
  int64_t width, count;
  const int64_t* order;
  const float* scale;
  void* out;  // [chunk rows, width]
};
cudaError_t launch_scatter_rows(Number number, const ScatterArgs& args, cudaStream_t stream);

// sums[j] += sum_k dz[k, j] scale[k], in the order of k.
cudaError_t launch_column_sums(Number number, const void* dz, int64_t stride, const float* scale,
                               int64_t count, int64_t columns, float* sums, cudaStream_t stream);

// data *= scale[0], which is on the device; a scale of 1 costs a launch.
cudaError_t launch_scale(Number number, void* data, const float* scale, int64_t count,
                         cudaStream_t stream);

// out = number(in * norm), norm null for 1; and the other way round.
cudaError_t launch_narrow(Number number, const float* in, const float* norm, void* out,
                          int64_t count, cudaStream_t stream);
cudaError_t launch_widen(Number number, const void* in, float* out, int64_t count,
                         cudaStream_t stream);

}  // namespace bupo::cuda
