#include "gradient_products.h"

namespace bupo::cuda {

GradientProducts::GradientProducts(const Call& call, const GradArgs& out, bool accumulate,
                                   int64_t capacity, bool by_place)
    : call_(call), out_(out), capacity_(capacity), by_place_(by_place) {
  if (accumulate)
    accumulator_ =
        make_uninitialised(call.like, {call.head.vocab, call.head.width}, ScalarType::Float);
}

void GradientProducts::take(Slab& slab) {
  const int64_t width = call_.head.width, vocab = call_.head.vocab;
  if (out_.hidden) dx_ = slab.take<float>(capacity_ * width);
  if (out_.weight && !by_place_) x_ = slab.bytes(capacity_ * width * bytes_of(call_.number));
  if (call_.number == Number::kFloat16) norm_ = slab.take<float>(1);
  if (out_.bias) bias_ = slab.take<float>(vocab);
  if (bias_) set_zero(call_.device, bias_, vocab * 4);
}

void GradientProducts::set_norm(const Coefficients& bounds) {
  if (norm_) check(launch_norm(bounds, call_.head.tokens, norm_, call_.device.stream));
}

void GradientProducts::add(const LiveRowsOfChunk& rows) {
  const Device& device = call_.device;
  const HeadArgs& head = call_.head;
  const Number number = call_.number;
  const int64_t live = rows.dz.rows, width = head.width, element = bytes_of(number);
  if (live == 0) return;
  if (out_.hidden) {
    multiply(device, {dx_, live, width, width, Number::kFloat}, rows.dz,
             {head.weight, head.vocab, width, head.weight_stride, number});
    auto* to = static_cast<char*>(out_.hidden) + rows.first * width * element;
    check(
        launch_scatter_rows(number, {dx_, width, live, rows.order, rows.scale, to}, device.stream));
  }
  if (out_.weight) {
    void* scaled = by_place_ ? rows.hidden : x_;
    GatherArgs gather{scaled, width, width, live, nullptr, rows.scale, norm_, scaled};
    if (!by_place_) {
      gather.x = static_cast<const char*>(head.hidden) + rows.first * head.hidden_stride * element;
      gather.stride = head.hidden_stride;
      gather.order = rows.order;
    }
    check(launch_gather_rows(number, gather, device.stream));
    void* sum = accumulator_ ? accumulator_->mutable_data_ptr() : out_.weight;
    multiply(device, {sum, head.vocab, width, width, accumulator_ ? Number::kFloat : number},
             transpose(rows.dz), {scaled, live, width, width, number}, written_);
  }
  if (out_.bias)
    check(launch_column_sums(number, rows.dz.data, rows.dz.stride, rows.scale, live, head.vocab,
                             bias_, device.stream));
  written_ = true;
}

void GradientProducts::finish() {
  const HeadArgs& head = call_.head;
  const int64_t count = head.vocab * head.width;
  if (out_.weight && !written_)
    set_zero(call_.device, out_.weight, count * bytes_of(call_.number));
  else if (accumulator_)
    check(launch_narrow(call_.number, static_cast<const float*>(accumulator_->const_data_ptr()),
                        norm_, out_.weight, count, call_.device.stream));
  if (out_.bias)
    check(launch_narrow(call_.number, bias_, nullptr, out_.bias, head.vocab, call_.device.stream));
}

}  // namespace bupo::cuda
