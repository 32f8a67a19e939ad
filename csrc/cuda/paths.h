// The kernels that can serve a call, by architecture: paths.cpp has the table, lm_head.cpp the walk
// over the rows that all of them share.

#pragma once

#include <memory>

#include "call.h"

namespace bupo::cuda {

// Places whose gradient is wanted: the first `rows`, in place of what the scan has stored of them;
// or with a source those that it names, to `out`, whose rows are as long as the stored ones.
struct GradientRows {
  int64_t rows;
  float* scale;                     // [rows], out
  const int32_t* source = nullptr;  // [rows]
  void* out = nullptr;
  int64_t* order = nullptr;  // [rows], out
};

// What a path does with chunks of rows of a call, of `capacity` rows at most.
class Scan {
 public:
  Scan(const Call& call, int64_t capacity, bool stores)
      : call(call), head(call.head), capacity(capacity), stores(stores) {}
  virtual ~Scan() = default;

  // What statistics() leaves, of which gradient() makes gradients; and what the former needs
  // beside. A slab that only counts may be given first.
  virtual void take_stored(Slab& slab) = 0;
  virtual void take_scratch(Slab& slab) = 0;
  // Of rows [first, first + count): statistics, to the rows of `out`; stores what a gradient needs
  // if it `stores`. Returns a reader of places.counts.
  virtual CountReader statistics(int64_t first, int64_t count, const Rows& rows,
                                 const TokenOutputs& out) = 0;
  // dz / scale of stored places. c: by row of the chunk.
  virtual Matrix gradient(const Coefficients& c, const GradientRows& rows) = 0;
  // Whether what is stored is still fit for another gradient after one in place.
  virtual bool survives(const Coefficients& c) const = 0;
  virtual int64_t stored_row_bytes() const = 0;

  void take_bias(Slab& slab, int64_t columns);  // in fp32

  const Call& call;
  const HeadArgs& head;
  const int64_t capacity;
  const bool stores;
  Places places{};
  void* placed = nullptr;  // [capacity, D]: rows of hidden by place
  float *bias = nullptr, *guess = nullptr;

 protected:
  // Places of the chunk, their rows of hidden, and where `guess` is given a guess of each row's L.
  CountReader arrange(int64_t first, int64_t count, const Rows& rows);
};

struct Path {
  bool (*serves)(const Call& call);
  Plan (*plan)(const Shape& shape, int64_t budget);
  std::unique_ptr<Scan> (*scan)(const Call& call, int64_t capacity, bool stores);
};

// Each folder defines its row.
namespace portable {
extern const Path kPath;
}
namespace sm90 {
extern const Path kPath;
}

// The first of the table that serves the call; the setting `kernels` may leave it the last alone.
const Path& path_of(const Call& call);

}  // namespace bupo::cuda
