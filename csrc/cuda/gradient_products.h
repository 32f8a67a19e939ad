// From dz of the live rows of a chunk to dX, dW and db: what both paths share.
//
//   dX[order] = scale dz W      dW += dz^T (scale X[order])      db += sum_k scale_k dz_k
//
// dz is stored as dz / scale of its row, so that it keeps its precision whatever its size.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "../args.h"
#include "choose.h"
#include "library.h"
#include "memory.h"

namespace bupo::cuda {

class GradientProducts {
 public:
  GradientProducts(const torch::stable::Tensor& like, const Device& device, Number number,
                   const HeadArgs& args, const GradArgs& out, const Plan& plan, Slab& slab);

  // The bound that keeps float16 rows in range; before the first chunk.
  void set_norm(const Coefficients& bounds);

  // Places 0..live of dz; order and scale are those of launch.h's LivePlaces. `first` is the row
  // that order counts from.
  void add(int64_t first, int64_t live, const Matrix& dz, const int64_t* order, const float* scale);

  // After the last chunk.
  void finish();

 private:
  void add_weight(const char* x, const Matrix& dz, const int64_t* order, const float* scale);
  float* total();  // where dW is summed: fp32

  const Device& device_;
  Number number_;
  HeadArgs args_;
  GradArgs out_;
  Plan plan_;
  void* x_ = nullptr;
  float *dx_ = nullptr, *slice_ = nullptr, *bias_ = nullptr, *norm_ = nullptr;
  std::optional<torch::stable::Tensor> accumulator_;
  bool written_ = false;
};

}  // namespace bupo::cuda
