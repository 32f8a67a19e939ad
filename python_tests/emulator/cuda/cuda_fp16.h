// In place of CUDA's header: the conversions of common/device.cuh.

#pragma once

#include "emulator.h"

inline float __half2float(uint16_t bits) { return emulator::from_half(bits); }
inline uint16_t __float2half_rn(float x) { return emulator::to_half(x); }
inline uint16_t __ushort_as_half(uint16_t bits) { return bits; }
inline uint16_t __half_as_ushort(uint16_t bits) { return bits; }
