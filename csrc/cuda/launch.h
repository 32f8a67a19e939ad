// Host-side entry points of the CUDA kernels: plain pointers, sizes and a stream. No torch types.
// All matrices are row-major with inner stride 1; strides count elements.

#pragma once

#include <cstdint>
#include <platform.cuh>

#include "../args.h"
#include "../row_math.h"

namespace bupo::cuda {

enum class Number : int { kFloat, kBfloat16, kFloat16 };

// Which rows take part: those whose target is not ignore_index (token_weights null), or those whose
// token weight is not 0.
struct RowChoice {
  const int64_t* targets;
  int64_t ignore_index;
  const float* token_weights;
};

// Products of some rows with the whole vocabulary, and how they become logits:
// z = softcap(x + bias_j) / temperature_i. The arrays of rows begin with the block's first row.
struct LogitBlock {
  const float* products;  // [rows, vocab], fp32 accumulators of the product
  int64_t rows, vocab, stride;
  const float* bias;         // [vocab] or null
  const float* temperature;  // [rows] or null
  float softcap;             // 0: none
};

// Statistics of each row. Rows that take no part give 0; a target outside [0, vocab) gives nan.
struct RowStatsArgs {
  LogitBlock logits;
  RowChoice choice;
  Row<float>* records;                    // [rows], for logit_gradient; null without gradient
  float *logprobs, *entropy, *logsumexp;  // [rows]; null where not wanted
};
cudaError_t launch_row_stats(const RowStatsArgs& args, cudaStream_t stream);

// Rows [first, first + rows) of a call.
struct PolicyRows {
  PolicyArgs policy;
  const float *logprobs, *entropy;
  int64_t first, rows;
};
// d loss / d logprob and d loss / d entropy, the token's weight included; on_entropy null: none.
cudaError_t launch_policy_coefficients(const PolicyRows& rows, float* on_logprob, float* on_entropy,
                                       cudaStream_t stream);
// The loss and the kPolicyMetrics metrics, from all rows at once, summed in double.
cudaError_t launch_policy_sums(const PolicyRows& rows, float* loss, float* metrics,
                               cudaStream_t stream);

// Upstream gradients of a row's outputs, [rows] each; null where there is none.
struct Coefficients {
  const float *on_logprob, *on_entropy, *on_logsumexp;
};

// Places of the rows that have a gradient among those of a chunk. scale_k is a power of two, so
// that dz / scale and x * scale round as dz and x do.
struct LivePlaces {
  int32_t* count;     // [1], grows from block to block
  int32_t* position;  // [block rows]: the place of each row of this block, -1 for none
  int64_t* order;     // [chunk rows]: the row at each place, counted from the chunk's first
  float* scale;       // [chunk rows]
};
struct LiveArgs {
  Coefficients coefficients;  // of the block
  const float* temperature;   // of the block, or null
  RowChoice choice;           // of the block
  int64_t rows, first;        // of the block; `first` counts from the chunk's first row
  bool compact;               // false: every row keeps its own place (CUDA-graph capture)
  bool half;                  // values for float16: 2^10 larger, so that small ones survive
  LivePlaces places;
};
cudaError_t launch_live_places(const LiveArgs& args, cudaStream_t stream);

// dz_j / scale of the rows that have a place, in the dtype of the inputs.
struct LogitGradientArgs {
  LogitBlock logits;
  const int64_t* targets;
  const Row<float>* records;
  Coefficients coefficients;
  LivePlaces places;
  void* out;  // [chunk rows, stride]
  int64_t out_stride;
};
cudaError_t launch_logit_gradient(Number number, const LogitGradientArgs& args,
                                  cudaStream_t stream);

// norm[0] = the power of two just above the largest |coefficient|-like bound of all rows, 1 if it
// is 0 or not finite. float16 only: it keeps x * scale / norm in range.
cudaError_t launch_norm(const Coefficients& bounds, int64_t rows, float* norm, cudaStream_t stream);

// out[k, :] = x[order[k], :] * scale[k] / norm; order null: x[k, :], and out may be x; norm
// null: 1.
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
