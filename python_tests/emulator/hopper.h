// What PTX has on Hopper and emulator.h has not, no more of it than head_scan.cu uses: clusters,
// mbarriers and setmaxnreg here, tma.h, wgmma.h. What a GPU would answer with a hang, or with
// numbers that are wrong now and then, is an error where it can be seen.

#pragma once

#include "emulator.h"

namespace emulator {

[[noreturn]] inline void fail(const std::string& text) {
  if (!current) throw std::logic_error("what was under way: " + text);
  throw std::logic_error("block " + std::to_string(current->block) + ", thread " +
                         std::to_string(current->thread) + ": " + text);
}
inline void require(bool fine, const char* text) {
  if (!fine) fail(text);
}

constexpr uint32_t kSharedBase = 1024;  // the first bytes are the system's
constexpr int64_t kMostSharedBytes = 227 << 10, kRegisters = 1 << 16;
constexpr uint32_t kRow = 128;  // bytes of a row of a tile in shared memory: a swizzle's

struct Span {
  uint32_t first, last;
  bool operator==(const Span&) const = default;
  bool overlaps(Span other) const { return first < other.last && other.first < last; }
};

// The 128-byte swizzle: 16 bytes within a row change places with the row.
inline uint32_t swizzled(uint32_t address) { return address ^ (address / kRow % 8) << 4; }

struct Mbarrier {
  uint32_t expected, pending;  // arrivals
  int64_t bytes = 0;           // that are still to come; negative if they came first
  uint32_t phase = 0;
  const Fiber* maker;  // until its fence
  Event event;
};

struct Block {
  std::vector<char> memory;
  char* shared;  // aligned as on the device
  int64_t shared_bytes;
  std::map<uint32_t, Mbarrier> mbarriers;
  std::vector<Span> loading, reading, storing;  // by TMA, by wgmma, by TMA
  std::map<uint32_t, const Fiber*> unfenced;    // words that stmatrix wrote, and their writers
  std::vector<int64_t> registers;      // of each thread
  int64_t free_registers = 0;
  Event registers_freed;
  int64_t threads;  // that have not left
};

inline std::vector<Block> cluster;
inline Meeting cluster_meeting;
inline std::vector<int64_t> cluster_arrivals;  // of each thread

inline Block& block_of(uint32_t rank) {
  require(rank < cluster.size(), "a rank beyond the cluster");
  require(cluster[rank].threads > 0, "reaches a block that has left");
  return cluster[rank];
}
inline uint32_t own_rank() { return static_cast<uint32_t>(current->block); }
inline Block& own_block() { return cluster[own_rank()]; }

inline char* shared_at(Block& block, uint32_t address) {
  return block.shared + (address - kSharedBase);
}
inline uint32_t shared_address(const void* pointer) {
  const int64_t offset = static_cast<const char*>(pointer) - own_block().shared;
  require(offset >= 0 && offset < own_block().shared_bytes, "an address beyond shared memory");
  return kSharedBase + static_cast<uint32_t>(offset);
}

// ---- mbarrier. What arrives from another block is under way before.

inline std::string name_of(uint32_t rank, uint32_t address) {
  return " of block " + std::to_string(rank) + " at " + std::to_string(address);
}

inline Mbarrier& mbarrier(uint32_t rank, uint32_t address) {
  auto& all = block_of(rank).mbarriers;
  const auto found = all.find(address);
  if (found == all.end()) fail("no mbarrier" + name_of(rank, address));
  const Fiber* maker = found->second.maker;
  require(!maker || maker == current, "an mbarrier is used before the fence after its making");
  return found->second;
}

inline void complete_if_due(Mbarrier& barrier) {
  if (barrier.pending > 0 || barrier.bytes != 0) return;
  barrier.phase ^= 1;
  barrier.pending = barrier.expected;
  wake(barrier.event);
}

inline void mbarrier_init(uint32_t address, uint32_t count) {
  require(address % 8 == 0 && count > 0, "mbarrier.init");
  const Mbarrier made{.expected = count, .pending = count, .maker = current, .event = {}};
  require(own_block().mbarriers.emplace(address, made).second, "mbarrier.init twice");
}

inline void mbarrier_fence() {
  for (auto& [address, barrier] : own_block().mbarriers)
    if (barrier.maker == current) barrier.maker = nullptr;
}

inline void mbarrier_arrive(uint32_t rank, uint32_t address, uint32_t bytes_to_come = 0) {
  Mbarrier& barrier = mbarrier(rank, address);
  barrier.bytes += bytes_to_come;
  require(barrier.bytes < 1 << 20, "an mbarrier expects too many bytes");
  require(barrier.pending > 0, "more arrivals at an mbarrier than it expects");
  --barrier.pending;
  complete_if_due(barrier);
}

inline void mbarrier_arrive_later(uint32_t rank, uint32_t address) {
  block_of(rank);
  under_way.push_back([=] { mbarrier_arrive(rank, address); });
}

inline bool mbarrier_passed(uint32_t address, uint32_t parity) {
  return mbarrier(own_rank(), address).phase != parity;
}

inline void mbarrier_wait(uint32_t address, uint32_t parity) {
  while (!mbarrier_passed(address, parity))
    wait_for(mbarrier(own_rank(), address).event, "the mbarrier",
             name_of(own_rank(), address) + ", parity " + std::to_string(parity));
}

// ---- cluster, registers

inline void cluster_arrive() {
  int64_t& arrivals = cluster_arrivals[static_cast<size_t>(current - fibers.data())];
  require(arrivals++ == cluster_meeting.held, "barrier.cluster.arrive twice");
  if (++cluster_meeting.arrived < cluster_meeting.members) return;
  cluster_meeting.arrived = 0;
  ++cluster_meeting.held;
  wake(cluster_meeting.next);
}

inline void cluster_wait() {
  while (cluster_meeting.held < cluster_arrivals[static_cast<size_t>(current - fibers.data())])
    wait_for(cluster_meeting.next, "barrier.cluster");
}

inline void set_registers(int64_t count) {
  Block& block = own_block();
  int64_t& mine = block.registers[static_cast<size_t>(current->thread)];
  while (count - mine > block.free_registers) wait_for(block.registers_freed, "registers");
  block.free_registers -= count - std::exchange(mine, count);
  wake(block.registers_freed);
}

// The blocks of a grid, cluster after cluster. Shared memory holds nan before it is written.
inline void run_clusters(int64_t blocks, int64_t threads, int64_t together, int64_t shared_bytes,
                         const std::function<void()>& kernel) {
  if (shared_bytes > kMostSharedBytes) throw std::logic_error("too much shared memory");
  gridDim.x = blocks;
  for (int64_t first = 0; first < blocks; first += together) {
    cluster = std::vector<Block>(static_cast<size_t>(together));
    cluster_meeting = {.members = static_cast<size_t>(together * threads)};
    cluster_arrivals.assign(cluster_meeting.members, 0);
    dynamic_memory.clear();
    for (Block& block : cluster) {
      block.memory.assign(static_cast<size_t>(shared_bytes + 1024), '\xff');
      const uintptr_t start = reinterpret_cast<uintptr_t>(block.memory.data());
      block.shared = block.memory.data() + (1024 - start % 1024);
      block.shared_bytes = shared_bytes;
      block.registers.assign(static_cast<size_t>(threads), kRegisters / threads / 8 * 8);
      block.threads = threads;
      dynamic_memory.push_back(block.shared);
    }
    run_together(first, together, threads, [&] {
      kernel();
      --own_block().threads;
    });
  }
}

}  // namespace emulator
