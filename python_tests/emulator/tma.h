// TMA of tiles with rows of 128 bytes, swizzled, and stmatrix, which writes what TMA stores. A load
// or a store happens some time after its issue; until a load happens there is nan in its place.

#pragma once

#include <array>

#include "hopper.h"

namespace emulator {

struct TensorMap {  // of 16-bit numbers
  char* data;
  std::array<uint64_t, 3> size, bytes_apart;  // of each dimension, the innermost first
  uint32_t rows;                              // of a tile
};
using Place = std::array<int32_t, 3>;  // in the tensor

// Null beyond the tensor.
inline char* element(const TensorMap& map, const Place& tile, uint32_t row, uint32_t column) {
  const std::array<int64_t, 3> place{tile[0] + int64_t{column}, tile[1] + int64_t{row}, tile[2]};
  char* found = map.data;
  for (size_t d = 0; d < 3; ++d) {
    if (place[d] < 0 || place[d] >= static_cast<int64_t>(map.size[d])) return nullptr;
    found += static_cast<uint64_t>(place[d]) * map.bytes_apart[d];
  }
  return found;
}

// visit(where the number is in shared memory, where it is in the tensor)
template <class Visit>
void each_element(Block& block, const TensorMap& map, const Place& tile, uint32_t address,
                  const Visit& visit) {
  for (uint32_t row = 0; row < map.rows; ++row)
    for (uint32_t i = 0; i < kRow; i += 2)
      visit(shared_at(block, swizzled(address + row * kRow + i)), element(map, tile, row, i / 2));
}

inline void arrive(const TensorMap& map, const Place& tile, uint32_t rank, uint32_t address,
                   uint32_t barrier) {
  Block& block = block_of(rank);
  each_element(block, map, tile, address, [](char* shared, const char* global) {
    global ? std::memcpy(shared, global, 2) : std::memset(shared, 0, 2);
  });
  std::erase(block.loading, Span{address, address + map.rows * kRow});
  Mbarrier& awaited = mbarrier(rank, barrier);
  awaited.bytes -= map.rows * kRow;
  complete_if_due(awaited);
}

// To the same address in each block of the mask, with news to the mbarrier there.
inline void load_tile(const void* descriptor, const Place& tile, uint32_t address, uint32_t barrier,
                      uint32_t mask) {
  TensorMap map;
  std::memcpy(&map, descriptor, sizeof map);
  const Span span{address, address + map.rows * kRow};
  require(address % kRow == 0, "a TMA load to an address that is no multiple of 128");
  require(span.last <= kSharedBase + own_block().shared_bytes, "a TMA load beyond shared memory");
  for (uint32_t rank = 0; mask >> rank != 0; ++rank) {
    if (!(mask >> rank & 1)) continue;
    Block& block = block_of(rank);
    mbarrier(rank, barrier);
    for (const Span other : block.loading)
      require(!span.overlaps(other), "a TMA load where another one is under way");
    for (const Span other : block.reading)
      require(!span.overlaps(other), "a TMA load where wgmma may still read");
    std::memset(shared_at(block, address), 0xff, map.rows * kRow);
    block.loading.push_back(span);
    under_way.push_back([=] { arrive(map, tile, rank, address, barrier); });
  }
}

// ---- stmatrix, and TMA stores of what it wrote

struct Sender {  // a thread that has issued stores
  int64_t sent = 0, committed = 0, read = 0;
  Event read_one{};
};
inline std::map<const Fiber*, Sender> senders;

// Of four matrices of 8 x 8, a lane has two numbers of a row of each; the lanes have the addresses
// of the 32 rows.
inline void stmatrix(const std::array<uint32_t, 4>& words, uint32_t address) {
  require(address % 16 == 0, "stmatrix to an address that is no multiple of 16");
  const uint64_t* rows = offer(address, "stmatrix");
  const auto lane = static_cast<uint32_t>(current->thread % 32);
  Block& block = own_block();
  for (uint32_t k = 0; k < 4; ++k) {
    const uint32_t to = static_cast<uint32_t>(rows[8 * k + lane / 4]) + lane % 4 * 4;
    for (const Span read : block.storing)
      require(!Span{to, to + 4}.overlaps(read), "stmatrix where TMA still reads");
    std::memcpy(shared_at(block, to), &words[k], 4);
    block.unfenced[to] = current;
  }
}

inline void store_fence() {
  std::erase_if(own_block().unfenced, [](const auto& word) { return word.second == current; });
}

inline void store_tile(const void* descriptor, const Place& tile, uint32_t address) {
  TensorMap map;
  std::memcpy(&map, descriptor, sizeof map);
  const Span span{address, address + map.rows * kRow};
  const uint32_t rank = own_rank();
  Block& block = own_block();
  require(address % kRow == 0, "a TMA store from an address that is no multiple of 128");
  const auto next = block.unfenced.lower_bound(span.first);
  require(next == block.unfenced.end() || next->first >= span.last,
          "a TMA store of what was written without a fence");
  block.storing.push_back(span);
  Sender* sender = &senders[current];
  ++sender->sent;
  under_way.push_back([=] {
    Block& from = block_of(rank);
    each_element(from, map, tile, address, [](const char* shared, char* global) {
      if (global) std::memcpy(global, shared, 2);
    });
    from.storing.erase(std::find(from.storing.begin(), from.storing.end(), span));
    ++sender->read;
    wake(sender->read_one);
  });
}

inline void store_commit() { senders[current].committed = senders[current].sent; }

inline void store_wait() {
  Sender& sender = senders[current];
  require(sender.committed == sender.sent, "waits without having committed its TMA stores");
  while (sender.read < sender.sent) wait_for(sender.read_one, "its TMA stores");
}

// Called by each thread at its end.
inline void leave_tma() {
  const auto found = senders.find(current);
  require(found == senders.end() || found->second.read == found->second.sent,
          "leaves before TMA has read what it stores");
}

}  // namespace emulator
