// Tensors to arguments and back, and the registration for dispatch key CUDA: device guard, then
// lm_head.h. Values are not read on the host: a target out of range gives nan, never a wild read.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "../operands.h"
#include "lm_head.h"

namespace bupo {
namespace {

constexpr auto kDtypes = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};

cuda::Number number_of(ScalarType dtype) {
  return dtype == ScalarType::Float      ? cuda::Number::kFloat
         : dtype == ScalarType::BFloat16 ? cuda::Number::kBfloat16
                                         : cuda::Number::kFloat16;
}

#ifdef BUPO_EMULATED
struct Guard {
  explicit Guard(const Tensor&) {}
};
#else
struct Guard {
  explicit Guard(const Tensor& t) : guard(t.get_device()) {}
  torch::stable::accelerator::DeviceGuard guard;
};
#endif

cuda::Call call_of(const Tensor& hidden, const Inputs& in) {
  return {hidden, cuda::current_device(hidden), number_of(in.dtype), in.args};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lm_head_logprobs(Tensor hidden, Tensor weight,
                                                            Tensor targets, OptionalTensor bias,
                                                            OptionalTensor temperature,
                                                            double softcap, int64_t ignore_index,
                                                            bool keep) {
  const Guard guard(hidden);
  const Inputs in("bupo.ops.lm_head_logprobs", kDtypes, hidden, weight, targets, bias, temperature,
                  softcap);
  const cuda::Call call = call_of(hidden, in);
  Tensor logprobs = make_uninitialised(hidden, {in.args.tokens}, in.acc);
  Tensor entropy = make_uninitialised(hidden, {in.args.tokens}, in.acc);
  Tensor logsumexp = make_uninitialised(hidden, {in.args.tokens}, in.acc);
  const int64_t bytes = keep ? cuda::kept_bytes(call) : 0;
  Tensor kept = make_uninitialised(hidden, {bytes}, ScalarType::Byte);
  cuda::lm_head_logprobs(
      call, ignore_index,
      {logprobs.mutable_data_ptr(), entropy.mutable_data_ptr(), logsumexp.mutable_data_ptr()},
      bytes ? kept.mutable_data_ptr() : nullptr);
  return {logprobs, entropy, logsumexp, kept};
}

std::tuple<Tensor, Tensor, Tensor> lm_head_logprobs_backward(
    Tensor grad_logprobs, Tensor grad_entropy, Tensor grad_logsumexp, Tensor hidden, Tensor weight,
    Tensor targets, OptionalTensor bias, OptionalTensor temperature, Tensor kept, double softcap,
    int64_t ignore_index, bool need_hidden, bool need_weight, bool need_bias) {
  const Guard guard(hidden);
  constexpr const char* op = "bupo.ops.lm_head_logprobs (backward)";
  const Inputs in(op, kDtypes, hidden, weight, targets, bias, temperature, softcap);
  const TokenGrads upstream = token_grads(op, in, grad_logprobs, grad_entropy, grad_logsumexp);
  Grads grads(in, hidden, need_hidden, need_weight, need_bias);
  const cuda::Call call = call_of(hidden, in);
  check_vector(op, "kept", kept, kept.numel(), ScalarType::Byte);
  require(cuda::may_be_kept(call, kept.numel()), op, ": kept is of another call, got ",
          shape_of(kept));
  if (!grads.args.any()) return {grads.hidden, grads.weight, grads.bias};
  cuda::lm_head_logprobs_backward(call, ignore_index, upstream, grads.args,
                                  kept.numel() ? kept.mutable_data_ptr() : nullptr, kept.numel());
  return {grads.hidden, grads.weight, grads.bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> policy_loss(
    Tensor hidden, Tensor weight, Tensor targets, Tensor old_logprobs, Tensor advantages,
    Tensor token_weights, OptionalTensor bias, OptionalTensor temperature, double softcap,
    std::vector<double> settings, OptionalTensor ref_logprobs, OptionalTensor importance_weights,
    bool need_hidden, bool need_weight, bool need_bias) {
  const Guard guard(hidden);
  constexpr const char* op = "bupo.ops.policy_loss";
  const Inputs in(op, kDtypes, hidden, weight, targets, bias, temperature, softcap);
  const PolicyArgs policy = policy_args(op, in, settings, old_logprobs, advantages, token_weights,
                                        ref_logprobs, importance_weights);
  Tensor logprobs = make_uninitialised(hidden, {in.args.tokens}, in.acc);
  Tensor entropy = make_uninitialised(hidden, {in.args.tokens}, in.acc);
  Tensor loss = make_uninitialised(hidden, {}, in.acc);
  Tensor metrics = make_uninitialised(hidden, {kPolicyMetrics}, in.acc);
  Grads grads(in, hidden, need_hidden, need_weight, need_bias);
  cuda::policy_loss(call_of(hidden, in), policy,
                    {logprobs.mutable_data_ptr(), entropy.mutable_data_ptr(), nullptr}, grads.args,
                    loss.mutable_data_ptr(), metrics.mutable_data_ptr());
  return {loss, logprobs, entropy, metrics, grads.hidden, grads.weight, grads.bias};
}

}  // namespace

#ifdef BUPO_EMULATED
STABLE_TORCH_LIBRARY_IMPL(bupo, CPU, m) {  // in place of the CPU operators: tests of this code
#else
STABLE_TORCH_LIBRARY_IMPL(bupo, CUDA, m) {
#endif
  m.impl("lm_head_logprobs", TORCH_BOX(&lm_head_logprobs));
  m.impl("lm_head_logprobs_backward", TORCH_BOX(&lm_head_logprobs_backward));
  m.impl("policy_loss", TORCH_BOX(&policy_loss));
}

}  // namespace bupo
