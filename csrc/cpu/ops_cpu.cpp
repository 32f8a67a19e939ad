// Tensors to arguments and back, and the registration for dispatch key CPU.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "../args.h"
#include "../checks.h"
#include "lm_head.h"

namespace bupo {
namespace {

using OptionalTensor = std::optional<Tensor>;

const void* data(const Tensor& t) { return t.const_data_ptr(); }
const void* data(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }

Tensor make(const Tensor& like, std::vector<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_zeros(like, {shape.data(), shape.size()}, dtype);
}

Tensor make_uninitialised(const Tensor& like, std::vector<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_empty(like, {shape.data(), shape.size()}, dtype);
}

// The LM head's operands, checked.
struct Inputs {
  HeadArgs args;
  cpu::Scalar scalar;
  ScalarType dtype, acc;

  Inputs(const char* op, const Tensor& hidden, const Tensor& weight, const Tensor& targets,
         const OptionalTensor& bias, const OptionalTensor& temperature, double softcap) {
    check_matrix(op, "hidden", hidden);
    check_matrix(op, "weight", weight);
    dtype = hidden.scalar_type();
    require(
        dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16,
        op, ": hidden on the CPU must be float32, float64 or bfloat16");
    require(weight.scalar_type() == dtype, op, ": weight must have the dtype of hidden");
    require(weight.size(1) == hidden.size(1), op, ": weight must be [V, ", hidden.size(1),
            "] for hidden ", shape_of(hidden), ", got ", shape_of(weight));
    require(weight.size(0) > 0, op, ": weight must have at least one row, got ", shape_of(weight));
    scalar = dtype == ScalarType::Float    ? cpu::Scalar::kFloat
             : dtype == ScalarType::Double ? cpu::Scalar::kDouble
                                           : cpu::Scalar::kBfloat16;
    acc = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    const int64_t tokens = hidden.size(0);
    check_vector(op, "targets", targets, tokens, ScalarType::Long);
    if (bias) check_vector(op, "bias", *bias, weight.size(0), dtype);
    if (temperature) check_vector(op, "temperature", *temperature, tokens, acc);
    args = {data(hidden),
            data(weight),
            data(bias),
            data(temperature),
            static_cast<const int64_t*>(data(targets)),
            tokens,
            hidden.size(1),
            weight.size(0),
            hidden.stride(0),
            weight.stride(0),
            softcap};
  }

  // The values that the tokens selected by `included` may hold; other tokens may hold anything.
  template <class Included>
  void check_tokens(const char* op, const Included& included) const {
    check_targets(op, args.targets, args.tokens, args.vocab, included);
    for (int64_t i = 0; args.temperature && i < args.tokens; ++i) {
      const double t = acc == ScalarType::Double ? static_cast<const double*>(args.temperature)[i]
                                                 : static_cast<const float*>(args.temperature)[i];
      require(!included(i) || (t > 0 && std::isfinite(t)), op, ": temperature[", i,
              "] must be positive and finite, got ", t);
    }
  }
};

struct Grads {
  Tensor hidden, weight, bias;
  GradArgs args;

