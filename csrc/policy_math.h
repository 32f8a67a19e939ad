// The policy loss of one token, as plain functions for host and device: the one table of losses.
//
// A loss is a function of the token's log-prob and of a log-ratio L = log pi / pi_old, which is the
// token's own or that of its sequence. policy_token() gives its derivatives in both; what an L of a
// sequence is made of, and how its derivative comes back to the tokens, is in the section below.
// bupo/ops/policy_losses.py has the names and defaults, docs/ops.md the formulas and sources.
//
// Tests: python_tests/test_policy_loss.py, python_tests/test_every_loss.py.

#pragma once

#include "row_math.h"

namespace bupo {

enum class LossType : int { kPpo, kCispo, kSapo, kDppoTv, kDppoKl, kDro, kGmpo, kVespo, kCount };
enum class RatioLevel : int { kToken, kSequence, kSequenceToken, kSequenceSum, kCount };
enum class KlEstimator : int { kK1, kK2, kK3, kAbs, kCount };

// Limits are infinite when off.
struct PolicySettings {
  LossType loss_type;
  RatioLevel ratio_level;
  double options[4];  // of the loss type, see policy_token()
  double max_log_ratio;
  double kl_coef;
  KlEstimator kl_estimator;
  bool kl_straight_through, kl_times_ratio;
  double max_kl;
  double entropy_coef;
  bool has_reference;

