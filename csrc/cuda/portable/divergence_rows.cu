// The divergence of the student's and the teacher's row of logits, and dz of either, in place of
// the products.
//
// One block a row, three sweeps over both rows: statistics, the divergence with the sums that
// gradients need, the gradients. 24V bytes read a row and up to 8V written: bound by memory.
//
// Tests: python_tests/test_cuda_emulated.py.

#include "../common/coefficients.cuh"
#include "../common/device.cuh"
#include "../common/logit.cuh"
#include "../common/running_sums.cuh"
#include "../launch.h"

namespace bupo::cuda {
namespace {

constexpr int kThreads = kRowThreads;
constexpr float kDivergenceGain = 256.0f;  // float16's; |dz / weight| is rarely above 100

struct ScalarMath {
  __device__ static float exp_nonpositive(float x) { return expf(x); }
  __device__ static float log1p(float x) { return log1pf(x); }
};

// log p_j of a row.
class LogProbs {
 public:
  // All threads call it; shared: for a reduction, and two numbers.
  __device__ LogProbs(const LogitBlock& block, int64_t place, int64_t row, RowSums<float>* shared,
                      float* numbers)
      : z(block, place, row) {
    RunningSums running;
    for (int64_t j = threadIdx.x; j < block.vocab; j += kThreads) running.add(z[j]);
    __syncthreads();
    const RowSums<float> sums = merged<kThreads>(running.sums, shared);
    if (threadIdx.x == 0) {
      numbers[0] = sums.max;
      numbers[1] = sums.sum == 0.0f ? NAN : static_cast<float>(log(double(sums.sum)));
    }
    __syncthreads();
    max_ = numbers[0];
    log_total_ = numbers[1];
  }
  __device__ float of(float unit) const { return z.z(unit) - max_ - log_total_; }

  const RowLogits z;

 private:
  float max_, log_total_;
};

template <DivergenceKind kKind, class T>
__global__ void __launch_bounds__(kThreads) divergence_kernel(DivergenceRowsArgs args) {
  __shared__ RowSums<float> shared[kThreads / 32];
  __shared__ double sums[kThreads / 32];
  __shared__ float numbers[2];
  const DivergenceSide &student = args.student, &teacher = args.teacher;
  const int64_t place = blockIdx.x, row = args.order[place], vocab = student.logits.vocab;
  const float weight = args.weights[row];
  const auto out = [&](const DivergenceSide& side) {
    auto* products = reinterpret_cast<T*>(const_cast<float*>(side.logits.products));
    return products + place * side.out_stride;
  };
  if (weight == 0.0f) {
    for (const DivergenceSide* side : {&student, &teacher}) {
      if (!side->gradient) continue;
      for (int64_t j = threadIdx.x; j < vocab; j += kThreads) narrow(0.0f, out(*side)[j]);
      if (threadIdx.x == 0) side->scale[place] = 0.0f;
    }
    return;
  }
  const LogProbs q(student.logits, place, row, shared, numbers);
  __syncthreads();
  const LogProbs p(teacher.logits, place, row, shared, numbers);
  const auto terms = [&](float lp, float lq) {
    return divergence_terms<kKind, ScalarMath>(lp, lq, expf(lp), expf(lq), args.beta);
  };
  double divergence = 0, of_q = 0, of_p = 0;
  for (int64_t j = threadIdx.x; j < vocab; j += kThreads) {
    const auto t = terms(p.of(p.z.unit(j)), q.of(q.z.unit(j)));
    divergence += t.divergence;
    of_q += t.student;
    of_p += t.teacher;
  }
  divergence = block_sum<kThreads>(divergence, sums);
  if (threadIdx.x == 0) args.divergence[row] = static_cast<float>(divergence);
  if (!student.gradient && !teacher.gradient) return;
  of_q = block_sum<kThreads>(of_q, sums);
  of_p = block_sum<kThreads>(of_p, sums);
  const float total_q = kKind == DivergenceKind::kForwardKl ? -1.0f : static_cast<float>(of_q);
  const float total_p = kKind == DivergenceKind::kReverseKl ? -1.0f : static_cast<float>(of_p);
  const auto scale_of = [&](const LogProbs& x) {
    return power_of_two(fabsf(weight) / x.z.temperature()) / (args.half ? kDivergenceGain : 1.0f);
  };
  const float scale_q = scale_of(q), scale_p = scale_of(p);
  if (threadIdx.x == 0) {
    if (student.gradient) student.scale[place] = scale_q;
    if (teacher.gradient) teacher.scale[place] = scale_p;
  }
  const float factor_q = weight / (q.z.temperature() * scale_q);
  const float factor_p = weight / (p.z.temperature() * scale_p);
  for (int64_t base = 0; base < vocab; base += kThreads) {
    const int64_t j = base + threadIdx.x;
    float dq = 0.0f, dp = 0.0f;
    if (j < vocab) {
      const float q_unit = q.z.unit(j), p_unit = p.z.unit(j);
      const float lq = q.of(q_unit), lp = p.of(p_unit);
      const auto t = terms(lp, lq);
      dq = (t.student - expf(lq) * total_q) * factor_q * q.z.slope(q_unit);
      dp = (t.teacher - expf(lp) * total_p) * factor_p * p.z.slope(p_unit);
    }
    __syncthreads();  // in place: dz is no wider than a product, so it covers none of those to come
    if (j < vocab && student.gradient) narrow(dq, out(student)[j]);
    if (j < vocab && teacher.gradient) narrow(dp, out(teacher)[j]);
  }
}

__global__ void __launch_bounds__(kThreads)
    weighted_sum_kernel(const float* weights, const float* divergence, int64_t rows, float* loss) {
  __shared__ double shared[kThreads / 32];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < rows; i += kThreads)
    if (weights[i] != 0.0f) sum += double(weights[i]) * divergence[i];
  sum = block_sum<kThreads>(sum, shared);
  if (threadIdx.x == 0) *loss = static_cast<float>(sum);
}

}  // namespace

cudaError_t launch_divergence_rows(Number number, const DivergenceRowsArgs& args,
                                   cudaStream_t stream) {
  return with_number(number, [&]<class T>(T) {
    const auto kernel =
        args.kind == DivergenceKind::kForwardKl   ? divergence_kernel<DivergenceKind::kForwardKl, T>
        : args.kind == DivergenceKind::kReverseKl ? divergence_kernel<DivergenceKind::kReverseKl, T>
                                                  : divergence_kernel<DivergenceKind::kJsd, T>;
    return launch(kernel, args.student.logits.rows, kThreads, stream, args);
  });
}

cudaError_t launch_weighted_sum(const float* weights, const float* divergence, int64_t rows,
                                float* loss, cudaStream_t stream) {
  return launch(weighted_sum_kernel, 1, kThreads, stream, weights, divergence, rows, loss);
}

}  // namespace bupo::cuda
