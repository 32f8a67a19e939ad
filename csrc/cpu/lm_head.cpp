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
#include <memory>
#include <vector>

#include "head.h"

namespace bupo::cpu {
namespace {

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
  for_products(dtype, {&args}, [&]<class Products>() {
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
  for_products(dtype, {&args}, [&]<class Products>() {
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
  for_products(dtype, {&args}, [&]<class Products>() {
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
