// Memory of a call, handed out front to back.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <stdexcept>

#include "../operands.h"
#include "choose.h"

namespace bupo::cuda {

// Pieces of one block of memory. Without a block it only counts: what a layout takes is found by
// laying it out.
class Slab {
 public:
  static constexpr int64_t kAlignment = 256;

  Slab() = default;
  Slab(void* begin, int64_t bytes) : begin_(static_cast<char*>(begin)), bytes_(bytes) {}

  template <class T>
  T* take(int64_t count) {
    return static_cast<T*>(bytes(count * static_cast<int64_t>(sizeof(T))));
  }
  void* bytes(int64_t count) {
    const int64_t at = used_;
    used_ += round_up(count, kAlignment);
    if (begin_ == nullptr) return nullptr;
    if (used_ > bytes_) throw std::logic_error("bupo.ops: the workspace was planned too small");
    return begin_ + at;
  }
  int64_t used() const { return used_; }

 private:
  char* begin_ = nullptr;
  int64_t bytes_ = 0, used_ = 0;
};

// A Slab with memory of its own.
class Workspace : public Slab {
 public:
  Workspace(const torch::stable::Tensor& like, int64_t bytes)
      : Workspace(bytes, make_uninitialised(like, {bytes}, ScalarType::Byte)) {}

 private:
  Workspace(int64_t bytes, const torch::stable::Tensor& memory)
      : Slab(memory.mutable_data_ptr(), bytes), memory_(memory) {}
  torch::stable::Tensor memory_;
};

// Entry i of an array that may be null.
template <class T>
const T* at(const void* array, int64_t i) {
  return array ? static_cast<const T*>(array) + i : nullptr;
}

}  // namespace bupo::cuda
