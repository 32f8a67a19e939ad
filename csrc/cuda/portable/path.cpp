// The portable path, for every GPU of sm_80 and newer: a library product with fp32 output, reduced
// by one sweep; another one turns the rows that may have a gradient into dz, in place.
//
// Traffic of a row: 4V bytes written and read; of those with a gradient 4V read again, and dz
// written once and read twice. Where something is stored masked rows are left out of the product,
// for whose size the host waits.
//
// Tests: python_tests/test_cuda_emulated.py runs this file on the host.

#include "../paths.h"

namespace bupo::cuda::portable {
namespace {

class Portable final : public Scan {
 public:
  using Scan::Scan;

  void take_stored(Slab& slab) override {
    places = lay_out_places(head, capacity, slab);
    products_ = slab.take<float>(capacity * stride_);
    if (stores) records_ = slab.take<Row<float>>(capacity);
  }

  void take_scratch(Slab& slab) override {
    placed = slab.bytes(capacity * head.width * bytes_of(call.number));
    take_bias(slab, head.vocab);
  }

  CountReader statistics(int64_t first, int64_t count, const Rows& rows,
                         const TokenOutputs& out) override {
    CountReader counts = arrange(first, count, rows);
    if (stores) count = counts.wait()[0];
    if (count == 0) return counts;
    multiply(call.device, {products_, count, head.vocab, stride_, Number::kFloat},
             {placed, count, head.width, head.width, call.number},
             transpose({head.weight, head.vocab, head.width, head.weight_stride, call.number}));
    check(launch_row_stats(
        {logits(count), places, from(rows.choice, first), records_, from(out.logprobs, first),
         from(out.entropy, first), from(out.logsumexp, first)},
        call.device.stream));
    return counts;
  }

  Matrix gradient(const Coefficients& c, const GradientRows& rows) override {
    void* out = rows.out ? rows.out : products_;
    const int64_t stride = stored_row_bytes() / bytes_of(call.number);
    const bool half = call.number == Number::kFloat16;
    check(launch_logit_gradient(call.number,
                                {logits(rows.rows), places, records_, c, rows.source, half, out,
                                 stride, rows.order, rows.scale},
                                call.device.stream));
    return {out, rows.rows, head.vocab, stride, call.number};
  }

  bool survives(const Coefficients&) const override { return false; }
  int64_t stored_row_bytes() const override { return 4 * stride_; }

 private:
  LogitBlock logits(int64_t rows) const {
    const auto softcap = static_cast<float>(head.softcap);
    return {products_, rows, head.vocab, stride_, bias, places.temperature, softcap};
  }

  const int64_t stride_ = products_stride(head.vocab);
  float* products_ = nullptr;
  Row<float>* records_ = nullptr;
};

}  // namespace

const Path kPath{
    [](const Call&) { return true; },
    [](const Shape& shape, int64_t budget) { return best_plan(shape, budget, portable_plan); },
    [](const Call& call, int64_t capacity, bool stores) {
      return std::unique_ptr<Scan>(new Portable(call, capacity, stores));
    }};

}  // namespace bupo::cuda::portable
