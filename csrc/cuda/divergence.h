// The divergence of two heads. As in cpu/divergence.h, without checks of values.

#pragma once

#include "call.h"

namespace bupo::cuda {

void lm_head_divergence(const Call& student, const Call& teacher, const DivergenceArgs& args,
                        const GradArgs& to_student, const GradArgs& to_teacher, float* divergence,
                        float* loss);

}  // namespace bupo::cuda
