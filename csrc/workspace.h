// The bytes that a CUDA operator may take beside its results (bupo.ops.set_workspace_bytes). Its
// smallest unit, 128 rows, is always taken.

#pragma once

#include <atomic>
#include <cstdint>

namespace bupo {

inline std::atomic<int64_t> workspace_bytes{int64_t{1} << 30};

}  // namespace bupo
