#include "paths.h"

#include "../settings.h"

namespace bupo::cuda {
namespace {

constexpr const Path* kPaths[] = {&sm90::kPath, &portable::kPath};  // the last serves every call

}  // namespace

const Path& path_of(const Call& call) {
  if (kernels != Kernels::kPortable)
    for (const Path* path : kPaths)
      if (path->serves(call)) return *path;
  return portable::kPath;
}

int64_t bytes_to_keep(const Call& call) {
  const int64_t bytes = call.device.capturing ? 0 : path_of(call).kept_bytes(call);
  return bytes <= workspace_budget(call.device) ? bytes : 0;
}

}  // namespace bupo::cuda
