// A call of an operator on device pointers, and what every path makes of it. Per-token arrays are
// fp32.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "../args.h"
#include "choose.h"
#include "launch.h"
#include "library.h"
#include "memory.h"

namespace bupo::cuda {

// `like` is a tensor of the call: its device, its allocator.
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

// Whether TMA can read rows of 16-bit numbers. Overlapping rows have no tensor map.
inline bool rows_readable(const void* data, int64_t width, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && width % 8 == 0 && stride % 8 == 0 &&
         stride >= width;
}

// Upstream gradients, or the policy loss's, from row on.
inline Coefficients from(const Coefficients& c, int64_t row) {
  return {at<float>(c.on_logprob, row), at<float>(c.on_entropy, row),
          at<float>(c.on_logsumexp, row)};
}

inline RowChoice from(const RowChoice& choice, int64_t row) {
  return {choice.targets + row, choice.ignore_index, at<float>(choice.token_weights, row)};
}

// Outputs from row on.
inline float* from(void* array, int64_t row) {
  return array ? static_cast<float*>(array) + row : nullptr;
}

// Which rows a chunk is made of, and which of them may have a gradient.
struct Rows {
  RowChoice choice;  // of the call's first row
  const float* signals[3] = {};
  bool all_store = false, only_stored = false;
  const float* old_logprobs = nullptr;
};

inline Places lay_out_places(const HeadArgs& head, int64_t capacity, Slab& slab) {
  return {slab.take<int32_t>(2), slab.take<int64_t>(capacity), slab.take<int64_t>(capacity),
          head.temperature ? slab.take<float>(capacity) : nullptr, capacity};
}

// Of rows [first, first + places.capacity).
inline ArrangeArgs arrange_args(const Call& call, const Rows& rows, int64_t first,
                                const Places& places) {
  ArrangeArgs args{
      from(rows.choice, first), places.capacity, {},          rows.all_store, rows.only_stored,
      !call.device.capturing,   places.counts,   places.order};
  for (int i = 0; i < 3; ++i) args.signals[i] = at<float>(rows.signals[i], first);
  return args;
}

inline PlaceArgs place_args(const Call& call, int64_t first, const Places& places, void* out) {
  const HeadArgs& head = call.head;
  PlaceArgs args{};
  args.hidden =
      static_cast<const char*>(head.hidden) + first * head.hidden_stride * bytes_of(call.number);
  args.hidden_stride = head.hidden_stride;
  args.width = head.width;
  args.weight = head.weight;
  args.weight_stride = head.weight_stride;
  args.vocab = head.vocab;
  args.temperature = at<float>(head.temperature, first);
  args.targets = head.targets + first;
  args.places = places;
  args.out = out;
  return args;
}

// The policy loss as a path sees it: the rows' arrays, and where to put d loss / d logprob and
// d loss / d entropy of a block of rows whose log-probs have just been written.
class PolicyCoefficients {
 public:
  PolicyCoefficients(const Call& call, const PolicyArgs& policy, const TokenOutputs& out)
      : device_(call.device),
        policy_(policy),
        logprobs_(at<float>(out.logprobs, 0)),
        entropy_(at<float>(out.entropy, 0)),
        targets_(call.head.targets),
        tokens_(call.head.tokens),
        arrays_(call.like, 2 * round_up(4 * tokens_, Slab::kAlignment)),
        on_logprob_(arrays_.take<float>(tokens_)) {
    if (policy.settings.entropy_coef != 0) on_entropy_ = arrays_.take<float>(tokens_);
  }

  // Of rows [first, first + count), made now.
  Coefficients make(int64_t first, int64_t count) const {
    check(launch_policy_coefficients({policy_, logprobs_, entropy_, first, count}, on_logprob_,
                                     on_entropy_, device_.stream));
    return from(Coefficients{on_logprob_, on_entropy_, nullptr}, first);
  }
  // token_weights bound the coefficients up to advantages of ordinary size.
  Coefficients bounds() const { return {at<float>(policy_.token_weights, 0), nullptr, nullptr}; }
  // Advantage 0 is no gradient, unless of entropy or KL.
  Rows rows() const {
    Rows rows{{targets_, 0, at<float>(policy_.token_weights, 0)},
              {at<float>(policy_.advantages, 0)}};
    rows.all_store = policy_.settings.entropy_coef != 0 || policy_.settings.kl_coef != 0;
    rows.old_logprobs = at<float>(policy_.old_logprobs, 0);
    return rows;
  }
  void sum(void* loss, void* metrics) const {
    check(launch_policy_sums({policy_, logprobs_, entropy_, 0, tokens_}, static_cast<float*>(loss),
                             static_cast<float*>(metrics), device_.stream));
  }

 private:
  Device device_;
  PolicyArgs policy_;
  const float *logprobs_, *entropy_;
  const int64_t* targets_;
  int64_t tokens_;
  Workspace arrays_;
  float *on_logprob_, *on_entropy_ = nullptr;
};

}  // namespace bupo::cuda
