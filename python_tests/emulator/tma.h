// TMA loads of tiles with rows of 128 bytes, swizzled. A load happens some time after its issue;
// until then there is nan in its place.

#pragma once

#include <array>

#include "hopper.h"

namespace emulator {

struct TensorMap {  // of 16-bit numbers
  const char* data;
  std::array<uint64_t, 3> size, bytes_apart;  // of each dimension, the innermost first
  uint32_t rows;                              // of a tile
};
using Place = std::array<int32_t, 3>;  // in the tensor

// Zero beyond the tensor.
inline uint16_t element(const TensorMap& map, const Place& tile, uint32_t row, uint32_t column) {
  const std::array<int64_t, 3> place{tile[0] + int64_t{column}, tile[1] + int64_t{row}, tile[2]};
  const char* source = map.data;
  for (size_t d = 0; d < 3; ++d) {
    if (place[d] < 0 || place[d] >= static_cast<int64_t>(map.size[d])) return 0;
    source += static_cast<uint64_t>(place[d]) * map.bytes_apart[d];
  }
  uint16_t value;
  std::memcpy(&value, source, sizeof value);
  return value;
}

inline void arrive(const TensorMap& map, const Place& tile, uint32_t rank, uint32_t address,
                   uint32_t barrier) {
  Block& block = block_of(rank);
  for (uint32_t row = 0; row < map.rows; ++row) {
    for (uint32_t i = 0; i < kRow; i += 2) {
      const uint16_t value = element(map, tile, row, i / 2);
      std::memcpy(shared_at(block, swizzled(address + row * kRow + i)), &value, sizeof value);
    }
  }
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

}  // namespace emulator