  BUPO_HOST_DEVICE bool of_sequences() const { return ratio_level != RatioLevel::kToken; }
  // Whether a token may have a gradient though its advantage (or its sequence's) is 0.
  bool without_advantage() const {
    return entropy_coef != 0 || kl_coef != 0 || loss_type == LossType::kDro;
  }
};

template <class T>
struct PolicyInput {
  T logprob, old_logprob, advantage, ref_logprob, importance;
};

enum class Clip : int { kNone, kLow, kHigh, kDual };

// One token's loss before its weight and without the entropy term.
template <class T>
struct PolicyToken {
  T loss;
  T on_ratio;    // d loss / d L
  T on_logprob;  // d loss / d logprob at a fixed L
  T ratio;       // e^L
  T log_ratio;   // the token's own
  T kl;
  Clip clip;
};

template <class T>
BUPO_HOST_DEVICE inline T limited(T x, double limit) {
  return x > T(limit) ? T(limit) : (x < T(-limit) ? T(-limit) : x);
}

// The KL estimate against the reference and its derivative in the log-prob.
template <class T>
BUPO_HOST_DEVICE inline void estimate_kl(const PolicySettings& s, T gap, T& kl, T& slope) {
  switch (s.kl_estimator) {
    case KlEstimator::kK1:
      kl = -gap, slope = T(1);
      break;
    case KlEstimator::kK2:
      kl = gap * gap / 2, slope = -gap;
      break;
    case KlEstimator::kK3:
      kl = std::expm1(gap) - gap, slope = -std::expm1(gap);
      break;
    default:
      kl = gap < T(0) ? -gap : gap, slope = T(gap < T(0)) - T(gap > T(0));
  }
  if (kl > T(s.max_kl) || kl < T(-s.max_kl)) kl = limited(kl, s.max_kl), slope = T(0);
  if (s.kl_straight_through) slope = -gap;  // k2's
}

// What a token adds to the L of its sequence, and whether that moves with its log-prob.
template <class T>
struct RatioPart {
  T value;
  bool moves;
};
template <class T>
BUPO_HOST_DEVICE inline RatioPart<T> ratio_part(const PolicySettings& s, const PolicyInput<T>& in) {
  const T log_ratio = in.logprob - in.old_logprob, a = in.advantage;
  if (s.loss_type != LossType::kGmpo) return {log_ratio, true};
  if (a > T(0) && log_ratio > T(s.options[1])) return {T(s.options[1]), false};
  if (a < T(0) && log_ratio < T(-s.options[0])) return {T(-s.options[0]), false};
  return {a == T(0) ? T(0) : log_ratio, a != T(0)};
}

template <class T>
BUPO_HOST_DEVICE inline PolicyToken<T> policy_token(const PolicySettings& s,
                                                    const PolicyInput<T>& in, T level_log_ratio) {
  PolicyToken<T> token{};
  token.log_ratio = limited(in.logprob - in.old_logprob, s.max_log_ratio);
  const T log_ratio = limited(level_log_ratio, s.max_log_ratio);
  const bool held = log_ratio != level_log_ratio && level_log_ratio == level_log_ratio;
  const T r = token.ratio = std::exp(log_ratio), a = in.advantage, logp = in.logprob;
  const double* o = s.options;
  const bool moves = a != T(0) || r != r;  // 0 * inf must give 0
  if (!moves && s.loss_type != LossType::kDro) {
    token.clip = s.loss_type == LossType::kCispo && r > T(o[1])   ? Clip::kHigh
                 : s.loss_type == LossType::kCispo && r < T(o[0]) ? Clip::kLow
                                                                  : Clip::kNone;
  } else {
    switch (s.loss_type) {
      case LossType::kPpo: {  // options: clip_low, clip_high, dual_clip
        // max(-r a, -clip(r) a): the gradient flows where the first is picked, and at a tie.
        const T low = T(1 - o[0]), high = T(1 + o[1]), dual = T(o[2]);
        if (a > T(0) && r > high) token.clip = Clip::kHigh;
        if (a < T(0) && r < low) token.clip = Clip::kLow;
        const bool clipped = token.clip != Clip::kNone;
        token.loss = -(clipped ? (r > high ? high : low) : r) * a;
        token.on_ratio = clipped || held ? T(0) : -r * a;
        if (a < T(0) && r >= dual) {
          token.loss = -dual * a;
          token.on_ratio = r == dual ? token.on_ratio / 2 : T(0);  // as torch.minimum at a tie
          token.clip = Clip::kDual;
        }
        if (held && token.clip == Clip::kNone)
          token.clip = log_ratio > T(0) ? Clip::kHigh : Clip::kLow;
        break;
      }
      case LossType::kCispo: {  // options: ratio_min, ratio_max
        const T low = T(o[0]), high = T(o[1]);
        if (r > high) token.clip = Clip::kHigh;
        if (r < low) token.clip = Clip::kLow;
        token.on_logprob = -(r > high ? high : (r < low ? low : r)) * a;
        token.loss = token.on_logprob * logp;
        break;
      }
      case LossType::kSapo: {  // options: temperature_positive, temperature_negative
        const T heat = a > T(0) ? T(o[0]) : T(o[1]);
        const T gate = T(1) / (T(1) + std::exp(-heat * (r - T(1))));
        token.loss = -gate * 4 / heat * a;
        token.on_ratio = held || gate == T(1) ? T(0) : -4 * gate * (T(1) - gate) * r * a;
        break;
      }
      case LossType::kDppoTv:
      case LossType::kDppoKl: {  // options: divergence_low, divergence_high, ratio_max
        const T p = std::exp(logp), q = std::exp(in.old_logprob);
        bool blocked = a > T(0) ? p - q > T(o[1]) : q - p > T(o[0]);
        if (s.loss_type == LossType::kDppoKl) {
          const T kl = q * (in.old_logprob - logp) +
                       (T(1) - q) * std::log((T(1) - q + T(1e-8)) / (T(1) - p + T(1e-8)));
          blocked = a > T(0) ? kl > T(o[1]) && p > q : kl > T(o[0]) && p < q;
        }
        if (r > T(o[2])) token.clip = Clip::kDual;
        if (blocked) token.clip = a > T(0) ? Clip::kHigh : Clip::kLow;
        token.on_logprob = blocked ? T(0) : -(r > T(o[2]) ? T(o[2]) : r) * a;
        token.loss = blocked ? T(0) : token.on_logprob * logp;
        break;
      }
      case LossType::kDro: {  // option: beta
        token.loss = (a == T(0) ? T(0) : -a * logp) + T(o[0]) / 2 * log_ratio * log_ratio;
        token.on_logprob = -a;
        token.on_ratio = held ? T(0) : T(o[0]) * log_ratio;
        break;
      }
      case LossType::kGmpo: {  // options: log_clip_low, log_clip_high
        if (!ratio_part(s, in).moves) token.clip = a > T(0) ? Clip::kHigh : Clip::kLow;
        token.loss = -r * a;
        token.on_ratio = held ? T(0) : -r * a;
        break;
      }
      default: {  // kVespo; options: k_positive, lambda_positive, k_negative, lambda_negative
        const T k = a < T(0) ? T(o[2]) : T(o[0]), lambda = a < T(0) ? T(o[3]) : T(o[1]);
        const T phi = std::exp(lambda + k * log_ratio - lambda * r);
        const bool overflows = phi != phi && log_ratio == log_ratio;
        token.on_logprob = overflows ? T(0) : -phi * a;
        token.loss = token.on_logprob * logp;
      }
    }
  }
  token.loss *= in.importance;
  token.on_ratio *= in.importance;
  token.on_logprob *= in.importance;
  T slope = 0;
  if (s.has_reference) estimate_kl(s, in.ref_logprob - logp, token.kl, slope);
  if (s.kl_coef != 0) {
    const T factor = T(s.kl_coef) * (s.kl_times_ratio ? r : T(1));
    token.loss += factor * token.kl;
    token.on_logprob += factor * slope;
    if (s.kl_times_ratio && !held) token.on_ratio += factor * token.kl;
  }
  return token;
}

// ---- Sequences. With n tokens of weight, L = sum_i part_i / n, or the sum itself.

// Over the tokens of a sequence that have weight.
struct SequenceSums {
  double log_ratio = 0, count = 0, on_ratio = 0;  // the last: sum of weight * d loss / d L

