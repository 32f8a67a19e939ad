// The LM-head ops on the CPU, on raw pointers. T of the per-token arrays is the accumulator type.

#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

#include "../args.h"

namespace bupo::cpu {

using torch::headeronly::ScalarType;

// Log-prob, entropy and logsumexp of every token whose target is not ignore_index.
void lm_head_logprobs(ScalarType dtype, const HeadArgs& head, int64_t ignore_index,
                      const TokenOutputs& out);

// Its gradient, for upstream gradients of the three outputs. Recomputes the logits block by block.
void lm_head_logprobs_backward(ScalarType dtype, const HeadArgs& head, int64_t ignore_index,
                               const Coefficients& upstream, const GradArgs& grads);

// Clipped-ratio loss with its gradient in the same pass over the tokens. `loss` and `metrics`
// (kPolicyMetrics of them) are of the accumulator type.
void policy_loss(ScalarType dtype, const HeadArgs& head, const PolicyArgs& policy,
                 const TokenOutputs& out, const GradArgs& grads, void* loss, void* metrics);

}  // namespace bupo::cpu
