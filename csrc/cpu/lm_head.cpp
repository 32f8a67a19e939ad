// One pass over the tokens in chunks. For every chunk:
//   1. forward(): products with all weight rows, tile by tile, each tile reduced while it is in
//      cache; tiles are merged in their order, so the result does not depend on the threads.
//   2. the caller turns rows into coefficients (policy loss) or has them already (backward).
//      Where these depend on the whole sequence, a chunk is one or more sequences; the logits of a
//      sequence that is too long for the buffer are made once more.
//   3. Gradients::append(): the logits of tokens with a non-zero coefficient become dz, in place
//      and packed to the left. Tokens without gradient leave no column behind.
//   4. When the buffer is full, Gradients::flush(): dW += dz X and dX = dz^T W on those columns.
//
// Work: 1 + 2k products of 2NDV flop, k = share of live tokens. Memory beyond inputs and outputs:
// the buffer [V, kBufferBytes / 4V tokens] when gradients are wanted, otherwise one tile a thread;
// bfloat16 adds the fp32 accumulator of dW.
//
// Tests: python_tests/test_lm_head.py, test_policy_loss.py. Bench: bench/bench_lm_head.py.

#include "lm_head.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "library.h"
#include "products.h"
#include "vector_math.h"
#include "vocab_tile.h"

namespace bupo::cpu {
namespace {

constexpr int64_t kBufferBytes = int64_t{64} << 20;
constexpr int64_t kSequenceBytes = int64_t{256} << 20;  // if the longest sequence needs them
constexpr int64_t kForwardTokens = 256;

// Entry i of an array that may be null.
template <class T>
double at(const void* array, int64_t i, double otherwise = 0) {
  return array ? static_cast<const T*>(array)[i] : otherwise;
}

template <class Products>
class Head {
 public:
  using Acc = typename Products::Acc;

  explicit Head(const HeadArgs& args)
      : args_(args), products_(args), tiles_((args.vocab + kTileRows - 1) / kTileRows) {
    if (args.bias == nullptr) return;
    bias_.resize(static_cast<size_t>(args.vocab));
    for (int64_t j = 0; j < args.vocab; ++j) {
      if constexpr (std::is_same_v<typename Products::Stored, Acc>) {
        bias_[j] = static_cast<const Acc*>(args.bias)[j];
      } else {
        bias_[j] = from_bfloat16(static_cast<const uint16_t*>(args.bias)[j]);
      }
    }
  }

  const HeadArgs& args() const { return args_; }
  Products& products() { return products_; }
  int64_t tiles() const { return tiles_; }
  int64_t tile_rows(int64_t tile) const {
    return std::min(kTileRows, args_.vocab - tile * kTileRows);
  }
  double temperature(int64_t token) const { return at<Acc>(args_.temperature, token, 1); }
  bool capped() const { return args_.softcap != 0; }
  // The tile keeps z, or with a softcap u = z / scale.
  Acc scale(int64_t token) const {
    return Acc((capped() ? args_.softcap : 1) / temperature(token));
  }
  double kept_scale(int64_t token) const { return capped() ? double(scale(token)) : 1.0; }

  // Rows of logits of the given tokens, reduced. With `keep` [V, ld] the logits stay there.
  std::vector<Row<double>> forward(const int64_t* tokens, int64_t count, Acc* keep, int64_t ld) {
    products_.load_tokens(tokens, count);
    std::vector<int64_t> targets(static_cast<size_t>(count));
    std::vector<Acc> scales, targets_kept(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) targets[i] = args_.targets[tokens[i]];
    if (args_.temperature || capped()) {
      scales.assign(static_cast<size_t>(count + kColumnPad), Acc(1));
      for (int64_t i = 0; i < count; ++i) scales[i] = scale(tokens[i]);
    }
    std::vector<RowSums<Acc>> sums(static_cast<size_t>(tiles_ * count));
    const int64_t scratch_ld = round_up(count, kColumnPad);
    for_each(tiles_, [&](int64_t tile) {
      thread_local std::vector<Acc> scratch;
      Acc* logits = keep ? keep + tile * kTileRows * ld : nullptr;
      if (!keep) {
        scratch.resize(static_cast<size_t>(kTileRows * scratch_ld));
        logits = scratch.data();
      }
      const int64_t first = tile * kTileRows, stride = keep ? ld : scratch_ld;
      const LogitMap<Acc> map{bias_.empty() ? nullptr : bias_.data() + first,
                              scales.empty() ? nullptr : scales.data(), Acc(args_.softcap)};
      products_.logits(first, tile_rows(tile), logits, stride);
      tile_stats(logits, stride, tile_rows(tile), count, map, first, targets.data(),
                 targets_kept.data(), sums.data() + tile * count);
    });
    std::vector<Row<double>> rows(static_cast<size_t>(count));
    for_each(count, [&](int64_t i) {
      RowSums<double> row;
      for (int64_t tile = 0; tile < tiles_; ++tile) merge(row, sums[tile * count + i]);
      rows[i] = finish_row<double>(row, targets_kept[i] * kept_scale(tokens[i]), args_.vocab);
    });
    return rows;
  }

