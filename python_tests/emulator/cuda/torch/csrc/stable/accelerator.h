// In place of torch's header: the host has one device, and no guard of it.

#pragma once

#define DeviceGuard DeviceGuardOfTorch
#include_next <torch/csrc/stable/accelerator.h>
#undef DeviceGuard

namespace torch::stable::accelerator {
struct DeviceGuard {
  explicit DeviceGuard(DeviceIndex) {}
};
}  // namespace torch::stable::accelerator
