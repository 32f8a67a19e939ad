// The divergence of two heads' distributions. For every chunk of tokens: the logits of both sides,
// kept; a sweep over them for the divergences and the sums that gradients need; a sweep that turns
// them into dz, in place; the gradient products.
//
// Work: products of 2NDV flop, one forward a side and two for the gradients of each side that has
// some. Memory beyond inputs and outputs: a buffer of logits a side (see head.h).
//
// Tests: python_tests/test_divergence.py. Bench: bench/bench_divergence.py.

#include "divergence.h"

#include "head.h"

namespace bupo::cpu {
namespace {

template <class V>
struct VectorMath {
  BUPO_INLINE static V exp_nonpositive(const V& x) { return cpu::exp_nonpositive<V>(x); }
  BUPO_INLINE static V log1p(const V& x) { return log1p_nonpositive<V>(x); }
};

// One side's numbers of each token of a chunk: log p_j = kept_j scale - shift, and what its dz is
// multiplied by; with the sum of x_j (divergence_math.h).
template <class T>
struct Side {
  std::vector<T> scale, max, log_total, factor, total;
  bool capped;

  template <class Products>
  Side(const Head<Products>& head, const int64_t* tokens, const std::vector<Row<double>>& rows,
       const void* weights)
      : capped(head.capped()) {
    const size_t padded = round_up(static_cast<int64_t>(rows.size()), kColumnPad);
    for (auto* v : {&scale, &max, &log_total, &factor, &total}) v->resize(padded);
    for (size_t i = 0; i < rows.size(); ++i) {
      scale[i] = T(head.kept_scale(tokens[i]));
      max[i] = T(rows[i].max);
      log_total[i] = T(rows[i].log_total);
      factor[i] = T(at<T>(weights, tokens[i]) / head.temperature(tokens[i]));
    }
  }
};

template <class V, class T>
BUPO_INLINE V load_columns(const T* row, int64_t valid) {
  if (valid >= kLanes<V>) return load<V>(row);
  V v{};
  for (int64_t l = 0; l < valid; ++l) v[l] = row[l];
  return v;
}

template <class V, class T>
BUPO_INLINE V log_prob(const V& kept, const Side<T>& side, int64_t i) {
  const auto of = [i](const std::vector<T>& values) { return load<V>(values.data() + i); };
  return kept * of(side.scale) - of(side.max) - of(side.log_total);
}

template <class T>
struct Sums {
  T divergence = 0, student = 0, teacher = 0;
};

template <DivergenceKind kKind, class V, class T>
BUPO_INLINE void sum_tile(const T* student, const T* teacher, int64_t ld, int64_t rows,
                          int64_t columns, const Side<T>& of_student, const Side<T>& of_teacher,
                          T beta, Sums<T>* sums) {
  constexpr int64_t kShortSum = 16;  // small terms beside a large sum are not lost one by one
  for (int64_t i = 0; i < columns; i += kLanes<V>) {
    const int64_t valid = columns - i;
    V divergence{}, of_q{}, of_p{};
    for (int64_t start = 0; start < rows; start += kShortSum) {
      V short_divergence{}, short_q{}, short_p{};
      for (int64_t j = start; j < rows && j < start + kShortSum; ++j) {
        const V lq = log_prob(load_columns<V>(student + j * ld + i, valid), of_student, i);
        const V lp = log_prob(load_columns<V>(teacher + j * ld + i, valid), of_teacher, i);
        const auto t = divergence_terms<kKind, VectorMath<V>, T, V>(lp, lq, exp_nonpositive<V>(lp),
                                                                    exp_nonpositive<V>(lq), beta);
        short_divergence = short_divergence + t.divergence;
        short_q = short_q + t.student;
        short_p = short_p + t.teacher;
      }
      divergence = divergence + short_divergence;
      of_q = of_q + short_q;
      of_p = of_p + short_p;
    }
    for (int64_t l = 0; l < kLanes<V> && l < valid; ++l)
      sums[i + l] = {divergence[l], of_q[l], of_p[l]};
  }
}

// dz of one side: (x_j - p_j total) factor, and the softcap's slope.
template <class V, bool kBfloat16, class T>
BUPO_INLINE void store_gradient(T* row, int64_t at, int64_t i, int64_t valid, const V& kept,
                                const V& x, const V& p, const Side<T>& side, double* row_sum) {
  const auto of = [i](const std::vector<T>& values) { return load<V>(values.data() + i); };
  V dz = (x - p * of(side.total)) * of(side.factor);
  if (side.capped) dz = dz - dz * kept * kept;
  if (row_sum) {
    T total = 0;
    for (int64_t l = 0; l < kLanes<V> && l < valid; ++l) total += dz[l];
    *row_sum += static_cast<double>(total);
  }
  if constexpr (kBfloat16) {
    store_bfloat16(reinterpret_cast<uint16_t*>(row) + at, dz);
  } else {
    store(row + at, dz);
  }
}

// The tiles of one side; with gradients they become dz from column `base` on, where they begin.
template <class T>
struct TileOf {
  T* logits;
  int64_t base;
  bool gradient;
  double* row_sums;  // null: none wanted
};

template <DivergenceKind kKind, class V, bool kBfloat16, class T>
BUPO_INLINE void gradient_tile(const TileOf<T>& student, const TileOf<T>& teacher, int64_t ld,
                               int64_t rows, int64_t columns, const Side<T>& of_student,
                               const Side<T>& of_teacher, T beta) {
  for (int64_t i = 0; i < columns; i += kLanes<V>) {
    const int64_t valid = columns - i;
    for (int64_t j = 0; j < rows; ++j) {
      T *q_row = student.logits + j * ld, *p_row = teacher.logits + j * ld;
      const V q_kept = load_columns<V>(q_row + student.base + i, valid);
      const V p_kept = load_columns<V>(p_row + teacher.base + i, valid);
      const V lq = log_prob(q_kept, of_student, i), lp = log_prob(p_kept, of_teacher, i);
      const V q = exp_nonpositive<V>(lq), p = exp_nonpositive<V>(lp);
      const auto t = divergence_terms<kKind, VectorMath<V>, T, V>(lp, lq, p, q, beta);
      if (student.gradient)
        store_gradient<V, kBfloat16>(q_row, student.base + i, i, valid, q_kept, t.student, q,
                                     of_student, student.row_sums ? student.row_sums + j : nullptr);
      if (teacher.gradient)
        store_gradient<V, kBfloat16>(p_row, teacher.base + i, i, valid, p_kept, t.teacher, p,
                                     of_teacher, teacher.row_sums ? teacher.row_sums + j : nullptr);
    }
  }
}

// body<kind>() for one of the kinds.
template <class Body>
void with_kind(DivergenceKind kind, const Body& body) {
  switch (kind) {
    case DivergenceKind::kForwardKl:
      return body.template operator()<DivergenceKind::kForwardKl>();
    case DivergenceKind::kReverseKl:
      return body.template operator()<DivergenceKind::kReverseKl>();
    default:
      return body.template operator()<DivergenceKind::kJsd>();
  }
}

template <class Products>
class Divergence {
 public:
  using Acc = typename Products::Acc;
  static constexpr bool kPackedGrad = !std::is_same_v<typename Products::Grad, Acc>;