  BUPO_HOST_DEVICE double divisor(const PolicySettings& s) const {
    return s.ratio_level == RatioLevel::kSequenceSum || count == 0 ? 1.0 : count;
  }
};

// A token's coefficient: d (sum of weighted losses) / d logprob.
BUPO_HOST_DEVICE inline double coefficient(const PolicySettings& s, const PolicyToken<double>& t,
                                           double weight, const PolicyInput<double>& in,
                                           const SequenceSums& sequence) {
  if (s.ratio_level == RatioLevel::kToken || s.ratio_level == RatioLevel::kSequenceToken)
    return weight * (t.on_logprob + t.on_ratio);
  const double of_sequence = ratio_part(s, in).moves ? sequence.on_ratio / sequence.divisor(s) : 0;
  return weight * t.on_logprob + of_sequence;
}

// In the order of METRICS in bupo/ops/policy_losses.py.
inline constexpr int kPolicyMetrics = 11;

// Over the tokens with weight. The largest ratio is nan if one of them is.
struct PolicySums {
  double loss = 0, low = 0, high = 0, dual = 0, ratio = 0, largest = 0, k3 = 0, k1 = 0, kl = 0,
         entropy = 0, live = 0, included = 0;

  BUPO_HOST_DEVICE void add(const PolicyToken<double>& t, double loss_with_weight,
                            double its_entropy, bool is_live) {
    merge({loss_with_weight, double(t.clip == Clip::kLow), double(t.clip == Clip::kHigh),
           double(t.clip == Clip::kDual), t.ratio, t.ratio, std::expm1(t.log_ratio) - t.log_ratio,
           -t.log_ratio, t.kl, its_entropy, double(is_live), 1});
  }
  BUPO_HOST_DEVICE void merge(const PolicySums& o) {
    loss += o.loss;
    low += o.low;
    high += o.high;
    dual += o.dual;
    ratio += o.ratio;
    if (o.largest > largest || o.largest != o.largest) largest = o.largest;
    k3 += o.k3;
    k1 += o.k1;
    kl += o.kl;
    entropy += o.entropy;
    live += o.live;
    included += o.included;
  }
  template <class T>
  BUPO_HOST_DEVICE void write(long long tokens, T* loss_out, T* metrics) const {
    const double n = included > 1 ? included : 1, all = tokens > 1 ? double(tokens) : 1;
    const double values[kPolicyMetrics] = {(low + high + dual) / n,
                                           ratio / n,
                                           largest,
                                           k3 / n,
                                           entropy / n,
                                           live / all,
                                           low / n,
                                           high / n,
                                           dual / n,
                                           k1 / n,
                                           kl / n};
    *loss_out = T(loss);
    for (int m = 0; m < kPolicyMetrics; ++m) metrics[m] = T(values[m]);
  }
};

}  // namespace bupo
