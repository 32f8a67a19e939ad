// The kernels that can serve a call, by architecture; paths.cpp has the table.

#pragma once

#include "call.h"

namespace bupo::cuda {

// As in cpu/lm_head.h, without checks of values: a target out of range gives nan.
//
// kept: what the forward leaves for its backward, kept_bytes() of memory, so that the product with
// the vocabulary is not made again; null where nothing is kept.
struct Path {
  const char* name;
  bool (*serves)(const Call& call);
  Plan (*plan)(const Shape& shape, int64_t budget);
  int64_t (*kept_bytes)(const Call& call);
  void (*lm_head_logprobs)(const Call& call, int64_t ignore_index, const TokenOutputs& out,
                           void* kept);
  void (*lm_head_logprobs_backward)(const Call& call, int64_t ignore_index,
                                    const Coefficients& upstream, const GradArgs& grads,
                                    void* kept);
  void (*policy_loss)(const Call& call, const PolicyCoefficients& policy, const TokenOutputs& out,
                      const GradArgs& grads);
};

// Each folder defines its row.
namespace portable {
extern const Path kPath;
}
namespace sm90 {
extern const Path kPath;
}

// The first of the table that serves the call; the setting `kernels` may leave it the last alone.
const Path& path_of(const Call& call);

}  // namespace bupo::cuda
