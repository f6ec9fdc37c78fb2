// What the launches of both directions share.
#pragma once

#include "group_norm.h"
#include "launch.cuh"
#include "vectors.cuh"

namespace msd::cuda {

constexpr char kOp[] = "group_norm";

// Calls body(T{}) with the type of the activations.
template <class Body>
void for_type(ElementType type, const Body& body) {
  switch (type) {
    case ElementType::kFloat:
      return body(float());
    case ElementType::kBFloat16:
      return body(BFloat16());
    case ElementType::kHalf:
      return body(Half());
  }
}

// Calls body(T{}, layout) with a std::bool_constant that says whether the layout is NHWC.
template <class Body>
void for_type_and_layout(const GroupNormShape& shape, const Body& body) {
  for_type(shape.type, [&](auto element) {
    if (shape.channels_last) {
      body(element, std::true_type());
    } else {
      body(element, std::false_type());
    }
  });
}

// The stages of a launch with the accesses that these buffers allow.
inline Stages with_widths(const GroupNormShape& shape, const GroupNormLaunch& launch,
                          std::initializer_list<const void*> buffers) {
  Stages stages = launch.stages;
  const int bytes = shape.type == ElementType::kFloat ? 4 : 2;
  for (int s = 0; s < stages.count; ++s) {
    stages.stage[s].width =
        access_width(stages.stage[s], shape.spatial, shape.channels_last, bytes, buffers);
  }
  return stages;
}

inline Grid grid_of(const GroupNormLaunch& launch) {
  return {launch.blocks, kThreads, launch.shared, launch.stages.cluster};
}

}  // namespace msd::cuda
