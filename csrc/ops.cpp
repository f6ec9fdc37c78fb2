// The Python module of the CPU kernels, and of what the host plans. An op of the CPU is here in two
// places: its function, by the convention of bindings.h, and its line in the module. It runs
// without Python's lock.
#include "bindings.h"
#include "cpu/exchange_axes.h"
#include "cpu/group_norm.h"
#include "cpu/isa.h"
#include "cpu/optimal_denoiser.h"
#include "cpu/resample2d.h"
#include "formulas.h"
#include "winograd_layout.h"

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

void group_norm_forward(const msd::GroupNormLayout& layout, const Addresses<6>& inputs,
                        const Addresses<3>& outputs) {
  msd::group_norm_forward(layout.shape, layout.forward(inputs, outputs));
}

void group_norm_backward(const msd::GroupNormLayout& layout, const Addresses<9>& inputs,
                         const Addresses<6>& outputs, bool dy_planar) {
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

using WeightsOfStages = msd::WinogradLayout::Stages;

void winograd_forward(const msd::WinogradLayout& layout, const msd::Sizes& stages,
                      const Addresses<4>& inputs, const WeightsOfStages& weight,
                      const msd::Sizes& innermost, const WeightsOfStages& bias, double scale,
                      const Addresses<2>& outputs) {
  msd::winograd_conv(layout.forward(stages, inputs, weight, innermost, bias, scale, outputs));
}

void winograd_input_gradient(const msd::WinogradLayout& layout, const msd::Sizes& stages,
                             msd::Address dy, const WeightsOfStages& weight,
                             const msd::Sizes& innermost, const Addresses<3>& outputs) {
  msd::winograd_conv(layout.input_gradient(stages, dy, weight, innermost, outputs));
}

void winograd_weight_gradient(const msd::WinogradLayout& layout, const msd::Sizes& stages,
                              const Addresses<3>& inputs, const WeightsOfStages& gradients,
                              const msd::Sizes& innermost, msd::Address outliers) {
  msd::winograd_weight_gradient(
      layout.weight_gradient(stages, inputs, gradients, innermost, outliers));
}

void exchange_axes(int64_t count, int64_t rows, int64_t columns, const msd::Types<1>& types,
                   const Addresses<1>& inputs, const Addresses<1>& outputs) {
  msd::require(count >= 0 && rows >= 1 && columns >= 1, "exchange_axes: no such sizes");
  msd::exchange_axes({count, rows, columns}, msd::element_type(types[0]), at(inputs[0]),
                     at(outputs[0]));
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
        "(layout, [x, skip, weight, bias, scale, shift], [y, mean, rstd])");
  m.def("group_norm_backward", &group_norm_backward, msd::WithoutLock(),
        "(layout, [dy, mean, rstd, x, skip, weight, bias, scale, shift], [dx, dskip, dweight, "
        "dbias, dscale, "
        "dshift], whether dy of one stage is NCHW although x is NHWC)");
  m.def("resample2d", &resample2d, msd::WithoutLock(), "(layout, [x], [y])");
  m.def("optimal_denoiser_centre", &optimal_denoiser_centre, msd::WithoutLock(),
        "(rows, dim, type of data, step, [data, shift], [centred, half_norms])");
  m.def("optimal_denoiser_update_softmax", &optimal_denoiser_update_softmax, msd::WithoutLock(),
        "(batch, rows, [half_norms, precision], [products, peak, sums, rescale]); all but rescale "
        "are read, too");
  py::class_<msd::WinogradLayout>(m, "WinogradLayout",
                                  "msd_kernels.layouts.Conv2dLayout, and the type of x.")
      .def(py::init<msd::Sizes, msd::Sizes, msd::Sizes, msd::Sizes, int64_t, int64_t, int64_t,
                    const std::string&, const msd::Types<1>&>());
  m.def("winograd_forward", &winograd_forward, msd::WithoutLock(),
        "(layout, stages to compute, [x, skip, sample_bias, residual], weight per stage, stages "
        "whose "
        "weights have the channels innermost, bias per stage, scale, [y, outliers])");
  m.def("winograd_input_gradient", &winograd_input_gradient, msd::WithoutLock(),
        "(layout, stages to compute, dy, weight per stage, stages whose weights have the channels "
        "innermost, [dx, dskip, outliers])");
  m.def("winograd_weight_gradient", &winograd_weight_gradient, msd::WithoutLock(),
        "(layout, stages to compute, [dy, x, skip], float32 gradient per stage, stages whose "
        "gradients have the channels innermost, outliers)");
  m.def("exchange_axes", &exchange_axes, msd::WithoutLock(),
        "(count, rows, columns, type, [x], [y]): y [count, columns, rows] of x [count, rows, "
        "columns]");
}
