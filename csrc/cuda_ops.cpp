// The Python module of the CUDA kernels, with the convention of bindings.h. It needs neither
// PyTorch nor CUDA's headers: kernels are started by functions that take pointers, a device and a
// stream.
#include "bindings.h"
#include "cuda/group_norm.h"
#include "cuda/resample2d.h"

namespace {

using msd::Address;
using msd::Addresses;
using msd::at;
using msd::py::literals::operator""_a;
namespace py = msd::py;

// Groups of a unit, and its parts or 0 for two passes; no groups: the estimates decide.
using Cut = std::array<int64_t, 2>;

std::shared_ptr<const msd::cuda::GroupNormPlan> plan_for(const msd::GroupNormLayout& layout,
                                                         bool backward, const Cut& cut,
                                                         int device) {
  msd::require(!layout.shape.has_skip(), "group_norm: the CUDA kernels take one source");
  return msd::cuda::group_norm_plan(layout.shape, backward, device, {cut[0], cut[1]});
}

int64_t group_norm_workspace(const msd::GroupNormLayout& layout, bool backward, bool parameters,
                             const Cut& cut, int device) {
  return plan_for(layout, backward, cut, device)->workspace(backward, parameters);
}

void group_norm_forward(const msd::GroupNormLayout& layout, const Addresses<6>& inputs,
                        const Addresses<3>& outputs, Address workspace, const Cut& cut, int device,
                        Address stream) {
  msd::cuda::group_norm_forward(layout.shape, *plan_for(layout, false, cut, device),
                                layout.forward(inputs, outputs), at<float>(workspace), device,
                                at(stream));
}

void group_norm_backward(const msd::GroupNormLayout& layout, const Addresses<9>& inputs,
                         const Addresses<6>& outputs, Address workspace, const Cut& cut, int device,
                         Address stream) {
  msd::cuda::group_norm_backward(layout.shape, *plan_for(layout, true, cut, device),
                                 layout.backward(inputs, outputs), at<float>(workspace), device,
                                 at(stream));
}

// How a device with `facts` = (multiprocessors, shared memory per block, per multiprocessor,
// reserved, clusters) would cut every stage that has samples: (one pass, groups of a unit, parts,
// pixels of a part, bytes of shared memory).
std::vector<std::array<int64_t, 5>> group_norm_cuts(const msd::GroupNormLayout& layout,
                                                    bool backward,
                                                    const std::array<int64_t, 5>& facts) {
  const msd::cuda::Device device{facts[0], facts[1], facts[2], facts[3], facts[4] != 0};
  std::vector<std::array<int64_t, 5>> cuts;
  for (size_t stage = 0; stage < layout.shape.counts.size(); ++stage) {
    if (layout.shape.counts[stage] == 0) continue;
    const msd::cuda::StageCut cut = msd::cuda::cut_stage(layout.shape, stage, backward, device);
    cuts.push_back({cut.one_pass, cut.block_groups, cut.parts, cut.part_pixels, cut.layout.total});
  }
  return cuts;
}

void resample2d(const msd::Resample2dLayout& layout, const Addresses<1>& inputs,
                const Addresses<1>& outputs, int device, Address stream) {
  msd::cuda::resample2d(layout.shape, layout.filter, at(inputs[0]), at(outputs[0]), device,
                        at(stream));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  msd::bind_layouts(m);
  m.def(
      "build_info",
      [] { return py::dict("cuda_architectures"_a = msd::words(MSD_CUDA_ARCHITECTURES)); },
      "What the module was built for: cuda_architectures.");
  m.def("group_norm_workspace", &group_norm_workspace, msd::WithoutLock(),
        "(layout, backward, whether gradients of weight or bias are wanted, cut, device) -> floats "
        "of the workspace");
  m.def("group_norm_forward", &group_norm_forward, msd::WithoutLock(),
        "(layout, [x, skip, weight, bias, scale, shift], [y, mean, rstd], workspace, cut, device, "
        "stream)");
  m.def("group_norm_backward", &group_norm_backward, msd::WithoutLock(),
        "(layout, [dy, mean, rstd, x, skip, weight, bias, scale, shift], [dx, dskip, dweight, "
        "dbias, dscale, "
        "dshift], workspace, cut, device, stream)");
  m.def("group_norm_cuts", &group_norm_cuts,
        "(layout, backward, (multiprocessors, shared memory per block, per multiprocessor, "
        "reserved, clusters)) -> (one pass, groups of a unit, parts, pixels of a part, bytes of "
        "shared memory) of every stage with samples");
  m.def("resample2d", &resample2d, msd::WithoutLock(), "(layout, [x], [y], device, stream)");
}
