#pragma once

#include <cstdint>

// Every TU of a kernel is compiled once per instruction set, so a helper shared by them must have
// internal linkage: the linker would otherwise keep one copy, maybe of an instruction set the
// processor lacks.
#define MSD_INLINE static inline __attribute__((always_inline))

// Before a loop over the few parts of a tile. GCC else unrolls it too late, and keeps arrays that
// could be registers in memory.
#if defined(__clang__)
#define MSD_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define MSD_UNROLL _Pragma("GCC unroll 8")
#else
#define MSD_UNROLL
#endif

namespace msd {

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

MSD_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return bits;
}

MSD_INLINE float float_of(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

MSD_INLINE float to_float(float value) { return value; }

MSD_INLINE float to_float(BFloat16 value) { return float_of(uint32_t{value.bits} << 16); }

// Exponent and mantissa move to float32's positions; a product with 2^112 then corrects the bias
// and normalises subnormal numbers. Infinity and NaN get float32's largest exponent.
MSD_INLINE float to_float(Half value) {
  const uint32_t sign = uint32_t{value.bits} << 16 & 0x80000000u;
  const uint32_t magnitude = uint32_t{value.bits} << 13 & 0x0fffe000u;
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  return float_of(bits_of(float_of(magnitude) * 0x1p112f) | special | sign);
}

MSD_INLINE void from_float(float value, float* to) { *to = value; }

// Rounds to the nearest, ties to even; a NaN stays one.
MSD_INLINE void from_float(float value, BFloat16* to) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const uint32_t quiet = bits >> 16 | 0x40u;
  to->bits = static_cast<uint16_t>(value != value ? quiet : rounded);
}

// Rounds to the nearest, ties to even. A subnormal result is what remains of the mantissa when the
// number is added to 0.5, whose last bit is half's smallest number, 2^-24.
MSD_INLINE void from_float(float value, Half* to) {
  const uint32_t bits = bits_of(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {
    half = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  to->bits = static_cast<uint16_t>(half | (bits >> 16 & 0x8000u));
}

}  // namespace msd
