// The operators on the CPU: values are checked, and nothing is kept for the backward, which makes
// the logits again in its cache.

#include <cmath>

#include "../operators.h"
#include "divergence.h"
#include "lm_head.h"

namespace bupo {
namespace {

struct Cpu {
  static constexpr bool kKeeps = false;
  static constexpr auto kDtypes = {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16};
  struct Guard {
    explicit Guard(int32_t) {}
  };

  Cpu(const Tensor&, const Inputs& inputs) : in(inputs) {}

  // The values that the tokens selected by `included` may hold; other tokens may hold anything.
  template <class Included>
  void check_tokens(const char* op, const Included& included) const {
    if (in.args.targets)
      check_targets(op, in.args.targets, in.args.tokens, in.args.vocab, included);
    for (int64_t i = 0; in.args.temperature && i < in.args.tokens; ++i) {
      const double t = in.value(in.args.temperature, i);
      const bool invertible = in.acc == ScalarType::Double || std::isfinite(float(1 / t));
      require(!included(i) || (t > 0 && std::isfinite(t) && invertible), op,
              ": temperature.flatten()[", i, "] must be positive and finite, got ", t);
    }
  }

  void check_sequences(const char* op, const int64_t* ids) const {
    for (int64_t i = 1; ids && i < in.args.tokens; ++i)
      require(ids[i] >= ids[i - 1], op, ": sequence_ids.flatten()[", i,
              "] must not be below the one before it, ", ids[i - 1], ", got ", ids[i]);
  }

  int64_t bytes_to_keep() const { return 0; }
  void lm_head_logprobs(int64_t ignore_index, const TokenOutputs& out, void*) const {
    cpu::lm_head_logprobs(in.dtype, in.args, ignore_index, out);
  }
  void lm_head_logprobs_backward(int64_t ignore_index, const Coefficients& upstream,
                                 const GradArgs& grads, void*, int64_t) const {
    cpu::lm_head_logprobs_backward(in.dtype, in.args, ignore_index, upstream, grads);
  }
  void policy_loss(const PolicyArgs& policy, const TokenOutputs& out, const GradArgs& grads,
                   void* loss, void* metrics) const {
    cpu::policy_loss(in.dtype, in.args, policy, out, grads, loss, metrics);
  }

  void lm_head_divergence(const Cpu&, const DivergenceArgs& args, const GradArgs& student,
                          const GradArgs& teacher, void* divergence, void* loss) const {
    cpu::lm_head_divergence(in.dtype, args, student, teacher, divergence);
    double total = 0;
    for (int64_t i = 0; i < in.args.tokens; ++i)
      if (const double weight = in.value(args.token_weights, i); weight != 0)
        total += weight * in.value(divergence, i);
    if (in.acc == ScalarType::Double) {
      *static_cast<double*>(loss) = total;
    } else {
      *static_cast<float*>(loss) = static_cast<float>(total);
    }
  }

  const Inputs& in;
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bupo, CPU, m) {
  m.impl("lm_head_logprobs", TORCH_BOX(&Operators<Cpu>::lm_head_logprobs));
  m.impl("lm_head_logprobs_backward", TORCH_BOX(&Operators<Cpu>::lm_head_logprobs_backward));
  m.impl("policy_loss", TORCH_BOX(&Operators<Cpu>::policy_loss));
  m.impl("lm_head_divergence", TORCH_BOX(&Operators<Cpu>::lm_head_divergence));
}

}  // namespace bupo
