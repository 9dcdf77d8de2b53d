// LayerNorm, forward and backward, one row after the other, with a residual added first or not. Compiled once per
// instruction set. Mean first, then the squares of what is left: E[x^2] - E[x]^2 loses its digits where the mean is large.
#include "norm.h"

namespace kernelwise {
namespace {

struct Moments {
  float mean, rest;  // the mean in two parts, so that x - mean keeps its digits
  float inverse;     // 1 / sqrt(variance + eps)
};

static inline void centre(const float* x, const Moments& m, float* out, int64_t num) {
#pragma omp simd
  for (int64_t k = 0; k < num; k++) out[k] = (x[k] - m.mean) - m.rest;
}

// `block(j, num)` gives the float32 numbers of a row from j on; those of the last block are left in `centred`.
template <class F>
static Moments moments_of(int64_t width, float eps, float* centred, const F& block) {
  double sum = 0, squares = 0;
  const float* in = nullptr;
  for (int64_t j = 0; j < width; j += kRow) {
    const int64_t num = smaller(kRow, width - j);
    in = block(j, num);
    sum += long_sum(in, num);
  }
  const double mean = sum / double(width);
  Moments m{float(mean), float(mean - double(float(mean))), 0.0f};
  m.rest = m.rest - m.rest == 0 ? m.rest : 0.0f;  // an infinite mean leaves the rest to NaN
  for (int64_t j = 0; j < width; j += kRow) {
    const int64_t num = smaller(kRow, width - j);
    if (width > kRow) in = block(j, num);
    centre(in, m, centred, num);
    squares += long_dot(centred, centred, num);
  }
  m.inverse = 1.0f / sqrtf(float(squares / double(width)) + eps);
  return m;
}

template <class T, class W, class O>
static void forward(const NormArgs& a, int64_t begin, int64_t end) {
  float x_buffer[kRow], w_buffer[kRow], b_buffer[kRow], y_buffer[kRow], centred[kRow];
  const W *weight = static_cast<const W*>(a.weight), *bias = static_cast<const W*>(a.bias);
  const bool one_block = a.width <= kRow;
  const float *w = nullptr, *b = nullptr;
  for (int64_t i = begin; i < end; i++) {
    const T* x = static_cast<const T*>(a.x) + i * a.x_stride;
    T* sum = a.sum == nullptr ? nullptr : static_cast<T*>(a.sum) + i * a.width;
    O* y = static_cast<O*>(a.y) + i * a.width;
    if (a.residual != nullptr) {
      const T* residual = static_cast<const T*>(a.residual) + i * a.residual_stride;
      for (int64_t j = 0; j < a.width; j += kRow)
        input_block(x + j, residual + j, sum + j, x_buffer, y_buffer, smaller(kRow, a.width - j));
      x = sum;
    }
    const auto block = [&](int64_t j, int64_t num) { return read(x + j, x_buffer, num); };
    const Moments m = moments_of(a.width, a.eps, centred, block);
    for (int64_t j = 0; j < a.width; j += kRow) {
      const int64_t num = smaller(kRow, a.width - j);
      if (!one_block) centre(block(j, num), m, centred, num);
      if (!one_block || i == begin) {
        if (weight != nullptr) w = weight_block(weight + j, a.offset, true, w_buffer, num);
        if (bias != nullptr) b = read(bias + j, b_buffer, num);
      }
      float* out = room(y + j, y_buffer);
      if (w != nullptr && b != nullptr) {
#pragma omp simd
        for (int64_t k = 0; k < num; k++) out[k] = centred[k] * m.inverse * w[k] + b[k];
      } else if (w != nullptr) {
#pragma omp simd
        for (int64_t k = 0; k < num; k++) out[k] = centred[k] * m.inverse * w[k];
      } else {
#pragma omp simd
        for (int64_t k = 0; k < num; k++) out[k] = centred[k] * m.inverse;
        if (b != nullptr) add_block(bias + j, out, b_buffer, num);
      }
      narrow(out, y + j, num);
    }
  }
}

// With h the normalised numbers and g the gradient times the weight: dx = (g - mean(g) - h mean(g h)) / deviation.
template <class T, class W, class O>
static void backward(const NormBackwardArgs& a, float* grad_weight, float* grad_bias, int64_t begin, int64_t end) {
  float x_buffer[kRow], w_buffer[kRow], g_buffer[kRow], product[kRow], dx_buffer[kRow], centred[kRow];
  const W* weight = static_cast<const W*>(a.weight);
  const bool one_block = a.width <= kRow;
  const float *g = nullptr, *w = nullptr;
  for (int64_t i = begin; i < end; i++) {
    const O* grad = static_cast<const O*>(a.grad) + i * a.grad_stride;
    const T* x = static_cast<const T*>(a.x) + i * a.x_stride;
    const T* more = a.grad_sum == nullptr ? nullptr : static_cast<const T*>(a.grad_sum) + i * a.grad_sum_stride;
    T* dx = static_cast<T*>(a.grad_x) + i * a.width;
    const auto block = [&](int64_t j, int64_t num) { return read(x + j, x_buffer, num); };
    const Moments m = moments_of(a.width, a.eps, centred, block);
    const auto read_block = [&](int64_t j, int64_t num) {  // what is centred, the gradient, and that times the weight
      if (!one_block) centre(block(j, num), m, centred, num);
      g = read(grad + j, g_buffer, num);
      if (weight == nullptr) {
        std::memcpy(product, g, sizeof(float) * num);
        return;
      }
      if (!one_block || i == begin) w = weight_block(weight + j, a.offset, false, w_buffer, num);
#pragma omp simd
      for (int64_t k = 0; k < num; k++) product[k] = g[k] * w[k];
    };
    double total = 0, shared = 0;
    for (int64_t j = 0; j < a.width; j += kRow) {
      const int64_t num = smaller(kRow, a.width - j);
      read_block(j, num);
      total += long_sum(product, num);
      shared += long_dot(centred, product, num);
    }
    const float r = m.inverse, mean = float(total / double(a.width));
    const float c = float(shared * r / double(a.width) * r * r);
    for (int64_t j = 0; j < a.width; j += kRow) {
      const int64_t num = smaller(kRow, a.width - j);
      if (!one_block) read_block(j, num);
      float* out = room(dx + j, dx_buffer);
#pragma omp simd
      for (int64_t k = 0; k < num; k++) out[k] = (product[k] - mean) * r - centred[k] * c;
      if (more != nullptr) add_block(more + j, out, product, num);
      narrow(out, dx + j, num);
      if (grad_weight != nullptr) {
        float* dw = grad_weight + j;
#pragma omp simd
        for (int64_t k = 0; k < num; k++) dw[k] += g[k] * (centred[k] * r);
      }
      if (grad_bias != nullptr) {
        float* db = grad_bias + j;
#pragma omp simd
        for (int64_t k = 0; k < num; k++) db[k] += g[k];
      }
    }
  }
}

}  // namespace

namespace KERNELWISE_ISA {

#define KERNELWISE_CASES(function)               \
  KERNELWISE_CASE(function, float, float, float) \
  KERNELWISE_CASE(function, bf16, bf16, bf16)    \
  KERNELWISE_CASE(function, bf16, float, bf16)   \
  KERNELWISE_CASE(function, fp16, fp16, fp16)    \
  KERNELWISE_CASE(function, fp16, float, fp16)

NormRows layer_norm(Signature s) {
  KERNELWISE_CASES(forward)
  return nullptr;
}

NormBackwardRows layer_norm_backward(Signature s) {
  KERNELWISE_CASES(backward)
  return nullptr;
}

}  // namespace KERNELWISE_ISA
}  // namespace kernelwise
