// Tensors to arguments and back, and the registration for dispatch key CUDA: device guard, then
// paths.h. Values are not read on the host: a target out of range gives nan, never a wild read.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <platform.cuh>
#include <tuple>
#include <vector>

#include "../operands.h"
#include "paths.h"

namespace bupo {
namespace {

constexpr auto kDtypes = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};

cuda::Number number_of(ScalarType dtype) {
  return dtype == ScalarType::Float      ? cuda::Number::kFloat
         : dtype == ScalarType::BFloat16 ? cuda::Number::kBfloat16
                                         : cuda::Number::kFloat16;
}

using Guard = torch::stable::accelerator::DeviceGuard;

cuda::Call call_of(const Tensor& hidden, const Inputs& in) {
  return {hidden, cuda::current_device(hidden), number_of(in.dtype), in.args};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lm_head_logprobs(Tensor hidden, Tensor weight,
                                                            Tensor targets, OptionalTensor bias,
                                                            OptionalTensor temperature,
                                                            double softcap, int64_t ignore_index,
                                                            bool keep) {
  const Guard guard(hidden.get_device());
  const Inputs in("bupo.ops.lm_head_logprobs", kDtypes, hidden, weight, targets, bias, temperature,
                  softcap);
  const cuda::Call call = call_of(hidden, in);
  Tensor logprobs = make_uninitialised(hidden, {in.args.tokens}, in.acc);
  Tensor entropy = make_uninitialised(hidden, {in.args.tokens}, in.acc);
  Tensor logsumexp = make_uninitialised(hidden, {in.args.tokens}, in.acc);
  const int64_t bytes = keep ? cuda::bytes_to_keep(call) : 0;
  Tensor kept = make_uninitialised(hidden, {bytes}, ScalarType::Byte);
  path_of(call).lm_head_logprobs(
      call, ignore_index,
      {logprobs.mutable_data_ptr(), entropy.mutable_data_ptr(), logsumexp.mutable_data_ptr()},
      bytes ? kept.mutable_data_ptr() : nullptr);
  return {logprobs, entropy, logsumexp, kept};
}

std::tuple<Tensor, Tensor, Tensor> lm_head_logprobs_backward(
    OptionalTensor grad_logprobs, OptionalTensor grad_entropy, OptionalTensor grad_logsumexp,
    Tensor hidden, Tensor weight, Tensor targets, OptionalTensor bias, OptionalTensor temperature,
    Tensor kept, double softcap, int64_t ignore_index, bool need_hidden, bool need_weight,
    bool need_bias) {
  const Guard guard(hidden.get_device());
  constexpr const char* op = "bupo.ops.lm_head_logprobs (backward)";
  const Inputs in(op, kDtypes, hidden, weight, targets, bias, temperature, softcap);
  const TokenGrads upstream = token_grads(op, in, grad_logprobs, grad_entropy, grad_logsumexp);
  Grads grads(in, hidden, need_hidden, need_weight, need_bias);
  const cuda::Call call = call_of(hidden, in);
  check_vector(op, "kept", kept, kept.numel(), ScalarType::Byte);
  if (!grads.args.any()) return {grads.hidden, grads.weight, grads.bias};
  const cuda::Path& path = path_of(call);
  // A saved weight may come back at another address (hooks that offload it), on the other path.
  const bool fits = kept.numel() && kept.numel() == path.kept_bytes(call);
  path.lm_head_logprobs_backward(
      call, ignore_index,
      {cuda::at<float>(upstream.logprobs, 0), cuda::at<float>(upstream.entropy, 0),
       cuda::at<float>(upstream.logsumexp, 0)},
      grads.args, fits ? kept.mutable_data_ptr() : nullptr);
  return {grads.hidden, grads.weight, grads.bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> policy_loss(
    Tensor hidden, Tensor weight, Tensor targets, Tensor old_logprobs, Tensor advantages,
    Tensor token_weights, OptionalTensor bias, OptionalTensor temperature, double softcap,
    std::vector<double> settings, OptionalTensor ref_logprobs, OptionalTensor importance_weights,
    bool need_hidden, bool need_weight, bool need_bias) {
  const Guard guard(hidden.get_device());
  constexpr const char* op = "bupo.ops.policy_loss";
  const Inputs in(op, kDtypes, hidden, weight, targets, bias, temperature, softcap);
  const PolicyArgs policy = policy_args(op, in, settings, old_logprobs, advantages, token_weights,
                                        ref_logprobs, importance_weights);
  Tensor logprobs = make_uninitialised(hidden, {in.args.tokens}, in.acc);
  Tensor entropy = make_uninitialised(hidden, {in.args.tokens}, in.acc);
  Tensor loss = make_uninitialised(hidden, {}, in.acc);
  Tensor metrics = make_uninitialised(hidden, {kPolicyMetrics}, in.acc);
  Grads grads(in, hidden, need_hidden, need_weight, need_bias);
  const cuda::Call call = call_of(hidden, in);
  const TokenOutputs out{logprobs.mutable_data_ptr(), entropy.mutable_data_ptr(), nullptr};
  const cuda::PolicyCoefficients coefficients(call, policy, out);
  path_of(call).policy_loss(call, coefficients, out, grads.args);
  coefficients.sum(loss.mutable_data_ptr(), metrics.mutable_data_ptr());
  return {loss, logprobs, entropy, metrics, grads.hidden, grads.weight, grads.bias};
}

// gradient *= scale, which the host does not read.
void scale_(Tensor gradient, Tensor scale) {
  const Guard guard(gradient.get_device());
  constexpr const char* op = "bupo.ops.scale_";
  require(
      gradient.is_contiguous() && scale.numel() == 1 && scale.scalar_type() == ScalarType::Float,
      op, ": expected a contiguous gradient and a float32 scalar");
  const cuda::Device device = cuda::current_device(gradient);
  cuda::check(cuda::launch_scale(number_of(gradient.scalar_type()), gradient.mutable_data_ptr(),
                                 static_cast<const float*>(data(scale)), gradient.numel(),
                                 device.stream));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bupo, BUPO_DISPATCH_KEY, m) {
  m.impl("lm_head_logprobs", TORCH_BOX(&lm_head_logprobs));
  m.impl("lm_head_logprobs_backward", TORCH_BOX(&lm_head_logprobs_backward));
  m.impl("policy_loss", TORCH_BOX(&policy_loss));
  m.impl("scale_", TORCH_BOX(&scale_));
}

}  // namespace bupo
