// What the norms share: rows read in blocks, with a residual added, and the weight as the layer's own code has it.
#pragma once

#include "vec.h"

namespace kernelwise {
namespace {

// Rows up to this width are converted once and stay in the cache for the second pass, as does the weight for all rows.
constexpr int64_t kRow = 4096;

// weight + offset as float32, rounded to the weight's dtype where the layer adds in that.
template <class W>
static const float* weight_block(const W* weight, float offset, bool rounded, float* buffer, int64_t num) {
  const float* w = read(weight, buffer, num);
  if (offset == 0) return w;
#pragma omp simd
  for (int64_t k = 0; k < num; k++) buffer[k] = w[k] + offset;
  if (rounded) round_as(weight, buffer, num);
  return buffer;
}

// A block of what is normalised, as float32: of x; or of x + residual rounded to T, which also goes to `sum`.
template <class T>
static const float* input_block(const T* x, const T* residual, T* sum, float* buffer, float* other, int64_t num) {
  if (residual == nullptr) return read(x, buffer, num);
  const float* a = read(x, buffer, num);
  const float* b = read(residual, other, num);
  float* total = room(sum, buffer);
#pragma omp simd
  for (int64_t k = 0; k < num; k++) total[k] = a[k] + b[k];
  narrow(total, sum, num);
  return read(sum, buffer, num);
}

// The gradient that what was normalised gets from elsewhere is added to `out`.
template <class T>
static void add_block(const T* more, float* out, float* buffer, int64_t num) {
  const float* m = read(more, buffer, num);
#pragma omp simd
  for (int64_t k = 0; k < num; k++) out[k] += m[k];
}

// Sums of blocks are added in double, so that the error does not grow with the width.
static inline double long_dot(const float* a, const float* b, int64_t num) {
  double sum = 0;
  for (int64_t k = 0; k < num; k += kBlock) sum += dot(a + k, b + k, smaller(kBlock, num - k));
  return sum;
}

static inline double long_sum(const float* a, int64_t num) {
  double sum = 0;
  for (int64_t k = 0; k < num; k += kBlock) {
    const int64_t n = smaller(kBlock, num - k);
    float part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t i = 0; i < n; i++) part += a[k + i];
    sum += part;
  }
  return sum;
}

}  // namespace
}  // namespace kernelwise

// The dtypes of x, weight and result that a norm is built for.
#define KERNELWISE_CASE(function, T, W, O) \
  if (s.in == Is<T>::dtype && s.other == Is<W>::dtype && s.out == Is<O>::dtype) return function<T, W, O>;
