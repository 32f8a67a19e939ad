// Tensors to arguments and back, and the registration for dispatch key CPU.

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "../operands.h"
#include "lm_head.h"

namespace bupo {
namespace {

constexpr auto kDtypes = {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16};

cpu::Scalar scalar_of(ScalarType dtype) {
  return dtype == ScalarType::Float    ? cpu::Scalar::kFloat
         : dtype == ScalarType::Double ? cpu::Scalar::kDouble
                                       : cpu::Scalar::kBfloat16;
}

double at(const Inputs& in, const void* values, int64_t i) {
  return in.acc == ScalarType::Double ? static_cast<const double*>(values)[i]
                                      : static_cast<const float*>(values)[i];
}

// The values that the tokens selected by `included` may hold; other tokens may hold anything.
template <class Included>
void check_tokens(const char* op, const Inputs& in, const Included& included) {
  check_targets(op, in.args.targets, in.args.tokens, in.args.vocab, included);
  for (int64_t i = 0; in.args.temperature && i < in.args.tokens; ++i) {
    const double t = at(in, in.args.temperature, i);
    const bool invertible = in.acc == ScalarType::Double || std::isfinite(float(1 / t));
    require(!included(i) || (t > 0 && std::isfinite(t) && invertible), op, ": temperature[", i,
            "] must be positive and finite, got ", t);
  }
}

// Keeps nothing for the backward, which makes the logits again in its cache.
std::tuple<Tensor, Tensor, Tensor, Tensor> lm_head_logprobs(Tensor hidden, Tensor weight,
                                                            Tensor targets, OptionalTensor bias,
                                                            OptionalTensor temperature,
                                                            double softcap, int64_t ignore_index,
                                                            bool /*keep*/) {
  constexpr const char* op = "bupo.ops.lm_head_logprobs";
  const Inputs in(op, kDtypes, hidden, weight, targets, bias, temperature, softcap);
  check_tokens(op, in, [&](int64_t i) { return in.args.targets[i] != ignore_index; });
  Tensor logprobs = make(hidden, {in.args.tokens}, in.acc);
  Tensor entropy = make(hidden, {in.args.tokens}, in.acc);
  Tensor logsumexp = make(hidden, {in.args.tokens}, in.acc);
  cpu::lm_head_logprobs(
      scalar_of(in.dtype), in.args, ignore_index,
      {logprobs.mutable_data_ptr(), entropy.mutable_data_ptr(), logsumexp.mutable_data_ptr()});
  return {logprobs, entropy, logsumexp, make(hidden, {0}, ScalarType::Byte)};
}

std::tuple<Tensor, Tensor, Tensor> lm_head_logprobs_backward(
    OptionalTensor grad_logprobs, OptionalTensor grad_entropy, OptionalTensor grad_logsumexp,
    Tensor hidden, Tensor weight, Tensor targets, OptionalTensor bias, OptionalTensor temperature,
    Tensor kept, double softcap, int64_t ignore_index, bool need_hidden, bool need_weight,
    bool need_bias) {
  constexpr const char* op = "bupo.ops.lm_head_logprobs (backward)";
  const Inputs in(op, kDtypes, hidden, weight, targets, bias, temperature, softcap);
  check_tokens(op, in, [&](int64_t i) { return in.args.targets[i] != ignore_index; });
  check_vector(op, "kept", kept, 0, ScalarType::Byte);
  const TokenGrads upstream = token_grads(op, in, grad_logprobs, grad_entropy, grad_logsumexp);
  Grads grads(in, hidden, need_hidden, need_weight, need_bias);
  cpu::lm_head_logprobs_backward(scalar_of(in.dtype), in.args, ignore_index, upstream, grads.args);
  return {grads.hidden, grads.weight, grads.bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> policy_loss(
    Tensor hidden, Tensor weight, Tensor targets, Tensor old_logprobs, Tensor advantages,
    Tensor token_weights, OptionalTensor bias, OptionalTensor temperature, double softcap,
    std::vector<double> settings, OptionalTensor ref_logprobs, OptionalTensor importance_weights,
    bool need_hidden, bool need_weight, bool need_bias) {
  constexpr const char* op = "bupo.ops.policy_loss";
  const Inputs in(op, kDtypes, hidden, weight, targets, bias, temperature, softcap);
  const PolicyArgs policy = policy_args(op, in, settings, old_logprobs, advantages, token_weights,
                                        ref_logprobs, importance_weights);
  check_tokens(op, in, [&](int64_t i) { return at(in, policy.token_weights, i) != 0; });
  Tensor logprobs = make(hidden, {in.args.tokens}, in.acc);
  Tensor entropy = make(hidden, {in.args.tokens}, in.acc);
  Tensor loss = make(hidden, {}, in.acc);
  Tensor metrics = make(hidden, {kPolicyMetrics}, in.acc);
  Grads grads(in, hidden, need_hidden, need_weight, need_bias);
  cpu::policy_loss(scalar_of(in.dtype), in.args, policy,
                   {logprobs.mutable_data_ptr(), entropy.mutable_data_ptr(), nullptr}, grads.args,
                   loss.mutable_data_ptr(), metrics.mutable_data_ptr());
  return {loss, logprobs, entropy, metrics, grads.hidden, grads.weight, grads.bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bupo, CPU, m) {
  m.impl("lm_head_logprobs", TORCH_BOX(&lm_head_logprobs));
  m.impl("lm_head_logprobs_backward", TORCH_BOX(&lm_head_logprobs_backward));
  m.impl("policy_loss", TORCH_BOX(&policy_loss));
}

}  // namespace bupo
