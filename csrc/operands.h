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
         const Tensor& weight, const OptionalTensor& targets, const OptionalTensor& bias,
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
    if (targets) check_vector(op, "targets", *targets, tokens, ScalarType::Long);
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

// An enumerator by its number.
template <class Enum>
Enum one_of(const char* op, const char* name, double value) {
  const int number = static_cast<int>(value);
  require(number >= 0 && number < static_cast<int>(Enum::kCount), op, ": unknown ", name, " ",
          number);
  return static_cast<Enum>(number);
}

// Per-token tensors of the policy loss that may be left out, in the order of the schema.
struct PolicyOptions {
  const OptionalTensor &sequence_ids, &old_logprobs, &ref_logprobs, &importance_weights,
      &entropy_weights;
};

inline PolicyArgs policy_args(const char* op, const Inputs& in, const std::vector<double>& values,
                              const Tensor& advantages, const Tensor& token_weights,
                              const PolicyOptions& given) {
  const int64_t n = in.args.tokens;
  check_vector(op, "token_weights", token_weights, n, in.acc);
  check_vector(op, "advantages", advantages, n, in.acc);
  const auto optional = [&](const char* name, const OptionalTensor& x) {
    if (x) check_vector(op, name, *x, n, in.acc);
    return data(x);
  };
  if (given.sequence_ids)
    check_vector(op, "sequence_ids", *given.sequence_ids, n, ScalarType::Long);
  require(values.size() == 13, op, ": settings must be 13 numbers, got ", values.size());
  const auto* v = values.data();
  const PolicySettings settings{one_of<LossType>(op, "loss_type", v[0]),
                                one_of<RatioLevel>(op, "ratio_level", v[1]),
                                {v[2], v[3], v[4], v[5]},
                                v[6],
                                v[7],
                                one_of<KlEstimator>(op, "kl_estimator", v[8]),
                                v[9] != 0,
                                v[10] != 0,
                                v[11],
                                v[12],
                                given.ref_logprobs.has_value()};
  require(settings.kl_coef == 0 || given.ref_logprobs, op,
          ": ref_logprobs is needed when kl_coef is not 0");
  require(settings.of_sequences() == given.sequence_ids.has_value(), op,
          ": sequence_ids are needed exactly when the ratio is one of sequences");
  return {settings,
          static_cast<const int64_t*>(data(given.sequence_ids)),
          optional("old_logprobs", given.old_logprobs),
          data(advantages),
          data(token_weights),
          optional("ref_logprobs", given.ref_logprobs),
          optional("importance_weights", given.importance_weights),
          optional("entropy_weights", given.entropy_weights)};
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
