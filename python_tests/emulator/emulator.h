// CUDA on the host, for tests: every thread of a block is a fiber (fibers.h), and barriers,
// shuffles and ballots switch between them. Enough of the language for csrc/cuda/portable; slow,
// and exact about who waits for whom: a barrier that not every thread reaches is an error, as it
// would be a hang on a GPU.

#pragma once

#include <cmath>

#include <cuda_runtime_api.h>  // of the folder cuda here, or CUDA's own for head_scan.cu

#include "fibers.h"

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

struct Index {
  int64_t x, y, z;
};
inline Index threadIdx, blockIdx, gridDim;

namespace emulator {

inline std::vector<char*> dynamic_memory;  // of each block that runs
inline char* dynamic_shared_memory() { return dynamic_memory[static_cast<size_t>(current->block)]; }

// Blocks first, first + 1, ... of the grid, at the same time.
inline void run_together(int64_t first, int64_t blocks, int64_t threads,
                         const std::function<void()>& kernel) {
  run_fibers(blocks, threads, kernel, [first] {
    threadIdx.x = current->thread;
    blockIdx.x = first + current->block;
  });
}

inline void run(int64_t blocks, int threads, const std::function<void()>& kernel) {
  gridDim.x = blocks;
  for (int64_t block = 0; block < blocks; ++block) run_together(block, 1, threads, kernel);
}

inline uint16_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float from_bfloat16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, sizeof x);
  return x;
}

inline uint16_t to_half(float x) {
  const _Float16 y = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &y, sizeof bits);
  return bits;
}

inline float from_half(uint16_t bits) {
  _Float16 y;
  std::memcpy(&y, &bits, sizeof y);
  return static_cast<float>(y);
}

// All lanes of a warp offer a value; returns where they are. There are two such places, in turn: no
// lane offers a third time before everyone has read the first.
inline const uint64_t* offer(uint64_t value, const char* what) {
  Warp& warp = warps[current->warp];
  uint64_t* offers = warp.offers + warp.meeting.held % 2 * 32;
  offers[current->thread % 32] = value;
  meet(warp.meeting, what);
  return offers;
}

// The value that lane `from` offers.
template <class T>
T trade(T value, int64_t from, const char* what) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  std::memcpy(&value, offer(bits, what) + from, sizeof value);
  return value;
}

}  // namespace emulator

inline void __syncthreads() {
  emulator::meet(emulator::block_meetings[static_cast<size_t>(emulator::current->block)],
                 "__syncthreads");
}
inline void __syncwarp() { emulator::offer(0, "__syncwarp"); }

template <class T>
T __shfl_down_sync(unsigned, T value, int offset) {
  const int64_t lane = emulator::current->thread % 32, from = lane + offset;
  return emulator::trade(value, from < 32 ? from : lane, "__shfl_down_sync");
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulator::trade(value, emulator::current->thread % 32 ^ mask, "__shfl_xor_sync");
}

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulator::trade(value, lane, "__shfl_sync");
}

inline unsigned __ballot_sync(unsigned, bool vote) {
  const uint64_t* votes = emulator::offer(vote, "__ballot_sync");
  unsigned result = 0;
  for (int i = 0; i < 32; ++i)
    if (votes[i]) result |= 1u << i;
  return result;
}

inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
