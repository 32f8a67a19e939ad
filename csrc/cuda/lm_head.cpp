// One walk over the rows of a call in chunks: a path's scan makes the statistics, the caller turns
// rows into coefficients (policy loss) or has them already (backward), the scan makes dz of the
// rows that may have a gradient, and two library products make dX and dW from it.
//
// Work: 1 + 2k products of 2NDV flop, k = share of rows that may have a gradient. Where there are
// gradients the host waits once a chunk, for the number of these rows; while a CUDA graph is
// recorded every row takes part and it does not.
//
// lm_head_logprobs keeps what the scan stores of all rows where that fits the budget, and its
// backward takes the rows with a gradient from there; otherwise the backward scans again.
//
// Tests: python_tests/test_cuda_emulated.py runs this file on the host.

#include "lm_head.h"

#include <algorithm>
#include <functional>

#include "gradient_products.h"

namespace bupo::cuda {
namespace {

// The coefficients of rows [first, first + count), whose log-probs have been written.
using CoefficientsOf = std::function<Coefficients(int64_t first, int64_t count)>;

// bounds: of the coefficients, of all rows.
void walk(const Path& path, const Call& call, const Rows& rows, const TokenOutputs& out,
          const GradArgs& grads, const Coefficients& bounds, const CoefficientsOf& coefficients,
          void* kept = nullptr) {
  const Plan plan = path.plan(call.shape(grads), workspace_budget(call.device));
  const int64_t tokens = call.head.tokens, capacity = kept ? tokens : std::min(plan.chunk, tokens);
  const auto scan = path.scan(call, capacity, kept || grads.any());
  GradientProducts products(call, grads, plan.accumulate, capacity, true);
  Slab keeping(kept);
  float* scale = nullptr;
  const Tensor workspace = make_workspace(call.like, [&](Slab& slab) {
    if (!kept) scan->take_stored(slab);
    scan->take_scratch(slab);
    if (!grads.any()) return;
    scale = slab.take<float>(capacity);
    products.take(slab);
  });
  if (kept) scan->take_stored(keeping);
  products.set_norm(bounds);
  for (int64_t first = 0; first < tokens; first += capacity) {
    const int64_t count = std::min(capacity, tokens - first);
    CountReader counts = scan->statistics(first, count, rows, out);
    if (!grads.any()) continue;
    const Coefficients c = coefficients(first, count);
    products.add({scan->gradient(c, {counts.wait()[1], scale}), scan->places.order, scale, first,
                  scan->placed});
  }
  if (grads.any()) products.finish();
}

// In place where every row that is stored has a gradient and what is stored survives it; else a
// copy of the rows with a gradient, chunk by chunk.
void backward_of_kept(const Path& path, const Call& call, const Coefficients& upstream,
                      const GradArgs& grads, void* kept) {
  const int64_t tokens = call.head.tokens;
  const auto scan = path.scan(call, tokens, true);
  Slab keeping(kept);
  scan->take_stored(keeping);
  int32_t *counts = nullptr, *source = nullptr;
  const Tensor list = make_workspace(call.like, [&](Slab& slab) {
    counts = slab.take<int32_t>(2);
    source = slab.take<int32_t>(tokens);
  });
  check(launch_live_places({upstream, scan->places, counts, source}, call.device.stream));
  const auto [live, stored] = CountReader(call.device, counts, tokens).wait();
  const bool in_place = live == stored && scan->survives(upstream);
  Shape shape = call.shape(grads);
  shape.tokens = live;
  const Plan plan = path.plan(shape, workspace_budget(call.device));
  const int64_t capacity = in_place ? live : std::min(plan.chunk, live);
  GradientProducts products(call, grads, accumulates(shape, capacity), capacity, false);
  GradientRows rows{};
  const Tensor workspace = make_workspace(call.like, [&](Slab& slab) {
    rows.scale = slab.take<float>(capacity);
    scan->take_bias(slab, call.head.vocab);
    products.take(slab);
    if (in_place) return;
    rows.out = slab.bytes(capacity * scan->stored_row_bytes());
    rows.order = slab.take<int64_t>(capacity);
  });
  products.set_norm(upstream);
  for (int64_t first = 0; first < live; first += capacity) {
    rows.rows = std::min(capacity, live - first);
    if (!in_place) rows.source = source + first;
    products.add({scan->gradient(upstream, rows), in_place ? scan->places.order : rows.order,
                  rows.scale, 0, nullptr});
  }
  products.finish();
}

}  // namespace

void Scan::take_bias(Slab& slab, int64_t columns) {
  if (!head.bias) return;
  bias = slab.take<float>(columns);
  if (bias) check(launch_widen(call.number, head.bias, bias, head.vocab, call.device.stream));
}

CountReader Scan::arrange(int64_t first, int64_t count, const Rows& rows) {
  const Device& device = call.device;
  places.capacity = count;
  ArrangeArgs order{
      from(rows.choice, first), count,         {},          rows.all_store, rows.only_stored,
      !device.capturing,        places.counts, places.order};
  for (int i = 0; i < 3; ++i) order.signals[i] = at<float>(rows.signals[i], first);
  check(launch_arrange_rows(order, device.stream));
  const CountReader counts(device, places.counts, count);
  const auto* hidden =
      static_cast<const char*>(head.hidden) + first * head.hidden_stride * bytes_of(call.number);
  check(launch_place_rows(
      call.number,
      {hidden, head.hidden_stride, head.width, head.weight, head.weight_stride, head.vocab, bias,
       at<float>(head.temperature, first), at<float>(rows.old_logprobs, first),
       head.targets + first, places, placed, guess},
      device.stream));
  return counts;
}

int64_t kept_bytes(const Path& path, const Call& call) {
  Slab counting;
  path.scan(call, call.head.tokens, true)->take_stored(counting);
  return counting.used();
}

void lm_head_logprobs(const Path& path, const Call& call, int64_t ignore_index,
                      const TokenOutputs& out, void* kept) {
  Rows rows{{call.head.targets, ignore_index, nullptr}};
  rows.all_store = kept != nullptr;
  walk(path, call, rows, out, {}, {}, {}, kept);
}

void lm_head_logprobs_backward(const Path& path, const Call& call, int64_t ignore_index,
                               const Coefficients& upstream, const GradArgs& grads, void* kept) {
  // Under capture every row keeps its place, and an eager forward has not left them so.
  if (kept && !call.device.capturing) return backward_of_kept(path, call, upstream, grads, kept);
  Rows rows{{call.head.targets, ignore_index, nullptr},
            {at<float>(upstream.on_logprob, 0), at<float>(upstream.on_entropy, 0),
             at<float>(upstream.on_logsumexp, 0)}};
  rows.only_stored = true;
  walk(path, call, rows, {}, grads, upstream,
       [&](int64_t first, int64_t) { return from(upstream, first); });
}

void policy_loss(const Path& path, const Call& call, const PolicyArgs& policy,
                 const TokenOutputs& out, const GradArgs& grads, void* loss, void* metrics) {
  const PolicySettings& settings = policy.settings;
  const int64_t tokens = call.head.tokens;
  const auto* weights = at<float>(policy.token_weights, 0);
  cudaStream_t stream = call.device.stream;
  PolicyRows of{policy, at<float>(out.logprobs, 0), at<float>(out.entropy, 0), 0, tokens};
  of.losses = from(out.losses, 0);
  float* signal = nullptr;
  const Tensor arrays = make_workspace(call.like, [&](Slab& slab) {
    of.on_logprob = slab.take<float>(tokens);
    if (settings.entropy_coef != 0) of.on_entropy = slab.take<float>(tokens);
    if (!settings.of_sequences()) return;
    of.log_ratios = slab.take<double>(tokens);
    signal = slab.take<float>(tokens);
  });
  const RowChoice choice{call.head.targets, 0, weights};
  const Coefficients coefficients{of.on_logprob, of.on_entropy, nullptr};
  const auto set_coefficients = [&](int64_t first, int64_t count) {
    of.first = first;
    of.rows = count;
    check(launch_policy_coefficients(of, stream));
    return from(coefficients, first);
  };
  // Advantage 0 is no gradient, unless of entropy or KL.
  Rows rows{choice, {at<float>(policy.advantages, 0)}};
  rows.all_store = settings.without_advantage();
  rows.old_logprobs = at<float>(policy.old_logprobs, 0);
  if (settings.of_sequences() && grads.any()) {
    check(launch_sequence_signals(of, signal, stream));
    rows.signals[0] = signal;
  }
  const bool at_once = tokens <= path.plan(call.shape(grads), workspace_budget(call.device)).chunk;
  if (!settings.of_sequences() || at_once) {
    // token_weights bound the coefficients up to advantages of ordinary size.
    walk(path, call, rows, out, grads, {weights, nullptr, nullptr}, set_coefficients);
    if (!grads.any()) set_coefficients(0, tokens);
  } else {  // a sequence may go over chunks: all log-probs first
    walk(path, call, {choice}, out, {}, {}, {});
    set_coefficients(0, tokens);
    Rows live{choice, {of.on_logprob, of.on_entropy}};
    live.only_stored = true;
    live.old_logprobs = rows.old_logprobs;
    if (grads.any())
      walk(path, call, live, {}, grads, coefficients,
           [&](int64_t first, int64_t) { return from(coefficients, first); });
  }
  of.first = 0;
  of.rows = tokens;
  check(launch_policy_sums(of, static_cast<float*>(loss), static_cast<float*>(metrics), stream));
}

}  // namespace bupo::cuda
