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

}  // namespace bupo
