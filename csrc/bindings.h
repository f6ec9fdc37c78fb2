// What the Python modules of the CPU and of the CUDA kernels have in common.
//
// An op has the same function in both: f(layout, inputs, outputs), and on CUDA what follows the
// tensors: the device and its stream. The layout is compiled once, with the types of the tensors;
// tensors are addresses, 0 for one that is absent or not wanted. The caller allocates the outputs,
// and has checked every tensor against the layout: nothing in here knows their sizes.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "group_norm_job.h"
#include "resample2d_job.h"

namespace msd {

namespace py = pybind11;
using py::literals::operator""_a;

using Address = std::uintptr_t;
template <size_t kCount>
using Addresses = std::array<Address, kCount>;
// The types of tensors, by the codes of msd_kernels/runtime/extension.py.
template <size_t kCount>
using Types = std::array<int64_t, kCount>;
using Sizes = std::vector<int64_t>;

using WithoutLock = py::call_guard<py::gil_scoped_release>;

template <class T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

inline void require(bool fits, const char* what) {
  if (!fits) throw std::invalid_argument(what);
}

inline ElementType element_type(int64_t code) {
  require(code >= 0 && code <= 2, "the kernels take float32, bfloat16 and float16");
  return static_cast<ElementType>(code);
}

// A layout as the kernels of GroupNorm take it, with the types of x, weight, bias, scale and shift.
struct GroupNormLayout {
  GroupNormShape shape;
  float eps;
  bool silu;
  std::array<bool, 4> is_float;

  GroupNormLayout(Sizes counts, Sizes channels, Sizes skip_channels, Sizes groups, int64_t spatial,
                  bool channels_last, double eps, bool silu, double dropout, const Types<5>& types)
      : shape{std::move(counts), std::move(channels), std::move(skip_channels), std::move(groups),
              spatial,           channels_last,       element_type(types[0])},
        eps(static_cast<float>(eps)),
        silu(silu) {
    const size_t stages = shape.counts.size();
    require(shape.channels.size() == stages && shape.skip_channels.size() == stages &&
                shape.groups.size() == stages && spatial >= 1,
            "group_norm: needs sizes of every stage, and pixels");
    for (size_t s = 0; s < stages; ++s) {
      require(shape.counts[s] >= 0 && shape.groups[s] >= 1 && shape.channels[s] >= 1 &&
                  shape.skip_channels[s] >= 0 &&
                  (shape.channels[s] + shape.skip_channels[s]) % shape.groups[s] == 0,
              "group_norm: needs channels in whole groups");
    }
    require(dropout == 0, "group_norm: no dropout");
    require(channels_last || !shape.has_skip(), "group_norm: two sources have channels innermost");
    for (size_t i = 0; i < is_float.size(); ++i) {
      is_float[i] = element_type(types[1 + i]) == ElementType::kFloat;
      require(is_float[i] || types[1 + i] == types[0],
              "group_norm: parameters are of the type of x or float32");
    }
  }

  // Inputs: x, skip, weight, bias, scale, shift. Outputs: y, mean, rstd.
  GroupNormForward forward(const Addresses<6>& inputs, const Addresses<3>& outputs) const {
    return {at(inputs[0]), at(inputs[1]),  affine(&inputs[2]),    eps,
            silu,          at(outputs[0]), at<float>(outputs[1]), at<float>(outputs[2])};
  }

  // Inputs: dy, mean, rstd, x, skip, weight, bias, scale, shift. Outputs: the gradients of the last
  // six.
  GroupNormBackward backward(const Addresses<9>& inputs, const Addresses<6>& outputs) const {
    GroupNormBackward job;
    job.dy = at(inputs[0]);
    job.mean = at<float>(inputs[1]);
    job.rstd = at<float>(inputs[2]);
    job.x = at(inputs[3]);
    job.skip = at(inputs[4]);
    job.affine = affine(&inputs[5]);
    job.silu = silu;
    job.dx = at(outputs[0]);
    job.dskip = at(outputs[1]);
    job.dweight = {at(outputs[2]), is_float[0]};
    job.dbias = {at(outputs[3]), is_float[1]};
    job.dscale = {at(outputs[4]), is_float[2]};
    job.dshift = {at(outputs[5]), is_float[3]};
    return job;
  }

 private:
  Affine affine(const Address* addresses) const {
    const auto array = [&](size_t i) { return ConstArray{at(addresses[i]), is_float[i]}; };
    return {array(0), array(1), array(2), array(3)};
  }
};

// A layout as the kernels of FIR resampling take it, with the type of x and y.
struct Resample2dLayout {
  ResampleShape shape;
  ResampleFilter filter;

  Resample2dLayout(std::vector<double> taps, bool upward, int64_t stride, Sizes counts,
                   Sizes channels, int64_t height, int64_t width, int64_t out_height,
                   int64_t out_width, bool channels_last, const Types<1>& types)
      : shape{std::move(counts), std::move(channels), height,        width,
              out_height,        out_width,           channels_last, element_type(types[0])},
        filter{std::move(taps), upward, stride} {
    require(!filter.taps.empty() && filter.taps.size() <= kMaxTaps && stride >= 1 &&
                stride <= kMaxStride,
            "resample2d: too many taps, or too large a stride");
    require(shape.counts.size() == shape.channels.size() && height >= 1 && width >= 1 &&
                out_height >= 1 && out_width >= 1,
            "resample2d: needs sizes of every stage, and pixels");
  }
};

inline void bind_layouts(py::module_& m) {
  py::class_<GroupNormLayout>(m, "GroupNormLayout", py::module_local(),
                              "msd_kernels.layouts.GroupNormLayout, and the types of x, weight, "
                              "bias, scale and shift.")
      .def(py::init<Sizes, Sizes, Sizes, Sizes, int64_t, bool, double, bool, double,
                    const Types<5>&>());
  py::class_<Resample2dLayout>(m, "Resample2dLayout", py::module_local(),
                               "msd_kernels.layouts.Resample2dLayout, and the type of x.")
      .def(py::init<std::vector<double>, bool, int64_t, Sizes, Sizes, int64_t, int64_t, int64_t,
                    int64_t, bool, const Types<1>&>());
}

inline py::list words(const std::string& text) {
  py::list list;
  std::istringstream stream(text);
  for (std::string word; stream >> word;) list.append(word);
  return list;
}

}  // namespace msd
