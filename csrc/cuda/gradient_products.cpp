#include "gradient_products.h"

#include <algorithm>
#include <vector>

namespace bupo::cuda {

GradientProducts::GradientProducts(const torch::stable::Tensor& like, const Device& device,
                                   Number number, const HeadArgs& args, const GradArgs& out,
                                   const Plan& plan, Slab& slab)
    : device_(device), number_(number), args_(args), out_(out), plan_(plan) {
  if (out.hidden) dx_ = slab.take<float>(plan.chunk * args.width);
  if (out.weight) x_ = slab.bytes(plan.chunk * args.width * bytes_of(number));
  if (plan.slice) slice_ = slab.take<float>(plan.slice * args.width);
  if (number == Number::kFloat16) norm_ = slab.take<float>(1);
  if (out.bias) {
    bias_ = slab.take<float>(args.vocab);
    set_zero(device, bias_, args.vocab * 4);
  }
  if (plan.accumulate) {
    const std::vector<int64_t> shape{args.vocab, args.width};
    accumulator_ =
        torch::stable::new_empty(like, {shape.data(), 2}, torch::headeronly::ScalarType::Float);
  }
}

void GradientProducts::set_norm(const Coefficients& bounds) {
  if (norm_) check(launch_norm(bounds, args_.tokens, norm_, device_.stream));
}

void GradientProducts::add(int64_t first, int64_t live, const Matrix& dz, const int64_t* order,
                           const float* scale) {
  if (live == 0) return;
  const int64_t element = bytes_of(number_);
  if (out_.hidden) {
    const Matrix weight{args_.weight, args_.vocab, args_.width, args_.weight_stride, number_};
    multiply(device_, {dx_, live, args_.width, args_.width, Number::kFloat}, dz, weight);
    auto* to = static_cast<char*>(out_.hidden) + first * args_.width * element;
    check(launch_scatter_rows(number_, {dx_, args_.width, live, order, scale, to}, device_.stream));
  }
  if (out_.weight) {
    add_weight(static_cast<const char*>(args_.hidden) + first * args_.hidden_stride * element, dz,
               order, scale);
  }
  if (out_.bias)
    check(launch_column_sums(number_, dz.data, dz.stride, scale, live, args_.vocab, bias_,
                             device_.stream));
}

void GradientProducts::add_weight(const char* x, const Matrix& dz, const int64_t* order,
                                  const float* scale) {
  check(launch_gather_rows(number_,
                           {x, args_.hidden_stride, args_.width, dz.rows, order, scale, norm_, x_},
                           device_.stream));
  const Matrix rows{x_, dz.rows, args_.width, args_.width, number_};
  if (!plan_.slice) {
    multiply(device_, {out_.weight, args_.vocab, args_.width, args_.width, number_}, transpose(dz),
             rows);
  } else if (!written_) {
    multiply(device_, {total(), args_.vocab, args_.width, args_.width, Number::kFloat},
             transpose(dz), rows);
  } else {
    for (int64_t j = 0; j < args_.vocab; j += plan_.slice) {
      const int64_t count = std::min(plan_.slice, args_.vocab - j);
      Matrix part = dz;
      part.data = static_cast<const char*>(dz.data) + j * bytes_of(number_);
      part.columns = count;
      multiply(device_, {slice_, count, args_.width, args_.width, Number::kFloat}, transpose(part),
               rows);
      check(launch_add(total() + j * args_.width, slice_, count * args_.width, device_.stream));
    }
  }
  written_ = true;
}

void GradientProducts::finish() {
  const int64_t count = args_.vocab * args_.width;
  if (out_.weight && !written_) {
    set_zero(device_, out_.weight, count * bytes_of(number_));
  } else if (out_.weight && plan_.accumulate) {
    check(launch_narrow(number_, total(), norm_, out_.weight, count, device_.stream));
  }
  if (out_.bias)
    check(launch_narrow(number_, bias_, nullptr, out_.bias, args_.vocab, device_.stream));
}

float* GradientProducts::total() {
  return static_cast<float*>(accumulator_ ? accumulator_->mutable_data_ptr() : out_.weight);
}

}  // namespace bupo::cuda
