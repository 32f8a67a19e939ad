// From dz of the live rows of a chunk to dX, dW and db: what all paths share.
//
//   dX[order] = scale dz W      dW += dz^T (scale X)      db += sum_k scale_k dz_k
//
// dz is stored as dz / scale of its row, so that it keeps its precision whatever its size.

#pragma once

#include <optional>

#include "call.h"

namespace bupo::cuda {

// Rows whose dz / scale is there, by place.
struct LiveRowsOfChunk {
  Matrix dz;
  const int64_t* order;  // the row of each place, counted from `first`
  const float* scale;
  int64_t first;
  void* hidden;  // if by_place: rows of hidden by place, which are overwritten
};

class GradientProducts {
 public:
  GradientProducts(const Call& call, const GradArgs& out, bool accumulate, int64_t capacity,
                   bool by_place);

  void take(Slab& slab);
  // The bound that keeps float16 rows in range; before the first chunk.
  void set_norm(const Coefficients& bounds);
  void add(const LiveRowsOfChunk& rows);
  // After the last chunk.
  void finish();

 private:
  const Call& call_;
  GradArgs out_;
  int64_t capacity_;
  bool by_place_, written_ = false;
  void* x_ = nullptr;
  float *dx_ = nullptr, *bias_ = nullptr, *norm_ = nullptr;
  std::optional<Tensor> accumulator_;
};

}  // namespace bupo::cuda
