// Blocks of numbers: conversion to and from float32, sums and elementary functions, written as plain loops that a
// compiler turns into vector code for whatever instruction set it is told. No intrinsics but for float16, whose
// conversion instruction compilers do not find by themselves.
//
// Everything here is static on purpose, see kernels.h.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "kernels.h"

namespace kernelwise {
namespace {

// Values are turned to float32 in blocks that stay in the first-level cache together with their companions.
constexpr int64_t kBlock = 256;

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

template <class T>
struct Is {
  static constexpr DType dtype = DType::kFloat32;
  static constexpr bool half = false;
};
template <>
struct Is<bf16> {
  static constexpr DType dtype = DType::kBFloat16;
  static constexpr bool half = true;
};
template <>
struct Is<fp16> {
  static constexpr DType dtype = DType::kFloat16;
  static constexpr bool half = true;
};

static inline uint32_t bits_of(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

static inline float float_of(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static inline void widen(const float* from, float* to, int64_t num) { std::memcpy(to, from, sizeof(float) * num); }

static inline void widen(const bf16* from, float* to, int64_t num) {
#pragma omp simd
  for (int64_t i = 0; i < num; i++) to[i] = float_of(uint32_t(from[i].bits) << 16);
}

static inline float widen_one(fp16 h) {
  const uint32_t magnitude = h.bits & 0x7fffu;
  // Shifted into place the exponent is 112 too small; the product also puts subnormal numbers right.
  uint32_t u = bits_of(float_of(magnitude << 13) * 0x1p112f);
  u = magnitude >= 0x7c00u ? (magnitude << 13) | 0x7f800000u : u;
  return float_of(u | uint32_t(h.bits & 0x8000u) << 16);
}

static inline void widen(const fp16* from, float* to, int64_t num) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= num; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#endif
#pragma omp simd
  for (int64_t j = i; j < num; j++) to[j] = widen_one(from[j]);
}

static inline void narrow(const float* from, float* to, int64_t num) {
  if (from != to) std::memcpy(to, from, sizeof(float) * num);
}

// The upper half of a float32, rounded to nearest, ties to even; NaN stays NaN.
static inline uint32_t bf16_bits(float f) {
  const uint32_t u = bits_of(f);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return (u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 0x40u : rounded;
}

static inline void narrow(const float* from, bf16* to, int64_t num) {
#pragma omp simd
  for (int64_t i = 0; i < num; i++) to[i].bits = uint16_t(bf16_bits(from[i]));
}

static inline fp16 narrow_one(float f) {
  const uint32_t sign = (bits_of(f) >> 16) & 0x8000u, u = bits_of(f) & 0x7fffffffu;
  // Below 2^-14 the result is subnormal: adding 0.5 leaves its 10 bits at the end, rounded by the processor.
  const uint32_t subnormal = bits_of(float_of(u) + 0.5f) - bits_of(0.5f);
  const uint32_t normal = (u + 0xfffu + ((u >> 13) & 1u) - (112u << 23)) >> 13;
  uint32_t h = u < 0x38800000u ? subnormal : normal;
  h = u >= 0x47800000u ? 0x7c00u : h;
  h = u > 0x7f800000u ? 0x7e00u | ((u >> 13) & 0x3ffu) : h;
  return fp16{uint16_t(h | sign)};
}

static inline void narrow(const float* from, fp16* to, int64_t num) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= num; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#endif
#pragma omp simd
  for (int64_t j = i; j < num; j++) to[j] = narrow_one(from[j]);
}

// Values as float32: in place where they are, else converted into `buffer`.
static inline const float* read(const float* from, float*, int64_t) { return from; }
template <class T>
static inline const float* read(const T* from, float* buffer, int64_t num) {
  widen(from, buffer, num);
  return buffer;
}

// Where to put float32 results before `narrow`: where they belong, else `buffer`.
static inline float* room(float* to, float*) { return to; }
template <class T>
static inline float* room(T*, float* buffer) {
  return buffer;
}

// Rounds to T and back, as a layer does that casts in the middle of its formula.
static inline void round_as(const float*, float*, int64_t) {}
static inline void round_as(const bf16*, float* values, int64_t num) {
#pragma omp simd
  for (int64_t i = 0; i < num; i++) values[i] = float_of(bf16_bits(values[i]) << 16);
}
template <class T>
static inline void round_as(const T*, float* values, int64_t num) {
  T rounded[kBlock];
  for (int64_t j = 0; j < num; j += kBlock) {
    const int64_t n = smaller(kBlock, num - j);
    narrow(values + j, rounded, n);
    widen(rounded, values + j, n);
  }
}

// Four sums side by side, so that one addition need not wait for the last.
static inline float dot(const float* a, const float* b, int64_t num) {
  const int64_t quarter = num / 4;
  float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
  for (int64_t i = 0; i < quarter; i++) {
    s0 += a[i] * b[i];
    s1 += a[i + quarter] * b[i + quarter];
    s2 += a[i + 2 * quarter] * b[i + 2 * quarter];
    s3 += a[i + 3 * quarter] * b[i + 3 * quarter];
  }
  for (int64_t i = 4 * quarter; i < num; i++) s0 += a[i] * b[i];
  return (s0 + s1) + (s2 + s3);
}

// e^x within 2 units in the last place; infinite above 88.3, zero below -87.6, NaN for NaN.
static inline float exp_of(float x) {
  x = x > 88.5f ? 88.5f : x;  // written so that NaN stays; 2^n is then infinite or zero
  x = x < -88.0f ? -88.0f : x;
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which then stands in the low bits
  const float shifted = x * 1.44269504f + shift;
  const float n = shifted - shift;
  float r = x - n * 0x1.62e4p-1f;  // ln 2 in two parts, the first short enough to be exact here
  r = r - n * float(0x1.62e42fefa39efp-1 - 0x1.62e4p-1);
  float p = 0.00139506f;  // (e^r - 1 - r) / r^2 for |r| <= ln(2) / 2, fitted for the least maximum error: 3e-9
  p = p * r + 0.008368954f;
  p = p * r + 0.041666206f;
  p = p * r + 0.16666518f;
  p = p * r + 0.5f;
  const float y = 1.0f + (r + r * r * p);
  return y * float_of((bits_of(shifted) - bits_of(shift) + 127u) << 23);
}

// Standard normal distribution function less 1/2, that is erf(x / sqrt(2)) / 2, within 1.3e-7; exact from 5.6 on.
static inline float centred_normal_cdf(float x) {
  const float s = x * x;
  float p = 2.2173955e-08f;  // fitted for |x| <= 5.6, least maximum error 1e-8
  p = p * s + 6.3381744e-06f;
  p = p * s + 0.00017262022f;
  p = p * s + 0.0046998765f;
  p = p * s + 0.03426577f;
  p = p * s + 0.39894226f;
  float q = 1.1796611e-06f;
  q = q * s + 7.465174e-05f;
  q = q * s + 0.0019061797f;
  q = q * s + 0.028875222f;
  q = q * s + 0.25255752f;
  q = q * s + 1.0f;
  const float inside = x * p / q;
  const float upper = x > 5.6f ? 0.5f : inside;
  return x < -5.6f ? -0.5f : upper;
}

// tanh within 2 units in the last place.
static inline float tanh_of(float x) {
  const float s = x * x;
  float p = -0.005717042f;  // (tanh(x) / x - 1) / x^2 for |x| <= 0.625, fitted for the least maximum relative error: 4e-9
  p = p * s + 0.020650486f;
  p = p * s - 0.053743497f;
  p = p * s + 0.13331491f;
  p = p * s - 0.33333284f;
  const float inner = x + x * s * p;
  const float outer = 1.0f - 2.0f / (1.0f + exp_of(2.0f * fabsf(x)));
  return fabsf(x) < 0.625f ? inner : copysignf(outer, x);
}

}  // namespace
}  // namespace kernelwise
