// In place of CUDA's header: the conversions of common/device.cuh.

#pragma once

#include "emulator.h"

inline uint16_t __float2bfloat16_rn(float x) { return emulator::to_bfloat16(x); }
inline uint16_t __bfloat16_as_ushort(uint16_t bits) { return bits; }
