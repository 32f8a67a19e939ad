// The portable path, for every GPU of sm_80 and newer: library products with fp32 output, block by
// block of rows, each block reduced by one sweep; rows with a gradient turned into dz and packed
// into a chunk; two gradient products a chunk.
//
// Work: 1 + 2k products of 2NDV flop, k = share of live rows. Beside them, of each block: 4V bytes
// a row written and read, of live rows 4V read again and dz written and read twice. Memory:
// choose.h. The host waits once a chunk, for the number of live rows; under graph capture every row
// keeps its place and the host does not wait.
//
// Tests: python_tests/test_cuda_emulated.py runs this file on the host.

#include "lm_head.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <vector>

#include "../workspace.h"
#include "choose.h"
#include "library.h"

namespace bupo::cuda {
namespace {

// One allocation, handed out front to back.
class Workspace {
 public:
  Workspace(const torch::stable::Tensor& like, int64_t bytes) {
    const std::vector<int64_t> shape{bytes};
    slab_ = torch::stable::new_empty(like, {shape.data(), 1}, torch::headeronly::ScalarType::Byte);
    next_ = static_cast<char*>(slab_->mutable_data_ptr());
    end_ = next_ + bytes;
  }

  template <class T>
  T* take(int64_t count) {
    return static_cast<T*>(bytes(count * static_cast<int64_t>(sizeof(T))));
  }
  void* bytes(int64_t count) {
    char* at = next_;
    next_ += round_up(count, kAlignment);
    if (next_ > end_) throw std::logic_error("bupo.ops: the workspace was planned too small");
    return at;
  }

  static constexpr int64_t kAlignment = 256;

 private:
  std::optional<torch::stable::Tensor> slab_;
  char *next_, *end_;
};

constexpr int64_t kPieces = 16;  // at most, each rounded up to kAlignment

template <class T>
const T* at(const void* array, int64_t i) {
  return array ? static_cast<const T*>(array) + i : nullptr;
}

// The products and statistics of one block of rows after another.
class Head {
 public:
  Head(const Device& device, Number number, const HeadArgs& args, const Plan& plan,
       Workspace& workspace)
      : device_(device), number_(number), args_(args), stride_(plan.products_stride) {
    products_ = workspace.take<float>(plan.block * stride_);
    if (args.bias) {
      bias_ = workspace.take<float>(args.vocab);
      check(launch_widen(number, args.bias, bias_, args.vocab, device.stream));
    }
  }

  RowChoice choice(int64_t row, int64_t ignore_index, const void* token_weights) const {
    return {args_.targets + row, ignore_index, at<float>(token_weights, row)};
  }

  LogitBlock logits(int64_t row, int64_t rows) const {
    return {products_,
            rows,
            args_.vocab,
            stride_,
            bias_,
            at<float>(args_.temperature, row),
            static_cast<float>(args_.softcap)};
  }

  void forward(int64_t row, int64_t rows, const RowChoice& choice, Row<float>* records,
               const TokenOutputs& out) {
    const int64_t bytes = number_ == Number::kFloat ? 4 : 2;
    const auto* x = static_cast<const char*>(args_.hidden) + row * args_.hidden_stride * bytes;
    multiply(device_, {products_, rows, args_.vocab, stride_, Number::kFloat},
             {x, rows, args_.width, args_.hidden_stride, number_}, transpose(weight()));
    check(launch_row_stats(
        {logits(row, rows), choice, records, static_cast<float*>(out.logprobs) + row,
         static_cast<float*>(out.entropy) + row,
         out.logsumexp ? static_cast<float*>(out.logsumexp) + row : nullptr},
        device_.stream));
  }

  Matrix weight() const {
    return {args_.weight, args_.vocab, args_.width, args_.weight_stride, number_};
  }

 private:
  const Device& device_;
  Number number_;
  HeadArgs args_;
  int64_t stride_;
  float* products_;
  float* bias_ = nullptr;
};

// dz of a chunk's live rows, and what is made of it.
class Gradients {
 public:
  Gradients(const torch::stable::Tensor& like, const Device& device, Number number,
            const HeadArgs& args, const GradArgs& out, const Plan& plan, Workspace& workspace)
      : device_(device), number_(number), args_(args), out_(out), plan_(plan) {
    const int64_t element = number == Number::kFloat ? 4 : 2;
    dz_ = workspace.bytes(plan.chunk * plan.products_stride * element);
    records_ = workspace.take<Row<float>>(plan.block);
    places_ = {workspace.take<int32_t>(1), workspace.take<int32_t>(plan.block),
               workspace.take<int64_t>(plan.chunk), workspace.take<float>(plan.chunk)};
    if (out.hidden) dx_ = workspace.take<float>(plan.chunk * args.width);
    if (out.weight) x_ = workspace.bytes(plan.chunk * args.width * element);
    if (plan.slice) slice_ = workspace.take<float>(plan.slice * args.width);
    if (number == Number::kFloat16) norm_ = workspace.take<float>(1);
    if (out.bias) {
      bias_ = workspace.take<float>(args.vocab);
      set_zero(device, bias_, args.vocab * 4);
    }
    if (plan.accumulate) {
      const std::vector<int64_t> shape{args.vocab, args.width};
      accumulator_ =
          torch::stable::new_empty(like, {shape.data(), 2}, torch::headeronly::ScalarType::Float);
    }
  }

