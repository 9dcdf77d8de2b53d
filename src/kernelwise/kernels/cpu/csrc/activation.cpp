// An activation and its backward over contiguous numbers. Compiled once per instruction set.
#include "activations.h"

namespace kernelwise {
namespace {

template <class A, class T>
static void forward(const T* x, T* y, int64_t num) {
  float x_buffer[kBlock], y_buffer[kBlock];
  for (int64_t j = 0; j < num; j += kBlock) {
    const int64_t n = smaller(kBlock, num - j);
    const float* in = read(x + j, x_buffer, n);
    float* out = room(y + j, y_buffer);
#pragma omp simd
    for (int64_t k = 0; k < n; k++) out[k] = A::value(in[k]);
    narrow(out, y + j, n);
  }
}

template <class A, class T>
static void backward(const T* grad, const T* x, T* grad_x, int64_t num) {
  float d_buffer[kBlock], x_buffer[kBlock], dx_buffer[kBlock];
  for (int64_t j = 0; j < num; j += kBlock) {
    const int64_t n = smaller(kBlock, num - j);
    const float* d = read(grad + j, d_buffer, n);
    const float* in = read(x + j, x_buffer, n);
    float* dx = room(grad_x + j, dx_buffer);
#pragma omp simd
    for (int64_t k = 0; k < n; k++) {
      float value, slope;
      A::both(in[k], value, slope);
      dx[k] = d[k] * slope;
    }
    narrow(dx, grad_x + j, n);
  }
}

template <class T>
static void forward_of(Activation activation, const void* x, void* y, int64_t num) {
  with(activation, [&](auto a) { forward<decltype(a)>(static_cast<const T*>(x), static_cast<T*>(y), num); });
}

template <class T>
static void backward_of(Activation activation, const void* grad, const void* x, void* grad_x, int64_t num) {
  with(activation, [&](auto a) {
    backward<decltype(a)>(static_cast<const T*>(grad), static_cast<const T*>(x), static_cast<T*>(grad_x), num);
  });
}

}  // namespace

namespace KERNELWISE_ISA {

ActivationBlock activation(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return forward_of<float>;
    case DType::kBFloat16: return forward_of<bf16>;
    case DType::kFloat16: return forward_of<fp16>;
  }
  return nullptr;
}

ActivationBackwardBlock activation_backward(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return backward_of<float>;
    case DType::kBFloat16: return backward_of<bf16>;
    case DType::kFloat16: return backward_of<fp16>;
  }
  return nullptr;
}

}  // namespace KERNELWISE_ISA
}  // namespace kernelwise
