// wgmma.mma_async m64nNk16 of bf16 in shared memory, k contiguous and swizzled. It happens when its
// first thread has waited for it, no earlier; until a thread has waited for all, its accumulators
// hold nan.

#pragma once

#include "hopper.h"

namespace emulator {

constexpr int kWgmmaRows = 64, kWgmmaDepth = 16, kMostColumns = 256;

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
  uint32_t columns;
  size_t set;  // of accumulators
  bool adds;
  int threads = 0;  // that have issued it
};

struct Accumulators {
  float* data;
  uint32_t columns;  // of the product; a thread has half as many numbers
};

struct WgmmaThread {
  size_t issued = 0, done = 0;    // of the warpgroup's operations
  std::vector<size_t> groups;      // what was issued at each commit
  std::vector<Accumulators> sets;  // while one operation is not done
  bool fenced = false;
};

struct Warpgroup {
  std::vector<Wgmma> operations;
  size_t executed = 0;
  Event issued;
  std::vector<WgmmaThread> threads = std::vector<WgmmaThread>(128);
  std::vector<std::vector<float>> sums{};  // of each set
};

inline std::map<int64_t, Warpgroup> warpgroups;  // of the blocks that run, by number

inline Warpgroup& own_warpgroup() { return warpgroups[static_cast<int64_t>(current->warp) / 4]; }
inline WgmmaThread& own_thread() {
  return own_warpgroup().threads[static_cast<size_t>(current->thread % 128)];
}

// Where the accumulators of a thread are in the product.
template <class Visit>
void each_accumulator(uint32_t columns, const Visit& visit) {
  const int64_t thread = current->thread % 128;
  for (uint32_t i = 0; i < columns / 2; ++i) {
    const int64_t row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
    visit(i, static_cast<size_t>(row * columns + i / 4 * 8 + thread % 4 * 2 + i % 2));
  }
}

inline void wgmma_fence() { own_thread().fenced = true; }

// Which of the thread's accumulators these are. What they hold goes to the sums.
inline size_t set_of(float* data, uint32_t columns) {
  std::vector<Accumulators>& sets = own_thread().sets;
  for (size_t i = 0; i < sets.size(); ++i)
    if (sets[i].data == data && sets[i].columns == columns) return i;
  for (const Accumulators& other : sets)
    require(data >= other.data + other.columns / 2 || data + columns / 2 <= other.data,
            "wgmma into some of the accumulators of another one before a wait");
  sets.push_back({data, columns});
  auto& sums = own_warpgroup().sums;
  if (sums.size() < sets.size()) sums.emplace_back(kWgmmaRows * kMostColumns);
  each_accumulator(columns, [&](uint32_t i, size_t place) {
    sums[sets.size() - 1][place] = std::exchange(data[i], NAN);
  });
  return sets.size() - 1;
}

inline void wgmma(uint64_t a, uint64_t b, float* accumulators, uint32_t columns, bool adds) {
  Warpgroup& group = own_warpgroup();
  WgmmaThread& thread = own_thread();
  require(thread.fenced, "wgmma without wgmma.fence before it");
  const size_t set = set_of(accumulators, columns);
  if (thread.issued == group.operations.size()) {
    group.operations.push_back({a, b, columns, set, adds});
    for (const Span read : {Operand(a).span(kWgmmaRows), Operand(b).span(columns)}) {
      require(read.last <= kSharedBase + own_block().shared_bytes, "wgmma beyond shared memory");
      for (const Span written : own_block().loading)
        require(!read.overlaps(written), "wgmma of what TMA still loads");
      own_block().reading.push_back(read);
    }
  }
  Wgmma& operation = group.operations[thread.issued++];
  require(operation.a == a && operation.b == b && operation.columns == columns &&
              operation.set == set && operation.adds == adds,
          "the threads of a warpgroup issue different wgmma");
  if (++operation.threads == 128) wake(group.issued);
}

inline void wgmma_commit() { own_thread().groups.push_back(own_thread().issued); }

inline void execute(const Wgmma& operation, std::vector<float>& sums) {
  Block& block = own_block();
  const Operand left(operation.a), right(operation.b);
  const uint32_t columns = operation.columns;
  float b[kWgmmaDepth][kMostColumns];
  for (uint32_t n = 0; n < columns; ++n)
    for (uint32_t k = 0; k < kWgmmaDepth; ++k) b[k][n] = right.at(block, n, k);
  if (!operation.adds) std::fill(sums.begin(), sums.end(), 0.0f);
  for (uint32_t m = 0; m < kWgmmaRows; ++m) {
    float* row = sums.data() + m * columns;
    for (uint32_t k = 0; k < kWgmmaDepth; ++k) {
      const float a = left.at(block, m, k);
      for (uint32_t n = 0; n < columns; ++n) row[n] += a * b[k][n];
    }
  }
  for (const Span read : {left.span(kWgmmaRows), right.span(columns)})
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
      execute(next, group.sums[next.set]);
      ++group.executed;
    }
  }
  thread.fenced = false;
  if (thread.done < thread.issued) return;
  for (size_t set = 0; set < thread.sets.size(); ++set) {
    const auto [data, columns] = thread.sets[set];
    each_accumulator(columns,
                     [&](uint32_t i, size_t place) { data[i] = group.sums[set][place]; });
  }
  thread.sets.clear();
}

// Called by each thread at its end.
inline void leave_wgmma() {
  require(own_thread().done == own_thread().issued, "leaves before its wgmma are done");
}

}  // namespace emulator
