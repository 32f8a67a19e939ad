// The portable path, for every GPU of sm_80 and newer: library products with fp32 output, block by
// block of rows in places, each block reduced by one sweep; the rows that may have a gradient
// turned into dz; two gradient products a chunk.
//
// Work: 1 + 2k products of 2NDV flop, k = share of rows that may have a gradient. Further traffic a
// row: 4V bytes written and read; for those rows 4V read again, and dz written once and read twice.
// Memory: choose.h. Where gradients are computed masked rows are left out, and the host waits once
// a chunk, for the numbers of rows; under graph capture every row takes part and it does not.
//
// lm_head_logprobs keeps the products of all rows, and its backward starts from them, where that
// fits the budget; otherwise the backward makes them again.
//
// Tests: python_tests/test_cuda_emulated.py runs this file on the host.

#include <algorithm>
#include <optional>

#include "../gradient_products.h"
#include "../paths.h"

namespace bupo::cuda::portable {
namespace {

Plan plan(const Shape& shape, int64_t budget) { return best_plan(shape, budget, portable_plan); }

// Places, and the products and statistics of some of them.
struct Scanned {
  Places places{};
  float* products = nullptr;      // [block, stride]
  Row<float>* records = nullptr;  // [block]

  static Scanned lay_out(const HeadArgs& head, int64_t capacity, int64_t block, Slab& slab) {
    return {lay_out_places(head, capacity, slab),
            slab.take<float>(block * products_stride(head.vocab)), slab.take<Row<float>>(block)};
  }
};

class Head {
 public:
  Head(const Call& call, Slab& slab) : call_(call), stride_(products_stride(call.head.vocab)) {
    if (!call.head.bias) return;
    bias_ = slab.take<float>(call.head.vocab);
    check(launch_widen(call.number, call.head.bias, bias_, call.head.vocab, call.device.stream));
  }

  // Of `rows` places from `first` on; products are the block's.
  LogitBlock logits(const Scanned& s, int64_t first, int64_t rows) const {
    return {s.products,
            rows,
            call_.head.vocab,
            stride_,
            bias_,
            at<float>(s.places.temperature, first),
            static_cast<float>(call_.head.softcap)};
  }

  // The products and statistics of a block; `chunk`: the first row of the chunk.
  void forward(const Scanned& s, const void* placed, int64_t chunk, int64_t first, int64_t rows,
               const RowChoice& choice, const TokenOutputs& out) {
    const HeadArgs& head = call_.head;
    const Number number = call_.number;
    const auto* x = static_cast<const char*>(placed) + first * head.width * bytes_of(number);
    multiply(call_.device, {s.products, rows, head.vocab, stride_, Number::kFloat},
             {x, rows, head.width, head.width, number},
             transpose({head.weight, head.vocab, head.width, head.weight_stride, number}));
    check(launch_row_stats(
        {logits(s, first, rows), s.places, first, choice, s.records, from(out.logprobs, chunk),
         from(out.entropy, chunk), from(out.logsumexp, chunk)},
        call_.device.stream));
  }

 private:
  const Call& call_;
  int64_t stride_;
  float* bias_ = nullptr;
};

// dz of a chunk's places, each with its scale.
struct LogitGradients {
  LogitGradients(const Call& call, int64_t capacity, Slab& slab)
      : stride(products_stride(call.head.vocab)),
        element(bytes_of(call.number)),
        dz(static_cast<char*>(slab.bytes(capacity * stride * element))),
        scale(slab.take<float>(capacity)) {}

  // args.out and args.scale are those of place `at`.
  void make(const Call& call, LogitGradientArgs args, int64_t at) const {
    args.half = call.number == Number::kFloat16;
    args.out = dz + at * stride * element;
    args.out_stride = stride;
    args.scale = scale + at;
    check(launch_logit_gradient(call.number, args, call.device.stream));
  }
  Matrix matrix(const Call& call, int64_t rows) const {
    return {dz, rows, call.head.vocab, stride, call.number};
  }

