// The Hopper path: logits exist in registers only. One product makes the statistics of every row
// and E, the exponentials of those that may have a gradient; two library products make dX and dW
// from E, which is left in place and scaled by rows (gradient_rows.cu).
//
// Work: 1 + 2k products of 2NDV flop, k = share of rows that store E; E is written once and read
// twice. Masked rows are left out of all three, rows of advantage 0 out of the last two; a row
// whose ratio turns out clipped stays, as zeros. The host waits once a chunk, for the number of
// rows that store, which is known before the product begins; under graph capture all rows take part
// and it does not.
//
// lm_head_logprobs keeps E of all rows for its backward where that fits the budget, and the
// backward leaves out the rows without gradient; otherwise it makes E again.
//
// Tests: python_tests/test_cuda_emulated.py runs this file on the host.

#include <algorithm>
#include <optional>

#include "../../settings.h"
#include "../gradient_products.h"
#include "../paths.h"
#include "launch.h"

namespace bupo::cuda::sm90 {
namespace {

// Ping-pong unless set otherwise: by the model of bench/scan_model.py it hides its whole epilogue,
// cooperative shows 3 to 7 % of a product. Neither has been measured.
Schedule schedule() {
  return kernels == Kernels::kCooperative ? Schedule::kCooperative : Schedule::kPingpong;
}

int64_t tiles_of(const HeadArgs& head) {
  return sm90::tiles_of(head.vocab, columns_of(schedule()));
}

bool serves(const Call& call) {
  constexpr int64_t kLargest = int64_t{1} << 30;  // places and columns are 32-bit
  const HeadArgs& head = call.head;
  return call.device.capability == 90 && call.number == Number::kBfloat16 && head.softcap == 0 &&
         head.vocab < kLargest && head.width < kLargest &&
         rows_readable(head.weight, head.width, head.weight_stride);
}

Plan plan(const Shape& shape, int64_t budget) {
  return best_plan(shape, budget, [](const Shape& s, int64_t bytes) {
    return sm90_plan(s, bytes, columns_of(schedule()));
  });
}

// A chunk of rows in places: what the scan leaves and the gradient needs.
struct Scanned {
  Places places{};
  Kept kept{};
  PlacedRow* records = nullptr;
  float* target_logits = nullptr;

  static Scanned lay_out(const HeadArgs& head, int64_t capacity, bool stores, Slab& slab) {
    Scanned s;
    s.places = lay_out_places(head, capacity, slab);
    s.target_logits = slab.take<float>(capacity);
    if (!stores) return s;
    const int64_t stride = round_up(head.vocab, 64);
    s.kept = {static_cast<BFloat16*>(slab.bytes(capacity * stride * 2)), stride,
              slab.take<float>(capacity), slab.take<float>(capacity * tiles_of(head))};
    s.records = slab.take<PlacedRow>(capacity);
    return s;
  }
};

// The LM head's weight, and the scan of some rows of hidden with it.
class Head {
 public:
  Head(const Call& call, int64_t capacity, Slab& slab) : call_(call), head_(call.head) {
    partials_ = slab.take<BitSums>(tiles_of(head_) * capacity);
    placed_ = static_cast<BFloat16*>(slab.bytes(2 * capacity * head_.width));
    if (!head_.bias) return;
    bias_ = slab.take<float>(tiles_of(head_) * columns_of(schedule()));
    check(launch_widen(call.number, head_.bias, bias_, head_.vocab, call.device.stream));
  }

  // Of rows [first, first + s.places.capacity) those that take part; E is stored where there is
  // room for it. Returns a reader of how many rows store.
  CountReader scan(int64_t first, const Rows& rows, const Scanned& s, const TokenOutputs& out) {
    const Device& device = call_.device;
    const RowChoice choice = from(rows.choice, first);
    ArrangeArgs arrange = arrange_args(call_, rows, first, s.places);
    check(launch_arrange_rows(arrange, device.stream));
    const CountReader stored(device, s.places.counts);
    PlaceArgs place = place_args(call_, first, s.places, placed_);
    place.bias = bias_;
    place.old_logprobs = at<float>(rows.old_logprobs, first);
    place.guess = s.kept.guess;
    check(launch_place_rows(call_.number, place, device.stream));
    check(launch_head_scan(
        schedule(),
        {placed_, head_.weight, head_.width, head_.weight_stride, head_.width, head_.vocab,
         s.places, bias_, partials_, s.target_logits, tiles_of(head_), s.kept},
        device.stream));
    check(launch_finish_rows({partials_, tiles_of(head_), s.target_logits, s.kept.guess, s.places,
                              choice, head_.vocab, s.records, from(out.logprobs, first),
                              from(out.entropy, first), from(out.logsumexp, first)},
                             device.stream));
    return stored;
  }

  BFloat16* placed() const { return placed_; }  // rows of hidden of the last scan, by place

