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

}  // namespace bupo::cuda
