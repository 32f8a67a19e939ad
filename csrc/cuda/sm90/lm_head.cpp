// The Hopper path: logits exist in registers only. One product makes the statistics of every row
// and E, the exponentials of those that may have a gradient; two library products make dX and dW
// from E, which is left in place and scaled by rows (gradient_rows.cu).
//
// Work: 1 + 2k products of 2NDV flop, k = share of live rows; E is written once and read twice.
// Masked rows are left out of all three, rows of advantage 0 out of the last two, and rows whose
// ratio turns out clipped leave by one move of another row each. The host waits once a chunk, for
// the number of live rows; under graph capture all rows take part and it does not.
//
// lm_head_logprobs keeps E of all rows for its backward where that fits the budget; otherwise the
// backward makes it again.
//
// Tests: python_tests/test_cuda_emulated.py runs this file on the host.

#include "../lm_head.h"

#include <algorithm>
#include <optional>

#include "../../workspace.h"
#include "../gradient_products.h"
#include "../memory.h"
#include "launch.h"

namespace bupo::cuda::sm90 {
namespace {

// A chunk of rows in places: what the scan leaves and the gradient needs.
struct Scanned {
  Places places{};
  Kept kept{};
  PlacedRow* records = nullptr;
  float* target_logits = nullptr;

  static Scanned lay_out(const HeadArgs& head, int64_t capacity, bool stores, Slab& slab) {
    Scanned s;
    s.places = {slab.take<int32_t>(2), slab.take<int64_t>(capacity), slab.take<int64_t>(capacity),
                head.temperature ? slab.take<float>(capacity) : nullptr, capacity};
    s.target_logits = slab.take<float>(capacity);
    if (!stores) return s;
    const int64_t stride = round_up(head.vocab, 64);
    s.kept.stride = stride;
    s.kept.e = static_cast<BFloat16*>(slab.bytes(capacity * stride * 2));
    s.kept.guess = slab.take<float>(capacity);
    s.kept.references = slab.take<float>(capacity * tiles_of(head.vocab));
    s.records = slab.take<PlacedRow>(capacity);
    return s;
  }
};

// Which rows a scan is of, and which of them store E.
struct Rows {
  RowChoice choice;  // of the call's first row
  const float* signals[3] = {};
  bool all_store = false, only_stored = false;
  const float* old_logprobs = nullptr;
};

// The LM head's weight, and the scan of some rows of hidden with it.
class Head {
 public:
  Head(const Call& call, int64_t capacity, Slab& slab) : call_(call), head_(call.head) {
    partials_ = slab.take<BitSums>(splits_of(head_.vocab) * capacity);
    if (!head_.bias) return;
    bias_ = slab.take<float>(tiles_of(head_.vocab) * kTileColumns);
    check(launch_widen(call.number, head_.bias, bias_, head_.vocab, call.device.stream));
  }

  // Rows in places: only those that take part are read, and E is stored where there is room for it.
  void scan(int64_t first, int64_t count, const Rows& rows, BFloat16* placed, const Scanned& s,
            const TokenOutputs& out) {
    const cudaStream_t stream = call_.device.stream;
    const RowChoice choice = from(rows.choice, first);
    ArrangeArgs arrange{
        choice, count, {}, rows.all_store, rows.only_stored, !call_.device.capturing, s.places};
    for (int i = 0; i < 3; ++i) arrange.signals[i] = at<float>(rows.signals[i], first);
    check(launch_arrange_rows(arrange, stream));
    check(launch_place_rows(
        {hidden(first), head_.hidden_stride, head_.width,
         static_cast<const BFloat16*>(head_.weight), head_.weight_stride, head_.vocab, bias_,
         at<float>(head_.temperature, first), at<float>(rows.old_logprobs, first), softcap(),
         head_.targets + first, s.places, placed, s.kept.guess},
        stream));
    ScanArgs args = scan_args(s.places.capacity);
    args.hidden = placed;
    args.hidden_stride = head_.width;
    args.counts = s.places.counts;
    args.targets = s.places.targets;
    args.temperature = s.places.temperature;
    args.target_logits = s.target_logits;
    args.kept = s.kept;
    check(launch_head_scan(args, stream));
    clear(out.logprobs, first, count);
    clear(out.entropy, first, count);
    clear(out.logsumexp, first, count);
    finish(first, choice, s.places, s.target_logits, s.kept.guess, s.records, out);
  }

  // Rows where they are, all of them, for their statistics alone.
  void scan(int64_t first, int64_t count, const RowChoice& choice, float* target_logits,
            const TokenOutputs& out) {
    ScanArgs args = scan_args(count);
    args.hidden = hidden(first);
    args.hidden_stride = head_.hidden_stride;
    args.targets = head_.targets + first;
    args.temperature = at<float>(head_.temperature, first);
    args.target_logits = target_logits;
    check(launch_head_scan(args, call_.device.stream));
    Places places{};
    places.targets = const_cast<int64_t*>(args.targets);
    places.temperature = const_cast<float*>(args.temperature);
    places.capacity = count;
    finish(first, from(choice, first), places, target_logits, nullptr, nullptr, out);
  }

