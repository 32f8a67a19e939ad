// Settings of the CUDA operators, for the whole process; bupo.ops sets them by bupo._C, hence they
// are visible to it.

#pragma once

#include <atomic>
#include <cstdint>

namespace bupo {

// Bytes that an operator may take beside its results; 0: by the memory that is free (cuda/library).
// Its smallest unit, 128 rows, is always taken.
[[gnu::visibility("default")]] inline std::atomic<int64_t> workspace_bytes{0};

// Which kernels serve CUDA calls. kAuto: the first row of cuda/paths.cpp that can.
enum class Kernels : int { kAuto, kPortable, kCooperative, kPingpong };
inline constexpr const char* kKernelNames[] = {"auto", "portable", "sm90_cooperative",
                                               "sm90_pingpong"};
[[gnu::visibility("default")]] inline std::atomic<Kernels> kernels{Kernels::kAuto};

}  // namespace bupo