  Row<float>* records() const { return records_; }

  void begin_chunk() {
    set_zero(device_, places_.count, sizeof(int32_t));
    rows_ = 0;
  }

  // The bound that keeps float16 rows in range; before the first chunk.
  void set_norm(const Coefficients& bounds) {
    if (norm_) check(launch_norm(bounds, args_.tokens, norm_, device_.stream));
  }

  // The block whose logits are in `head` now; `first` counts from the chunk's first row.
  void append(const LogitBlock& logits, const RowChoice& choice, int64_t first,
              const Coefficients& coefficients) {
    check(launch_live_places({coefficients, logits.temperature, choice, logits.rows, first,
                              !device_.capturing, number_ == Number::kFloat16, places_},
                             device_.stream));
    check(launch_logit_gradient(
        number_,
        {logits, choice.targets, records_, coefficients, places_, dz_, plan_.products_stride},
        device_.stream));
    rows_ += logits.rows;
  }

  void end_chunk(int64_t first, const Matrix& weight) {
    const int64_t live = device_.capturing ? rows_ : read_count(device_, places_.count);
    if (live == 0) return;
    const Matrix dz{dz_, live, args_.vocab, plan_.products_stride, number_};
    const int64_t element = number_ == Number::kFloat ? 4 : 2;
    if (out_.hidden) {
      multiply(device_, {dx_, live, args_.width, args_.width, Number::kFloat}, dz, weight);
      auto* to = static_cast<char*>(out_.hidden) + first * args_.width * element;
      check(launch_scatter_rows(number_, {dx_, args_.width, live, places_.order, places_.scale, to},
                                device_.stream));
    }
    if (out_.weight) add_weight(first, live, dz, element);
    if (out_.bias)
      check(launch_column_sums(number_, dz_, plan_.products_stride, places_.scale, live,
                               args_.vocab, bias_, device_.stream));
  }

  void finish() {
    const int64_t count = args_.vocab * args_.width;
    if (out_.weight && !written_) {
      set_zero(device_, out_.weight, count * (number_ == Number::kFloat ? 4 : 2));
    } else if (out_.weight && plan_.accumulate) {
      check(launch_narrow(number_, total(), norm_, out_.weight, count, device_.stream));
    }
    if (out_.bias)
      check(launch_narrow(number_, bias_, nullptr, out_.bias, args_.vocab, device_.stream));
  }

 private:
  // Where dW is summed: fp32.
  float* total() {
    return static_cast<float*>(accumulator_ ? accumulator_->mutable_data_ptr() : out_.weight);
  }

  void add_weight(int64_t first, int64_t live, const Matrix& dz, int64_t element) {
    const auto* x = static_cast<const char*>(args_.hidden) + first * args_.hidden_stride * element;
    check(launch_gather_rows(
        number_,
        {x, args_.hidden_stride, args_.width, live, places_.order, places_.scale, norm_, x_},
        device_.stream));
    const Matrix rows{x_, live, args_.width, args_.width, number_};
    if (!plan_.slice) {
      multiply(device_, {out_.weight, args_.vocab, args_.width, args_.width, number_},
               transpose(dz), rows);
    } else if (!written_) {
      multiply(device_, {total(), args_.vocab, args_.width, args_.width, Number::kFloat},
               transpose(dz), rows);
    } else {
      for (int64_t j = 0; j < args_.vocab; j += plan_.slice) {
        const int64_t count = std::min(plan_.slice, args_.vocab - j);
        Matrix part = dz;
        part.data = static_cast<const char*>(dz_) + j * element;
        part.columns = count;
        multiply(device_, {slice_, count, args_.width, args_.width, Number::kFloat},
                 transpose(part), rows);
        check(launch_add(total() + j * args_.width, slice_, count * args_.width, device_.stream));
      }
    }
    written_ = true;
  }

