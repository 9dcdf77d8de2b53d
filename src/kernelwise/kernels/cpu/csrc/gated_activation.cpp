// activation(gate) * up and its backward over contiguous numbers. Compiled once per instruction set.
#include "activations.h"

namespace kernelwise {
namespace {

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
  with(activation, [&](auto a) {
    forward<decltype(a)>(static_cast<const T*>(gate), static_cast<const T*>(up), static_cast<T*>(y), num);
  });
}

template <class T>
static void backward_of(Activation activation, const void* grad, const void* gate, const void* up, void* grad_gate,
                        void* grad_up, int64_t num) {
  with(activation, [&](auto a) {
    backward<decltype(a)>(static_cast<const T*>(grad), static_cast<const T*>(gate), static_cast<const T*>(up),
                          static_cast<T*>(grad_gate), static_cast<T*>(grad_up), num);
  });
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
