// log p(target), entropy and logsumexp of each row of a block of fp32 products [rows, V].
//
//   z_j = softcap(x_j + bias_j) / T;  RowSums over j != target;  finish_row() of row_math.h
//
// One block a row, one sweep with a running maximum per thread: 4V bytes read and V exponentials a
// row, so it is bound by memory. Threads are merged in a fixed order, so a row's result depends on
// nothing but the row.
//
// Tests: python_tests/test_cuda_emulated.py, on a GPU bench/gpu_check.py. Bench: the latter.

#include "../common/device.cuh"
#include "../common/logit.cuh"
#include "../common/running_sums.cuh"
#include "../launch.h"

namespace bupo::cuda {
namespace {

constexpr int kThreads = kRowThreads;

__global__ void __launch_bounds__(kThreads) row_stats_kernel(RowStatsArgs args) {
  __shared__ RowSums<float> shared[kThreads / 32];
  const int64_t place = blockIdx.x;
  if (place >= args.places.counts[0]) return;
  const int64_t row = args.places.order[place];
  const bool included = takes_part(args.choice, row);
  const int64_t target = args.places.targets[place], vocab = args.logits.vocab;
  const bool valid = included && target >= 0 && target < vocab;
  Row<float> record{};
  if (!valid) {
    const float value = included ? NAN : 0.0f;
    record.logprob = record.entropy = record.logsumexp = value;
  } else {
    const RowLogits z(args.logits, place);
    RunningSums running;
    for (int64_t j = threadIdx.x; j < vocab; j += kThreads)
      if (j != target) running.add(z[j]);
    const RowSums<float> sums = merged<kThreads>(running.sums, shared);
    if (threadIdx.x == 0)
      record = in_float(finish_row<double>({sums.max, sums.sum, sums.dot}, z[target], vocab));
  }
  if (threadIdx.x != 0) return;
  if (args.records) args.records[place] = record;
  if (args.logprobs) args.logprobs[row] = record.logprob;
  if (args.entropy) args.entropy[row] = record.entropy;
  if (args.logsumexp) args.logsumexp[row] = record.logsumexp;
}

}  // namespace

cudaError_t launch_row_stats(const RowStatsArgs& args, cudaStream_t stream) {
  return launch(row_stats_kernel, args.logits.rows, kThreads, stream, args);
}

}  // namespace bupo::cuda