  float softcap() const { return static_cast<float>(head_.softcap); }

 private:
  static RowChoice from(RowChoice choice, int64_t first) {
    choice.targets += first;
    if (choice.token_weights) choice.token_weights += first;
    return choice;
  }
  const BFloat16* hidden(int64_t first) const {
    return reinterpret_cast<const BFloat16*>(static_cast<const char*>(head_.hidden) +
                                             2 * first * head_.hidden_stride);
  }
  ScanArgs scan_args(int64_t capacity) const {
    ScanArgs args{};
    args.weight = head_.weight;
    args.weight_stride = head_.weight_stride;
    args.width = head_.width;
    args.vocab = head_.vocab;
    args.capacity = capacity;
    args.bias = bias_;
    args.softcap = softcap();
    args.partials = partials_;
    args.tiles = tiles_of(head_.vocab);
    return args;
  }
  void finish(int64_t first, const RowChoice& choice, const Places& places,
              const float* target_logits, const float* guess, PlacedRow* records,
              const TokenOutputs& out) const {
    const auto of = [first](void* array) {
      return array ? static_cast<float*>(array) + first : nullptr;
    };
    check(
        launch_finish_rows({partials_, target_logits, guess, places, choice, head_.vocab, softcap(),
                            records, of(out.logprobs), of(out.entropy), of(out.logsumexp)},
                           call_.device.stream));
  }
  void clear(void* array, int64_t first, int64_t count) const {
    if (array) set_zero(call_.device, static_cast<float*>(array) + first, 4 * count);
  }

  const Call& call_;
  HeadArgs head_;
  BitSums* partials_;
  float* bias_ = nullptr;
};

// The rows of some places that have a gradient, as dz / scale.
class LiveRows {
 public:
  // out: where dz goes; null for the place of E.
  LiveRows(const Call& call, int64_t capacity, bool scaled_by_row, BFloat16* out, Slab& slab)
      : call_(call), capacity_(capacity), scaled_by_row_(scaled_by_row), out_(out) {
    count_ = slab.take<int32_t>(1);
    source_ = slab.take<int32_t>(capacity);
    scratch_ = slab.take<int32_t>(capacity);
    order_ = slab.take<int64_t>(capacity);
    scale_ = slab.take<float>(capacity);
  }

  // Of places [first, first + capacity); coefficients and choice by row, counted from `row`.
  void add_to(GradientProducts& products, const Scanned& s, int64_t first, int64_t row,
              const RowChoice& choice, const Coefficients& coefficients) {
    const HeadArgs& head = call_.head;
    const Device& device = call_.device;
    const int64_t rows = std::min(capacity_, s.places.capacity - first);
    check(
        launch_live_rows({coefficients, choice, s.places, first, rows, s.records, !device.capturing,
                          scaled_by_row_, count_, source_, scratch_, order_, scale_},
                         device.stream));
    const int64_t live = device.capturing ? rows : read_count(device, count_);
    BFloat16* out = out_ ? out_ : s.kept.e;
    check(launch_gradient_rows({coefficients, s.places, s.kept, head.vocab, tiles_of(head.vocab),
                                s.records, s.target_logits, head.softcap != 0, source_, order_,
                                scale_, live, scaled_by_row_, out, s.kept.stride},
                               device.stream));
    products.add(row, live, {out, live, head.vocab, s.kept.stride, call_.number}, order_, scale_);
  }

