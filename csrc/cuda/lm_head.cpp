// Which path serves a call, and what both need around it.

#include "lm_head.h"

#include <cstdint>

#include "../workspace.h"
#include "memory.h"

namespace bupo::cuda {
namespace {

Path path_for(const Call& call, bool entropy_gradient) {
  if (portable_only) return Path::kPortable;
  const HeadArgs& head = call.head;
  const bool aligned = rows_readable(head.weight, head.width, head.weight_stride);
  return path_of({call.device.capability, call.number == Number::kBfloat16, aligned, head.width,
                  head.vocab, head.softcap != 0, entropy_gradient});
}

}  // namespace

// A softcap's backward may be asked for the entropy, which only the portable path can do then.
int64_t kept_bytes(const Call& call) {
  const Path path = path_for(call, true);
  if (call.device.capturing || path != path_for(call, false)) return 0;
  const int64_t bytes = path == Path::kSm90 ? sm90::kept_bytes(call) : portable::kept_bytes(call);
  return bytes <= workspace_bytes ? bytes : 0;
}

bool may_be_kept(const Call& call, int64_t bytes) {
  return bytes == 0 || bytes == portable::kept_bytes(call) || bytes == sm90::kept_bytes(call);
}

void lm_head_logprobs(const Call& call, int64_t ignore_index, const TokenOutputs& out, void* kept) {
  const bool hopper = path_for(call, false) == Path::kSm90;
  (hopper ? sm90::lm_head_logprobs : portable::lm_head_logprobs)(call, ignore_index, out, kept);
}

void lm_head_logprobs_backward(const Call& call, int64_t ignore_index, const TokenGrads& upstream,
                               const GradArgs& grads, void* kept, int64_t bytes_kept) {
  const Coefficients all{at<float>(upstream.logprobs, 0), at<float>(upstream.entropy, 0),
                         at<float>(upstream.logsumexp, 0)};
  const bool hopper = path_for(call, true) == Path::kSm90;
  // A saved weight may come back at another address (hooks that offload it), on the other path.
  if (bytes_kept != (hopper ? sm90::kept_bytes : portable::kept_bytes)(call)) kept = nullptr;
  (hopper ? sm90::lm_head_logprobs_backward : portable::lm_head_logprobs_backward)(
      call, ignore_index, all, grads, kept);
}

PolicyRows PolicyCoefficients::rows(int64_t first, int64_t count) const {
  return {policy_.settings,
          at<float>(out_.logprobs, first),
          at<float>(out_.entropy, first),
          at<float>(policy_.old_logprobs, first),
          at<float>(policy_.advantages, first),
          at<float>(policy_.token_weights, first),
          at<float>(policy_.ref_logprobs, first),
          at<float>(policy_.importance_weights, first),
          count};
}

Coefficients PolicyCoefficients::make(int64_t first, int64_t count) const {
  check(launch_policy_coefficients(rows(first, count), logprob_ + first, entropy_ + first,
                                   device_.stream));
  return {logprob_ + first, entropy_ + first, nullptr};
}

Coefficients PolicyCoefficients::bounds() const {
  const float* weights = at<float>(policy_.token_weights, 0);
  return {weights, weights, nullptr};
}

void policy_loss(const Call& call, const PolicyArgs& policy, const TokenOutputs& out,
                 const GradArgs& grads, void* loss, void* metrics) {
  const int64_t tokens = call.head.tokens;
  Workspace arrays(call.like, 2 * round_up(4 * tokens, Slab::kAlignment) + Slab::kAlignment);
  float* on_logprob = arrays.take<float>(tokens);
  const PolicyCoefficients coefficients(call, policy, out, on_logprob, arrays.take<float>(tokens));
  const bool hopper = path_for(call, policy.settings.entropy_coef != 0) == Path::kSm90;
  (hopper ? sm90::policy_loss : portable::policy_loss)(call, coefficients, out, grads);
  check(launch_policy_sums(coefficients.rows(0, tokens), static_cast<float*>(loss),
                           static_cast<float*>(metrics), call.device.stream));
}

}  // namespace bupo::cuda
