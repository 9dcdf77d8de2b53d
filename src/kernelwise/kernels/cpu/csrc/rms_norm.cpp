// RMSNorm, forward and backward, one row after the other. Compiled once per instruction set.
#include "vec.h"

namespace kernelwise {
namespace {

// Rows up to this width are converted once and stay in the cache for the second pass, as does the weight for all rows.
constexpr int64_t kRow = 4096;

// Sums of blocks are added in double, so that the error does not grow with the width.
static inline float inverse_rms(double squares, int64_t width, float eps) {
  return 1.0f / sqrtf(float(squares / double(width)) + eps);
}

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

template <class T, class W, class O>
static void forward(const RmsNormArgs& a, int64_t begin, int64_t end) {
  float x_buffer[kRow], w_buffer[kRow], y_buffer[kRow];
  const W* weight = static_cast<const W*>(a.weight);
  const bool one_block = a.width <= kRow;
  const float *in = nullptr, *w = nullptr;
  for (int64_t i = begin; i < end; i++) {
    const T* x = static_cast<const T*>(a.x) + i * a.x_stride;
    O* y = static_cast<O*>(a.y) + i * a.width;
    double squares = 0;
    for (int64_t j = 0; j < a.width; j += kRow) {
      const int64_t num = smaller(kRow, a.width - j);
      in = read(x + j, x_buffer, num);
      for (int64_t k = 0; k < num; k += kBlock) {
        const int64_t n = smaller(kBlock, num - k);
        squares += dot(in + k, in + k, n);
      }
    }
    const float r = inverse_rms(squares, a.width, a.eps);
    for (int64_t j = 0; j < a.width; j += kRow) {
      const int64_t num = smaller(kRow, a.width - j);
      if (!one_block) in = read(x + j, x_buffer, num);
      float* out = room(y + j, y_buffer);
#pragma omp simd
      for (int64_t k = 0; k < num; k++) out[k] = in[k] * r;
      if (weight != nullptr) {
        if (!one_block || i == begin) w = weight_block(weight + j, a.offset, !a.cast_after, w_buffer, num);
        if (!a.cast_after) round_as(x, out, num);
#pragma omp simd
        for (int64_t k = 0; k < num; k++) out[k] *= w[k];
      }
      narrow(out, y + j, num);
    }
  }
}

// With r = rsqrt(mean(x^2) + eps) and g the gradient times the weight: dx = r g - x r^3 mean(g x).
template <class T, class W, class O>
static void backward(const RmsNormBackwardArgs& a, float* grad_weight, int64_t begin, int64_t end) {
  float x_buffer[kRow], w_buffer[kRow], g_buffer[kRow], product[kRow], dx_buffer[kRow];
  const W* weight = static_cast<const W*>(a.weight);
  const bool one_block = a.width <= kRow;
  const float *in = nullptr, *g = nullptr, *w = nullptr;
  for (int64_t i = begin; i < end; i++) {
    const O* grad = static_cast<const O*>(a.grad) + i * a.grad_stride;
    const T* x = static_cast<const T*>(a.x) + i * a.x_stride;
    T* dx = static_cast<T*>(a.grad_x) + i * a.width;
    const auto read_block = [&](int64_t j, int64_t num) {  // x, the gradient, and the gradient times the weight
      in = read(x + j, x_buffer, num);
      g = read(grad + j, g_buffer, num);
      if (weight == nullptr) {
        std::memcpy(product, g, sizeof(float) * num);
        return;
      }
      if (!one_block || i == begin) w = weight_block(weight + j, a.offset, false, w_buffer, num);
#pragma omp simd
      for (int64_t k = 0; k < num; k++) product[k] = g[k] * w[k];
    };
    double squares = 0, shared = 0;
    for (int64_t j = 0; j < a.width; j += kRow) {
      const int64_t num = smaller(kRow, a.width - j);
      read_block(j, num);
      for (int64_t k = 0; k < num; k += kBlock) {
        const int64_t n = smaller(kBlock, num - k);
        squares += dot(in + k, in + k, n);
        shared += dot(in + k, product + k, n);
      }
    }
    const float r = inverse_rms(squares, a.width, a.eps);
    const float c = float(shared * r / double(a.width) * r * r);
    for (int64_t j = 0; j < a.width; j += kRow) {
      const int64_t num = smaller(kRow, a.width - j);
      if (!one_block) read_block(j, num);
      float* out = room(dx + j, dx_buffer);
#pragma omp simd
      for (int64_t k = 0; k < num; k++) out[k] = product[k] * r - in[k] * c;
      narrow(out, dx + j, num);
      if (grad_weight != nullptr) {
        float* dw = grad_weight + j;
#pragma omp simd
        for (int64_t k = 0; k < num; k++) dw[k] += g[k] * (in[k] * r);
      }
    }
  }
}

}  // namespace

namespace KERNELWISE_ISA {

#define KERNELWISE_CASE(function, T, W, O) \
  if (s.in == Is<T>::dtype && s.other == Is<W>::dtype && s.out == Is<O>::dtype) return function<T, W, O>;
#define KERNELWISE_CASES(function)             \
  KERNELWISE_CASE(function, float, float, float) \
  KERNELWISE_CASE(function, bf16, bf16, bf16)    \
  KERNELWISE_CASE(function, bf16, float, float)  \
  KERNELWISE_CASE(function, bf16, float, bf16)   \
  KERNELWISE_CASE(function, fp16, fp16, fp16)    \
  KERNELWISE_CASE(function, fp16, float, float)  \
  KERNELWISE_CASE(function, fp16, float, fp16)

RmsNormRows rms_norm(Signature s) {
  KERNELWISE_CASES(forward)
  return nullptr;
}

RmsNormBackwardRows rms_norm_backward(Signature s) {
  KERNELWISE_CASES(backward)
  return nullptr;
}

}  // namespace KERNELWISE_ISA
}  // namespace kernelwise
