// The Python module bupo._C: importing it registers the operators; build_info() says what is in it.

#include <pybind11/pybind11.h>

#include "cpu/library.h"

#ifndef BUPO_CUDA_MODE
#define BUPO_CUDA_MODE "OFF"
#endif
#ifndef BUPO_CUDA_ARCHS
#define BUPO_CUDA_ARCHS ""
#endif
#ifndef BUPO_VERSION
#define BUPO_VERSION "unknown"
#endif

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled part of bupo.ops.";
  m.def("build_info", [] {
    py::dict info;
    info["version"] = BUPO_VERSION;
    info["cuda"] = BUPO_CUDA_MODE;
    info["archs"] = BUPO_CUDA_ARCHS;
    info["torch_target"] = BUPO_TORCH_TARGET;
    info["devices"] = py::make_tuple("cpu");
    info["cpu_bfloat16"] = bupo::cpu::bfloat16_kernel().call ? "block product" : "upcast";
    return info;
  });
}
