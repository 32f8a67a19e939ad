// The three matrix products of the LM head, on blocks, through libraries.
//
//   logits          out[j, i] = <weight_j, hidden_i>     a tile of the vocabulary, loaded tokens
//   weight_gradient dw[j, :] (+)= sum_i dz[j, i] hidden_i         the same, live tokens
//   hidden_gradient dx[i, :] = sum_j dz[j, i] weight_j            whole vocabulary, live tokens
//
// Logits and dz are [vocabulary, tokens]: then the weight is the left operand of the first two and
// is never repacked. logits and weight_gradient run inside a parallel region, on the calling
// thread; hidden_gradient uses all threads itself. Two implementations with this interface, for
// inputs stored as Stored (uint16_t: bfloat16 bits) and logits, sums and dz as Acc:
//
//   BlockProducts<float|uint16_t>                          oneDNN's block product, T in, fp32 out
//   LibraryProducts<float|double> and <uint16_t, float>    torch's BLAS; the last one turns
//       blocks of bfloat16 to fp32 first. Slower, and needs nothing of the CPU.

#pragma once

#include <cstdint>
#include <type_traits>
#include <vector>

#include "../args.h"

namespace bupo::cpu {

// The weight rows of a tile. A multiple of the block product's 128 rows; a tile of logits for 256
// tokens (512 KiB) stays in a core's second-level cache between its product and its statistics.
inline constexpr int64_t kTileRows = 512;

template <class T, class AccType = T>
class LibraryProducts {
 public:
  using Stored = T;     // inputs and their gradients
  using Acc = AccType;  // logits, accumulators, per-token tensors
  using Grad = Acc;     // dz

  explicit LibraryProducts(const HeadArgs& args) : args_(args) {}
  void load_tokens(const int64_t* rows, int64_t count);
  void logits(int64_t first, int64_t rows, Acc* out, int64_t ld) const;
  void load_live(const std::vector<int64_t>& rows);
  void weight_gradient(int64_t first, int64_t rows, Acc* dz, int64_t ld, Acc* out,
                       bool accumulate) const;
  void hidden_gradient(const Acc* dz, int64_t ld, void* out) const;

 private:
  HeadArgs args_;
  int64_t count_ = 0;
  std::vector<int64_t> live_rows_;
  std::vector<Acc> tokens_, live_;
};

template <class T>
class BlockProducts {
 public:
  using Stored = T;
  using Acc = float;
  using Grad = T;

  // Whether this CPU, this torch and this width can run it.
  static bool usable(const HeadArgs& args);

  explicit BlockProducts(const HeadArgs& args) : args_(args) {}
  void load_tokens(const int64_t* rows, int64_t count);
  void logits(int64_t first, int64_t rows, float* out, int64_t ld) const;
  void load_live(const std::vector<int64_t>& rows);
  // Clears the columns that pad the number of live tokens, hence dz is not const.
  void weight_gradient(int64_t first, int64_t rows, float* dz, int64_t ld, float* out,
                       bool accumulate) const;
  void hidden_gradient(const float* dz, int64_t ld, void* out) const;

 private:
  HeadArgs args_;
  int64_t count_ = 0;
  std::vector<int64_t> live_rows_;
  std::vector<T> tokens_, live_;  // panels of 64 columns; bfloat16 in pairs of the summed dimension
};

}  // namespace bupo::cpu