  Divergence(const DivergenceArgs& args, const GradArgs& student, const GradArgs& teacher,
             int64_t tokens)
      : args_(args),
        wanted_{student.any(), teacher.any()},
        student_(args.student),
        teacher_(args.teacher),
        to_student_(student_, student, tokens),
        to_teacher_(teacher_, teacher, tokens) {}

  int64_t step() const { return to_student_.step(); }

  // Writes the divergences of the tokens, which are at most step().
  void add(const int64_t* tokens, int64_t count, Acc* divergence) {
    const int64_t ld = to_student_.ld(), tiles = student_.tiles();
    Acc* q_logits = to_student_.reserve(count);
    Acc* p_logits = to_teacher_.reserve(count);
    const auto q_rows = student_.forward(tokens, count, q_logits, ld);
    const auto p_rows = teacher_.forward(tokens, count, p_logits, ld);
    Side<Acc> q(student_, tokens, q_rows, args_.token_weights);
    Side<Acc> p(teacher_, tokens, p_rows, args_.token_weights);
    std::vector<Sums<Acc>> sums(static_cast<size_t>(tiles * count));
    with_kind(args_.kind, [&]<DivergenceKind kKind>() {
      for_each(tiles, [&](int64_t tile) {
        const int64_t at = tile * kTileRows * ld;
        with_vectors([&](auto bytes) __attribute__((always_inline)) {
          sum_tile<kKind, Vec<Acc, bytes>>(q_logits + at, p_logits + at, ld,
                                           student_.tile_rows(tile), count, q, p, Acc(args_.beta),
                                           sums.data() + tile * count);
        });
      });
      for (int64_t i = 0; i < count; ++i) {
        Sums<double> all;
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const Sums<Acc>& part = sums[static_cast<size_t>(tile * count + i)];
          all = {all.divergence + part.divergence, all.student + part.student,
                 all.teacher + part.teacher};
        }
        divergence[tokens[i]] = Acc(all.divergence);
        q.total[i] = kKind == DivergenceKind::kForwardKl ? Acc(-1) : Acc(all.student);
        p.total[i] = kKind == DivergenceKind::kReverseKl ? Acc(-1) : Acc(all.teacher);
      }
      if (!wanted_[0] && !wanted_[1]) return;
      for_each(tiles, [&](int64_t tile) {
        const TileOf<Acc> of_q{to_student_.tile(tile), to_student_.base(), wanted_[0],
                               to_student_.row_sums(tile)};
        const TileOf<Acc> of_p{to_teacher_.tile(tile), to_teacher_.base(), wanted_[1],
                               to_teacher_.row_sums(tile)};
        with_vectors([&](auto bytes) __attribute__((always_inline)) {
          gradient_tile<kKind, Vec<Acc, bytes>, kPackedGrad>(
              of_q, of_p, ld, student_.tile_rows(tile), count, q, p, Acc(args_.beta));
        });
      });
    });
    if (wanted_[0]) to_student_.add(tokens, count);
    if (wanted_[1]) to_teacher_.add(tokens, count);
  }

  void finish() {
    if (wanted_[0]) to_student_.finish();
    if (wanted_[1]) to_teacher_.finish();
  }

 private:
  const DivergenceArgs& args_;
  bool wanted_[2];  // gradients of the student, of the teacher
  Head<Products> student_, teacher_;
  Gradients<Products> to_student_, to_teacher_;
};

}  // namespace

void lm_head_divergence(ScalarType dtype, const DivergenceArgs& args, const GradArgs& student,
                        const GradArgs& teacher, void* divergence) {
  const auto run = [&]<class Products>() {
    using Acc = typename Products::Acc;
    std::vector<int64_t> tokens;
    for (int64_t i = 0; i < args.student.tokens; ++i)
      if (at<Acc>(args.token_weights, i) != 0) tokens.push_back(i);
    const int64_t total = static_cast<int64_t>(tokens.size());
    Divergence<Products> all(args, student, teacher, total);
    for (int64_t begin = 0; begin < total; begin += all.step())
      all.add(tokens.data() + begin, std::min(all.step(), total - begin),
              static_cast<Acc*>(divergence));
    all.finish();
  };
  for_products(dtype, {&args.student, &args.teacher}, run);
}

}  // namespace bupo::cpu