 private:
  HeadArgs args_;
  Products products_;
  int64_t tiles_;
  std::vector<Acc> bias_;
};

// Collects dz of live tokens and multiplies when the buffer is full.
template <class Products>
class Gradients {
 public:
  using Acc = typename Products::Acc;
  static constexpr bool kBfloat16 = !std::is_same_v<typename Products::Stored, Acc>;
  static constexpr bool kPackedGrad = !std::is_same_v<typename Products::Grad, Acc>;

  // together: of how many tokens the logits should fit, within kSequenceBytes.
  Gradients(Head<Products>& head, const GradArgs& out, int64_t tokens, int64_t together = 0)
      : head_(head), args_(head.args()), out_(out) {
    const int64_t bytes = args_.vocab * static_cast<int64_t>(sizeof(Acc));
    capacity_ = std::clamp<int64_t>(kBufferBytes / bytes / 64 * 64, 128, 2048);
    if (round_up(together, 64) * bytes <= kSequenceBytes)
      capacity_ = std::max(capacity_, round_up(together, 64));
    capacity_ = std::min(capacity_, round_up(tokens, 64));
    ld_ = capacity_ + 16;  // one cache line: no power of two, whose rows would share cache sets
    buffer_.reset(new Acc[static_cast<size_t>(args_.vocab * ld_)]);
    if (out.weight && kBfloat16) {
      accumulator_.reset(new Acc[static_cast<size_t>(args_.vocab * args_.width)]);
      weight_ = accumulator_.get();
    } else {
      weight_ = static_cast<Acc*>(out.weight);
    }
    if (out.bias) bias_.assign(static_cast<size_t>(args_.vocab), 0.0);
  }

  int64_t step() const { return capacity_; }
  int64_t ld() const { return ld_; }

  // Room for the logits of `count` tokens.
  Acc* reserve(int64_t count) {
    if (static_cast<int64_t>(columns_.size()) + round_up(count, kColumnPad) > capacity_) flush();
    return buffer_.get() + columns_.size();
  }

  // The last reserved logits become dz of the tokens with a gradient.
  void append(const int64_t* tokens, const std::vector<Row<double>>& rows,
              const std::vector<Coefficient<double>>& coefficients) {
    const int64_t base = static_cast<int64_t>(columns_.size());
    GradientColumns<Acc> live{};
    for (size_t i = 0; i < rows.size(); ++i) {
      const Coefficient<double>& c = coefficients[i];
      if (!c.is_live()) continue;
      const double temperature = head_.temperature(tokens[i]);
      columns_.push_back(tokens[i]);
      live.column.push_back(static_cast<int32_t>(i));
      live.max.push_back(Acc(rows[i].max));
      live.log_total.push_back(Acc(rows[i].log_total));
      live.mean.push_back(Acc(rows[i].mean));
      live.on_p.push_back(Acc((c.on_logsumexp - c.on_logprob) / temperature));
      live.on_gap.push_back(Acc(-c.on_entropy / temperature));
      if (head_.capped()) live.scale.push_back(head_.scale(tokens[i]));
    }
    const int64_t count = live.count = static_cast<int64_t>(live.column.size());
    if (count == 0) return;
    const size_t padded = static_cast<size_t>(round_up(count, kColumnPad));
    live.column.resize(padded);
    for (auto* v : {&live.max, &live.log_total, &live.mean, &live.on_p, &live.on_gap})
      v->resize(padded);
    if (head_.capped()) live.scale.resize(padded);
    for_each(head_.tiles(), [&](int64_t tile) {
      Acc* logits = buffer_.get() + tile * kTileRows * ld_;
      double* row_sums = out_.bias ? bias_.data() + tile * kTileRows : nullptr;
      tile_gradient<kPackedGrad>(logits, ld_, head_.tile_rows(tile), base, base, live, row_sums);
    });
    for (int64_t n = 0; n < count; ++n) {
      const int64_t i = live.column[n], target = args_.targets[tokens[i]];
      const Acc dz = Acc(target_gradient(rows[i], coefficients[i], tokens[i]));
      Acc* row = buffer_.get() + target * ld_;
      if constexpr (kPackedGrad) {
        reinterpret_cast<uint16_t*>(row)[base + n] = to_bfloat16(dz);
      } else {
        row[base + n] = dz;
      }
      if (out_.bias) bias_[target] += dz;
    }
  }

