// What both backends make of an operator's arguments: checked operands, gradients to fill, and the
// policy loss's settings. Values of tensors are not read here.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <vector>

#include "args.h"
#include "checks.h"

namespace bupo {

using OptionalTensor = std::optional<Tensor>;

inline const void* data(const Tensor& t) { return t.const_data_ptr(); }
inline const void* data(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }

inline Tensor make_uninitialised(const Tensor& like, std::vector<int64_t> shape, ScalarType dtype) {
  try {
    return torch::stable::new_empty(like, {shape.data(), shape.size()}, dtype);
  } catch (const std::runtime_error&) {  // bupo.ops makes torch.OutOfMemoryError of it
    throw_torch_error("out of memory for a tensor of shape " +
                      shape_of({shape.data(), shape.size()}) + ", type " + toString(dtype));
  }
}

inline Tensor make(const Tensor& like, std::vector<int64_t> shape, ScalarType dtype) {
  Tensor zeros = make_uninitialised(like, std::move(shape), dtype);
  torch::stable::zero_(zeros);
  return zeros;
}

// The LM head's operands, checked.
struct Inputs {
  HeadArgs args;
  ScalarType dtype, acc;  // of hidden and weight; of the per-token tensors

  Inputs(const char* op, std::initializer_list<ScalarType> supported, const Tensor& hidden,
         const Tensor& weight, const Tensor& targets, const OptionalTensor& bias,
         const OptionalTensor& temperature, double softcap) {
    check_matrix(op, "hidden", hidden);
    check_matrix(op, "weight", weight);
    dtype = hidden.scalar_type();
    require(std::find(supported.begin(), supported.end(), dtype) != supported.end(), op,
            ": hidden of ", toString(dtype), " is not supported on this device");
    require(weight.scalar_type() == dtype, op, ": weight must have the dtype of hidden");
    require(weight.size(1) == hidden.size(1), op, ": weight must be [V, ", hidden.size(1),
            "] for hidden ", shape_of(hidden), ", got ", shape_of(weight));
    require(hidden.size(1) > 0, op, ": hidden must have at least one column, got ",
            shape_of(hidden));
    require(weight.size(0) > 0, op, ": weight must have at least one row, got ", shape_of(weight));
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

  // Entry i of a per-token tensor, on the host.
  double value(const void* values, int64_t i) const {
    return acc == ScalarType::Double ? static_cast<const double*>(values)[i]
                                     : static_cast<const float*>(values)[i];
  }
};

// Upstream gradients of the per-token op.
inline Coefficients coefficients(const char* op, const Inputs& in, const OptionalTensor& logprobs,
                                 const OptionalTensor& entropy, const OptionalTensor& logsumexp) {
  const int64_t n = in.args.tokens;
  if (logprobs) check_vector(op, "grad_logprobs", *logprobs, n, in.acc);
  if (entropy) check_vector(op, "grad_entropy", *entropy, n, in.acc);
  if (logsumexp) check_vector(op, "grad_logsumexp", *logsumexp, n, in.acc);
  return {data(logprobs), data(entropy), data(logsumexp)};
}

inline PolicyArgs policy_args(const char* op, const Inputs& in, const std::vector<double>& values,
                              const OptionalTensor& old_logprobs, const Tensor& advantages,
                              const Tensor& token_weights, const OptionalTensor& ref_logprobs,
                              const OptionalTensor& importance_weights) {
  const int64_t n = in.args.tokens;
  check_vector(op, "token_weights", token_weights, n, in.acc);
  if (old_logprobs) check_vector(op, "old_logprobs", *old_logprobs, n, in.acc);
  check_vector(op, "advantages", advantages, n, in.acc);
  if (ref_logprobs) check_vector(op, "ref_logprobs", *ref_logprobs, n, in.acc);
  if (importance_weights) check_vector(op, "importance_weights", *importance_weights, n, in.acc);
  require(values.size() == 8, op, ": settings must be 8 numbers, got ", values.size());
  const int type = static_cast<int>(values[3]), estimator = static_cast<int>(values[5]);
  const PolicySettings settings{values[0], values[1],
                                values[2], static_cast<LossType>(type),
                                values[4], static_cast<KlEstimator>(estimator),
                                values[6], values[7]};
  require(settings.kl_coef == 0 || ref_logprobs, op,
          ": ref_logprobs is needed when kl_coef is not 0");
  require(type >= 0 && type <= 1, op, ": unknown loss_type ", type);
  require(estimator >= 0 && estimator <= 2, op, ": unknown kl_estimator ", estimator);
  return {settings,           data(old_logprobs),      data(advantages), data(token_weights),
          data(ref_logprobs), data(importance_weights)};
}

// The gradients that an operator returns; empty where not wanted.
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

}  // namespace bupo
