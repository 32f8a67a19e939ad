// The portable path, for every GPU of sm_80 and newer: library products with fp32 output, block by
// block of rows, each block reduced by one sweep; rows with a gradient turned into dz and packed
// into a chunk; two gradient products a chunk.
//
// Work: 1 + 2k products of 2NDV flop, k = share of live rows. Beside them, of each block: 4V bytes
// a row written and read, of live rows 4V read again and dz written and read twice. Memory:
// choose.h. The host waits once a chunk, for the number of live rows; under graph capture every row
// keeps its place and the host does not wait.
//
// lm_head_logprobs keeps the products of all rows, and its backward starts from them, where that
// fits the budget; otherwise the backward makes them again, to the same bits.
//
// Tests: python_tests/test_cuda_emulated.py runs this file on the host.

#include <algorithm>
#include <optional>

#include "../gradient_products.h"
#include "../paths.h"

namespace bupo::cuda::portable {
namespace {

Plan plan(const Shape& shape, int64_t budget) { return best_plan(shape, budget, portable_plan); }

int64_t kept_bytes(const Call& call);

// What a forward leaves for its backward.
struct Kept {
  float* products = nullptr;      // [tokens, stride]
  Row<float>* records = nullptr;  // [tokens]

  static Kept lay_out(const HeadArgs& head, Slab& slab) {
    float* products = slab.take<float>(head.tokens * products_stride(head.vocab));
    return {products, slab.take<Row<float>>(head.tokens)};
  }
  static Kept in(const Call& call, void* memory) {
    if (memory == nullptr) return {};
    Slab slab(memory, kept_bytes(call));
    return lay_out(call.head, slab);
  }
};

// The products and statistics of one block of rows after another.
class Head {
 public:
  Head(const Call& call, int64_t block, const Kept& kept, bool records, Slab& slab)
      : call_(call), kept_(kept), stride_(products_stride(call.head.vocab)) {
    if (!kept.products) products_ = slab.take<float>(block * stride_);
    if (records && !kept.records) records_ = slab.take<Row<float>>(block);
    if (call.head.bias) {
      bias_ = slab.take<float>(call.head.vocab);
      check(launch_widen(call.number, call.head.bias, bias_, call.head.vocab, call.device.stream));
    }
  }

  LogitBlock logits(int64_t row, int64_t rows) const {
    return {products(row),
            rows,
            call_.head.vocab,
            stride_,
            bias_,
            at<float>(call_.head.temperature, row),
            static_cast<float>(call_.head.softcap)};
  }

  Row<float>* records(int64_t row) const { return kept_.records ? kept_.records + row : records_; }

  void forward(int64_t row, int64_t rows, const RowChoice& choice, const TokenOutputs& out) {
    const HeadArgs& head = call_.head;
    const Number number = call_.number;
    const auto* x =
        static_cast<const char*>(head.hidden) + row * head.hidden_stride * bytes_of(number);
    multiply(call_.device, {products(row), rows, head.vocab, stride_, Number::kFloat},
             {x, rows, head.width, head.hidden_stride, number},
             transpose({head.weight, head.vocab, head.width, head.weight_stride, number}));
    check(launch_row_stats({logits(row, rows), choice, records(row), from(out.logprobs, row),
                            from(out.entropy, row), from(out.logsumexp, row)},
                           call_.device.stream));
  }

 private:
  float* products(int64_t row) const {
    return kept_.products ? kept_.products + row * stride_ : products_;
  }

  const Call& call_;
  Kept kept_;
  int64_t stride_;
  float *products_ = nullptr, *bias_ = nullptr;
  Row<float>* records_ = nullptr;
};

// dz of a chunk's live rows.
class LiveRows {
 public:
  LiveRows(const Call& call, const Plan& plan, Slab& slab)
      : call_(call), stride_(products_stride(call.head.vocab)) {
    dz_ = slab.bytes(plan.chunk * stride_ * bytes_of(call.number));
    places_ = {slab.take<int32_t>(1), slab.take<int32_t>(plan.block),
               slab.take<int64_t>(plan.chunk), slab.take<float>(plan.chunk)};
  }

  void begin() {
    set_zero(call_.device, places_.count, sizeof(int32_t));
    rows_ = 0;
  }

