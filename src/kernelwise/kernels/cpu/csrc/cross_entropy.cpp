// Cross-entropy of rows of logits and its gradient. Compiled once per instruction set.
//
// A row is read for its largest logit and once more for the sum of exponentials; backward reads it once. The loss is
// log(sum) - (logit - largest), which keeps the digits that log(sum) + largest - logit loses.
#include "vec.h"

namespace kernelwise {
namespace {

template <class T>
static float largest_of(const T* row, int64_t width) {
  float buffer[kBlock], largest = -INFINITY;
  for (int64_t j = 0; j < width; j += kBlock) {
    const int64_t n = smaller(kBlock, width - j);
    const float* in = read(row + j, buffer, n);
#pragma omp simd reduction(max : largest)
    for (int64_t k = 0; k < n; k++) largest = in[k] > largest ? in[k] : largest;
  }
  return largest;
}

// The derivative of tanh, 1 - tanh(x)^2, of which nothing is lost where tanh is nearly 1.
static inline float slope_of_tanh(float x) {
  const float e = exp_of(-2.0f * fabsf(x)), whole = 1.0f + e;
  return 4.0f * e / (whole * whole);
}

static inline float capped(float x, float cap) { return cap == 0 ? x : cap * tanh_of(x / cap); }

// A block of logits as float32, with the cap applied.
template <class T>
static const float* logit_block(const T* row, float cap, float* buffer, int64_t num) {
  const float* in = read(row, buffer, num);
  if (cap == 0) return in;
#pragma omp simd
  for (int64_t k = 0; k < num; k++) buffer[k] = cap * tanh_of(in[k] / cap);
  return buffer;
}

template <class T>
static void forward(const CrossEntropyArgs& a, float* losses, float* statistics, int64_t begin, int64_t end) {
  float buffer[kBlock];
  for (int64_t i = begin; i < end; i++) {
    const int64_t label = a.labels[i];
    losses[i] = statistics[2 * i] = statistics[2 * i + 1] = 0.0f;
    if (label == a.ignore_index) continue;
    const T* row = static_cast<const T*>(a.logits) + i * a.stride;
    const float largest = capped(largest_of(row, a.width), a.softcap);
    double sum = 0, below = 0;  // of e^(x - largest), and of x - largest
    for (int64_t j = 0; j < a.width; j += kBlock) {
      const int64_t n = smaller(kBlock, a.width - j);
      const float* in = logit_block(row + j, a.softcap, buffer, n);
      float part = 0, differences = 0;
#pragma omp simd reduction(+ : part, differences)
      for (int64_t k = 0; k < n; k++) {
        part += exp_of(in[k] - largest);
        differences += in[k] - largest;
      }
      sum += part;
      below += differences;
    }
    const double log_sum = log(sum);
    const float own = *logit_block(row + label, a.softcap, buffer, 1);
    double loss = log_sum - (double(own) - double(largest));
    if (a.smoothing != 0) loss = (1.0 - a.smoothing) * loss + a.smoothing * (log_sum - below / double(a.width));
    if (a.z_loss != 0) loss += a.z_loss * (log_sum + largest) * (log_sum + largest);
    losses[i] = float(loss);
    statistics[2 * i] = largest;
    statistics[2 * i + 1] = float(sum);
  }
}

template <class T>
static void backward(const CrossEntropyArgs& a, const float* statistics, const float* grad_losses, void* grad_logits,
                     int64_t grad_stride, int64_t begin, int64_t end) {
  float x_buffer[kBlock], raw_buffer[kBlock], d_buffer[kBlock];
  for (int64_t i = begin; i < end; i++) {
    const int64_t label = a.labels[i];
    const T* row = static_cast<const T*>(a.logits) + i * a.stride;
    T* out = static_cast<T*>(grad_logits) + i * grad_stride;
    if (label == a.ignore_index) {
      std::memset(static_cast<void*>(out), 0, sizeof(T) * a.width);
      continue;
    }
    const float largest = statistics[2 * i], sum = statistics[2 * i + 1], grad = grad_losses[i];
    const float scale = grad * (1.0f + 2.0f * a.z_loss * (largest + logf(sum))) / sum;
    const float everywhere = grad * a.smoothing / float(a.width), at_label = grad * (1.0f - a.smoothing);
    const float inverse_cap = a.softcap == 0 ? 0.0f : 1.0f / a.softcap;
    for (int64_t j = 0; j < a.width; j += kBlock) {
      const int64_t n = smaller(kBlock, a.width - j);
      const float* in = logit_block(row + j, a.softcap, x_buffer, n);
      float* d = room(out + j, d_buffer);
      const int64_t at = label - j;  // out of the block for all blocks but one
      float slope_at_label = 1.0f;
      if (a.softcap == 0) {
#pragma omp simd
        for (int64_t k = 0; k < n; k++) d[k] = exp_of(in[k] - largest) * scale - everywhere;
      } else {
        const float* raw = read(row + j, raw_buffer, n);
        if (at >= 0 && at < n) slope_at_label = slope_of_tanh(raw[at] * inverse_cap);
#pragma omp simd
        for (int64_t k = 0; k < n; k++)
          d[k] = (exp_of(in[k] - largest) * scale - everywhere) * slope_of_tanh(raw[k] * inverse_cap);
      }
      if (at >= 0 && at < n) d[at] -= at_label * slope_at_label;
      narrow(d, out + j, n);
    }
  }
}

}  // namespace

namespace KERNELWISE_ISA {

CrossEntropyRows cross_entropy(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return forward<float>;
    case DType::kBFloat16: return forward<bf16>;
    case DType::kFloat16: return forward<fp16>;
  }
  return nullptr;
}

CrossEntropyBackwardRows cross_entropy_backward(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return backward<float>;
    case DType::kBFloat16: return backward<bf16>;
    case DType::kFloat16: return backward<fp16>;
  }
  return nullptr;
}

}  // namespace KERNELWISE_ISA
}  // namespace kernelwise
