// The Python module bupo._C: importing it registers the operators; build_info() says what is in it.

#include <pybind11/pybind11.h>

#include "cpu/library.h"

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
    const auto products = [](bool block) { return block ? "block" : "library"; };
    info["cpu_products"] =
        py::dict(py::arg("float32") = products(bupo::cpu::block_kernel<float>().call),
                 py::arg("bfloat16") = products(bupo::cpu::block_kernel<uint16_t>().call));
    return info;
  });
}
