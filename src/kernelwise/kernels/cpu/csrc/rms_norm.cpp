// RMSNorm, forward and backward, one row after the other, with a residual added first or not. Compiled once per
// instruction set.
#include "norm.h"

namespace kernelwise {
namespace {

static inline float inverse_rms(double squares, int64_t width, float eps) {
  return 1.0f / sqrtf(float(squares / double(width)) + eps);
}

template <class T, class W, class O>
static void forward(const NormArgs& a, int64_t begin, int64_t end) {
  float x_buffer[kRow], w_buffer[kRow], y_buffer[kRow];
  const W* weight = static_cast<const W*>(a.weight);
  const bool one_block = a.width <= kRow;
  const float *in = nullptr, *w = nullptr;
  for (int64_t i = begin; i < end; i++) {
    const T* x = static_cast<const T*>(a.x) + i * a.x_stride;
    const T* residual = a.residual == nullptr ? nullptr : static_cast<const T*>(a.residual) + i * a.residual_stride;
    T* sum = a.sum == nullptr ? nullptr : static_cast<T*>(a.sum) + i * a.width;
    O* y = static_cast<O*>(a.y) + i * a.width;
    double squares = 0;
    for (int64_t j = 0; j < a.width; j += kRow) {
      const int64_t num = smaller(kRow, a.width - j);
      in = residual == nullptr ? read(x + j, x_buffer, num)
                               : input_block(x + j, residual + j, sum + j, x_buffer, y_buffer, num);
      squares += long_dot(in, in, num);
    }
    const float r = inverse_rms(squares, a.width, a.eps);
    for (int64_t j = 0; j < a.width; j += kRow) {
      const int64_t num = smaller(kRow, a.width - j);
      if (!one_block) in = read((residual == nullptr ? x : sum) + j, x_buffer, num);
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
static void backward(const NormBackwardArgs& a, float* grad_weight, float*, int64_t begin, int64_t end) {
  float x_buffer[kRow], w_buffer[kRow], g_buffer[kRow], product[kRow], dx_buffer[kRow];
  const W* weight = static_cast<const W*>(a.weight);
  const bool one_block = a.width <= kRow;
  const float *in = nullptr, *g = nullptr, *w = nullptr;
  for (int64_t i = begin; i < end; i++) {
    const O* grad = static_cast<const O*>(a.grad) + i * a.grad_stride;
    const T* x = static_cast<const T*>(a.x) + i * a.x_stride;
    const T* more = a.grad_sum == nullptr ? nullptr : static_cast<const T*>(a.grad_sum) + i * a.grad_sum_stride;
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
      squares += long_dot(in, in, num);
      shared += long_dot(in, product, num);
    }
    const float r = inverse_rms(squares, a.width, a.eps);
    const float c = float(shared * r / double(a.width) * r * r);
    for (int64_t j = 0; j < a.width; j += kRow) {
      const int64_t num = smaller(kRow, a.width - j);
      if (!one_block) read_block(j, num);
      float* out = room(dx + j, dx_buffer);
#pragma omp simd
      for (int64_t k = 0; k < num; k++) out[k] = product[k] * r - in[k] * c;
      if (more != nullptr) add_block(more + j, out, product, num);
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

#define KERNELWISE_CASES(function)               \
  KERNELWISE_CASE(function, float, float, float) \
  KERNELWISE_CASE(function, bf16, bf16, bf16)    \
  KERNELWISE_CASE(function, bf16, float, float)  \
  KERNELWISE_CASE(function, bf16, float, bf16)   \
  KERNELWISE_CASE(function, fp16, fp16, fp16)    \
  KERNELWISE_CASE(function, fp16, float, float)  \
  KERNELWISE_CASE(function, fp16, float, fp16)

NormRows rms_norm(Signature s) {
  KERNELWISE_CASES(forward)
  return nullptr;
}

NormBackwardRows rms_norm_backward(Signature s) {
  KERNELWISE_CASES(backward)
  return nullptr;
}

}  // namespace KERNELWISE_ISA
}  // namespace kernelwise