  // A block whose logits and records are there; `first` counts from the chunk's first row.
  void append(const LogitBlock& logits, const Row<float>* records, const RowChoice& choice,
              int64_t first, const Coefficients& coefficients) {
    const Device& device = call_.device;
    check(launch_live_places({coefficients, logits.temperature, choice, logits.rows, first,
                              !device.capturing, call_.number == Number::kFloat16, places_},
                             device.stream));
    check(launch_logit_gradient(
        call_.number, {logits, choice.targets, records, coefficients, places_, dz_, stride_},
        device.stream));
    rows_ += logits.rows;
  }

  void end(int64_t first, GradientProducts& products) {
    const Device& device = call_.device;
    const int64_t live = device.capturing ? rows_ : CountReader(device, places_.count).wait();
    products.add({{dz_, live, call_.head.vocab, stride_, call_.number},
                  places_.order,
                  places_.scale,
                  first,
                  nullptr});
  }

 private:
  const Call& call_;
  int64_t stride_;
  void* dz_;
  LivePlaces places_;
  int64_t rows_ = 0;
};

constexpr int64_t kPieces = 16;  // at most, each rounded up

// The walk over chunks and blocks. coefficients(row, rows) are those of a block whose statistics
// have just been written, or are kept (`forward` false).
template <class CoefficientsOf>
void run(const Call& call, const RowChoice& choice, const TokenOutputs& out, const GradArgs& grads,
         const Coefficients& bounds, const Kept& kept, bool forward,
         const CoefficientsOf& coefficients) {
  const HeadArgs& head = call.head;
  const Plan p = plan(call.shape(grads), workspace_budget(call.device));
  Workspace workspace(call.like, p.bytes + 2 * 4 * head.vocab + kPieces * Slab::kAlignment);
  Head rows_of(call, p.block, kept, grads.any(), workspace);
  std::optional<LiveRows> live;
  std::optional<GradientProducts> products;
  if (grads.any()) {
    live.emplace(call, p, workspace);
    products.emplace(call.like, call.device, call.number, head, grads, p.accumulate, p.chunk, false,
                     workspace);
    products->set_norm(bounds);
  }
  for (int64_t chunk = 0; chunk < head.tokens; chunk += p.chunk) {
    const int64_t end = std::min(chunk + p.chunk, head.tokens);
    if (live) live->begin();
    for (int64_t row = chunk; row < end; row += p.block) {
      const int64_t rows = std::min(p.block, end - row);
      if (forward) rows_of.forward(row, rows, from(choice, row), out);
      if (live)
        live->append(rows_of.logits(row, rows), rows_of.records(row), from(choice, row),
                     row - chunk, coefficients(row, rows));
    }
    if (live) live->end(chunk, *products);
  }
  if (products) products->finish();
}

int64_t kept_bytes(const Call& call) {
  Slab counting;
  Kept::lay_out(call.head, counting);
  return counting.used();
}

void lm_head_logprobs(const Call& call, int64_t ignore_index, const TokenOutputs& out, void* kept) {
  run(call, {call.head.targets, ignore_index, nullptr}, out, {}, {}, Kept::in(call, kept), true,
      [](int64_t, int64_t) { return Coefficients{}; });
}

void lm_head_logprobs_backward(const Call& call, int64_t ignore_index, const Coefficients& upstream,
                               const GradArgs& grads, void* kept) {
  run(call, {call.head.targets, ignore_index, nullptr}, {}, grads, upstream, Kept::in(call, kept),
      kept == nullptr, [&](int64_t row, int64_t) { return from(upstream, row); });
}

void policy_loss(const Call& call, const PolicyCoefficients& policy, const TokenOutputs& out,
                 const GradArgs& grads) {
  run(call, {call.head.targets, 0, at<float>(policy.policy().token_weights, 0)}, out, grads,
      policy.bounds(), {}, true, [&](int64_t row, int64_t rows) { return policy.make(row, rows); });
}

}  // namespace

const Path kPath{"portable",       [](const Call&) { return true; }, plan,       kept_bytes,
                 lm_head_logprobs, lm_head_logprobs_backward,        policy_loss};

}  // namespace bupo::cuda::portable
