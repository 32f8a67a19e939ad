// What one token's row of logits contributes, as plain functions for host and device.
//
// A row z[0..V) is reduced in tiles. Each tile leaves RowSums relative to its own maximum, with the
// target's entry left out; tiles are merged in a fixed order; finish_row() adds the target. Leaving
// the target out keeps 1 - p_t (and a log-prob close to 0) accurate when p_t rounds to 1.
//
// Tests: python_tests/test_lm_head.py, python_tests/test_policy_loss.py (three-way, float64 truth).

#pragma once

#include <cmath>

#ifdef __CUDACC__
#define BUPO_HOST_DEVICE __host__ __device__
#else
#define BUPO_HOST_DEVICE
#endif

namespace bupo {

// sum = sum_j e^{z_j - max}, dot = sum_j e^{z_j - max} (z_j - max), over the entries j seen so far.
template <class T>
struct RowSums {
  T max = -T(INFINITY);
  T sum = 0;
  T dot = 0;
};

// a := a followed by b. A part without mass (every logit -inf) changes nothing; nan spreads.
template <class T, class U>
BUPO_HOST_DEVICE inline void merge(RowSums<T>& a, const RowSums<U>& b) {
  if (b.sum == U(0)) return;
  if (a.sum == T(0)) {
    a = {T(b.max), T(b.sum), T(b.dot)};
    return;
  }
  const T max = a.max > T(b.max) ? a.max : T(b.max);
  const T scale_a = std::exp(a.max - max);
  const T scale_b = std::exp(T(b.max) - max);
  a.dot = scale_a * (a.dot + a.sum * (a.max - max)) +
          scale_b * (T(b.dot) + T(b.sum) * (T(b.max) - max));
  a.sum = scale_a * a.sum + scale_b * T(b.sum);
  a.max = max;
}

// Everything that later steps need of a row. Logits enter them as d_j = z_j - max, so that an
// offset common to the row never costs precision:
//   p_j = e^{d_j - log_total},  H = log_total - mean,  z_j - sum_k p_k z_k = d_j - mean.
template <class T>
struct Row {
  T max, log_total, mean;
  T target;       // d_t
  T target_prob;  // p_t
  T target_rest;  // 1 - p_t
  T logprob, entropy, logsumexp;
};

BUPO_HOST_DEVICE inline Row<float> in_float(const Row<double>& r) {
  return {float(r.max),     float(r.log_total),   float(r.mean),
          float(r.target),  float(r.target_prob), float(r.target_rest),
          float(r.logprob), float(r.entropy),     float(r.logsumexp)};
}

template <class T>
BUPO_HOST_DEVICE inline Row<T> finish_row(RowSums<T> others, T target_logit, long long vocab) {
  const T inf = T(INFINITY);
  Row<T> row;
  const bool target_is_max = !(others.sum != T(0)) || target_logit >= others.max;
  T sum = others.sum, dot = others.dot;
  row.max = target_is_max ? target_logit : others.max;
  if (target_is_max && sum != T(0)) {
    const T shift = others.max - row.max;
    const T scale = std::exp(shift);
    dot = scale == T(0) ? T(0) : scale * (dot + sum * shift);
    sum *= scale;
  }
  row.target = target_logit - row.max;  // nan when every logit of the row is -inf, as in torch
  const T e_target = std::exp(row.target);
  const T total = sum + e_target;
  if (row.target > -inf || row.target != row.target) dot += e_target * row.target;
  row.log_total = target_is_max ? std::log1p(sum) : std::log(total);
  row.mean = dot / total;
  row.target_prob = e_target / total;
  row.target_rest = sum / total;
  row.logprob = row.target - row.log_total;
  row.entropy = row.log_total - row.mean;
  const T bound = std::log(T(vocab));
  if (row.entropy < T(0)) row.entropy = T(0);
  if (row.entropy > bound) row.entropy = bound;
  row.logsumexp = row.max + row.log_total;
  return row;
}

// Gradients of one token's log-prob, entropy and logsumexp.
template <class T>
struct Coefficient {
  T on_logprob, on_entropy, on_logsumexp;
  BUPO_HOST_DEVICE bool is_live() const {  // nan is
    return !(on_logprob == T(0) && on_entropy == T(0) && on_logsumexp == T(0));
  }
};

// dz_t of the target, less the temperature.
template <class T>
BUPO_HOST_DEVICE inline T target_gradient(const Row<T>& row, const Coefficient<T>& c) {
  const T dz = c.on_logprob * row.target_rest + c.on_logsumexp * row.target_prob;
  if (row.target_prob == T(0)) return dz;
  return dz - c.on_entropy * row.target_prob * (row.target - row.mean);
}

enum class LossType : int { kPpo = 0, kCispo = 1 };
enum class KlEstimator : int { kK1 = 0, kK2 = 1, kK3 = 2 };

// Settings of the per-token loss; dual_clip and max_log_ratio are infinite when off.
struct PolicySettings {
  double clip_low, clip_high, dual_clip;
  LossType loss_type;
  double kl_coef;
  KlEstimator kl_estimator;
  double entropy_coef;
  double max_log_ratio;
};

// One token's loss before its weight, and the derivatives that the gradient needs.
template <class T>
struct PolicyToken {
  T loss;
  T d_logprob;
  T d_entropy;
  T ratio, log_ratio;
  bool clipped;
};

template <class T>
BUPO_HOST_DEVICE inline PolicyToken<T> policy_token(const PolicySettings& s, T logprob, T entropy,
                                                    T old_logprob, T advantage, T ref_logprob,
                                                    T importance) {
  PolicyToken<T> token;
  token.log_ratio = logprob - old_logprob;
  const T limit = T(s.max_log_ratio);
  const bool limited = token.log_ratio > limit || token.log_ratio < -limit;
  if (limited) token.log_ratio = token.log_ratio > limit ? limit : -limit;
  token.ratio = std::exp(token.log_ratio);
  const T low = T(1 - s.clip_low), high = T(1 + s.clip_high), dual = T(s.dual_clip);
  const T r = token.ratio, a = advantage;
  T loss, slope;  // slope = d loss / d logprob
  if (s.loss_type == LossType::kCispo) {
    const T bounded = r > high ? high : r;
    token.clipped = r > high;
    loss = -bounded * a * logprob;
    slope = -bounded * a;
  } else {
    // max(-r a, -clip(r) a): the gradient flows where the first is picked, and at a tie.
    token.clipped = (a > T(0) && r > high) || (a < T(0) && r < low);
    const T bounded = r > high ? high : (r < low ? low : r);
    loss = token.clipped ? -bounded * a : -r * a;
    slope = token.clipped || limited ? T(0) : -r * a;  // a limited ratio is constant
    if (a < T(0) && r >= dual) {
      loss = -dual * a;
      slope = r == dual ? slope / 2 : T(0);  // torch.minimum halves the gradient of a tie
      token.clipped = true;
    }
    token.clipped = token.clipped || (limited && a != T(0));
  }
  if (a == T(0) && r == r) loss = slope = T(0);  // even where the ratio or log-prob is infinite
  loss *= importance;
  slope *= importance;
  if (s.kl_coef != 0) {
    const T gap = ref_logprob - logprob;
    const T beta = T(s.kl_coef);
    if (s.kl_estimator == KlEstimator::kK1) {
      loss -= beta * gap;
      slope += beta;
    } else if (s.kl_estimator == KlEstimator::kK2) {
      loss += beta * gap * gap / 2;
      slope -= beta * gap;
    } else {
      loss += beta * (std::expm1(gap) - gap);
      slope -= beta * std::expm1(gap);
    }
  }
  token.loss = loss - T(s.entropy_coef) * entropy;
  token.d_logprob = slope;
  token.d_entropy = -T(s.entropy_coef);
  return token;
}

// clip_fraction, ratio_mean, ratio_max, approx_kl, entropy_mean, live_fraction
inline constexpr int kPolicyMetrics = 6;

// Over the tokens with weight. The largest ratio is nan if one of them is.
struct PolicySums {
  double loss = 0, clipped = 0, ratio = 0, largest = 0, kl = 0, entropy = 0, live = 0, included = 0;

  BUPO_HOST_DEVICE void add(const PolicyToken<double>& t, double weight, double its_entropy,
                            bool is_live) {
    merge({weight * t.loss, double(t.clipped), t.ratio, t.ratio,
           std::expm1(t.log_ratio) - t.log_ratio, its_entropy, double(is_live), 1});
  }
  BUPO_HOST_DEVICE void merge(const PolicySums& o) {
    loss += o.loss;
    clipped += o.clipped;
    ratio += o.ratio;
    if (o.largest > largest || o.largest != o.largest) largest = o.largest;
    kl += o.kl;
    entropy += o.entropy;
    live += o.live;
    included += o.included;
  }
  template <class T>
  BUPO_HOST_DEVICE void write(long long tokens, T* loss_out, T* metrics) const {
    const double n = included > 1 ? included : 1, all = tokens > 1 ? double(tokens) : 1;
    const double values[kPolicyMetrics] = {clipped / n, ratio / n,   largest,
                                           kl / n,      entropy / n, live / all};
    *loss_out = T(loss);
    for (int m = 0; m < kPolicyMetrics; ++m) metrics[m] = T(values[m]);
  }
};

}  // namespace bupo
