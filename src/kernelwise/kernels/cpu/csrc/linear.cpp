// Pieces of the linear layer: conversion of whole blocks, and products of few rows, which take as long as the weight takes
// to arrive from memory. Compiled once per instruction set.
#include "vec.h"

namespace kernelwise {
namespace {

template <class T>
static void widen_all(const void* from, float* to, int64_t num) {
  widen(static_cast<const T*>(from), to, num);
}

template <class T>
static void narrow_all(const float* from, const float* bias, void* to, int64_t num) {
  T* out = static_cast<T*>(to);
  if (bias == nullptr) return narrow(from, out, num);
  float sum[kBlock];
  for (int64_t j = 0; j < num; j += kBlock) {
    const int64_t n = smaller(kBlock, num - j);
#pragma omp simd
    for (int64_t k = 0; k < n; k++) sum[k] = from[j + k] + bias[j + k];
    narrow(sum, out + j, n);
  }
}

#if defined(__GNUC__)

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
#elif defined(__AVX2__)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif
constexpr int64_t kSummed = 512;  // products that are summed in one go: long sums of float32 numbers lose digits
constexpr int64_t kNear = 16384;  // bytes of float32 weights that may be on their way into the first-level cache
constexpr int64_t kStep = 2 * kLanes;  // numbers of a row that are widened together
typedef float Floats __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef float Quad __attribute__((vector_size(16), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((vector_size(kLanes * 4), aligned(2), may_alias));

static inline void widen_step(const float* from, Floats& first, Floats& second) {
  first = *reinterpret_cast<const Floats*>(from);
  second = *reinterpret_cast<const Floats*>(from + kLanes);
}

static inline float sum_of(Floats v) {
  Quad parts[kLanes / 4];
  std::memcpy(parts, &v, sizeof v);
  for (int64_t l = 1; l < kLanes / 4; l++) parts[0] += parts[l];
  return (parts[0][0] + parts[0][1]) + (parts[0][2] + parts[0][3]);
}

// Two vectors of bfloat16 numbers: those at even places, then those at odd places, which need no shuffling.
static inline void widen_step(const bf16* from, Floats& first, Floats& second) {
  const Bits bits = *reinterpret_cast<const Bits*>(from);
  first = reinterpret_cast<Floats>(bits << 16);
  second = reinterpret_cast<Floats>(bits & 0xffff0000u);
}

static inline void widen_step(const fp16* from, Floats& first, Floats& second) {
#if defined(__AVX512F__)
  const __m256i* in = reinterpret_cast<const __m256i*>(from);
  first = reinterpret_cast<Floats>(_mm512_maskz_cvtph_ps(__mmask16(-1), _mm256_loadu_si256(in)));
  second = reinterpret_cast<Floats>(_mm512_maskz_cvtph_ps(__mmask16(-1), _mm256_loadu_si256(in + 1)));
#elif defined(__F16C__)
  const __m128i* in = reinterpret_cast<const __m128i*>(from);
  first = reinterpret_cast<Floats>(_mm256_cvtph_ps(_mm_loadu_si128(in)));
  second = reinterpret_cast<Floats>(_mm256_cvtph_ps(_mm_loadu_si128(in + 1)));
#else
  float wide[kStep];
  widen(from, wide, kStep);
  first = *reinterpret_cast<const Floats*>(wide);
  second = *reinterpret_cast<const Floats*>(wide + kLanes);
#endif
}

// A row of x as float32, in the order that widen_step gives. What is left over comes last, as it is.
template <class T>
static void widen_for_few(const void* from, float* to, int64_t num) {
  const T* in = static_cast<const T*>(from);
  int64_t k = 0;
  for (; k + kStep <= num; k += kStep) {
    Floats first, second;
    widen_step(in + k, first, second);
    *reinterpret_cast<Floats*>(to + k) = first;
    *reinterpret_cast<Floats*>(to + k + kLanes) = second;
  }
  widen(in + k, to + k, num - k);
}

// The products of R rows of x with W rows of the weight, each in P sums side by side. The W rows after them are asked for
// meanwhile: processors look ahead on few streams at once, and not beyond a page. `Near`: into the first-level cache.
template <class T, int R, int W, int P, bool Near>
static inline void dots(const float* x, const T* weight, int64_t width, float* products) {
  Floats sums[R][W][P] = {};
  int64_t k = 0;
  while (k + kStep <= width) {
    const int64_t end = Is<T>::half || R == 1 ? width : smaller(width, k + kSummed);
    Floats part[R][W][P] = {};
    for (; k + kStep <= end; k += kStep) {
#pragma GCC unroll 8
      for (int j = 0; j < W; j++) {
        Floats first, second;
        __builtin_prefetch(weight + (j + W) * width + k, 0, Near ? 3 : 2);
        widen_step(weight + j * width + k, first, second);
#pragma GCC unroll 4
        for (int i = 0; i < R; i++) {
          part[i][j][0] += first * *reinterpret_cast<const Floats*>(x + i * width + k);
          part[i][j][P - 1] += second * *reinterpret_cast<const Floats*>(x + i * width + k + kLanes);
        }
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < R; i++)
#pragma GCC unroll 8
      for (int j = 0; j < W; j++)
#pragma GCC unroll 2
        for (int l = 0; l < P; l++) sums[i][j][l] += part[i][j][l];
  }
  if (!Is<T>::half && k + kLanes <= width) {  // in its order, so half a step is as good
#pragma GCC unroll 8
    for (int j = 0; j < W; j++) {
      const Floats half = *reinterpret_cast<const Floats*>(weight + j * width + k);
#pragma GCC unroll 4
      for (int i = 0; i < R; i++) sums[i][j][0] += half * *reinterpret_cast<const Floats*>(x + i * width + k);
    }
    k += kLanes;
  }
#pragma GCC unroll 4
  for (int i = 0; i < R; i++) {
#pragma GCC unroll 8
    for (int j = 0; j < W; j++) {
      float buffer[kStep];
      float sum = sum_of(P == 1 ? sums[i][j][0] : sums[i][j][0] + sums[i][j][P - 1]);
      const float* const left = read(weight + j * width + k, buffer, width - k);
      for (int64_t l = k; l < width; l++) sum += x[i * width + l] * left[l - k];
      products[i * W + j] = sum;
    }
  }
}

template <class T, int R, int W, int P>
static void few(const float* x, const void* weight, const float* bias, void* y, int64_t width, int64_t y_stride, int64_t begin,
                int64_t end) {
  const T* w = static_cast<const T*>(weight);
  T* out = static_cast<T*>(y);
  float products[R * W];
  const bool near = !Is<T>::half && 4 * W * width <= kNear;
  for (int64_t n = begin; n < end;) {
    const int64_t num = end - n < W ? 1 : W;
    if (num == W && near) {
      dots<T, R, W, P, true>(x, w + n * width, width, products);
    } else if (num == W) {
      dots<T, R, W, P, false>(x, w + n * width, width, products);
    } else {
      dots<T, R, 1, P, false>(x, w + n * width, width, products);
    }
    for (int64_t i = 0; i < R; i++) {
      if (bias != nullptr)
        for (int64_t j = 0; j < num; j++) products[i * num + j] += bias[n + j];
      narrow(products + i * num, out + i * y_stride + n, num);
    }
    n += num;
  }
}

template <class T>
static FewRows few_of(int64_t rows) {
  switch (rows) {
    case 1: return {widen_for_few<T>, few<T, 1, 8, 1>};
    case 2: return {widen_for_few<T>, few<T, 2, 4, 1>};
    case 3: return {widen_for_few<T>, few<T, 3, 2, 1>};
    default: return {widen_for_few<T>, few<T, 4, 2, 1>};
  }
}

#if defined(__AVX2__)
template <>
FewRows few_of<float>(int64_t rows) {
  switch (rows) {
    case 1: return {widen_for_few<float>, few<float, 1, 4, 2>};
    case 2: return {widen_for_few<float>, few<float, 2, 4, 1>};
    case 3: return {widen_for_few<float>, few<float, 3, 4, 1>};
    default: return {widen_for_few<float>, few<float, 4, 2, 1>};
  }
}
#endif

#endif

}  // namespace

namespace KERNELWISE_ISA {

Widen widen(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return widen_all<float>;
    case DType::kBFloat16: return widen_all<bf16>;
    case DType::kFloat16: return widen_all<fp16>;
  }
  return nullptr;
}

Narrow narrow(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return narrow_all<float>;
    case DType::kBFloat16: return narrow_all<bf16>;
    case DType::kFloat16: return narrow_all<fp16>;
  }
  return nullptr;
}

FewRows few_rows(DType dtype, int64_t rows) {
#if defined(__GNUC__)
  switch (dtype) {
#if defined(__AVX2__)
    case DType::kFloat32: return few_of<float>(rows);
#endif
    case DType::kBFloat16: return few_of<bf16>(rows);
    case DType::kFloat16: return few_of<fp16>(rows);
    default: break;
  }
#endif
  return {nullptr, nullptr};
}

}  // namespace KERNELWISE_ISA
}  // namespace kernelwise
