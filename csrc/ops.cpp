// The table of contents of the extension: every operator schema, and nothing else.
// Shapes: hidden [N, D], weight [V, D], per-token tensors [N]; kept: bytes that a forward leaves
// for its backward, possibly none; settings: PolicySettings, in the order of its fields; needs:
// which of the last six results are wanted. csrc/cpu and csrc/cuda implement them;
// bupo/ops/registration.py adds the fake (shape) functions and the autograd formulas.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(bupo, m) {
  m.def(
      "lm_head_logprobs(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias,"
      " Tensor? temperature, float softcap, int ignore_index, bool keep)"
      " -> (Tensor logprobs, Tensor entropy, Tensor logsumexp, Tensor kept)");
  m.def(
      "lm_head_logprobs_backward(Tensor? grad_logprobs, Tensor? grad_entropy,"
      " Tensor? grad_logsumexp, Tensor hidden, Tensor weight, Tensor targets, Tensor? bias,"
      " Tensor? temperature, Tensor kept, float softcap, int ignore_index, bool need_hidden,"
      " bool need_weight, bool need_bias)"
      " -> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "policy_loss(Tensor hidden, Tensor weight, Tensor targets, Tensor? old_logprobs,"
      " Tensor advantages, Tensor token_weights, Tensor? bias, Tensor? temperature,"
      " float softcap, float[] settings, Tensor? sequence_ids, Tensor? ref_logprobs,"
      " Tensor? importance_weights, Tensor? entropy_weights,"
      " bool need_hidden, bool need_weight, bool need_bias)"
      " -> (Tensor loss, Tensor logprobs, Tensor entropy, Tensor metrics, Tensor token_losses,"
      " Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "lm_head_divergence(Tensor hidden, Tensor weight, Tensor? bias, Tensor? temperature,"
      " float softcap, Tensor teacher_hidden, Tensor teacher_weight, Tensor? teacher_bias,"
      " Tensor? teacher_temperature, float teacher_softcap, Tensor token_weights, int kind,"
      " float beta, bool[] needs)"
      " -> (Tensor loss, Tensor divergence, Tensor grad_hidden, Tensor grad_weight,"
      " Tensor grad_bias, Tensor grad_teacher_hidden, Tensor grad_teacher_weight,"
      " Tensor grad_teacher_bias)");
  m.def("scale_(Tensor(a!) gradient, Tensor scale) -> ()");
}
