// The stored rows that have a gradient after all (a ratio may be clipped), in places of their own.
//
// With n of them, those among the first n places stay; the holes there are filled by the others, in
// order. So a row that is not clipped seldom moves, and E need not be copied to be compacted.
//
//   scale = dz / E of the whole row, -g gain / T; or the power of two below |g| / T, where every
//   entry of E is turned into dz. One block of threads, counted by ballots: always the same places.
//
// Tests: python_tests/test_cuda_emulated.py.

#include "../common/coefficients.cuh"
#include "../common/device.cuh"
#include "../common/logit.cuh"
#include "launch.h"

namespace bupo::cuda::sm90 {
namespace {

#ifdef BUPO_EMULATED
constexpr int kThreads = 64;
#else
constexpr int kThreads = 1024;
#endif

__global__ void __launch_bounds__(kThreads) live_rows_kernel(LiveRowsArgs args) {
  __shared__ int counts[kThreads / 32];
  const int64_t left = args.places.counts[1] - args.first;
  const int rows = static_cast<int>(left < args.rows ? (left > 0 ? left : 0) : args.rows);
  const int64_t* order = args.places.order + args.first;
  const auto has_gradient = [&](int64_t row) {
    return takes_part(args.choice, row) && is_live(args.coefficients, row);
  };

  int live = 0, live_before = 0;  // in all, and of the first `live` places
  for (int start = 0; start < rows; start += kThreads) {
    const int i = start + static_cast<int>(threadIdx.x);
    const bool mine = i < rows && (!args.compact || has_gradient(order[i]));
    next_place<kThreads>(mine, live, counts);
  }
  int holes = 0;
  for (int start = 0; start < live; start += kThreads) {
    const int i = start + static_cast<int>(threadIdx.x);
    const bool stays = i < live && (!args.compact || has_gradient(order[i]));
    const bool hole = i < live && !stays;
    if (stays) args.source[i] = static_cast<int>(args.first) + i;
    next_place<kThreads>(stays, live_before, counts);
    const int place = next_place<kThreads>(hole, holes, counts);
    if (hole) args.scratch[place] = i;
  }
  int filled = 0;
  __syncthreads();
  for (int start = live; start < rows; start += kThreads) {
    const int i = start + static_cast<int>(threadIdx.x);
    const bool moves = i < rows && has_gradient(order[i]);
    const int place = next_place<kThreads>(moves, filled, counts);
    if (moves) args.source[args.scratch[place]] = static_cast<int>(args.first) + i;
  }
  __syncthreads();
  for (int k = static_cast<int>(threadIdx.x); k < live; k += kThreads) {
    const int source = args.source[k];
    const int64_t row = args.places.order[source];
    const float temperature = args.places.temperature ? args.places.temperature[source] : 1.0f;
    const bool dead = !has_gradient(row);  // with its place only if not compact
    args.order[k] = row;
    args.scale[k] =
        dead ? 0.0f
        : args.scaled_by_row
            ? -args.coefficients.on_logprob[row] * args.records[source].gain / temperature
            : power_of_two(largest(args.coefficients, row) / temperature);
  }
  if (threadIdx.x == 0) *args.count = live;
}

}  // namespace

cudaError_t launch_live_rows(const LiveRowsArgs& args, cudaStream_t stream) {
  return launch(live_rows_kernel, 1, kThreads, stream, args);
}

}  // namespace bupo::cuda::sm90
