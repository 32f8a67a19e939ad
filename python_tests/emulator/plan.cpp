// csrc/cuda/choose.h for Python. A library of its own: the one with the operators, once loaded, takes
// over those of its process.

#include "cuda/choose.h"

#define BUPO_EXPORT extern "C" __attribute__((visibility("default")))

// tile_columns: of Hopper's kernel; 0: the portable path.
BUPO_EXPORT void bupo_plan(int64_t tile_columns, const int64_t* shape, int64_t budget,
                           int64_t* out) {
  using namespace bupo::cuda;
  const Shape given{shape[0],      shape[1],      shape[2],     shape[3],
                    shape[4] != 0, shape[5] != 0, shape[6] != 0};
  const Plan plan = best_plan(given, budget, [&](const Shape& s, int64_t bytes) {
    return tile_columns ? sm90_plan(s, bytes, tile_columns) : portable_plan(s, bytes);
  });
  for (const int64_t value : {plan.chunk, int64_t{plan.accumulate}, plan.bytes})
    *out++ = value;
}

BUPO_EXPORT int64_t bupo_budget(int64_t free) { return bupo::cuda::budget_within(free); }
