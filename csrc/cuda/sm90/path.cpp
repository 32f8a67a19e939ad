// The Hopper path: logits exist in registers only. One product makes the statistics of every row
// and E, the exponentials of those that may have a gradient; the gradient is E, which is left in
// place and scaled by rows (gradient_rows.cu).
//
// E is written once and read twice. Masked rows are left out of all three products, rows of
// advantage 0 out of the last two; a row whose ratio turns out clipped stays, as zeros. What the
// host waits for is known before the product begins.
//
// Tests: python_tests/test_cuda_emulated.py runs this file on the host.

#include "../../settings.h"
#include "../paths.h"
#include "launch.h"

namespace bupo::cuda::sm90 {
namespace {

// Ping-pong unless set otherwise: by the model of bench/scan_model.py it hides its whole epilogue,
// cooperative shows 3 to 7 % of a product. Neither has been measured.
Schedule schedule() {
  return kernels == Kernels::kCooperative ? Schedule::kCooperative : Schedule::kPingpong;
}

bool serves(const Call& call) {
  constexpr int64_t kLargest = int64_t{1} << 30;  // places and columns are 32-bit
  const HeadArgs& head = call.head;
  // TMA reads rows on 16 bytes; overlapping rows have no tensor map.
  const bool readable = reinterpret_cast<uintptr_t>(head.weight) % 16 == 0 && head.width % 8 == 0 &&
                        head.weight_stride % 8 == 0 && head.weight_stride >= head.width;
  return call.device.capability == 90 && call.number == Number::kBfloat16 && head.softcap == 0 &&
         head.vocab < kLargest && head.width < kLargest && readable;
}

Plan plan(const Shape& shape, int64_t budget) {
  return best_plan(shape, budget, [](const Shape& s, int64_t bytes) {
    return sm90_plan(s, bytes, columns_of(schedule()));
  });
}

class Hopper final : public Scan {
 public:
  using Scan::Scan;

  void take_stored(Slab& slab) override {
    places = lay_out_places(head, capacity, slab);
    target_logits_ = slab.take<float>(capacity);
    if (!stores) return;
    kept_.stride = round_up(head.vocab, 64);
    kept_.e = static_cast<BFloat16*>(slab.bytes(capacity * stored_row_bytes()));
    guess = kept_.guess = slab.take<float>(capacity);
    kept_.references = slab.take<float>(capacity * tiles_);
    records_ = slab.take<PlacedRow>(capacity);
  }

  void take_scratch(Slab& slab) override {
    partials_ = slab.take<BitSums>(tiles_ * capacity);
    placed = slab.bytes(2 * capacity * head.width);
    take_bias(slab, tiles_ * columns_);
  }

  CountReader statistics(int64_t first, int64_t count, const Rows& rows,
                         const TokenOutputs& out) override {
    const CountReader counts = arrange(first, count, rows);
    check(launch_head_scan(schedule_,
                           {placed, head.weight, head.width, head.weight_stride, head.width,
                            head.vocab, places, bias, partials_, target_logits_, tiles_, kept_},
                           call.device.stream));
    check(launch_finish_rows(
        {partials_, tiles_, target_logits_, guess, places, from(rows.choice, first), head.vocab,
         records_, from(out.logprobs, first), from(out.entropy, first), from(out.logsumexp, first)},
        call.device.stream));
    return counts;
  }

  Matrix gradient(const Coefficients& c, const GradientRows& rows) override {
    auto* out = rows.out ? static_cast<BFloat16*>(rows.out) : kept_.e;
    check(launch_gradient_rows({c, places, kept_, head.vocab, tiles_, columns_, records_, rows.rows,
                                rows.source, out, rows.order, rows.scale},
                               call.device.stream));
    return {out, rows.rows, head.vocab, kept_.stride, call.number};
  }

  bool survives(const Coefficients& c) const override { return !c.on_entropy && !c.on_logsumexp; }
  int64_t stored_row_bytes() const override { return 2 * round_up(head.vocab, 64); }

 private:
  const Schedule schedule_ = schedule();
  const int columns_ = columns_of(schedule_);
  const int64_t tiles_ = tiles_of(head.vocab, columns_);
  Kept kept_{};
  PlacedRow* records_ = nullptr;
  float* target_logits_ = nullptr;
  BitSums* partials_ = nullptr;
};

}  // namespace

const Path kPath{serves, plan, [](const Call& call, int64_t capacity, bool stores) {
                   return std::unique_ptr<Scan>(new Hopper(call, capacity, stores));
                 }};

}  // namespace bupo::cuda::sm90
