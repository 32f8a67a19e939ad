// dLoss/dz of the rows that may have a gradient, in the dtype of the inputs; out[k, j] = dz_j /
// scale.
//
//   p_j = e^{z_j - max - log_total}
//   dz_j = [ p_j (g_L - g_logp) - g_H p_j (z_j - m) ] f'_j / T
//   dz_t = [ g_logp (1 - p_t) + g_L p_t - g_H p_t (z_t - m) ] f'_t / T
//
// One block a row, in place of the products: 4V bytes read, 2V or 4V written, V exponentials, bound
// by memory. 1 - p_t comes from the sum without the target, so it keeps its digits where p_t rounds
// to 1.
//
// Tests: python_tests/test_cuda_emulated.py, on a GPU bench/gpu_check.py. Bench: the latter.

#include "../common/coefficients.cuh"
#include "../common/device.cuh"
#include "../common/logit.cuh"
#include "../launch.h"

namespace bupo::cuda {
namespace {

constexpr int kThreads = kRowThreads;

template <class T>
__global__ void __launch_bounds__(kThreads) logit_gradient_kernel(LogitGradientArgs args) {
  const int64_t k = blockIdx.x, place = args.source ? args.source[k] : k;
  const int64_t row = args.places.order[place], vocab = args.logits.vocab;
  T* out = static_cast<T*>(args.out) + k * args.out_stride;
  const auto c = coefficient_of(args.coefficients, row);
  const RowLogits z(args.logits, place);
  const float scale =
      !c.is_live() ? 0.0f
                   : power_of_two(largest(c) / z.temperature()) / (args.half ? kHalfGain : 1.0f);
  if (threadIdx.x == 0) {
    args.scale[k] = scale;
    if (args.order) args.order[k] = row;
  }
  if (scale == 0.0f) {
    for (int64_t j = threadIdx.x; j < vocab; j += kThreads) narrow(0.0f, out[j]);
    return;
  }
  const Row<float> record = args.records[place];
  const float factor = 1.0f / (z.temperature() * scale);
  const float on_p = (c.on_logsumexp - c.on_logprob) * factor, on_gap = -c.on_entropy * factor;
  const int64_t target = args.places.targets[place];
  for (int64_t base = 0; base < vocab; base += kThreads) {
    const int64_t j = base + threadIdx.x;
    float dz = 0.0f;
    if (j < vocab) {
      const float unit = z.unit(j), d = z.z(unit) - record.max;
      if (j == target) {
        dz = factor * target_gradient(record, c) * z.slope(unit);
      } else if (d != -INFINITY) {
        const float p = expf(d - record.log_total);
        dz = p * (on_p + on_gap * (d - record.mean)) * z.slope(unit);
      }
    }
    __syncthreads();  // in place: dz is no wider than a product, so it covers none of those to come
    if (j < vocab) narrow(dz, out[j]);
  }
}

}  // namespace

cudaError_t launch_logit_gradient(Number number, const LogitGradientArgs& args,
                                  cudaStream_t stream) {
  const auto kernel = number == Number::kFloat      ? logit_gradient_kernel<float>
                      : number == Number::kBfloat16 ? logit_gradient_kernel<BFloat16>
                                                    : logit_gradient_kernel<Float16>;
  return launch(kernel, args.logits.rows, kThreads, stream, args);
}

}  // namespace bupo::cuda
