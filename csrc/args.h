// Plain structs handed to the kernels: pointers, sizes, strides in elements. No torch types.

#pragma once

#include <cstdint>

#include "divergence_math.h"
#include "policy_math.h"

namespace bupo {

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// The LM head on N tokens: z[i, j] = softcap(<hidden_i, weight_j> + bias_j) / temperature_i.
struct HeadArgs {
  const void* hidden;       // [N, D], inner stride 1
  const void* weight;       // [V, D], inner stride 1
  const void* bias;         // [V] contiguous, dtype of weight, or null
  const void* temperature;  // [N] in the accumulator type, or null for 1
  const int64_t* targets;   // [N]; null in lm_head_divergence
  int64_t tokens, width, vocab;
  int64_t hidden_stride, weight_stride;
  double softcap;  // 0: none
};

// Gradients that the caller wants; null where it does not. dtypes are those of the inputs.
struct GradArgs {
  void* hidden;  // [N, D] contiguous, zeroed by the caller
  void* weight;  // [V, D] contiguous
  void* bias;    // [V] contiguous

  bool any() const { return hidden != nullptr || weight != nullptr || bias != nullptr; }
};

// Per-token results in the accumulator type (double for float64 input, float otherwise), zeroed by
// the caller.
struct TokenOutputs {
  void* logprobs;
  void* entropy;
  void* logsumexp;         // null in policy_loss
  void* losses = nullptr;  // in policy_loss: of each token, less weight and entropy term
};

// Gradients of every token's log-prob, entropy and logsumexp, [N] in the accumulator type; null
// where there is none.
struct Coefficients {
  const void *on_logprob, *on_entropy, *on_logsumexp;
};

// Inputs of the policy loss, [N] in the accumulator type; null where optional and not given.
struct PolicyArgs {
  PolicySettings settings;
  const int64_t* sequence_ids;  // null at token level; ascending
  const void* old_logprobs;     // null: the call's own
  const void* advantages;
  const void* token_weights;
  const void* ref_logprobs;
  const void* importance_weights;
  const void* entropy_weights;  // null: token_weights
};

// Two heads on the same tokens and the same vocabulary, without targets.
struct DivergenceArgs {
  HeadArgs student, teacher;
  DivergenceKind kind;
  double beta;                // of kJsd
  const void* token_weights;  // [N] in the accumulator type
};

}  // namespace bupo
