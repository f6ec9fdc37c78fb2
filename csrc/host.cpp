// The host-side module: what the extension was built with.
#include <pybind11/pybind11.h>

#include <sstream>
#include <string>

namespace py = pybind11;
using py::literals::operator""_a;

namespace {

std::string compiler() {
#if defined(__clang__)
  return "Clang " __clang_version__;
#elif defined(__GNUC__)
  return "GCC " __VERSION__;
#else
  return "unknown";
#endif
}

py::list words(const std::string& text) {
  py::list list;
  std::istringstream stream(text);
  for (std::string word; stream >> word;) list.append(word);
  return list;
}

py::dict build_info() {
  const py::list architectures = words(MSD_CUDA_ARCHITECTURES);
  return py::dict("compiler"_a = compiler(), "flags"_a = words(MSD_FLAGS),
                  "cpu_isas"_a = words(MSD_CPU_ISAS), "torch"_a = MSD_TORCH_VERSION,
                  "cuda"_a = py::len(architectures) > 0, "cuda_architectures"_a = architectures);
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.def("build_info", &build_info,
        "What the extension was built with: compiler, flags, cpu_isas (empty without the CPU "
        "kernels), torch (the version built against), cuda, cuda_architectures.");
}
