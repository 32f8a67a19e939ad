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

#include "../lm_head.h"

#include <algorithm>
#include <optional>

#include "../../workspace.h"
#include "../gradient_products.h"
#include "../memory.h"

namespace bupo::cuda::portable {
namespace {

// What a forward leaves for its backward.
struct Kept {
  float* products = nullptr;      // [tokens, stride]
  Row<float>* records = nullptr;  // [tokens]

  static Kept lay_out(const HeadArgs& head, Slab& slab) {
    float* products = slab.take<float>(head.tokens * round_up(head.vocab, 8));
    return {products, slab.take<Row<float>>(head.tokens)};
  }
  static Kept in(const Call& call, void* memory) {
    if (memory == nullptr) return {};
    Slab slab(memory, portable::kept_bytes(call));
    return lay_out(call.head, slab);
  }
};

// The products and statistics of one block of rows after another.
class Head {
 public:
  Head(const Call& call, const Plan& plan, const Kept& kept, bool records, Slab& slab)
      : call_(call), kept_(kept), stride_(plan.products_stride) {
    if (!kept.products) products_ = slab.take<float>(plan.block * stride_);
    if (records && !kept.records) records_ = slab.take<Row<float>>(plan.block);
    if (call.head.bias) {
      bias_ = slab.take<float>(call.head.vocab);
      check(launch_widen(call.number, call.head.bias, bias_, call.head.vocab, call.device.stream));
    }
  }

  RowChoice choice(int64_t row, int64_t ignore_index, const void* token_weights) const {
    return {call_.head.targets + row, ignore_index, at<float>(token_weights, row)};
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
    const auto of = [row](void* array) {
      return array ? static_cast<float*>(array) + row : nullptr;
    };
    check(launch_row_stats({logits(row, rows), choice, records(row), of(out.logprobs),
                            of(out.entropy), of(out.logsumexp)},
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
      : call_(call), stride_(plan.products_stride) {
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
    const int64_t live = device.capturing ? rows_ : read_count(device, places_.count);
    products.add(first, live, {dz_, live, call_.head.vocab, stride_, call_.number}, places_.order,
                 places_.scale);
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
void run(const Call& call, int64_t ignore_index, const void* token_weights, const TokenOutputs& out,
         const GradArgs& grads, const Coefficients& bounds, const Kept& kept, bool forward,
         const CoefficientsOf& coefficients) {
  const HeadArgs& head = call.head;
  const Plan plan = plan_of(Path::kPortable, call.shape(grads), workspace_bytes);
  Workspace workspace(call.like, plan.bytes + 2 * 4 * head.vocab + kPieces * Slab::kAlignment);
  Head rows_of(call, plan, kept, grads.any(), workspace);
  std::optional<LiveRows> live;
  std::optional<GradientProducts> products;
  if (grads.any()) {
    live.emplace(call, plan, workspace);
    products.emplace(call.like, call.device, call.number, head, grads, plan, workspace);
    products->set_norm(bounds);
  }
  for (int64_t chunk = 0; chunk < head.tokens; chunk += plan.chunk) {
    const int64_t end = std::min(chunk + plan.chunk, head.tokens);
    if (live) live->begin();
    for (int64_t row = chunk; row < end; row += plan.block) {
      const int64_t rows = std::min(plan.block, end - row);
      const RowChoice choice = rows_of.choice(row, ignore_index, token_weights);
      if (forward) rows_of.forward(row, rows, choice, out);
      if (live)
        live->append(rows_of.logits(row, rows), rows_of.records(row), choice, row - chunk,
                     coefficients(row, rows));
    }
    if (live) live->end(chunk, *products);
  }
  if (products) products->finish();
}

}  // namespace

int64_t kept_bytes(const Call& call) {
  Slab counting;
  Kept::lay_out(call.head, counting);
  return counting.used();
}

void lm_head_logprobs(const Call& call, int64_t ignore_index, const TokenOutputs& out, void* kept) {
  run(call, ignore_index, nullptr, out, {}, {}, Kept::in(call, kept), true,
      [](int64_t, int64_t) { return Coefficients{}; });
}

void lm_head_logprobs_backward(const Call& call, int64_t ignore_index, const Coefficients& upstream,
                               const GradArgs& grads, void* kept) {
  run(call, ignore_index, nullptr, {}, grads, upstream, Kept::in(call, kept), kept == nullptr,
      [&](int64_t row, int64_t) {
        return Coefficients{upstream.on_logprob + row, upstream.on_entropy + row,
                            upstream.on_logsumexp ? upstream.on_logsumexp + row : nullptr};
      });
}

void policy_loss(const Call& call, const PolicyCoefficients& policy, const TokenOutputs& out,
                 const GradArgs& grads) {
  run(call, 0, policy.policy().token_weights, out, grads, policy.bounds(), {}, true,
      [&](int64_t row, int64_t rows) { return policy.make(row, rows); });
}

}  // namespace bupo::cuda::portable
