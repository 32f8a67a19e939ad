// Settings of the CUDA operators, for the whole process.
//
// The bytes that a CUDA operator may take beside its results (bupo.ops.set_workspace_bytes). Its
// smallest unit, 128 rows, is always taken.

#pragma once

#include <atomic>
#include <cstdint>

namespace bupo {

inline std::atomic<int64_t> workspace_bytes{int64_t{1} << 30};

// Serve every CUDA call by the portable path: for tests of one path against the other.
inline std::atomic<bool> portable_only{false};

}  // namespace bupo
