// The LM-head ops on a GPU, on device pointers. Per-token arrays are fp32.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include "../args.h"
#include "launch.h"

namespace bupo::cuda {

// `like` is a tensor of the call: its device, its stream, its allocator. The rest as in
// cpu/lm_head.h, without checks of values: a target out of range gives nan.
void lm_head_logprobs(const torch::stable::Tensor& like, Number number, const HeadArgs& head,
                      int64_t ignore_index, const TokenOutputs& out);
void lm_head_logprobs_backward(const torch::stable::Tensor& like, Number number,
                               const HeadArgs& head, int64_t ignore_index,
                               const TokenGrads& upstream, const GradArgs& grads);
void policy_loss(const torch::stable::Tensor& like, Number number, const HeadArgs& head,
                 const PolicyArgs& policy, const TokenOutputs& out, const GradArgs& grads,
                 void* loss, void* metrics);

}  // namespace bupo::cuda
