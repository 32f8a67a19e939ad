// The Python module bupo._C: importing it registers the operators; build_info() says what is in it.

#include <pybind11/pybind11.h>

#include <string>

#include "cpu/library.h"
#include "cuda/choose.h"
#include "workspace.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled part of bupo.ops.";
  m.def("build_info", [] {
    py::dict info;
    info["version"] = BUPO_VERSION;
    info["cuda"] = BUPO_CUDA_MODE;
    info["archs"] = BUPO_CUDA_ARCHS;
    info["torch_target"] = BUPO_TORCH_TARGET;
#ifdef BUPO_WITH_CUDA
    info["devices"] = py::make_tuple("cpu", "cuda");
#else
    info["devices"] = py::make_tuple("cpu");
#endif
    info["workspace_bytes"] = bupo::workspace_bytes.load();
    const auto products = [](bool block) { return block ? "block" : "library"; };
    info["cpu_products"] =
        py::dict(py::arg("float32") = products(bupo::cpu::block_kernel<float>().call),
                 py::arg("bfloat16") = products(bupo::cpu::block_kernel<uint16_t>().call));
    return info;
  });
  m.def("set_workspace_bytes", [](int64_t bytes) { bupo::workspace_bytes = bytes; });
  // How a CUDA call would be cut; in every build, so that every build can test it.
  m.def(
      "cuda_plan",
      [](int64_t tokens, int64_t width, int64_t vocab, int64_t element, bool gradients,
         bool weight_gradient, bool half, int64_t budget) {
        const auto p = bupo::cuda::plan_of(
            {tokens, width, vocab, element, gradients, weight_gradient, half}, budget);
        return py::dict(py::arg("block") = p.block, py::arg("chunk") = p.chunk,
                        py::arg("slice") = p.slice, py::arg("accumulate") = p.accumulate,
                        py::arg("bytes") = p.bytes, py::arg("stride") = p.products_stride);
      },
      py::arg("tokens"), py::arg("width"), py::arg("vocab"), py::arg("element"),
      py::arg("gradients"), py::arg("weight_gradient"), py::arg("half"), py::arg("budget"));
}
