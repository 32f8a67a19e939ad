// From dz of the live rows of a chunk to dX, dW and db: what all paths share.
//
//   dX[order] = scale dz W      dW += dz^T (scale X)      db += sum_k scale_k dz_k
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

// Rows whose dz / scale is there, by place.
struct LiveRowsOfChunk {
  Matrix dz;
  const int64_t* order;  // the row of each place, counted from `first`
  const float* scale;
  int64_t first;
  void* hidden;  // if by_place: rows of hidden by place, to be overwritten
};

class GradientProducts {
 public:
  GradientProducts(const torch::stable::Tensor& like, const Device& device, Number number,
                   const HeadArgs& args, const GradArgs& out, bool accumulate, int64_t chunk,
                   bool by_place, Slab& slab);

  // The bound that keeps float16 rows in range; before the first chunk.
  void set_norm(const Coefficients& bounds);
  void add(const LiveRowsOfChunk& rows);
  // After the last chunk.
  void finish();

 private:
  float* total();  // where dW is summed: fp32

  const Device& device_;
  Number number_;
  HeadArgs args_;
  GradArgs out_;
  void* x_ = nullptr;
  float *dx_ = nullptr, *bias_ = nullptr, *norm_ = nullptr;
  std::optional<torch::stable::Tensor> accumulator_;
  bool written_ = false;
};

}  // namespace bupo::cuda