 private:
  const Call& call_;
  int64_t capacity_;
  bool scaled_by_row_;
  BFloat16* out_;
  int32_t *count_, *source_, *scratch_;
  int64_t* order_;
  float* scale_;
};

constexpr int64_t kPieces = 32;  // at most, each rounded up

Coefficients from(const Coefficients& c, int64_t row) {
  return {c.on_logprob + row, c.on_entropy + row, c.on_logsumexp ? c.on_logsumexp + row : nullptr};
}

// Chunk after chunk: scan, then coefficients(row, rows), then the gradient of the live rows.
template <class CoefficientsOf>
void run(const Call& call, const Rows& rows, bool scaled_by_row, const TokenOutputs& out,
         const GradArgs& grads, const CoefficientsOf& coefficients) {
  const HeadArgs& head = call.head;
  const Plan plan = plan_of(Path::kSm90, call.shape(grads), workspace_bytes);
  Workspace workspace(call.like, plan.bytes + kPieces * Slab::kAlignment);
  const int64_t capacity = std::min(plan.chunk, head.tokens);
  Head scanner(call, capacity, workspace);
  auto* placed = static_cast<BFloat16*>(workspace.bytes(2 * capacity * head.width));
  Scanned scanned = Scanned::lay_out(head, capacity, grads.any(), workspace);
  std::optional<LiveRows> live;
  std::optional<GradientProducts> products;
  if (grads.any()) {
    live.emplace(call, capacity, scaled_by_row, nullptr, workspace);
    products.emplace(call.like, call.device, call.number, head, grads, plan, workspace);
  }
  for (int64_t row = 0; row < head.tokens; row += capacity) {
    const int64_t count = std::min(capacity, head.tokens - row);
    scanned.places.capacity = count;
    scanner.scan(row, count, rows, placed, scanned, out);
    if (!live) continue;
    RowChoice choice = rows.choice;
    choice.targets += row;
    if (choice.token_weights) choice.token_weights += row;
    live->add_to(*products, scanned, 0, row, choice, coefficients(row, count));
  }
  if (products) products->finish();
}

}  // namespace

int64_t kept_bytes(const Call& call) {
  Slab counting;
  Scanned::lay_out(call.head, call.head.tokens, true, counting);
  return counting.used();
}

void lm_head_logprobs(const Call& call, int64_t ignore_index, const TokenOutputs& out, void* kept) {
  const HeadArgs& head = call.head;
  const RowChoice choice{head.targets, ignore_index, nullptr};
  if (kept == nullptr && !rows_readable(head.hidden, head.width, head.hidden_stride)) {
    Rows rows{choice};
    return run(call, rows, false, out, {}, [](int64_t, int64_t) { return Coefficients{}; });
  }
  Shape shape = call.shape({});
  shape.placed = false;
  const Plan plan = plan_of(Path::kSm90, shape, workspace_bytes);
  const int64_t capacity = kept ? head.tokens : std::min(plan.chunk, head.tokens);
  Slab measure;
  measure.take<BitSums>(splits_of(head.vocab) * capacity);
  measure.take<float>(tiles_of(head.vocab) * kTileColumns);
  measure.take<float>(capacity);
  if (kept) measure.bytes(2 * capacity * head.width);
  Workspace workspace(call.like, measure.used());
  Head scanner(call, capacity, workspace);
  if (kept) {
    Slab slab(kept, sm90::kept_bytes(call));
    const Scanned scanned = Scanned::lay_out(head, capacity, true, slab);
    Rows rows{choice};
    rows.all_store = true;
    auto* placed = static_cast<BFloat16*>(workspace.bytes(2 * capacity * head.width));
    scanner.scan(0, capacity, rows, placed, scanned, out);
    return;
  }
  float* target_logits = workspace.take<float>(capacity);
  for (int64_t row = 0; row < head.tokens; row += capacity)
    scanner.scan(row, std::min(capacity, head.tokens - row), choice, target_logits, out);
}

void lm_head_logprobs_backward(const Call& call, int64_t ignore_index, const Coefficients& upstream,
                               const GradArgs& grads, void* kept) {
  const HeadArgs& head = call.head;
  const RowChoice choice{head.targets, ignore_index, nullptr};
  // Under capture every row keeps its place, and an eager forward has not left them so.
  if (kept == nullptr || call.device.capturing) {
    Rows rows{choice, {upstream.on_logprob, upstream.on_entropy, upstream.on_logsumexp}};
    rows.only_stored = true;
    return run(call, rows, false, {}, grads,
               [&](int64_t row, int64_t) { return from(upstream, row); });
  }
  Slab slab(kept, sm90::kept_bytes(call));
  const Scanned scanned = Scanned::lay_out(head, head.tokens, true, slab);
  const Plan plan = plan_of(Path::kSm90, call.shape(grads), workspace_bytes);
  Workspace workspace(call.like, plan.bytes + kPieces * Slab::kAlignment);
  const int64_t capacity = std::min(plan.chunk, head.tokens);
  auto* dz = static_cast<BFloat16*>(workspace.bytes(2 * capacity * scanned.kept.stride));
  LiveRows live(call, capacity, false, dz, workspace);
  GradientProducts products(call.like, call.device, call.number, head, grads, plan, workspace);
  for (int64_t place = 0; place < head.tokens; place += capacity)
    live.add_to(products, scanned, place, 0, choice, upstream);
  products.finish();
}

void policy_loss(const Call& call, const PolicyCoefficients& policy, const TokenOutputs& out,
                 const GradArgs& grads) {
  const PolicyArgs& args = policy.policy();
  Rows rows{{call.head.targets, 0, at<float>(args.token_weights, 0)},
            {at<float>(args.advantages, 0)}};
  const bool entropy = args.settings.entropy_coef != 0;
  rows.all_store = entropy || args.settings.kl_coef != 0;
  rows.old_logprobs = at<float>(args.old_logprobs, 0);
  run(call, rows, !entropy, out, grads,
      [&](int64_t row, int64_t count) { return policy.make(row, count); });
}

}  // namespace bupo::cuda::sm90
