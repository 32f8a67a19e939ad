// How kernels read a row of logits, and which rows take part.

#pragma once

#include "../launch.h"
#include "device.cuh"

namespace bupo::cuda {

inline constexpr int kRowThreads = 256;

// body(T{}) for the type of a number.
template <class Body>
cudaError_t with_number(Number number, const Body& body) {
  if (number == Number::kFloat) return body(float{});
  if (number == Number::kBfloat16) return body(BFloat16{});
  return body(Float16{});
}

__device__ inline bool takes_part(const RowChoice& choice, int64_t row) {
  return choice.token_weights ? choice.token_weights[row] != 0.0f
                              : choice.targets[row] != choice.ignore_index;
}

// z[j] of one row.
class RowLogits {
 public:
  __device__ RowLogits(const LogitBlock& block, int64_t place) : RowLogits(block, place, place) {}
  // row: of its temperature
  __device__ RowLogits(const LogitBlock& block, int64_t place, int64_t row)
      : products_(block.products + place * block.stride),
        bias_(block.bias),
        softcap_(block.softcap),
        temperature_(block.temperature ? block.temperature[row] : 1.0f),
        scale_((block.softcap == 0.0f ? 1.0f : block.softcap) / temperature_) {}

  __device__ float operator[](int64_t j) const { return z(unit(j)); }
  // What z is a multiple of: x + bias, or tanh((x + bias) / softcap).
  __device__ float unit(int64_t j) const {
    const float x = bias_ ? products_[j] + bias_[j] : products_[j];
    return softcap_ == 0.0f ? x : tanhf(x / softcap_);
  }
  __device__ float z(float unit) const { return unit * scale_; }
  __device__ float temperature() const { return temperature_; }
  // d softcap(x) / dx
  __device__ float slope(float unit) const { return softcap_ == 0.0f ? 1.0f : 1.0f - unit * unit; }

 private:
  const float *products_, *bias_;
  float softcap_, temperature_, scale_;
};

}  // namespace bupo::cuda