  void finish() {
    flush();
    if (out_.weight && !written_)
      std::fill_n(weight_, static_cast<size_t>(args_.vocab * args_.width), Acc(0));
    if constexpr (kBfloat16) {
      if (out_.weight) {
        for_each(args_.vocab, [&](int64_t j) {
          round_to_bfloat16(weight_ + j * args_.width,
                            static_cast<uint16_t*>(out_.weight) + j * args_.width, args_.width);
        });
      }
      if (out_.bias)
        for (int64_t j = 0; j < args_.vocab; ++j)
          static_cast<uint16_t*>(out_.bias)[j] = to_bfloat16(static_cast<float>(bias_[j]));
    } else if (out_.bias) {
      for (int64_t j = 0; j < args_.vocab; ++j) static_cast<Acc*>(out_.bias)[j] = Acc(bias_[j]);
    }
  }

 private:
  double target_gradient(const Row<double>& row, const Coefficient<double>& c,
                         int64_t token) const {
    double dz = bupo::target_gradient(row, c);
    if (head_.capped()) {
      const double u = (row.max + row.target) / head_.kept_scale(token);
      dz *= 1 - u * u;
    }
    return dz / head_.temperature(token);
  }

  void flush() {
    if (columns_.empty()) return;
    if (out_.weight || out_.hidden) head_.products().load_live(columns_);
    if (out_.weight) {
      for_each(head_.tiles(), [&](int64_t tile) {
        head_.products().weight_gradient(tile * kTileRows, head_.tile_rows(tile),
                                         buffer_.get() + tile * kTileRows * ld_, ld_, weight_,
                                         written_);
      });
      written_ = true;
    }
    if (out_.hidden) head_.products().hidden_gradient(buffer_.get(), ld_, out_.hidden);
    columns_.clear();
  }

  Head<Products>& head_;
  const HeadArgs& args_;
  GradArgs out_;
  int64_t capacity_, ld_;
  std::unique_ptr<Acc[]> buffer_;       // [V, ld]: dz of columns_, then logits of the open chunk
  std::unique_ptr<Acc[]> accumulator_;  // fp32 dW of bfloat16 weights
  Acc* weight_ = nullptr;
  bool written_ = false;
  std::vector<double> bias_;
  std::vector<int64_t> columns_;  // the token behind each column
};

template <class Body>
void for_products(ScalarType dtype, const HeadArgs& args, const Body& body) {
  if (dtype == ScalarType::Double) return body.template operator()<LibraryProducts<double>>();
  const auto run = [&]<class Stored>() {
    if (BlockProducts<Stored>::usable(args)) {
      body.template operator()<BlockProducts<Stored>>();
    } else {
      body.template operator()<LibraryProducts<Stored, float>>();
    }
  };
  dtype == ScalarType::Float ? run.template operator()<float>()
                             : run.template operator()<uint16_t>();
}

// visit(tokens, count, rows) for all chosen tokens, with their logits kept if `gradients` is set.
template <class Products, class Visit>
void for_chunks(Head<Products>& head, const std::vector<int64_t>& tokens,
                Gradients<Products>* gradients, const Visit& visit) {
  const int64_t total = static_cast<int64_t>(tokens.size());
  const int64_t step = gradients ? gradients->step() : kForwardTokens;
  for (int64_t begin = 0; begin < total; begin += step) {
    const int64_t count = std::min(step, total - begin);
    auto* keep = gradients ? gradients->reserve(count) : nullptr;
    visit(tokens.data() + begin,
          head.forward(tokens.data() + begin, count, keep, gradients ? gradients->ld() : 0));
  }
}

template <class T>
void write(const TokenOutputs& out, int64_t token, const Row<double>& row) {
  static_cast<T*>(out.logprobs)[token] = T(row.logprob);
  static_cast<T*>(out.entropy)[token] = T(row.entropy);
  if (out.logsumexp) static_cast<T*>(out.logsumexp)[token] = T(row.logsumexp);
}

// The end of the tokens from `begin` on that are taken together: `room` of them at most, or whole
// sequences, at least one.
int64_t end_of_span(const std::vector<int64_t>& tokens, int64_t begin, int64_t room,
                    const int64_t* sequence_ids) {
  const int64_t total = static_cast<int64_t>(tokens.size());
  if (!sequence_ids) return std::min(begin + room, total);
  int64_t end = begin;
  for (int64_t next = begin; next < total; end = next) {
    const int64_t id = sequence_ids[tokens[next]];
    while (next < total && sequence_ids[tokens[next]] == id) ++next;
    if (end > begin && next - begin > room) break;
  }
  return end;
}

// Rows that are taken together become losses, metrics and coefficients.
template <class Acc>
class PolicyTerms {
 public:
  PolicyTerms(const PolicyArgs& policy, const TokenOutputs& out) : policy_(policy), out_(out) {}
  PolicySums sums;