 private:
  const Call& call_;
  HeadArgs head_;
  BitSums* partials_;
  BFloat16* placed_;
  float* bias_ = nullptr;
};

GradientRowsArgs gradient_args(const HeadArgs& head, const Scanned& s, const Coefficients& c) {
  GradientRowsArgs args{};
  args.coefficients = c;
  args.places = s.places;
  args.kept = s.kept;
  args.vocab = head.vocab;
  args.tiles = tiles_of(head);
  args.tile_columns = columns_of(schedule());
  args.records = s.records;
  args.out = s.kept.e;
  return args;
}

constexpr int64_t kPieces = 32;  // at most, each rounded up

// Chunk after chunk: scan, then coefficients(row, rows), then the gradient of the rows that store.
template <class CoefficientsOf>
void run(const Call& call, const Rows& rows, const TokenOutputs& out, const GradArgs& grads,
         const CoefficientsOf& coefficients) {
  const HeadArgs& head = call.head;
  const Plan p = plan(call.shape(grads), workspace_budget(call.device));
  Workspace workspace(call.like, p.bytes + kPieces * Slab::kAlignment);
  const int64_t capacity = std::min(p.chunk, head.tokens);
  Head scanner(call, capacity, workspace);
  Scanned scanned = Scanned::lay_out(head, capacity, grads.any(), workspace);
  float* scale = grads.any() ? workspace.take<float>(capacity) : nullptr;
  std::optional<GradientProducts> products;
  if (grads.any())
    products.emplace(call.like, call.device, call.number, head, grads, p.accumulate, capacity, true,
                     workspace);
  for (int64_t row = 0; row < head.tokens; row += capacity) {
    const int64_t count = std::min(capacity, head.tokens - row);
    scanned.places.capacity = count;
    CountReader stored = scanner.scan(row, rows, scanned, out);
    if (!products) continue;
    GradientRowsArgs gradient = gradient_args(head, scanned, coefficients(row, count));
    gradient.rows = call.device.capturing ? count : stored.wait()[1];
    gradient.scale = scale;
    check(launch_gradient_rows(gradient, call.device.stream));
    products->add({{gradient.out, gradient.rows, head.vocab, scanned.kept.stride, call.number},
                   scanned.places.order,
                   scale,
                   row,
                   scanner.placed()});
  }
  if (products) products->finish();
}

int64_t kept_bytes(const Call& call) {
  Slab counting;
  Scanned::lay_out(call.head, call.head.tokens, true, counting);
  return counting.used();
}

void lm_head_logprobs(const Call& call, int64_t ignore_index, const TokenOutputs& out, void* kept) {
  Rows rows{{call.head.targets, ignore_index, nullptr}};
  if (!kept) return run(call, rows, out, {}, [](int64_t, int64_t) { return Coefficients{}; });
  rows.all_store = true;
  Slab slab(kept, kept_bytes(call));
  const Plan p = sm90_plan(call.shape({}), INT64_MAX, columns_of(schedule()));
  Workspace workspace(call.like, p.bytes + kPieces * Slab::kAlignment);
  Head(call, call.head.tokens, workspace)
      .scan(0, rows, Scanned::lay_out(call.head, call.head.tokens, true, slab), out);
}

// From E that the forward has kept: in place where every row has a gradient of its log-prob alone,
// which leaves E fit for another backward; else a copy of the live rows, chunk by chunk.
void backward_of_kept(const Call& call, const Coefficients& upstream, const GradArgs& grads,
                      void* kept) {
  const HeadArgs& head = call.head;
  const Device& device = call.device;
  Slab slab(kept, kept_bytes(call));
  const Scanned scanned = Scanned::lay_out(head, head.tokens, true, slab);
  const int64_t stride = scanned.kept.stride;
  Workspace list(call.like, 4 * head.tokens + 2 * Slab::kAlignment);
  auto *counts = list.take<int32_t>(2), *source = list.take<int32_t>(head.tokens);
  check(launch_live_places({upstream, scanned.places, counts, source}, device.stream));
  const auto [live, stored] = CountReader(device, counts).wait();
  const bool in_place = !upstream.on_entropy && !upstream.on_logsumexp && live == stored;
  Shape shape = call.shape(grads);
  shape.tokens = live;
  const int64_t capacity =
      in_place ? live : std::min(plan(shape, workspace_budget(device)).chunk, live);
  const int64_t a_row = 2 * (in_place ? 0 : stride) + 6 * head.width + 12;
  Workspace workspace(call.like, capacity * a_row + 4 * head.vocab + kPieces * Slab::kAlignment);
  GradientRowsArgs gradient = gradient_args(head, scanned, upstream);
  if (!in_place) {
    gradient.out = static_cast<BFloat16*>(workspace.bytes(2 * capacity * stride));
    gradient.order = workspace.take<int64_t>(capacity);
  }
  gradient.scale = workspace.take<float>(capacity);
  GradientProducts products(call.like, device, call.number, head, grads,
                            accumulates(shape, capacity), capacity, false, workspace);
  for (int64_t first = 0; first < live; first += capacity) {
    gradient.rows = std::min(capacity, live - first);
    if (!in_place) gradient.source = source + first;
    check(launch_gradient_rows(gradient, device.stream));
    products.add({{gradient.out, gradient.rows, head.vocab, stride, call.number},
                  in_place ? scanned.places.order : gradient.order,
                  gradient.scale,
                  0,
                  nullptr});
  }
  products.finish();
}

void lm_head_logprobs_backward(const Call& call, int64_t ignore_index, const Coefficients& upstream,
                               const GradArgs& grads, void* kept) {
  // Under capture every row keeps its place, and an eager forward has not left them so.
  if (kept && !call.device.capturing) return backward_of_kept(call, upstream, grads, kept);
  Rows rows{{call.head.targets, ignore_index, nullptr},
            {upstream.on_logprob, upstream.on_entropy, upstream.on_logsumexp}};
  rows.only_stored = true;
  run(call, rows, {}, grads, [&](int64_t row, int64_t) { return from(upstream, row); });
}

void policy_loss(const Call& call, const PolicyCoefficients& policy, const TokenOutputs& out,
                 const GradArgs& grads) {
  run(call, policy.rows(), out, grads,
      [&](int64_t row, int64_t count) { return policy.make(row, count); });
}

}  // namespace

const Path kPath{"sm90",     serves, plan, kept_bytes, lm_head_logprobs, lm_head_logprobs_backward,
                 policy_loss};

}  // namespace bupo::cuda::sm90
