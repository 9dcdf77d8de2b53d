// activation(gate) * up and its backward over contiguous numbers. Compiled once per instruction set.
#include "vec.h"

namespace kernelwise {
namespace {

constexpr float kInverseSqrtTwoPi = 0.398942280f;
constexpr float kTanhFactor = 1.59576912f;  // 2 * sqrt(2 / pi): 0.5 * (1 + tanh(u)) = 1 / (1 + exp(-2 u))
constexpr float kTanhCube = 0.044715f;

// s = 1 / (1 + e) and 1 - s as e s, which keeps its digits where s is nearly one. An infinite e gives zero for both:
// whatever 1 - s is then multiplied with s.
static inline void sigmoid_of(float e, float& s, float& rest) {
  s = 1.0f / (1.0f + e);
  rest = (e < 3e38f ? e : 3e38f) * s;
}

struct Silu {
  static inline float value(float x) { return x / (1.0f + exp_of(-x)); }
  static inline void both(float x, float& value, float& slope) {
    float s, rest;
    sigmoid_of(exp_of(-x), s, rest);
    value = x * s;
    slope = s * (1.0f + x * rest);
  }
};

struct Gelu {
  static inline float value(float x) { return x * (0.5f + centred_normal_cdf(x)); }
  static inline void both(float x, float& value, float& slope) {
    const float below = 0.5f + centred_normal_cdf(x);
    value = x * below;
    slope = below + x * kInverseSqrtTwoPi * exp_of(-0.5f * x * x);
  }
};

struct GeluTanh {
  static inline float value(float x) { return x / (1.0f + exp_of(-kTanhFactor * (x + kTanhCube * x * x * x))); }
  static inline void both(float x, float& value, float& slope) {
    float s, rest;
    sigmoid_of(exp_of(-kTanhFactor * (x + kTanhCube * x * x * x)), s, rest);
    value = x * s;
    slope = s + value * rest * kTanhFactor * (1.0f + 3.0f * kTanhCube * x * x);
  }
};

template <class A, class T>
static void forward(const T* gate, const T* up, T* y, int64_t num) {
  float gate_buffer[kBlock], up_buffer[kBlock], y_buffer[kBlock];
  for (int64_t j = 0; j < num; j += kBlock) {
    const int64_t n = smaller(kBlock, num - j);
    const float* g = read(gate + j, gate_buffer, n);
    const float* u = read(up + j, up_buffer, n);
    float* out = room(y + j, y_buffer);
#pragma omp simd
    for (int64_t k = 0; k < n; k++) out[k] = A::value(g[k]) * u[k];
    narrow(out, y + j, n);
  }
}

template <class A, class T>
static void backward(const T* grad, const T* gate, const T* up, T* grad_gate, T* grad_up, int64_t num) {
  float d_buffer[kBlock], gate_buffer[kBlock], up_buffer[kBlock], dg_buffer[kBlock], du_buffer[kBlock];
  for (int64_t j = 0; j < num; j += kBlock) {
    const int64_t n = smaller(kBlock, num - j);
    const float* d = read(grad + j, d_buffer, n);
    const float* g = read(gate + j, gate_buffer, n);
    const float* u = read(up + j, up_buffer, n);
    float* dg = room(grad_gate + j, dg_buffer);
    float* du = room(grad_up + j, du_buffer);
#pragma omp simd
    for (int64_t k = 0; k < n; k++) {
      float value, slope;
      A::both(g[k], value, slope);
      dg[k] = d[k] * u[k] * slope;
      du[k] = d[k] * value;
    }
    narrow(dg, grad_gate + j, n);
    narrow(du, grad_up + j, n);
  }
}

template <class T>
static void forward_of(Activation activation, const void* gate, const void* up, void* y, int64_t num) {
  const T* g = static_cast<const T*>(gate);
  const T* u = static_cast<const T*>(up);
  T* out = static_cast<T*>(y);
  switch (activation) {
    case Activation::kSilu: return forward<Silu>(g, u, out, num);
    case Activation::kGelu: return forward<Gelu>(g, u, out, num);
    case Activation::kGeluTanh: return forward<GeluTanh>(g, u, out, num);
  }
}

template <class T>
static void backward_of(Activation activation, const void* grad, const void* gate, const void* up, void* grad_gate,
                        void* grad_up, int64_t num) {
  const T* d = static_cast<const T*>(grad);
  const T* g = static_cast<const T*>(gate);
  const T* u = static_cast<const T*>(up);
  T* dg = static_cast<T*>(grad_gate);
  T* du = static_cast<T*>(grad_up);
  switch (activation) {
    case Activation::kSilu: return backward<Silu>(d, g, u, dg, du, num);
    case Activation::kGelu: return backward<Gelu>(d, g, u, dg, du, num);
    case Activation::kGeluTanh: return backward<GeluTanh>(d, g, u, dg, du, num);
  }
}

}  // namespace

namespace KERNELWISE_ISA {

GatedBlock gated(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return forward_of<float>;
    case DType::kBFloat16: return forward_of<bf16>;
    case DType::kFloat16: return forward_of<fp16>;
  }
  return nullptr;
}

GatedBackwardBlock gated_backward(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return backward_of<float>;
    case DType::kBFloat16: return backward_of<bf16>;
    case DType::kFloat16: return backward_of<fp16>;
  }
  return nullptr;
}

}  // namespace KERNELWISE_ISA
}  // namespace kernelwise
