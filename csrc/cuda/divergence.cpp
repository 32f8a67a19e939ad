// The rows of a call in chunks: library products for the logits of both sides, one kernel that
// makes divergences of them and dz in their place, and two library products for the gradients of
// each side that wants some. For all GPUs from sm_80 on.
//
// Rows without weight are in no product; the host waits once a chunk for the number of the others,
// but not while a CUDA graph is recorded.
//
// Tests: python_tests/test_cuda_emulated.py runs this file on the host.

#include "divergence.h"

#include "gradient_products.h"

namespace bupo::cuda {
namespace {

class Side {
 public:
  Side(const Call& call, const GradArgs& grads, int64_t capacity)
      : call_(call),
        head_(call.head),
        grads_(grads),
        stride_(products_stride(call.head.vocab)),
        to_grads_(call, grads, accumulates(call.shape(grads), capacity), capacity, true) {}

  static int64_t bytes_a_row(const Call& call, const GradArgs& grads) {
    const int64_t width = call.head.width;
    return 4 * products_stride(call.head.vocab) + (bytes_of(call.number) + 4 * grads.any()) * width;
  }

  void take(Slab& slab, int64_t capacity) {
    products_ = slab.take<float>(capacity * stride_);
    placed_ = slab.bytes(capacity * head_.width * bytes_of(call_.number));
    scale_ = slab.take<float>(capacity);
    if (head_.bias) bias_ = slab.take<float>(head_.vocab);
    if (grads_.any()) to_grads_.take(slab);
  }

  void begin(const float* weights) {
    if (bias_)
      check(launch_widen(call_.number, head_.bias, bias_, head_.vocab, call_.device.stream));
    if (grads_.any()) to_grads_.set_norm({weights, nullptr, nullptr});
  }

  // The logits of rows first + order[0, count).
  DivergenceSide multiply_rows(int64_t first, int64_t count, const int64_t* order) {
    const auto* from = static_cast<const char*>(head_.hidden) +
                       first * head_.hidden_stride * bytes_of(call_.number);
    check(launch_gather_rows(
        call_.number,
        {from, head_.hidden_stride, head_.width, count, order, nullptr, nullptr, placed_},
        call_.device.stream));
    multiply(
        call_.device, {products_, count, head_.vocab, stride_, Number::kFloat},
        {placed_, count, head_.width, head_.width, call_.number},
        transpose({head_.weight, head_.vocab, head_.width, head_.weight_stride, call_.number}));
    return {{products_, count, head_.vocab, stride_, bias_, at<float>(head_.temperature, first),
             static_cast<float>(head_.softcap)},
            grads_.any(),
            out_stride(),
            scale_};
  }

  void add(int64_t first, int64_t count, const int64_t* order) {
    if (grads_.any())
      to_grads_.add({{products_, count, head_.vocab, out_stride(), call_.number},
                     order,
                     scale_,
                     first,
                     placed_});
  }

  void finish() {
    if (grads_.any()) to_grads_.finish();
  }

 private:
  int64_t out_stride() const { return 4 * stride_ / bytes_of(call_.number); }

  const Call& call_;
  const HeadArgs& head_;
  GradArgs grads_;
  int64_t stride_;
  GradientProducts to_grads_;
  float *products_ = nullptr, *scale_ = nullptr, *bias_ = nullptr;
  void* placed_ = nullptr;
};

}  // namespace

void lm_head_divergence(const Call& student, const Call& teacher, const DivergenceArgs& args,
                        const GradArgs& to_student, const GradArgs& to_teacher, float* divergence,
                        float* loss) {
  const Device& device = student.device;
  const int64_t tokens = args.student.tokens;
  const auto* weights = at<float>(args.token_weights, 0);
  const int64_t of_row =
      Side::bytes_a_row(student, to_student) + Side::bytes_a_row(teacher, to_teacher) + 128;
  const int64_t columns = 16 * args.student.vocab;  // bias and its gradient, of both sides
  const int64_t capacity =
      std::min(tokens, rows_within(tokens, workspace_budget(device) - columns, of_row));
  Side q(student, to_student, capacity), p(teacher, to_teacher, capacity);
  int32_t* counts = nullptr;
  int64_t* order = nullptr;
  const Tensor workspace = make_workspace(student.like, [&](Slab& slab) {
    counts = slab.take<int32_t>(2);
    order = slab.take<int64_t>(capacity);
    q.take(slab, capacity);
    p.take(slab, capacity);
  });
  q.begin(weights);
  p.begin(weights);
  for (int64_t first = 0; first < tokens; first += capacity) {
    const int64_t rows = std::min(capacity, tokens - first);
    const RowChoice choice{nullptr, 0, weights + first};
    check(launch_arrange_rows({choice, rows, {}, true, true, !device.capturing, counts, order},
                              device.stream));
    const int64_t live = CountReader(device, counts, rows).wait()[0];
    if (live == 0) continue;
    check(launch_divergence_rows(
        student.number,
        {q.multiply_rows(first, live, order), p.multiply_rows(first, live, order), args.kind,
         static_cast<float>(args.beta), student.number == Number::kFloat16, order, weights + first,
         divergence + first},
        device.stream));
    q.add(first, live, order);
    p.add(first, live, order);
  }
  q.finish();
  p.finish();
  check(launch_weighted_sum(weights, divergence, tokens, loss, device.stream));
}

}  // namespace bupo::cuda
