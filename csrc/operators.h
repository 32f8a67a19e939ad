// The operators, from tensors to a backend's arguments and back: one text for CPU and CUDA. Values
// of tensors are not read here.
//
// Backend(hidden, in) has check_tokens(op, included), bytes_to_keep() and the three operators; it
// is made on the device of hidden, which Backend::Guard sees to.

#pragma once

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "operands.h"

namespace bupo {

template <class Backend>
struct Operators {
  static std::tuple<Tensor, Tensor, Tensor, Tensor> lm_head_logprobs(
      Tensor hidden, Tensor weight, Tensor targets, OptionalTensor bias, OptionalTensor temperature,
      double softcap, int64_t ignore_index, bool keep) {
    const typename Backend::Guard guard(hidden.get_device());
    constexpr const char* op = "bupo.ops.lm_head_logprobs";
    const Inputs in(op, Backend::kDtypes, hidden, weight, targets, bias, temperature, softcap);
    const Backend backend(hidden, in);
    backend.check_tokens(op, [&](int64_t i) { return in.args.targets[i] != ignore_index; });
    Tensor logprobs = make(hidden, {in.args.tokens}, in.acc);
    Tensor entropy = make(hidden, {in.args.tokens}, in.acc);
    Tensor logsumexp = make(hidden, {in.args.tokens}, in.acc);
    Tensor kept =
        make_uninitialised(hidden, {keep ? backend.bytes_to_keep() : 0}, ScalarType::Byte);
    backend.lm_head_logprobs(
        ignore_index,
        {logprobs.mutable_data_ptr(), entropy.mutable_data_ptr(), logsumexp.mutable_data_ptr()},
        kept.numel() ? kept.mutable_data_ptr() : nullptr);
    return {logprobs, entropy, logsumexp, kept};
  }

  static std::tuple<Tensor, Tensor, Tensor> lm_head_logprobs_backward(
      OptionalTensor grad_logprobs, OptionalTensor grad_entropy, OptionalTensor grad_logsumexp,
      Tensor hidden, Tensor weight, Tensor targets, OptionalTensor bias, OptionalTensor temperature,
      Tensor kept, double softcap, int64_t ignore_index, bool need_hidden, bool need_weight,
      bool need_bias) {
    const typename Backend::Guard guard(hidden.get_device());
    constexpr const char* op = "bupo.ops.lm_head_logprobs (backward)";
    const Inputs in(op, Backend::kDtypes, hidden, weight, targets, bias, temperature, softcap);
    const Backend backend(hidden, in);
    backend.check_tokens(op, [&](int64_t i) { return in.args.targets[i] != ignore_index; });
    check_vector(op, "kept", kept, Backend::kKeeps ? kept.numel() : 0, ScalarType::Byte);
    const Coefficients upstream = coefficients(op, in, grad_logprobs, grad_entropy, grad_logsumexp);
    Grads grads(in, hidden, need_hidden, need_weight, need_bias);
    if (grads.args.any())
      backend.lm_head_logprobs_backward(ignore_index, upstream, grads.args,
                                        kept.numel() ? kept.mutable_data_ptr() : nullptr,
                                        kept.numel());
    return {grads.hidden, grads.weight, grads.bias};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> policy_loss(
      Tensor hidden, Tensor weight, Tensor targets, OptionalTensor old_logprobs, Tensor advantages,
      Tensor token_weights, OptionalTensor bias, OptionalTensor temperature, double softcap,
      std::vector<double> settings, OptionalTensor sequence_ids, OptionalTensor ref_logprobs,
      OptionalTensor importance_weights, OptionalTensor entropy_weights, bool need_hidden,
      bool need_weight, bool need_bias) {
    const typename Backend::Guard guard(hidden.get_device());
    constexpr const char* op = "bupo.ops.policy_loss";
    const Inputs in(op, Backend::kDtypes, hidden, weight, targets, bias, temperature, softcap);
    const PolicyArgs policy = policy_args(
        op, in, settings, advantages, token_weights,
        {sequence_ids, old_logprobs, ref_logprobs, importance_weights, entropy_weights});
    const Backend backend(hidden, in);
    backend.check_tokens(op, [&](int64_t i) { return in.value(policy.token_weights, i) != 0; });
    backend.check_sequences(op, policy.sequence_ids);
    Tensor logprobs = make(hidden, {in.args.tokens}, in.acc);
    Tensor entropy = make(hidden, {in.args.tokens}, in.acc);
    Tensor losses = make(hidden, {in.args.tokens}, in.acc);
    Tensor loss = make(hidden, {}, in.acc);
    Tensor metrics = make(hidden, {kPolicyMetrics}, in.acc);
    Grads grads(in, hidden, need_hidden, need_weight, need_bias);
    backend.policy_loss(policy,
                        {logprobs.mutable_data_ptr(), entropy.mutable_data_ptr(), nullptr,
                         losses.mutable_data_ptr()},
                        grads.args, loss.mutable_data_ptr(), metrics.mutable_data_ptr());
    return {loss, logprobs, entropy, metrics, losses, grads.hidden, grads.weight, grads.bias};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
  lm_head_divergence(Tensor hidden, Tensor weight, OptionalTensor bias, OptionalTensor temperature,
                     double softcap, Tensor teacher_hidden, Tensor teacher_weight,
                     OptionalTensor teacher_bias, OptionalTensor teacher_temperature,
                     double teacher_softcap, Tensor token_weights, int64_t kind, double beta,
                     std::vector<bool> needs) {
    const typename Backend::Guard guard(hidden.get_device());
    constexpr const char* op = "bupo.ops.lm_head_divergence";
    const Inputs in(op, Backend::kDtypes, hidden, weight, std::nullopt, bias, temperature, softcap);
    const Inputs of(op, Backend::kDtypes, teacher_hidden, teacher_weight, std::nullopt,
                    teacher_bias, teacher_temperature, teacher_softcap);
    const int64_t n = in.args.tokens;
    require(of.dtype == in.dtype && of.args.tokens == n && of.args.vocab == in.args.vocab, op,
            ": teacher_hidden and teacher_weight must have the dtype, tokens and vocabulary of "
            "hidden and weight");
    check_vector(op, "token_weights", token_weights, n, in.acc);
    require(needs.size() == 6, op, ": needs must be 6, got ", needs.size());
    const Backend student(hidden, in), teacher(teacher_hidden, of);
    const auto included = [&](int64_t i) { return in.value(data(token_weights), i) != 0; };
    student.check_tokens(op, included);
    teacher.check_tokens(op, included);
    Tensor loss = make(hidden, {}, in.acc), divergence = make(hidden, {n}, in.acc);
    Grads mine(in, hidden, needs[0], needs[1], needs[2]);
    Grads its(of, teacher_hidden, needs[3], needs[4], needs[5]);
    const DivergenceArgs args{in.args, of.args,
                              one_of<DivergenceKind>(op, "kind", static_cast<double>(kind)), beta,
                              data(token_weights)};
    student.lm_head_divergence(teacher, args, mine.args, its.args, divergence.mutable_data_ptr(),
                               loss.mutable_data_ptr());
    return {loss,      divergence, mine.hidden, mine.weight,
            mine.bias, its.hidden, its.weight,  its.bias};
  }
};

}  // namespace bupo
