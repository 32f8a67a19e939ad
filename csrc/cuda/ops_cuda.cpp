// The operators on a GPU. Values are not read on the host: a target out of range gives nan, never a
// wild read.

#include <torch/csrc/stable/accelerator.h>

#include <platform.cuh>

#include "../operators.h"
#include "divergence.h"
#include "lm_head.h"

namespace bupo {
namespace {

cuda::Number number_of(ScalarType dtype) {
  return dtype == ScalarType::Float      ? cuda::Number::kFloat
         : dtype == ScalarType::BFloat16 ? cuda::Number::kBfloat16
                                         : cuda::Number::kFloat16;
}

struct Cuda {
  static constexpr bool kKeeps = true;  // what does not fit is made again
  static constexpr auto kDtypes = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};
  using Guard = torch::stable::accelerator::DeviceGuard;

  Cuda(const Tensor& hidden, const Inputs& in)
      : call{hidden, cuda::current_device(hidden), number_of(in.dtype), in.args},
        path(path_of(call)) {}

  template <class Included>
  void check_tokens(const char*, const Included&) const {}
  void check_sequences(const char*, const int64_t*) const {}

  // Nothing where that is over the budget, while a CUDA graph is recorded, or without a token.
  int64_t bytes_to_keep() const {
    if (call.device.capturing || call.head.tokens == 0) return 0;
    const int64_t bytes = kept_bytes(path, call);
    return bytes <= workspace_budget(call.device) ? bytes : 0;
  }
  void lm_head_logprobs(int64_t ignore_index, const TokenOutputs& out, void* kept) const {
    cuda::lm_head_logprobs(path, call, ignore_index, out, kept);
  }
  void lm_head_logprobs_backward(int64_t ignore_index, const Coefficients& upstream,
                                 const GradArgs& grads, void* kept, int64_t bytes) const {
    // A saved weight may come back at another address (hooks that offload it), on the other path.
    if (bytes != kept_bytes(path, call)) kept = nullptr;
    cuda::lm_head_logprobs_backward(path, call, ignore_index, upstream, grads, kept);
  }
  void policy_loss(const PolicyArgs& policy, const TokenOutputs& out, const GradArgs& grads,
                   void* loss, void* metrics) const {
    cuda::policy_loss(path, call, policy, out, grads, loss, metrics);
  }

  void lm_head_divergence(const Cuda& teacher, const DivergenceArgs& args, const GradArgs& student,
                          const GradArgs& its, void* divergence, void* loss) const {
    cuda::lm_head_divergence(call, teacher.call, args, student, its,
                             static_cast<float*>(divergence), static_cast<float*>(loss));
  }

  cuda::Call call;
  const cuda::Path& path;
};

// gradient *= scale, which the host does not read.
void scale_(Tensor gradient, Tensor scale) {
  const Cuda::Guard guard(gradient.get_device());
  require(
      gradient.is_contiguous() && scale.numel() == 1 && scale.scalar_type() == ScalarType::Float,
      "bupo.ops.scale_: expected a contiguous gradient and a float32 scalar");
  cuda::check(cuda::launch_scale(number_of(gradient.scalar_type()), gradient.mutable_data_ptr(),
                                 static_cast<const float*>(data(scale)), gradient.numel(),
                                 cuda::current_device(gradient).stream));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bupo, BUPO_DISPATCH_KEY, m) {
  m.impl("lm_head_logprobs", TORCH_BOX(&Operators<Cuda>::lm_head_logprobs));
  m.impl("lm_head_logprobs_backward", TORCH_BOX(&Operators<Cuda>::lm_head_logprobs_backward));
  m.impl("policy_loss", TORCH_BOX(&Operators<Cuda>::policy_loss));
  m.impl("lm_head_divergence", TORCH_BOX(&Operators<Cuda>::lm_head_divergence));
  m.impl("scale_", TORCH_BOX(&scale_));
}

}  // namespace bupo
