// Host-side entry points of the CUDA kernels: plain pointers, sizes and a stream. No torch types.

#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace bupo::cuda {

// Per-row statistics of a block of finished fp32 logits.
struct RowStatsArgs {
  const float* logits;     // [rows, vocab], row stride `stride` elements
  const int64_t* targets;  // [rows]; outside [0, vocab) the row gives 0, 0, 0
  float* logprobs;         // [rows]
  float* entropy;          // [rows]
  float* logsumexp;        // [rows]
  int64_t rows, vocab, stride;
};

cudaError_t launch_row_stats(const RowStatsArgs& args, cudaStream_t stream);

}  // namespace bupo::cuda
