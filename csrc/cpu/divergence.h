// The divergence of two heads on the CPU, on raw pointers.

#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include "../args.h"

namespace bupo::cpu {

using torch::headeronly::ScalarType;

// Per-token divergences [N] in the accumulator type, zeroed by the caller, and the gradients of
// their sum with token_weights.
void lm_head_divergence(ScalarType dtype, const DivergenceArgs& args, const GradArgs& student,
                        const GradArgs& teacher, void* divergence);

}  // namespace bupo::cpu
