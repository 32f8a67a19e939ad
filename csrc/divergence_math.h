// What one entry of the vocabulary contributes to the divergence of two rows, teacher p and student
// q, and to its gradients. One text for scalars (CUDA) and vectors (CPU).
//
//   KL(a || m) = sum_j a_j f(log m_j - log a_j),  f(d) = e^d - d - 1
//
// This form sums terms that are not negative, so that nothing cancels where a and m are close; and
// an error common to all log m_j, as of its logsumexp, has only its square in the result. With
// x_j = q_j g_j, g_j = d divergence / d q_j up to a constant, d divergence / d z_j = x_j - q_j sum
// x.

#pragma once

#include "row_math.h"

namespace bupo {

enum class DivergenceKind : int { kForwardKl, kReverseKl, kJsd, kCount };

template <class V>
struct DivergenceTerms {
  V divergence;
  V student, teacher;  // x_j in the logits of each
};

// a f(d) = m - a - a d for a, m = a e^d and d = log m - log a; m where a is 0, whatever d is.
template <class T, class V>
BUPO_HOST_DEVICE inline V kl_term(V a, V m, V d) {
  constexpr int kTerms = sizeof(T) == 4 ? 8 : 14;
  V series = V{} + T(1);  // 2 (e^d - 1 - d) / d^2 = 1 + d/3 (1 + d/4 (1 + ...))
#ifndef __CUDACC__
#pragma GCC unroll 16
#endif
  for (int k = kTerms; k > 2; --k) series = T(1) + d * series * (T(1) / T(k));
  const V small = a * (d * d) * series * T(0.5), plain = m - a - a * d;
  const V near = (d < T(0.25)) & (d > T(-0.25)) ? small : plain;
  return a == V{} ? m : near;
}

// lp, lq: log p_j and log q_j; Math has exp_nonpositive and log1p of V.
template <DivergenceKind kKind, class Math, class T, class V>
BUPO_HOST_DEVICE inline DivergenceTerms<V> divergence_terms(V lp, V lq, V p, V q, T beta) {
  const V d = lq - lp;
  if constexpr (kKind == DivergenceKind::kForwardKl) {
    return {kl_term<T>(p, q, d), -p, p == V{} ? V{} : -p * d};
  } else if constexpr (kKind == DivergenceKind::kReverseKl) {
    return {kl_term<T>(q, p, -d), q == V{} ? V{} : q * d, -q};
  } else {
    // log m of m = beta p + (1 - beta) q, less the larger of lp and lq, and less the smaller one.
    const V gap = d < V{} ? -d : d;
    const V one = V{} + T(1), share = d > V{} ? V{} + beta : one - beta;
    const V above = Math::log1p(share * (Math::exp_nonpositive(-gap) - one)), below = above + gap;
    const V less_p = d > V{} ? below : above, less_q = d > V{} ? above : below;
    const V m = beta * p + (T(1) - beta) * q;
    const V of_p = kl_term<T>(p, m, less_p), of_q = kl_term<T>(q, m, less_q);
    return {beta * of_p + (T(1) - beta) * of_q, q == V{} ? V{} : (beta - T(1)) * q * less_q,
            p == V{} ? V{} : -beta * p * less_p};
  }
}

}  // namespace bupo
