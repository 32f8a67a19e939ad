// Checks of what reaches the operators, shared by the backends. The Python wrappers check first and
// word errors for users; these keep a direct call of torch.ops.bupo.* memory-safe.
// std::invalid_argument becomes ValueError in Python.

#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

namespace bupo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

// What torch's stable interface says of a failure is a status; from torch 2.13 on it also keeps the
// message, before that it has printed it.
[[noreturn]] inline void throw_torch_error(const std::string& what) {
  using Reason = const char* (*)();
  static const auto reason =
      reinterpret_cast<Reason>(dlsym(RTLD_DEFAULT, "torch_exception_get_what_without_backtrace"));
  throw std::runtime_error("bupo.ops: " + what + ": " +
                           (reason ? reason() : "torch has printed the reason above"));
}

inline std::string shape_of(torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  std::ostringstream text;
  text << '[';
  for (size_t d = 0; d < sizes.size(); ++d) text << (d ? ", " : "") << sizes[d];
  text << ']';
  return text.str();
}
inline std::string shape_of(const Tensor& t) { return shape_of(t.sizes()); }

inline void check_vector(const char* op, const char* name, const Tensor& t, int64_t size,
                         ScalarType dtype) {
  require(t.dim() == 1 && t.size(0) == size && t.is_contiguous(), op, ": ", name,
          " must be contiguous of shape [", size, "], got ", shape_of(t));
  require(t.scalar_type() == dtype, op, ": ", name, " has the wrong dtype");
}

inline void check_matrix(const char* op, const char* name, const Tensor& t) {
  require(t.dim() == 2 && (t.size(1) <= 1 || t.stride(1) == 1), op, ": ", name,
          " must be a matrix with inner stride 1, got ", shape_of(t));
}

// Targets of the tokens that `included` selects must name a vocabulary entry.
template <class Included>
void check_targets(const char* op, const int64_t* targets, int64_t count, int64_t vocab,
                   const Included& included) {
  for (int64_t i = 0; i < count; ++i)
    require(!included(i) || (targets[i] >= 0 && targets[i] < vocab), op, ": targets.flatten()[", i,
            "] must be in [0, ", vocab, ") unless it is excluded, got ", targets[i]);
}

}  // namespace bupo
