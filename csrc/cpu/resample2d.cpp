#include "resample2d.h"

#include <algorithm>

#include "isa.h"
#include "parallel.h"
#include "resample2d_unit.h"

namespace msd {
namespace {

// This many elements cost about as much as one of what `useful_threads` has in mind.
constexpr int64_t kElementsPerUseful = 4;

// Few enough rows that every thread gets several units, many enough that the rows which
// neighbouring units both read do not count.
int64_t rows_of_unit(int64_t row_elements, int64_t elements, int64_t threads) {
  constexpr int64_t kLeastElements = 1 << 14;
  constexpr int64_t kMostElements = 1 << 18;
  const int64_t share = threads == 1 ? kMostElements : elements / (2 * threads);
  return std::max<int64_t>(1, std::clamp(share, kLeastElements, kMostElements) / row_elements);
}

// Every stage's images, one after the other, cut into units of rows.
std::vector<ResampleUnit> make_units(const ResampleShape& shape, int64_t elements,
                                     int64_t threads) {
  const int64_t in_pixels = shape.height * shape.width;
  const int64_t out_pixels = shape.out_height * shape.out_width;
  std::vector<ResampleUnit> units;
  ResampleUnit unit = {};
  for (size_t s = 0; s < shape.counts.size(); ++s) {
    const int64_t planes = shape.counts[s] * shape.channels[s];
    unit.channels = shape.channels_last ? shape.channels[s] : 1;
    const int64_t rows = planes / unit.channels * shape.out_height;
    const int64_t row_elements = unit.channels * std::max(in_pixels, out_pixels) / shape.out_height;
    const int64_t step = rows_of_unit(row_elements, elements, threads);
    for (unit.first = 0; unit.first < rows; unit.first += step) {
      unit.rows = std::min(step, rows - unit.first);
      units.push_back(unit);
    }
    unit.x += planes * in_pixels;
    unit.y += planes * out_pixels;
  }
  return units;
}

// Of the larger one of input and output.
int64_t count_elements(const ResampleShape& shape) {
  int64_t planes = 0;
  for (size_t s = 0; s < shape.counts.size(); ++s) planes += shape.counts[s] * shape.channels[s];
  return planes * std::max(shape.height * shape.width, shape.out_height * shape.out_width);
}

}  // namespace

void resample2d(const ResampleShape& shape, const ResampleFilter& filter, const void* x, void* y) {
  const ResampleKernel kernel = MSD_FOR_THIS_CPU(resample2d_kernel)(shape.type);
  const ResampleJob job = {x, y, resample_axis(filter, shape.height, shape.out_height),
                           resample_axis(filter, shape.width, shape.out_width)};
  const int64_t elements = count_elements(shape);
  const int64_t threads = useful_threads(elements / kElementsPerUseful);
  const std::vector<ResampleUnit> units = make_units(shape, elements, threads);
  for_each_dynamic(static_cast<int64_t>(units.size()), threads,
                   [&](int64_t i) { kernel(job, units[i]); });
}

}  // namespace msd
