// E of the rows with a gradient to dz / scale, for the two library products that follow.
//
//   p_j  = E_j 2^(tile reference - ref) gain       d_j = z_j - max = ln(E_j 2^(...)) + offset
//   dz_j = [ p_j (g_L - g_logp) - g_H p_j (d_j - m) ] / T
//   dz_t = [ g_logp (1 - p_t) + g_L p_t - g_H p_t (d_t - m) ] slope_t / T
//
// Without a gradient of entropy and logsumexp, dz_j = E_j times a number of the row: the products
// take that as scale, and a row is left as it is but for its target, for tiles of another
// reference (a multiplication by a power of two, exact) and for a row that moves into a hole. Then
// nearly nothing is touched; otherwise 2V bytes a row are read and written. In place, or elsewhere.
//
// A block a row, a warp a tile. A row moves only from beyond the last place that is written.
//
// Tests: python_tests/test_cuda_emulated.py.

#include "../common/device.cuh"
#include "launch.h"

namespace bupo::cuda::sm90 {
namespace {

#ifdef BUPO_EMULATED
constexpr int kThreads = 64;
#else
constexpr int kThreads = 256;
#endif
constexpr int kWarps = kThreads / 32;
constexpr int kVector = 8;  // entries, 16 bytes
static_assert(32 * kVector == kTileColumns);

struct alignas(16) Vector {
  BFloat16 values[kVector];
};

__global__ void __launch_bounds__(kThreads) gradient_rows_kernel(GradientRowsArgs args) {
  const int64_t k = blockIdx.x;
  const int64_t source = args.source[k], row = args.order[k];
  const BFloat16* in = args.kept.e + source * args.kept.stride;
  BFloat16* out = args.out + k * args.out_stride;
  const float* references = args.kept.references + source * args.tiles;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Coefficients& c = args.coefficients;
  const float on_logprob = c.on_logprob[row], on_entropy = c.on_entropy[row];
  const float on_logsumexp = c.on_logsumexp ? c.on_logsumexp[row] : 0.0f;
  const float scale = args.scale[k];
  const PlacedRow record = args.records[source];
  const float temperature = args.places.temperature ? args.places.temperature[source] : 1.0f;
  const float factor = 1.0f / (temperature * scale);
  // dz / scale = e (on_e + on_gap (ln e + shift)) with e = E 2^(...)
  const float on_e = args.scaled_by_row ? 1.0f : record.gain * (on_logsumexp - on_logprob) * factor;
  const float on_gap = args.scaled_by_row ? 0.0f : -record.gain * on_entropy * factor;
  const float shift = record.offset - record.row.mean;
  const bool stays = args.scaled_by_row && in == out;

  for (int64_t base = warp; base < args.tiles; base += 32 * kWarps) {
    // A lane looks at a tile; most often none of them has to be touched.
    const int64_t mine = base + lane * kWarps;
    const bool there = mine < args.tiles;
    const float its_power = there ? exp2_integer(references[mine] - record.ref) : 1.0f;
    unsigned left =
        __ballot_sync(kAllLanes, there && !(stays && its_power == 1.0f && scale != 0.0f));
    for (; left != 0; left &= left - 1) {
      const int which = __ffs(left) - 1;
      const float power = __shfl_sync(kAllLanes, its_power, which);
      const int64_t j = (base + which * kWarps) * kTileColumns + lane * kVector;
      if (j >= args.out_stride) continue;
      Vector v{};
      if (scale != 0.0f) {
        v = *reinterpret_cast<const Vector*>(in + j);
        for (BFloat16& value : v.values) {
          const float e = widen(value) * power;
          float dz = e * on_e;
          if (on_gap != 0.0f && e != 0.0f) dz = e * (on_e + on_gap * (logf(e) + shift));
          narrow(dz, value);
        }
      }
      *reinterpret_cast<Vector*>(out + j) = v;
    }
  }
  __syncthreads();
  const int64_t target = args.places.targets[source];
  if (threadIdx.x != 0 || scale == 0.0f || target < 0 || target >= args.vocab) return;
  float slope = 1.0f;
  if (args.softcap) slope -= args.target_logits[source] * args.target_logits[source];
  float dz;
  if (args.scaled_by_row) {
    dz = -record.row.target_rest / record.gain;
  } else {
    dz = factor * (on_logprob * record.row.target_rest + on_logsumexp * record.row.target_prob);
    if (record.row.target_prob != 0.0f)
      dz -= factor * on_entropy * record.row.target_prob * (record.row.target - record.row.mean);
  }
  narrow(dz * slope, out[target]);
}

}  // namespace

cudaError_t launch_gradient_rows(const GradientRowsArgs& args, cudaStream_t stream) {
  return launch(gradient_rows_kernel, args.rows, kThreads, stream, args);
}

}  // namespace bupo::cuda::sm90
