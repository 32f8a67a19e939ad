// The Python module bupo._C: importing it registers the operators; build_info() says what is in it.

#include <pybind11/pybind11.h>

#include <string>

#include "cpu/library.h"
#include "cpu/vector_math.h"
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
    info["cuda_paths"] =
        py::dict(py::arg("sm90") =
                     "compute capability 9.0, bfloat16, D % 8 == 0, rows of the weight on 16 "
                     "bytes; with a softcap no "
                     "gradient of the entropy",
                 py::arg("portable") = "every other call, compute capability 8.0 and newer");
    info["workspace_bytes"] = bupo::workspace_bytes.load();
    const auto products = [](bool block) { return block ? "block" : "library"; };
    info["cpu_products"] =
        py::dict(py::arg("float32") = products(bupo::cpu::block_kernel<float>().call),
                 py::arg("bfloat16") = products(bupo::cpu::block_kernel<uint16_t>().call));
    info["cpu_vectors"] = 8 * bupo::cpu::vector_bytes();
    return info;
  });
  m.def("set_workspace_bytes", [](int64_t bytes) { bupo::workspace_bytes = bytes; });
  m.def("set_portable_only", [](bool only) { bupo::portable_only = only; });
  // Which path serves a call on a GPU; in every build, like cuda_plan.
  m.def(
      "cuda_path",
      [](int capability, bool bfloat16, bool aligned, int64_t width, int64_t vocab, bool softcap,
         bool entropy_gradient) {
        const auto path = bupo::cuda::path_of(
            {capability, bfloat16, aligned, width, vocab, softcap, entropy_gradient});
        return path == bupo::cuda::Path::kSm90 ? "sm90" : "portable";
      },
      py::arg("capability"), py::arg("bfloat16"), py::arg("aligned"), py::arg("width"),
      py::arg("vocab"), py::arg("softcap"), py::arg("entropy_gradient"));
  // How a CUDA call would be cut; in every build, so that every build can test it.
  m.def(
      "cuda_plan",
      [](int64_t tokens, int64_t width, int64_t vocab, int64_t element, bool gradients,
         bool weight_gradient, bool half, int64_t budget, bool sm90, bool placed) {
        const auto p = bupo::cuda::plan_of(
            sm90 ? bupo::cuda::Path::kSm90 : bupo::cuda::Path::kPortable,
            {tokens, width, vocab, element, gradients, weight_gradient, half, placed}, budget);
        return py::dict(py::arg("block") = p.block, py::arg("chunk") = p.chunk,
                        py::arg("slice") = p.slice, py::arg("accumulate") = p.accumulate,
                        py::arg("bytes") = p.bytes, py::arg("stride") = p.products_stride);
      },
      py::arg("tokens"), py::arg("width"), py::arg("vocab"), py::arg("element"),
      py::arg("gradients"), py::arg("weight_gradient"), py::arg("half"), py::arg("budget"),
      py::arg("sm90"), py::arg("placed"));
}
