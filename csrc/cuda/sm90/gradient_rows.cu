// E of the rows with a gradient to dz / scale, for the two library products that follow.
//
//   p_j  = E_j 2^(tile reference - ref) gain       d_j = z_j - max = ln(E_j 2^(...)) + offset
//   dz_j = [ p_j (g_L - g_logp) - g_H p_j (d_j - m) ] / T
//   dz_t = [ g_logp (1 - p_t) + g_L p_t - g_H p_t (d_t - m) ] / T
//
// With a gradient of the log-prob alone dz_j is E_j times a number of the row, which the products
// take as scale: a row is left as it is but for its target and for tiles of another reference (a
// multiplication by a power of two, exact). Then nearly nothing is touched, and as the references
// are brought up to date, E may be used again. Otherwise 2V bytes a row are read and written, and
// the scale is the power of two below the largest coefficient.
//
// A block a row, a warp a tile. A row without gradient becomes 0: it may hold nan.
//
// Tests: python_tests/test_cuda_emulated.py.

#include "../common/coefficients.cuh"
#include "../common/device.cuh"
#include "launch.h"

namespace bupo::cuda::sm90 {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kVector = 8;  // entries, 16 bytes

struct alignas(16) Vector {
  BFloat16 values[kVector];
};

__global__ void __launch_bounds__(kThreads) gradient_rows_kernel(GradientRowsArgs args) {
  const int64_t k = blockIdx.x, place = args.source ? args.source[k] : k;
  const int64_t row = args.places.order[place];
  const BFloat16* in = args.kept.e + place * args.kept.stride;
  BFloat16* out = args.out + k * args.kept.stride;
  float* references = args.kept.references + place * args.tiles;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const auto c = coefficient_of(args.coefficients, row);
  const bool by_row = !args.coefficients.on_entropy && !args.coefficients.on_logsumexp;
  const PlacedRow record = args.records[place];
  const float temperature = args.places.temperature ? args.places.temperature[place] : 1.0f;
  const float scale = !c.is_live() ? 0.0f
                      : by_row     ? -c.on_logprob * record.gain / temperature
                                   : power_of_two(largest(c) / temperature);
  const float factor = 1.0f / (temperature * scale);
  // dz / scale = e (on_e + on_gap (ln e + shift)) with e = E 2^(...)
  const float on_e = by_row ? 1.0f : record.gain * (c.on_logsumexp - c.on_logprob) * factor;
  const float on_gap = by_row ? 0.0f : -record.gain * c.on_entropy * factor;
  const float shift = record.offset - record.row.mean;
  const bool stays = by_row && in == out && scale != 0.0f;

  for (int64_t base = warp; base < args.tiles; base += 32 * kWarps) {
    // A lane looks at a tile; most often none of them has to be touched.
    const int64_t mine = base + lane * kWarps;
    const bool there = mine < args.tiles;
    const float its_power = there ? exp2_integer(references[mine] - record.ref) : 1.0f;
    if (there && stays) references[mine] = record.ref;
    unsigned left = __ballot_sync(kAllLanes, there && !(stays && its_power == 1.0f));
    for (; left != 0; left &= left - 1) {
      const int which = __ffs(left) - 1;
      const float power = __shfl_sync(kAllLanes, its_power, which);
      const int64_t j = (base + which * kWarps) * args.tile_columns + lane * kVector;
      if (lane * kVector >= args.tile_columns || j >= args.kept.stride) continue;
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
  if (threadIdx.x != 0) return;
  if (args.order) args.order[k] = row;
  args.scale[k] = scale;
  const int64_t target = args.places.targets[place];
  if (scale == 0.0f || target < 0 || target >= args.vocab) return;
  const float dz = target_gradient(record.row, c);
  narrow(by_row ? -record.row.target_rest / record.gain : factor * dz, out[target]);
}

}  // namespace

cudaError_t launch_gradient_rows(const GradientRowsArgs& args, cudaStream_t stream) {
  return launch(gradient_rows_kernel, args.rows, kThreads, stream, args);
}

}  // namespace bupo::cuda::sm90
