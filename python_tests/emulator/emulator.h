// A CUDA block on the host, for tests: every thread is a fiber, and barriers, shuffles and ballots
// switch between them. Enough of the language for csrc/cuda/portable; slow, and exact about who
// waits for whom: a barrier that not every thread reaches is an error, as it would be a hang on a
// GPU.

#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };

struct Index {
  int64_t x;
};
inline Index threadIdx, blockIdx;

namespace emulator {

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  int64_t id;
  int64_t block_waits = 0, warp_waits = 0;  // barriers passed
  bool done = false;
};

inline std::vector<Fiber> fibers;
inline Fiber* current;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline std::vector<uint64_t> lanes;  // what each thread offers to its warp

inline void yield() {
  Fiber* self = current;
  swapcontext(&self->context, &scheduler);
  current = self;
  threadIdx.x = self->id;
}

// Waits until all fibers in [first, last) have passed as many barriers of this kind.
inline void wait(int64_t Fiber::* count, size_t first, size_t last) {
  const int64_t mine = ++(current->*count);
  for (;;) {
    bool ready = true;
    for (size_t i = first; i < last; ++i) {
      if (fibers[i].*count >= mine) continue;
      if (fibers[i].done) throw std::logic_error("a thread left before a barrier of its block");
      ready = false;
    }
    if (ready) return;
    yield();
  }
}

inline void warp_wait() {
  const size_t first = static_cast<size_t>(current->id) / 32 * 32;
  wait(&Fiber::warp_waits, first, std::min(first + 32, fibers.size()));
}

inline std::exception_ptr failure;  // exceptions do not cross fibers by themselves

inline void enter() {
  try {
    body();
  } catch (...) {
    failure = std::current_exception();
  }
  current->done = true;
  swapcontext(&current->context, &scheduler);
}

inline void run(int64_t blocks, int threads, std::function<void()> kernel) {
  body = std::move(kernel);
  for (int64_t block = 0; block < blocks; ++block) {
    blockIdx.x = block;
    fibers.resize(static_cast<size_t>(threads));
    lanes.assign(static_cast<size_t>(threads), 0);
    for (int64_t i = 0; i < threads; ++i) {
      Fiber& fiber = fibers[static_cast<size_t>(i)];
      constexpr size_t kStack = 64 << 10;
      if (!fiber.stack) fiber.stack.reset(new char[kStack]);
      fiber.id = i;
      fiber.block_waits = fiber.warp_waits = 0;
      fiber.done = false;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, enter, 0);
    }
    for (bool left = true; left;) {
      left = false;
      for (Fiber& fiber : fibers) {
        if (fiber.done) continue;
        left = true;
        current = &fiber;
        threadIdx.x = fiber.id;
        swapcontext(&scheduler, &fiber.context);
        if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
      }
    }
  }
}

inline uint16_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
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

}  // namespace emulator

inline void __syncthreads() {
  emulator::wait(&emulator::Fiber::block_waits, 0, emulator::fibers.size());
}

template <class T>
T __shfl_down_sync(unsigned, T value, int offset) {
  static_assert(sizeof(T) <= 8);
  const int64_t me = emulator::current->id, lane = me % 32;
  std::memcpy(&emulator::lanes[static_cast<size_t>(me)], &value, sizeof value);
  emulator::warp_wait();
  if (lane + offset < 32)
    std::memcpy(&value, &emulator::lanes[static_cast<size_t>(me + offset)], sizeof value);
  emulator::warp_wait();
  return value;
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  static_assert(sizeof(T) <= 8);
  const int64_t me = emulator::current->id;
  std::memcpy(&emulator::lanes[static_cast<size_t>(me)], &value, sizeof value);
  emulator::warp_wait();
  std::memcpy(&value, &emulator::lanes[static_cast<size_t>(me ^ mask)], sizeof value);
  emulator::warp_wait();
  return value;
}

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  static_assert(sizeof(T) <= 8);
  const int64_t me = emulator::current->id;
  std::memcpy(&emulator::lanes[static_cast<size_t>(me)], &value, sizeof value);
  emulator::warp_wait();
  std::memcpy(&value, &emulator::lanes[static_cast<size_t>(me / 32 * 32 + lane)], sizeof value);
  emulator::warp_wait();
  return value;
}

inline unsigned __ballot_sync(unsigned, bool vote) {
  const int64_t me = emulator::current->id, first = me / 32 * 32;
  emulator::lanes[static_cast<size_t>(me)] = vote;
  emulator::warp_wait();
  unsigned result = 0;
  for (int64_t i = 0; i < 32; ++i)
    if (emulator::lanes[static_cast<size_t>(first + i)]) result |= 1u << i;
  emulator::warp_wait();
  return result;
}

inline void __syncwarp() { emulator::warp_wait(); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
