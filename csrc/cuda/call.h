// A call of an operator on device pointers, and its memory. Per-token arrays are fp32.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "../operands.h"
#include "choose.h"
#include "launch.h"
#include "library.h"

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

// Pieces of one block of memory. Without a block it only counts, and its pieces are null.
class Slab {
 public:
  explicit Slab(void* begin = nullptr) : begin_(static_cast<char*>(begin)) {}

  template <class T>
  T* take(int64_t count) {
    return static_cast<T*>(bytes(count * static_cast<int64_t>(sizeof(T))));
  }
  void* bytes(int64_t count) {
    const int64_t at = used_;
    used_ += round_up(count, 256);  // pieces begin where any access is aligned
    return begin_ ? begin_ + at : nullptr;
  }
  int64_t used() const { return used_; }

 private:
  char* begin_;
  int64_t used_ = 0;
};

// Memory for what lay_out(slab) takes, which is called twice: to count, then to take.
template <class LayOut>
Tensor make_workspace(const Tensor& like, const LayOut& lay_out) {
  Slab counting;
  lay_out(counting);
  const Tensor memory = make_uninitialised(like, {counting.used()}, ScalarType::Byte);
  Slab slab(memory.mutable_data_ptr());
  lay_out(slab);
  return memory;
}

// Entry i of an array that may be null.
template <class T>
const T* at(const void* array, int64_t i) {
  return array ? static_cast<const T*>(array) + i : nullptr;
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

}  // namespace bupo::cuda
