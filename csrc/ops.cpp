// The Python module of the CPU kernels, and of what the host plans. An op of the CPU is here in two
// places: its function, by the convention of bindings.h, and its line in the module. It runs
// without Python's lock.
#include "bindings.h"
#include "cpu/group_norm.h"
#include "cpu/isa.h"
#include "cpu/optimal_denoiser.h"
#include "cpu/resample2d.h"
#include "formulas.h"

namespace {

using msd::Addresses;
using msd::at;
using msd::py::literals::operator""_a;
namespace py = msd::py;

std::string compiler() {
#if defined(__clang__)
  return "Clang " __clang_version__;
#elif defined(__GNUC__)
  return "GCC " __VERSION__;
#else
  return "unknown";
#endif
}

py::dict build_info() {
  return py::dict("compiler"_a = compiler(), "flags"_a = msd::words(MSD_FLAGS),
                  "cpu_isas"_a = msd::words(MSD_CPU_ISAS), "torch"_a = MSD_TORCH_VERSION);
}

void group_norm_forward(const msd::GroupNormLayout& layout, const Addresses<5>& inputs,
                        const Addresses<3>& outputs) {
  msd::group_norm_forward(layout.shape, layout.forward(inputs, outputs));
}

void group_norm_backward(const msd::GroupNormLayout& layout, const Addresses<8>& inputs,
                         const Addresses<5>& outputs, bool dy_planar) {
  msd::GroupNormBackward job = layout.backward(inputs, outputs);
  job.dy_planar = dy_planar;
  msd::group_norm_backward(layout.shape, job);
}

void resample2d(const msd::Resample2dLayout& layout, const Addresses<1>& inputs,
                const Addresses<1>& outputs) {
  msd::resample2d(layout.shape, layout.filter, at(inputs[0]), at(outputs[0]));
}

void optimal_denoiser_centre(int64_t rows, int64_t dim, int64_t type, double step,
                             const Addresses<2>& inputs, const Addresses<2>& outputs) {
  msd::require(type >= 0 && type <= 4, "optimal_denoiser: no such type of data");
  msd::optimal_denoiser_centre({at(inputs[0]), static_cast<msd::DataType>(type), rows, dim,
                                at<double>(inputs[1]), step, at<double>(outputs[0]),
                                at<double>(outputs[1])});
}

void optimal_denoiser_update_softmax(int64_t batch, int64_t rows, const Addresses<2>& inputs,
                                     const Addresses<4>& outputs) {
  msd::optimal_denoiser_update_softmax({batch, rows, at<double>(outputs[0]), at<double>(inputs[0]),
                                        at<double>(inputs[1]), at<double>(outputs[1]),
                                        at<double>(outputs[2]), at<double>(outputs[3])});
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  msd::bind_layouts(m);
  msd::bind_formulas(m);
  m.def("build_info", &build_info,
        "What the module was built with: compiler, flags, cpu_isas, torch (the version).");
  m.def(
      "cpu_isa", [] { return msd::name(msd::cpu_isa()); },
      "The instruction set of the kernels that serve this processor.");
  m.def("group_norm_forward", &group_norm_forward, msd::WithoutLock(),
        "(layout, [x, weight, bias, scale, shift], [y, mean, rstd])");
  m.def("group_norm_backward", &group_norm_backward, msd::WithoutLock(),
        "(layout, [dy, mean, rstd, x, weight, bias, scale, shift], [dx, dweight, dbias, dscale, "
        "dshift], whether dy of one stage is NCHW although x is NHWC)");
  m.def("resample2d", &resample2d, msd::WithoutLock(), "(layout, [x], [y])");
  m.def("optimal_denoiser_centre", &optimal_denoiser_centre, msd::WithoutLock(),
        "(rows, dim, type of data, step, [data, shift], [centred, half_norms])");
  m.def("optimal_denoiser_update_softmax", &optimal_denoiser_update_softmax, msd::WithoutLock(),
        "(batch, rows, [half_norms, precision], [products, peak, sums, rescale]); all but rescale "
        "are read, too");
}