  std::vector<Coefficient<double>> of(const int64_t* tokens, const std::vector<Row<double>>& rows) {
    const size_t count = rows.size();
    std::vector<PolicyInput<double>> inputs(count);
    for (size_t i = 0; i < count; ++i) {
      write<Acc>(out_, tokens[i], rows[i]);
      inputs[i] = input(tokens[i], rows[i].logprob);
    }
    std::vector<Coefficient<double>> coefficients(count);
    const int64_t* ids = policy_.sequence_ids;
    for (size_t begin = 0, end = 0; begin < count; begin = end) {
      do ++end;
      while (ids && end < count && ids[tokens[end]] == ids[tokens[begin]]);
      sequence(tokens, rows, inputs, begin, end, coefficients);
    }
    return coefficients;
  }

 private:
  PolicyInput<double> input(int64_t token, double exact) const {
    const double returned = Acc(exact), old = at<Acc>(policy_.old_logprobs, token, returned);
    return {old == returned ? old : exact,  // the ratio to what the call returns is exactly 1
            old, at<Acc>(policy_.advantages, token), at<Acc>(policy_.ref_logprobs, token),
            at<Acc>(policy_.importance_weights, token, 1)};
  }

  // Inputs [begin, end) are one sequence, or one token.
  void sequence(const int64_t* tokens, const std::vector<Row<double>>& rows,
                const std::vector<PolicyInput<double>>& inputs, size_t begin, size_t end,
                std::vector<Coefficient<double>>& coefficients) {
    const PolicySettings& s = policy_.settings;
    SequenceSums whole;
    for (size_t i = begin; i < end; ++i) {
      whole.log_ratio += ratio_part(s, inputs[i]).value;
      whole.count += 1;
    }
    std::vector<PolicyToken<double>> found(end - begin);
    for (size_t i = begin; i < end; ++i) {
      found[i - begin] = policy_token(s, inputs[i], whole.log_ratio / whole.divisor(s));
      whole.on_ratio += weight(tokens[i]) * found[i - begin].on_ratio;
    }
    for (size_t i = begin; i < end; ++i) {
      const PolicyToken<double>& t = found[i - begin];
      const double of_entropy =
          -s.entropy_coef * at<Acc>(policy_.entropy_weights, tokens[i], weight(tokens[i]));
      coefficients[i] = {coefficient(s, t, weight(tokens[i]), inputs[i], whole), of_entropy, 0};
      sums.add(t, weight(tokens[i]) * t.loss + of_entropy * rows[i].entropy, rows[i].entropy,
               coefficients[i].is_live());
      static_cast<Acc*>(out_.losses)[tokens[i]] = Acc(t.loss);
    }
  }

  double weight(int64_t token) const { return at<Acc>(policy_.token_weights, token); }