  Grads(const Inputs& in, const Tensor& like, bool need_hidden, bool need_weight, bool need_bias)
      : hidden(make(like, {need_hidden ? in.args.tokens : 0, in.args.width}, in.dtype)),
        weight(
            make_uninitialised(like, {need_weight ? in.args.vocab : 0, in.args.width}, in.dtype)),
        bias(make(like, {need_bias ? in.args.vocab : 0}, in.dtype)),
        args{need_hidden ? hidden.mutable_data_ptr() : nullptr,
             need_weight ? weight.mutable_data_ptr() : nullptr,
             need_bias ? bias.mutable_data_ptr() : nullptr} {}
};

std::tuple<Tensor, Tensor, Tensor> lm_head_logprobs(Tensor hidden, Tensor weight, Tensor targets,
                                                    OptionalTensor bias, OptionalTensor temperature,
                                                    double softcap, int64_t ignore_index) {
  constexpr const char* op = "bupo.ops.lm_head_logprobs";
  const Inputs in(op, hidden, weight, targets, bias, temperature, softcap);
  in.check_tokens(op, [&](int64_t i) { return in.args.targets[i] != ignore_index; });
  Tensor logprobs = make(hidden, {in.args.tokens}, in.acc);
  Tensor entropy = make(hidden, {in.args.tokens}, in.acc);
  Tensor logsumexp = make(hidden, {in.args.tokens}, in.acc);
  cpu::lm_head_logprobs(
      in.scalar, in.args, ignore_index,
      {logprobs.mutable_data_ptr(), entropy.mutable_data_ptr(), logsumexp.mutable_data_ptr()});
  return {logprobs, entropy, logsumexp};
}

std::tuple<Tensor, Tensor, Tensor> lm_head_logprobs_backward(
    Tensor grad_logprobs, Tensor grad_entropy, Tensor grad_logsumexp, Tensor hidden, Tensor weight,
    Tensor targets, OptionalTensor bias, OptionalTensor temperature, double softcap,
    int64_t ignore_index, bool need_hidden, bool need_weight, bool need_bias) {
  constexpr const char* op = "bupo.ops.lm_head_logprobs (backward)";
  const Inputs in(op, hidden, weight, targets, bias, temperature, softcap);
  in.check_tokens(op, [&](int64_t i) { return in.args.targets[i] != ignore_index; });
  check_vector(op, "grad_logprobs", grad_logprobs, in.args.tokens, in.acc);
  check_vector(op, "grad_entropy", grad_entropy, in.args.tokens, in.acc);
  check_vector(op, "grad_logsumexp", grad_logsumexp, in.args.tokens, in.acc);
  Grads grads(in, hidden, need_hidden, need_weight, need_bias);
  cpu::lm_head_logprobs_backward(in.scalar, in.args, ignore_index,
                                 {data(grad_logprobs), data(grad_entropy), data(grad_logsumexp)},
                                 grads.args);
  return {grads.hidden, grads.weight, grads.bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> policy_loss(
    Tensor hidden, Tensor weight, Tensor targets, Tensor old_logprobs, Tensor advantages,
    Tensor token_weights, OptionalTensor bias, OptionalTensor temperature, double softcap,
    double clip_low, double clip_high, double dual_clip, int64_t loss_type,
    OptionalTensor ref_logprobs, double kl_coef, int64_t kl_estimator, double entropy_coef,
    OptionalTensor importance_weights, bool need_hidden, bool need_weight, bool need_bias) {
  constexpr const char* op = "bupo.ops.policy_loss";
  const Inputs in(op, hidden, weight, targets, bias, temperature, softcap);
  const auto included = [&](int64_t i) {
    return in.acc == ScalarType::Double ? static_cast<const double*>(data(token_weights))[i] != 0
                                        : static_cast<const float*>(data(token_weights))[i] != 0;
  };
  check_vector(op, "token_weights", token_weights, in.args.tokens, in.acc);
  in.check_tokens(op, included);
  check_vector(op, "old_logprobs", old_logprobs, in.args.tokens, in.acc);
  check_vector(op, "advantages", advantages, in.args.tokens, in.acc);
  if (ref_logprobs) check_vector(op, "ref_logprobs", *ref_logprobs, in.args.tokens, in.acc);
  if (importance_weights)
    check_vector(op, "importance_weights", *importance_weights, in.args.tokens, in.acc);
  require(kl_coef == 0 || ref_logprobs, op, ": ref_logprobs is needed when kl_coef is not 0");
  require(loss_type >= 0 && loss_type <= 1, op, ": unknown loss_type ", loss_type);
  require(kl_estimator >= 0 && kl_estimator <= 2, op, ": unknown kl_estimator ", kl_estimator);

  const PolicyArgs policy{{clip_low, clip_high, dual_clip, static_cast<LossType>(loss_type),
                           kl_coef, static_cast<KlEstimator>(kl_estimator), entropy_coef},
                          data(old_logprobs),
                          data(advantages),
                          data(token_weights),
                          data(ref_logprobs),
                          data(importance_weights)};
  Tensor logprobs = make(hidden, {in.args.tokens}, in.acc);
  Tensor entropy = make(hidden, {in.args.tokens}, in.acc);
  Tensor loss = make(hidden, {}, in.acc);
  Tensor metrics = make(hidden, {kPolicyMetrics}, in.acc);
  Grads grads(in, hidden, need_hidden, need_weight, need_bias);
  cpu::policy_loss(in.scalar, in.args, policy,
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
