// RMSNorm, forward and backward, one row after the other. Compiled once per instruction set.
#include "vec.h"

namespace kernelwise {
namespace {

// 1 / sqrt(mean(x^2) + eps). Blocks are summed in float32, their sums in double: the error does not grow with the width.
template <class T>
static float inverse_rms(const T* x, int64_t width, float eps) {
  float buffer[kBlock];
  double total = 0;
  for (int64_t j = 0; j < width; j += kBlock) {
    const int64_t num = smaller(kBlock, width - j);
    const float* a = read(x + j, buffer, num);
    total += dot(a, a, num);
  }
  return 1.0f / sqrtf(float(total / double(width)) + eps);
}

template <class T, class W, class O>
static void forward(const RmsNormArgs& a, int64_t begin, int64_t end) {
  float x_buffer[kBlock], w_buffer[kBlock], y_buffer[kBlock];
  const W* weight = static_cast<const W*>(a.weight);
  for (int64_t i = begin; i < end; i++) {
    const T* x = static_cast<const T*>(a.x) + i * a.x_stride;
    O* y = static_cast<O*>(a.y) + i * a.width;
    const float r = inverse_rms(x, a.width, a.eps);
    for (int64_t j = 0; j < a.width; j += kBlock) {
      const int64_t num = smaller(kBlock, a.width - j);
      const float* in = read(x + j, x_buffer, num);
      float* out = room(y + j, y_buffer);
#pragma omp simd
      for (int64_t k = 0; k < num; k++) out[k] = in[k] * r;
      if (weight != nullptr) {
        if (!a.cast_after) round_as(x, out, num);
        const float* w = read(weight + j, w_buffer, num);
        if (a.offset != 0) {
#pragma omp simd
          for (int64_t k = 0; k < num; k++) w_buffer[k] = w[k] + a.offset;
          if (!a.cast_after) round_as(weight, w_buffer, num);
          w = w_buffer;
        }
#pragma omp simd
        for (int64_t k = 0; k < num; k++) out[k] *= w[k];
      }
      narrow(out, y + j, num);
    }
  }
}

// With h = x * r, r = rsqrt(mean(x^2) + eps) and g the gradient times the weight: dx = r * g - x * r^3 * mean(g * x).
template <class T, class W, class O>
static void backward(const RmsNormBackwardArgs& a, float* grad_weight, int64_t begin, int64_t end) {
  float x_buffer[kBlock], w_buffer[kBlock], g_buffer[kBlock], product[kBlock], dx_buffer[kBlock];
  const W* weight = static_cast<const W*>(a.weight);
  const auto weighted = [&](const O* grad, int64_t j, int64_t num) {  // gradient times weight, into `product`
    const float* g = read(grad + j, g_buffer, num);
    if (weight == nullptr) {
      std::memcpy(product, g, sizeof(float) * num);
    } else {
      const float* w = read(weight + j, w_buffer, num);
#pragma omp simd
      for (int64_t k = 0; k < num; k++) product[k] = g[k] * (w[k] + a.offset);
    }
    return g;
  };
  for (int64_t i = begin; i < end; i++) {
    const O* grad = static_cast<const O*>(a.grad) + i * a.grad_stride;
    const T* x = static_cast<const T*>(a.x) + i * a.x_stride;
    T* dx = static_cast<T*>(a.grad_x) + i * a.width;
    double squares = 0, shared = 0;
    for (int64_t j = 0; j < a.width; j += kBlock) {
      const int64_t num = smaller(kBlock, a.width - j);
      const float* in = read(x + j, x_buffer, num);
      weighted(grad, j, num);
      squares += dot(in, in, num);
      shared += dot(in, product, num);
    }
    const float r = 1.0f / sqrtf(float(squares / double(a.width)) + a.eps);
    const float c = float(shared * r / double(a.width) * r * r);
    for (int64_t j = 0; j < a.width; j += kBlock) {
      const int64_t num = smaller(kBlock, a.width - j);
      const float* in = read(x + j, x_buffer, num);
      const float* g = weighted(grad, j, num);
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
