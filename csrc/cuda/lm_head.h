// The operators on a path. As in cpu/lm_head.h, without checks of values: a target out of range
// gives nan.

#pragma once

#include "paths.h"

namespace bupo::cuda {

// kept: what a forward leaves for its backward, so that the product with the vocabulary is not made
// again; null where nothing is kept.
int64_t kept_bytes(const Path& path, const Call& call);
void lm_head_logprobs(const Path& path, const Call& call, int64_t ignore_index,
                      const TokenOutputs& out, void* kept);
void lm_head_logprobs_backward(const Path& path, const Call& call, int64_t ignore_index,
                               const Coefficients& upstream, const GradArgs& grads, void* kept);
void policy_loss(const Path& path, const Call& call, const PolicyArgs& policy,
                 const TokenOutputs& out, const GradArgs& grads, void* loss, void* metrics);

}  // namespace bupo::cuda
