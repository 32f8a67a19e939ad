// One side of the ops on the CPU: a head whose logits are made for some tokens at a time, and the
// gradients that are collected from them.

#pragma once

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <memory>
#include <vector>

#include "library.h"
#include "products.h"
#include "vector_math.h"
#include "vocab_tile.h"

namespace bupo::cpu {

inline constexpr int64_t kBufferBytes = int64_t{64} << 20;
inline constexpr int64_t kSequenceBytes = int64_t{256} << 20;  // if the longest sequence needs them
inline constexpr int64_t kForwardTokens = 256;

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

  // Rows of logits of the given tokens, reduced, of all entries alike if there are no targets. With
  // `keep` [V, ld] the logits stay there.
  std::vector<Row<double>> forward(const int64_t* tokens, int64_t count, Acc* keep, int64_t ld) {
    products_.load_tokens(tokens, count);
    std::vector<int64_t> targets(static_cast<size_t>(count));
    std::vector<Acc> scales, targets_kept(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) targets[i] = args_.targets ? args_.targets[tokens[i]] : -1;
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
      const double target =
          args_.targets ? targets_kept[i] * kept_scale(tokens[i]) : -double(INFINITY);
      rows[i] = finish_row<double>(row, target, args_.vocab);
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
    const int64_t base = this->base();
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
      tile_gradient<kPackedGrad>(this->tile(tile), ld_, head_.tile_rows(tile), base, base, live,
                                 row_sums(tile));
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

  // The last reserved logits have become dz of these tokens, all of which have a gradient.
  void add(const int64_t* tokens, int64_t count) {
    columns_.insert(columns_.end(), tokens, tokens + count);
  }
  int64_t base() const { return static_cast<int64_t>(columns_.size()); }  // of the open logits
  Acc* tile(int64_t tile) const { return buffer_.get() + tile * kTileRows * ld_; }
  double* row_sums(int64_t tile) { return out_.bias ? bias_.data() + tile * kTileRows : nullptr; }

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

// body<Products>() with the fastest products that all the heads can use.
template <class Body>
void for_products(ScalarType dtype, std::initializer_list<const HeadArgs*> heads,
                  const Body& body) {
  if (dtype == ScalarType::Double) return body.template operator()<LibraryProducts<double>>();
  const auto run = [&]<class Stored>() {
    if (std::all_of(heads.begin(), heads.end(),
                    [](const HeadArgs* head) { return BlockProducts<Stored>::usable(*head); })) {
      body.template operator()<BlockProducts<Stored>>();
    } else {
      body.template operator()<LibraryProducts<Stored, float>>();
    }
  };
  dtype == ScalarType::Float ? run.template operator()<float>()
                             : run.template operator()<uint16_t>();
}

}  // namespace bupo::cpu