  int64_t stride, element;
  char* dz;
  float* scale;
};

constexpr int64_t kPieces = 32;  // at most, each rounded up

// The walk over chunks and blocks. coefficients(row, rows) are those of a chunk, as far as its
// statistics have been written. kept: where products and records of all places stay.
template <class CoefficientsOf>
void run(const Call& call, const Rows& rows, const TokenOutputs& out, const GradArgs& grads,
         const Coefficients& bounds, void* kept, const CoefficientsOf& coefficients) {
  const HeadArgs& head = call.head;
  const Device& device = call.device;
  Plan p = plan(call.shape(grads), workspace_budget(device));
  if (kept) p.chunk = head.tokens;
  const int64_t capacity = std::min(p.chunk, head.tokens), block = std::min(p.block, capacity);
  const int64_t placed_bytes = capacity * head.width * bytes_of(call.number);
  // With gradients the plan has room for x and its places.
  const int64_t beside = grads.any() ? 0 : placed_bytes;
  Workspace workspace(call.like, p.bytes + beside + 128 * capacity + 2 * 4 * head.vocab +
                                     kPieces * Slab::kAlignment);
  Slab keeping(kept, kept ? kPath.kept_bytes(call) : 0);
  const Scanned all = Scanned::lay_out(head, capacity, kept ? capacity : block,
                                       kept ? keeping : static_cast<Slab&>(workspace));
  void* placed = workspace.bytes(placed_bytes);
  Head scanner(call, workspace);
  std::optional<LogitGradients> gradients;
  std::optional<GradientProducts> products;
  if (grads.any()) {
    gradients.emplace(call, capacity, workspace);
    products.emplace(call.like, device, call.number, head, grads, p.accumulate, capacity, true,
                     workspace);
    products->set_norm(bounds);
  }
  for (int64_t chunk = 0; chunk < head.tokens; chunk += capacity) {
    Scanned s = all;
    s.places.capacity = std::min(capacity, head.tokens - chunk);
    check(launch_arrange_rows(arrange_args(call, rows, chunk, s.places), device.stream));
    CountReader reader(device, s.places.counts);
    check(launch_place_rows(call.number, place_args(call, chunk, s.places, placed), device.stream));
    std::array<int64_t, 2> counts{s.places.capacity, s.places.capacity};
    if (products && !device.capturing) counts = reader.wait();
    const auto [taking_part, stored] = counts;
    for (int64_t first = 0; first < taking_part; first += block) {
      const int64_t count = std::min(block, taking_part - first);
      if (kept) {
        s.products = all.products + first * products_stride(head.vocab);
        s.records = all.records + first;
      }
      scanner.forward(s, placed, chunk, first, count, from(rows.choice, chunk), out);
      if (!products || first >= stored) continue;
      gradients->make(
          call,
          {scanner.logits(s, first, count), s.places, s.records,
           coefficients(chunk, s.places.capacity), first, std::min(count, stored - first)},
          first);
    }
    if (products)
      products->add(
          {gradients->matrix(call, stored), s.places.order, gradients->scale, chunk, placed});
  }
  if (products) products->finish();
}

int64_t kept_bytes(const Call& call) {
  Slab counting;
  Scanned::lay_out(call.head, call.head.tokens, call.head.tokens, counting);
  return counting.used();
}

void lm_head_logprobs(const Call& call, int64_t ignore_index, const TokenOutputs& out, void* kept) {
  Rows rows{{call.head.targets, ignore_index, nullptr}};
  rows.all_store = true;
  run(call, rows, out, {}, {}, kept, [](int64_t, int64_t) { return Coefficients{}; });
}

void backward_of_kept(const Call& call, const Coefficients& upstream, const GradArgs& grads,
                      void* kept) {
  const HeadArgs& head = call.head;
  const Device& device = call.device;
  Slab slab(kept, kept_bytes(call));
  const Scanned s = Scanned::lay_out(head, head.tokens, head.tokens, slab);
  Workspace list(call.like, 4 * head.tokens + 2 * Slab::kAlignment);
  auto *counts = list.take<int32_t>(2), *source = list.take<int32_t>(head.tokens);
  check(launch_live_places({upstream, s.places, counts, source}, device.stream));
  const int64_t live = CountReader(device, counts).wait()[0];
  Shape shape = call.shape(grads);
  shape.tokens = live;
  const Plan p = plan(shape, workspace_budget(device));
  const int64_t capacity = std::min(p.chunk, live);
  Workspace workspace(call.like, p.bytes + 2 * 4 * head.vocab + kPieces * Slab::kAlignment);
  const Head scanner(call, workspace);
  const LogitGradients gradients(call, capacity, workspace);
  auto* order = workspace.take<int64_t>(capacity);
  GradientProducts products(call.like, device, call.number, head, grads, p.accumulate, capacity,
                            false, workspace);
  products.set_norm(upstream);
  for (int64_t first = 0; first < live; first += capacity) {
    LogitGradientArgs args{scanner.logits(s, 0, head.tokens), s.places,      s.records, upstream, 0,
                           std::min(capacity, live - first),  source + first};
    args.order = order;
    gradients.make(call, args, 0);
    products.add({gradients.matrix(call, args.rows), order, gradients.scale, 0, nullptr});
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
  run(call, rows, {}, grads, upstream, nullptr,
      [&](int64_t row, int64_t) { return from(upstream, row); });
}

void policy_loss(const Call& call, const PolicyCoefficients& policy, const TokenOutputs& out,
                 const GradArgs& grads) {
  run(call, policy.rows(), out, grads, policy.bounds(), nullptr,
      [&](int64_t row, int64_t count) { return policy.make(row, count); });
}

}  // namespace

const Path kPath{"portable",       [](const Call&) { return true; }, plan,       kept_bytes,
                 lm_head_logprobs, lm_head_logprobs_backward,        policy_loss};

}  // namespace bupo::cuda::portable