  const Device& device_;
  Number number_;
  HeadArgs args_;
  GradArgs out_;
  Plan plan_;
  void *dz_, *x_ = nullptr;
  Row<float>* records_;
  LivePlaces places_;
  float *dx_ = nullptr, *slice_ = nullptr, *bias_ = nullptr, *norm_ = nullptr;
  std::optional<torch::stable::Tensor> accumulator_;
  int64_t rows_ = 0;
  bool written_ = false;
};

// What the three ops share: plan, memory, and the walk over chunks and blocks. coefficients(row,
// rows) are those of a block whose statistics have just been written.
template <class CoefficientsOf>
void run(const torch::stable::Tensor& like, const Device& device, Number number,
         const HeadArgs& args, int64_t ignore_index, const void* token_weights,
         const TokenOutputs& out, const GradArgs& grads, const Coefficients& bounds,
         const CoefficientsOf& coefficients) {
  const Plan plan = plan_of({args.tokens, args.width, args.vocab, number == Number::kFloat ? 4 : 2,
                             grads.any(), grads.weight != nullptr, number == Number::kFloat16},
                            workspace_bytes);
  Workspace workspace(like, plan.bytes + 2 * 4 * args.vocab + kPieces * Workspace::kAlignment);
  Head head(device, number, args, plan, workspace);
  std::optional<Gradients> gradients;
  if (grads.any()) {
    gradients.emplace(like, device, number, args, grads, plan, workspace);
    gradients->set_norm(bounds);
  }
  for (int64_t chunk = 0; chunk < args.tokens; chunk += plan.chunk) {
    const int64_t end = std::min(chunk + plan.chunk, args.tokens);
    if (gradients) gradients->begin_chunk();
    for (int64_t row = chunk; row < end; row += plan.block) {
      const int64_t rows = std::min(plan.block, end - row);
      const RowChoice choice = head.choice(row, ignore_index, token_weights);
      head.forward(row, rows, choice, gradients ? gradients->records() : nullptr, out);
      if (gradients)
        gradients->append(head.logits(row, rows), choice, row - chunk, coefficients(row, rows));
    }
    if (gradients) gradients->end_chunk(chunk, head.weight());
  }
  if (gradients) gradients->finish();
}

Coefficients shifted(const Coefficients& c, int64_t row) {
  return {c.on_logprob + row, c.on_entropy + row, c.on_logsumexp ? c.on_logsumexp + row : nullptr};
}

}  // namespace

void lm_head_logprobs(const torch::stable::Tensor& like, Number number, const HeadArgs& head,
                      int64_t ignore_index, const TokenOutputs& out) {
  const Device device = current_device(like);
  run(like, device, number, head, ignore_index, nullptr, out, {}, {},
      [](int64_t, int64_t) { return Coefficients{}; });
}

void lm_head_logprobs_backward(const torch::stable::Tensor& like, Number number,
                               const HeadArgs& head, int64_t ignore_index,
                               const TokenGrads& upstream, const GradArgs& grads) {
  const Device device = current_device(like);
  Workspace outputs(like, 3 * round_up(4 * head.tokens, Workspace::kAlignment));
  float* logprobs = outputs.take<float>(head.tokens);
  float* entropy = outputs.take<float>(head.tokens);
  const Coefficients all{at<float>(upstream.logprobs, 0), at<float>(upstream.entropy, 0),
                         at<float>(upstream.logsumexp, 0)};
  run(like, device, number, head, ignore_index, nullptr, {logprobs, entropy, nullptr}, grads, all,
      [&](int64_t row, int64_t) { return shifted(all, row); });
}

void policy_loss(const torch::stable::Tensor& like, Number number, const HeadArgs& head,
                 const PolicyArgs& policy, const TokenOutputs& out, const GradArgs& grads,
                 void* loss, void* metrics) {
  const Device device = current_device(like);
  const auto rows_from = [&](int64_t row, int64_t rows) {
    return PolicyRows{policy.settings,
                      at<float>(out.logprobs, row),
                      at<float>(out.entropy, row),
                      at<float>(policy.old_logprobs, row),
                      at<float>(policy.advantages, row),
                      at<float>(policy.token_weights, row),
                      at<float>(policy.ref_logprobs, row),
                      at<float>(policy.importance_weights, row),
                      rows};
  };
  Workspace arrays(like,
                   2 * round_up(4 * head.tokens, Workspace::kAlignment) + Workspace::kAlignment);
  float* on_logprob = arrays.take<float>(head.tokens);
  float* on_entropy = arrays.take<float>(head.tokens);
  // token_weights bound the coefficients up to advantages of ordinary size.
  const Coefficients bounds{at<float>(policy.token_weights, 0), at<float>(policy.token_weights, 0),
                            nullptr};
  run(like, device, number, head, 0, policy.token_weights, out, grads, bounds,
      [&](int64_t row, int64_t rows) {
        check(launch_policy_coefficients(rows_from(row, rows), on_logprob + row, on_entropy + row,
                                         device.stream));
        return Coefficients{on_logprob + row, on_entropy + row, nullptr};
      });
  check(launch_policy_sums(rows_from(0, head.tokens), static_cast<float*>(loss),
                           static_cast<float*>(metrics), device.stream));
}

}  // namespace bupo::cuda
