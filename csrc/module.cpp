// The Python module bupo._C: importing it loads the operators' library, which knows nothing of
// Python; build_info() says what is in that.

#include <pybind11/pybind11.h>

#include <string>

#include "cpu/library.h"
#include "cpu/vector_math.h"
#include "settings.h"

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
    info["cuda_kernels"] = bupo::kKernelNames[static_cast<int>(bupo::kernels.load())];
    info["workspace_bytes"] = bupo::workspace_bytes.load();
    const auto products = [](bool block) { return block ? "block" : "library"; };
    info["cpu_products"] =
        py::dict(py::arg("float32") = products(bupo::cpu::block_kernel<float>().call),
                 py::arg("bfloat16") = products(bupo::cpu::block_kernel<uint16_t>().call));
    info["cpu_vectors"] = 8 * bupo::cpu::vector_bytes();
    return info;
  });
  m.def("set_workspace_bytes", [](int64_t bytes) { bupo::workspace_bytes = bytes; });
  m.def("set_cuda_kernels", [](const std::string& name) {
    for (int i = 0; i < static_cast<int>(std::size(bupo::kKernelNames)); ++i)
      if (name == bupo::kKernelNames[i]) {
        bupo::kernels = static_cast<bupo::Kernels>(i);
        return;
      }
    throw py::value_error("bupo.ops.set_cuda_kernels: unknown name " + name);
  });
}
