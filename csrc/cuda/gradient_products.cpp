#include "gradient_products.h"

namespace bupo::cuda {

GradientProducts::GradientProducts(const torch::stable::Tensor& like, const Device& device,
                                   Number number, const HeadArgs& args, const GradArgs& out,
                                   bool accumulate, int64_t chunk, bool by_place, Slab& slab)
    : device_(device), number_(number), args_(args), out_(out) {
  if (out.hidden) dx_ = slab.take<float>(chunk * args.width);
  if (out.weight && !by_place) x_ = slab.bytes(chunk * args.width * bytes_of(number));
  if (number == Number::kFloat16) norm_ = slab.take<float>(1);
  if (out.bias) {
    bias_ = slab.take<float>(args.vocab);
    set_zero(device, bias_, args.vocab * 4);
  }
  if (accumulate)
    accumulator_ = make_uninitialised(like, {args.vocab, args.width}, ScalarType::Float);
}

void GradientProducts::set_norm(const Coefficients& bounds) {
  if (norm_) check(launch_norm(bounds, args_.tokens, norm_, device_.stream));
}

void GradientProducts::add(const LiveRowsOfChunk& rows) {
  const int64_t live = rows.dz.rows, width = args_.width, element = bytes_of(number_);
  if (live == 0) return;
  if (out_.hidden) {
    multiply(device_, {dx_, live, width, width, Number::kFloat}, rows.dz,
             {args_.weight, args_.vocab, width, args_.weight_stride, number_});
    auto* to = static_cast<char*>(out_.hidden) + rows.first * width * element;
    check(launch_scatter_rows(number_, {dx_, width, live, rows.order, rows.scale, to},
                              device_.stream));
  }
  if (out_.weight) {
    const auto* x =
        static_cast<const char*>(args_.hidden) + rows.first * args_.hidden_stride * element;
    void* scaled = rows.hidden ? rows.hidden : x_;
    check(launch_gather_rows(
        number_,
        rows.hidden ? GatherArgs{scaled, width, width, live, nullptr, rows.scale, norm_, scaled}
                    : GatherArgs{x, args_.hidden_stride, width, live, rows.order, rows.scale, norm_,
                                 scaled},
        device_.stream));
    const bool in_fp32 = accumulator_ || number_ == Number::kFloat;
    const Matrix weight{in_fp32 ? total() : out_.weight, args_.vocab, width, width,
                        in_fp32 ? Number::kFloat : number_};
    multiply(device_, weight, transpose(rows.dz), {scaled, live, width, width, number_}, written_);
  }
  if (out_.bias)
    check(launch_column_sums(number_, rows.dz.data, rows.dz.stride, rows.scale, live, args_.vocab,
                             bias_, device_.stream));
  written_ = true;
}

void GradientProducts::finish() {
  const int64_t count = args_.vocab * args_.width;
  if (out_.weight && !written_)
    set_zero(device_, out_.weight, count * bytes_of(number_));
  else if (accumulator_)
    check(launch_narrow(number_, total(), norm_, out_.weight, count, device_.stream));
  if (out_.bias)
    check(launch_narrow(number_, bias_, nullptr, out_.bias, args_.vocab, device_.stream));
}

float* GradientProducts::total() {
  return static_cast<float*>(accumulator_ ? accumulator_->mutable_data_ptr() : out_.weight);
}

}  // namespace bupo::cuda