  const PolicyArgs& policy_;
  const TokenOutputs& out_;
};

// Gradients of rows whose logits were not kept.
template <class Products>
void append_again(Head<Products>& head, Gradients<Products>& gradients, const int64_t* tokens,
                  const std::vector<Coefficient<double>>& coefficients) {
  std::vector<int64_t> live;
  std::vector<Coefficient<double>> of_live;
  for (size_t i = 0; i < coefficients.size(); ++i) {
    if (!coefficients[i].is_live()) continue;
    live.push_back(tokens[i]);
    of_live.push_back(coefficients[i]);
  }
  auto next = of_live.begin();
  for_chunks(head, live, &gradients, [&](const int64_t* chunk, const auto& rows) {
    const auto end = next + static_cast<int64_t>(rows.size());
    gradients.append(chunk, rows, {next, end});
    next = end;
  });
}

}  // namespace

void lm_head_logprobs(ScalarType dtype, const HeadArgs& args, int64_t ignore_index,
                      const TokenOutputs& out) {
  for_products(dtype, args, [&]<class Products>() {
    Head<Products> head(args);
    std::vector<int64_t> tokens;
    for (int64_t i = 0; i < args.tokens; ++i)
      if (args.targets[i] != ignore_index) tokens.push_back(i);
    for_chunks<Products>(head, tokens, nullptr, [&](const int64_t* chunk, const auto& rows) {
      for (size_t i = 0; i < rows.size(); ++i)
        write<typename Products::Acc>(out, chunk[i], rows[i]);
    });
  });
}

void lm_head_logprobs_backward(ScalarType dtype, const HeadArgs& args, int64_t ignore_index,
                               const Coefficients& upstream, const GradArgs& grads) {
  for_products(dtype, args, [&]<class Products>() {
    using Acc = typename Products::Acc;
    const auto coefficients = [&](int64_t i) {
      return Coefficient<double>{at<Acc>(upstream.on_logprob, i), at<Acc>(upstream.on_entropy, i),
                                 at<Acc>(upstream.on_logsumexp, i)};
    };
    Head<Products> head(args);
    std::vector<int64_t> tokens;
    for (int64_t i = 0; i < args.tokens; ++i)
      if (args.targets[i] != ignore_index && coefficients(i).is_live()) tokens.push_back(i);
    Gradients<Products> gradients(head, grads, static_cast<int64_t>(tokens.size()));
    for_chunks(head, tokens, &gradients, [&](const int64_t* chunk, const auto& rows) {
      std::vector<Coefficient<double>> of_chunk;
      for (size_t i = 0; i < rows.size(); ++i) of_chunk.push_back(coefficients(chunk[i]));
      gradients.append(chunk, rows, of_chunk);
    });
    gradients.finish();
  });
}

void policy_loss(ScalarType dtype, const HeadArgs& args, const PolicyArgs& policy,
                 const TokenOutputs& out, const GradArgs& grads, void* loss, void* metrics) {
  for_products(dtype, args, [&]<class Products>() {
    using Acc = typename Products::Acc;
    Head<Products> head(args);
    std::vector<int64_t> tokens;
    for (int64_t i = 0; i < args.tokens; ++i)
      if (at<Acc>(policy.token_weights, i) != 0) tokens.push_back(i);
    const int64_t total = static_cast<int64_t>(tokens.size());
    int64_t longest = 0;  // sequence
    for (int64_t begin = 0, end = 0; policy.sequence_ids && begin < total; begin = end) {
      end = end_of_span(tokens, begin, 1, policy.sequence_ids);
      longest = std::max(longest, end - begin);
    }
    std::unique_ptr<Gradients<Products>> gradients;
    if (grads.any()) gradients = std::make_unique<Gradients<Products>>(head, grads, total, longest);

    const int64_t room = gradients ? gradients->step() : kForwardTokens;
    PolicyTerms<Acc> terms(policy, out);
    for (int64_t begin = 0, end = 0; begin < total; begin = end) {
      end = end_of_span(tokens, begin, room, policy.sequence_ids);
      const int64_t* span = tokens.data() + begin;
      if (gradients && end - begin <= room) {
        auto* keep = gradients->reserve(end - begin);
        const auto rows = head.forward(span, end - begin, keep, gradients->ld());
        gradients->append(span, rows, terms.of(span, rows));
        continue;
      }
      std::vector<Row<double>> rows;
      for_chunks<Products>(head, {tokens.begin() + begin, tokens.begin() + end}, nullptr,
                           [&](const int64_t*, const auto& more) {
                             rows.insert(rows.end(), more.begin(), more.end());
                           });
      const auto coefficients = terms.of(span, rows);
      if (gradients) append_again(head, *gradients, span, coefficients);
    }
    if (gradients) gradients->finish();
    terms.sums.write(args.tokens, static_cast<Acc*>(loss), static_cast<Acc*>(metrics));
  });
}

}  // namespace bupo::cpu
