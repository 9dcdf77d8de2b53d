// RMSNorm over the width of each head of q and k, then rotary position embedding, in one pass over the positions; and
// backward. Everything between reading and writing a head stays in float32. Compiled once per instruction set.
#include "vec.h"

namespace kernelwise {
namespace {

static inline const float* angles(const void* data, DType dtype, int64_t offset, float* buffer, int64_t num) {
  switch (dtype) {
    case DType::kFloat32: return static_cast<const float*>(data) + offset;
    case DType::kBFloat16: return read(static_cast<const bf16*>(data) + offset, buffer, num);
    case DType::kFloat16: return read(static_cast<const fp16*>(data) + offset, buffer, num);
  }
  return nullptr;
}

static inline float inverse_rms(const float* x, int64_t width, float eps) {
  return 1.0f / sqrtf(dot(x, x, width) / float(width) + eps);
}

// y1 = x1 c1 - x2 s1, y2 = x2 c2 + x1 s2 (halves of the width).
static inline void rotate(const float* x, const float* c, const float* s, float* y, int64_t half) {
#pragma omp simd
  for (int64_t k = 0; k < half; k++) {
    const float p = x[k], q = x[k + half];
    y[k] = p * c[k] - q * s[k];
    y[k + half] = q * c[k + half] + p * s[k + half];
  }
}

// The transposed map.
static inline void rotate_back(const float* y, const float* c, const float* s, float* x, int64_t half) {
#pragma omp simd
  for (int64_t k = 0; k < half; k++) {
    const float p = y[k], q = y[k + half];
    x[k] = p * c[k] + q * s[k + half];
    x[k + half] = q * c[k + half] - p * s[k];
  }
}

// Calls f(which of q and k, offsets of a head's numbers in x, y and grad, cos, sin) for every head of some positions.
template <class F>
static void each_head(const QkNormRotaryArgs& args, int64_t begin, int64_t end, const F& f) {
  float cos_buffer[kWidestHead], sin_buffer[kWidestHead];
  const RotaryArgs& a = args.rotary;
  for (int64_t i = begin; i < end; i++) {
    const int64_t batch = i / a.positions, position = i % a.positions;
    const float* cos = angles(a.cos, args.angles, batch * a.cos_batch + position * a.cos_position, cos_buffer, a.width);
    const float* sin = angles(a.sin, args.angles, batch * a.sin_batch + position * a.sin_position, sin_buffer, a.width);
    for (int which = 0; which < 2; which++)
      for (int64_t h = 0; h < a.heads[which]; h++)
        f(which, batch * a.x_batch[which] + position * a.x_position[which] + h * a.x_head[which],
          batch * a.y_batch[which] + position * a.y_position[which] + h * a.y_head[which],
          batch * args.grad_batch[which] + position * args.grad_position[which] + h * args.grad_head[which], cos, sin);
  }
}

template <class T, class O>
static void forward(const QkNormRotaryArgs& args, int64_t begin, int64_t end) {
  float x_buffer[kWidestHead], y_buffer[kWidestHead], normed[kWidestHead];
  const int64_t width = args.rotary.width;
  each_head(args, begin, end, [&](int which, int64_t x_at, int64_t y_at, int64_t, const float* cos, const float* sin) {
    const T* x = static_cast<const T*>(args.rotary.x[which]) + x_at;
    O* y = static_cast<O*>(args.rotary.y[which]) + y_at;
    const float* in = read(x, x_buffer, width);
    const float r = inverse_rms(in, width, args.eps);
#pragma omp simd
    for (int64_t k = 0; k < width; k++) normed[k] = in[k] * r;
    if (const float* w = args.weight[which]) {
#pragma omp simd
      for (int64_t k = 0; k < width; k++) normed[k] *= w[k];
    }
    float* out = room(y, y_buffer);
    rotate(normed, cos, sin, out, width / 2);
    narrow(out, y, width);
  });
}

// With g the gradient turned back, times the weight, and r as in RMSNorm: dx = r g - x r^3 mean(g x).
template <class T, class O>
static void backward(const QkNormRotaryArgs& args, float* grad_weights, int64_t begin, int64_t end) {
  float x_buffer[kWidestHead], d_buffer[kWidestHead], dx_buffer[kWidestHead], g[kWidestHead];
  const int64_t width = args.rotary.width;
  each_head(args, begin, end, [&](int which, int64_t x_at, int64_t y_at, int64_t grad_at, const float* cos, const float* sin) {
    T* dx = static_cast<T*>(args.rotary.y[which]) + y_at;
    const float* in = read(static_cast<const T*>(args.rotary.x[which]) + x_at, x_buffer, width);
    const float r = inverse_rms(in, width, args.eps);
    rotate_back(read(static_cast<const O*>(args.grad[which]) + grad_at, d_buffer, width), cos, sin, g, width / 2);
    if (const float* w = args.weight[which]) {
      if (grad_weights != nullptr) {
        float* dw = grad_weights + which * width;
#pragma omp simd
        for (int64_t k = 0; k < width; k++) dw[k] += g[k] * (in[k] * r);
      }
#pragma omp simd
      for (int64_t k = 0; k < width; k++) g[k] *= w[k];
    }
    const float c = dot(in, g, width) * r / float(width) * r * r;
    float* out = room(dx, dx_buffer);
#pragma omp simd
    for (int64_t k = 0; k < width; k++) out[k] = g[k] * r - in[k] * c;
    narrow(out, dx, width);
  });
}

}  // namespace

namespace KERNELWISE_ISA {

#define KERNELWISE_CASE(function, T, O) \
  if (s.in == Is<T>::dtype && s.out == Is<O>::dtype) return function<T, O>;
#define KERNELWISE_CASES(function)        \
  KERNELWISE_CASE(function, float, float) \
  KERNELWISE_CASE(function, bf16, bf16)   \
  KERNELWISE_CASE(function, bf16, float)  \
  KERNELWISE_CASE(function, fp16, fp16)   \
  KERNELWISE_CASE(function, fp16, float)

QkNormRotaryPositions qk_norm_rotary(Signature s) {
  KERNELWISE_CASES(forward)
  return nullptr;
}

QkNormRotaryBackwardPositions qk_norm_rotary_backward(Signature s) {
  KERNELWISE_CASES(backward)
  return nullptr;
}

}  // namespace KERNELWISE_ISA
}  // namespace kernelwise
