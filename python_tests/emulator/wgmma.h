// wgmma.mma_async m64n256k16 of bf16 in shared memory, k contiguous and swizzled. It happens when
// its first thread has waited for it, no earlier; until a thread has waited for all, its
// accumulators hold nan.

#pragma once

#include "hopper.h"

namespace emulator {

constexpr int kWgmmaRows = 64, kWgmmaColumns = 256, kWgmmaDepth = 16, kAccumulators = 128;

// An operand as wgmma's descriptor states it.
struct Operand {
  uint32_t start, groups_apart;  // of eight rows
  explicit Operand(uint64_t descriptor)
      : start((descriptor & 0x3fff) << 4), groups_apart((descriptor >> 32 & 0x3fff) << 4) {
    require(descriptor >> 62 == 1 && (descriptor >> 49 & 7) == 0, "wgmma: not the swizzle of TMA");
  }
  float at(Block& block, uint32_t row, uint32_t k) const {
    uint16_t bits;
    const uint32_t address = start + row / 8 * groups_apart + row % 8 * kRow + k * 2;
    std::memcpy(&bits, shared_at(block, swizzled(address)), sizeof bits);
    return from_bfloat16(bits);
  }
  // Whole groups: others are in the rest of the rows.
  Span span(uint32_t rows) const {
    const uint32_t first = start & ~(8 * kRow - 1);
    return {first, first + (rows / 8 - 1) * groups_apart + 8 * kRow};
  }
};

struct Wgmma {
  uint64_t a, b;
  bool adds;
  int threads = 0;  // that have issued it
};

struct WgmmaThread {
  size_t issued = 0, done = 0;    // of the warpgroup's operations
  std::vector<size_t> groups;     // what was issued at each commit
  float* accumulators = nullptr;  // while one is not done
  bool fenced = false;
};

struct Warpgroup {
  std::vector<Wgmma> operations;
  size_t executed = 0;
  Event issued;
  std::vector<WgmmaThread> threads = std::vector<WgmmaThread>(128);
  std::vector<float> sums = std::vector<float>(kWgmmaRows * kWgmmaColumns);
};

inline std::map<int64_t, Warpgroup> warpgroups;  // of the blocks that run, by number

inline Warpgroup& own_warpgroup() { return warpgroups[static_cast<int64_t>(current->warp) / 4]; }
inline WgmmaThread& own_thread() {
  return own_warpgroup().threads[static_cast<size_t>(current->thread % 128)];
}

// Where the accumulators of a thread are in the product.
template <class Visit>
void each_accumulator(const Visit& visit) {
  const int64_t thread = current->thread % 128;
  for (int i = 0; i < kAccumulators; ++i) {
    const int64_t row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
    visit(i, static_cast<size_t>(row * kWgmmaColumns + i / 4 * 8 + thread % 4 * 2 + i % 2));
  }
}

inline void wgmma_fence() { own_thread().fenced = true; }

inline void wgmma(uint64_t a, uint64_t b, float* accumulators, bool adds) {
  Warpgroup& group = own_warpgroup();
  WgmmaThread& thread = own_thread();
  require(thread.fenced, "wgmma without wgmma.fence before it");
  if (thread.issued == group.operations.size()) {
    group.operations.push_back({a, b, adds});
    for (const Span read : {Operand(a).span(kWgmmaRows), Operand(b).span(kWgmmaColumns)}) {
      require(read.last <= kSharedBase + own_block().shared_bytes, "wgmma beyond shared memory");
      for (const Span written : own_block().loading)
        require(!read.overlaps(written), "wgmma of what TMA still loads");
      own_block().reading.push_back(read);
    }
  }
  Wgmma& operation = group.operations[thread.issued++];
  require(operation.a == a && operation.b == b && operation.adds == adds,
          "the threads of a warpgroup issue different wgmma");
  if (!thread.accumulators) {
    thread.accumulators = accumulators;
    each_accumulator(
        [&](int i, size_t place) { group.sums[place] = std::exchange(accumulators[i], NAN); });
  }
  require(thread.accumulators == accumulators, "wgmma into other accumulators before a wait");
  if (++operation.threads == 128) wake(group.issued);
}

inline void wgmma_commit() { own_thread().groups.push_back(own_thread().issued); }

inline void execute(const Wgmma& operation, std::vector<float>& sums) {
  Block& block = own_block();
  const Operand left(operation.a), right(operation.b);
  float b[kWgmmaDepth][kWgmmaColumns];
  for (uint32_t n = 0; n < kWgmmaColumns; ++n)
    for (uint32_t k = 0; k < kWgmmaDepth; ++k) b[k][n] = right.at(block, n, k);
  if (!operation.adds) std::fill(sums.begin(), sums.end(), 0.0f);
  for (uint32_t m = 0; m < kWgmmaRows; ++m) {
    float* row = sums.data() + m * kWgmmaColumns;
    for (uint32_t k = 0; k < kWgmmaDepth; ++k) {
      const float a = left.at(block, m, k);
      for (int n = 0; n < kWgmmaColumns; ++n) row[n] += a * b[k][n];
    }
  }
  for (const Span read : {left.span(kWgmmaRows), right.span(kWgmmaColumns)})
    block.reading.erase(std::find(block.reading.begin(), block.reading.end(), read));
}

// Until all but `pending` of the thread's groups are done.
inline void wgmma_wait(size_t pending) {
  Warpgroup& group = own_warpgroup();
  WgmmaThread& thread = own_thread();
  if (thread.groups.size() > pending) thread.done = *(thread.groups.end() - 1 - pending);
  while (group.executed < thread.done) {
    const Wgmma& next = group.operations[group.executed];
    if (next.threads < 128) {
      wait_for(group.issued, "wgmma of other warps");
    } else {
      execute(next, group.sums);
      ++group.executed;
    }
  }
  thread.fenced = false;
  if (!thread.accumulators || thread.done < thread.issued) return;
  float* accumulators = std::exchange(thread.accumulators, nullptr);
  each_accumulator([&](int i, size_t place) { accumulators[i] = group.sums[place]; });
}

// Called by each thread at its end.
inline void leave_wgmma() {
  require(own_thread().done == own_thread().issued, "leaves before its wgmma are done");
}

}  // namespace emulator
