// The LM-head ops on a GPU, on device pointers. Per-token arrays are fp32.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "../args.h"
#include "choose.h"
#include "launch.h"
#include "library.h"

namespace bupo::cuda {

// One call of an operator. `like` is a tensor of it: its device, its allocator.
struct Call {
  const torch::stable::Tensor& like;
  Device device;
  Number number;
  HeadArgs head;

  Shape shape(const GradArgs& grads) const {
    return {head.tokens,
            head.width,
            head.vocab,
            bytes_of(number),
            grads.any(),
            grads.weight != nullptr,
            number == Number::kFloat16};
  }
};

// As in cpu/lm_head.h, without checks of values: a target out of range gives nan.
//
// kept: what the forward leaves for its backward, kept_bytes() of memory, so that the product with
// the vocabulary is not made again; null where nothing is kept.
int64_t kept_bytes(const Call& call);
bool may_be_kept(const Call& call, int64_t bytes);  // by either path
void lm_head_logprobs(const Call& call, int64_t ignore_index, const TokenOutputs& out, void* kept);
void lm_head_logprobs_backward(const Call& call, int64_t ignore_index, const TokenGrads& upstream,
                               const GradArgs& grads, void* kept, int64_t bytes_kept);
void policy_loss(const Call& call, const PolicyArgs& policy, const TokenOutputs& out,
                 const GradArgs& grads, void* loss, void* metrics);

// Whether TMA can read rows of 16-bit numbers. The emulator reads any, so that its tests reach the
// Hopper path with narrow heads.
inline bool rows_readable(const void* data, int64_t width, int64_t stride) {
#ifdef BUPO_EMULATED
  constexpr int64_t kElements = 1;
#else
  constexpr int64_t kElements = 8;
#endif
  return reinterpret_cast<uintptr_t>(data) % (2 * kElements) == 0 && width % kElements == 0 &&
         stride % kElements == 0 && stride >= width;  // overlapping rows have no tensor map
}

// The two paths; which one serves a call is choose.h's to say.
namespace portable {
int64_t kept_bytes(const Call& call);
void lm_head_logprobs(const Call& call, int64_t ignore_index, const TokenOutputs& out, void* kept);
void lm_head_logprobs_backward(const Call& call, int64_t ignore_index, const Coefficients& upstream,
                               const GradArgs& grads, void* kept);
}  // namespace portable

namespace sm90 {
int64_t kept_bytes(const Call& call);
void lm_head_logprobs(const Call& call, int64_t ignore_index, const TokenOutputs& out, void* kept);
void lm_head_logprobs_backward(const Call& call, int64_t ignore_index, const Coefficients& upstream,
                               const GradArgs& grads, void* kept);
}  // namespace sm90

// The policy loss as a path sees it: the rows' arrays, and where to put d loss / d logprob and
// d loss / d entropy of a block of rows whose log-probs have just been written.
class PolicyCoefficients {
 public:
  PolicyCoefficients(const Call& call, const PolicyArgs& policy, const TokenOutputs& out,
                     float* on_logprob, float* on_entropy)
      : device_(call.device),
        policy_(policy),
        out_(out),
        logprob_(on_logprob),
        entropy_(on_entropy) {}

  PolicyRows rows(int64_t first, int64_t count) const;
  // Of rows [first, first + count), made now.
  Coefficients make(int64_t first, int64_t count) const;
  // token_weights bound the coefficients up to advantages of ordinary size.
  Coefficients bounds() const;
  const PolicyArgs& policy() const { return policy_; }

 private:
  Device device_;
  PolicyArgs policy_;
  TokenOutputs out_;
  float *logprob_, *entropy_;
};

namespace portable {
void policy_loss(const Call& call, const PolicyCoefficients& policy, const TokenOutputs& out,
                 const GradArgs& grads);
}
namespace sm90 {
void policy_loss(const Call& call, const PolicyCoefficients& policy, const TokenOutputs& out,
                 const GradArgs& grads);
}

}  // namespace bupo::cuda
