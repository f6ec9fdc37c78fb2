// What the steps of GroupNorm's passes work on: pieces of planes, and where their columns lie.
#pragma once

#include "group_norm_unit.h"

namespace msd::MSD_ISA {

// One plane's piece as a matrix.
struct Item {
  int64_t plane, piece, pixel, rows, offset, stride, columns, first_row;
  bool folded;  // columns are not the unit's channels

  Item(const Unit& unit, int64_t item)
      : plane(unit.piece_count == 1 ? item : item / unit.piece_count),
        piece(item - plane * unit.piece_count) {
    const Piece& cut = unit.pieces[piece];
    pixel = cut.pixel;
    rows = cut.rows;
    offset = unit.x + plane * unit.plane_stride + cut.pixel * unit.pixel_stride;
    stride = cut.fold * unit.pixel_stride;
    columns = cut.fold * unit.plane_channels;
    first_row = plane * unit.plane_rows + cut.row;
    folded = cut.fold > 1 || unit.planes > 1;
  }
};

// Columns of an item that lie in one source, `stride` elements from row to row.
struct Span {
  int64_t column, columns, offset, stride;
};

// Calls f(span, whether it is of skip) for the item's columns of x, then for those of skip.
template <class F>
MSD_INLINE void for_each_source(const Unit& unit, const Item& item, const F& f) {
  const int64_t own = unit.own_channels;
  if (own == unit.channels && unit.skip_stride == 0) {
    f(Span{0, item.columns, item.offset, item.stride}, false);
    return;
  }
  const int64_t own_offset = unit.own + item.pixel * unit.own_stride;
  const int64_t skip_offset = unit.skip + item.pixel * unit.skip_stride;
  if (own > 0) f(Span{0, own, own_offset, unit.own_stride}, false);
  if (own < unit.channels) f(Span{own, unit.channels - own, skip_offset, unit.skip_stride}, true);
}

template <class T>
MSD_INLINE const T* source_of(const void* x, const void* skip, const Span& span, bool of_skip) {
  return static_cast<const T*>(of_skip ? skip : x) + span.offset;
}

}  // namespace msd::MSD_ISA
