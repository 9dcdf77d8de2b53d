// Rotary position embedding in the half layout, q and k in one pass over the positions. Compiled once per instruction
// set. Forward: y1 = x1 c1 - x2 s1, y2 = x2 c2 + x1 s2 (halves of the width); backward is the transposed map.
#include "vec.h"

namespace kernelwise {
namespace {

template <class T, class C, class O>
static void positions(const RotaryArgs& a, int64_t begin, int64_t end) {
  float c1_buffer[kBlock], c2_buffer[kBlock], s1_buffer[kBlock], s2_buffer[kBlock];
  float x1_buffer[kBlock], x2_buffer[kBlock], y1_buffer[kBlock], y2_buffer[kBlock];
  const int64_t half = a.width / 2;
  for (int64_t i = begin; i < end; i++) {
    const int64_t batch = i / a.positions, position = i % a.positions;
    const C* cos = static_cast<const C*>(a.cos) + batch * a.cos_batch + position * a.cos_position;
    const C* sin = static_cast<const C*>(a.sin) + batch * a.sin_batch + position * a.sin_position;
    for (int64_t j = 0; j < half; j += kBlock) {
      const int64_t num = smaller(kBlock, half - j);
      const float* c1 = read(cos + j, c1_buffer, num);
      const float* c2 = read(cos + half + j, c2_buffer, num);
      // What the other half is multiplied with: -s1 and s2 forward, s2 and -s1 backward.
      const float* s1 = read(sin + (a.backward ? half : 0) + j, s1_buffer, num);
      const float* s2 = read(sin + (a.backward ? 0 : half) + j, s2_buffer, num);
      const float sign1 = a.backward ? 1.0f : -1.0f;
#pragma omp simd
      for (int64_t k = 0; k < num; k++) {
        s1_buffer[k] = sign1 * s1[k];
        s2_buffer[k] = -sign1 * s2[k];
      }
      for (int which = 0; which < 2; which++) {
        const T* x = static_cast<const T*>(a.x[which]) + batch * a.x_batch[which] + position * a.x_position[which] + j;
        O* y = static_cast<O*>(a.y[which]) + batch * a.y_batch[which] + position * a.y_position[which] + j;
        for (int64_t h = 0; h < a.heads[which]; h++, x += a.x_head[which], y += a.y_head[which]) {
          const float* x1 = read(x, x1_buffer, num);
          const float* x2 = read(x + half, x2_buffer, num);
          float* y1 = room(y, y1_buffer);
          float* y2 = room(y + half, y2_buffer);
#pragma omp simd
          for (int64_t k = 0; k < num; k++) {
            const float p = x1[k], q = x2[k];
            y1[k] = p * c1[k] + q * s1_buffer[k];
            y2[k] = q * c2[k] + p * s2_buffer[k];
          }
          narrow(y1, y, num);
          narrow(y2, y + half, num);
        }
      }
    }
  }
}

}  // namespace

namespace KERNELWISE_ISA {

RotaryPositions rotary(Signature s) {
#define KERNELWISE_CASE(T, C, O) \
  if (s.in == Is<T>::dtype && s.other == Is<C>::dtype && s.out == Is<O>::dtype) return positions<T, C, O>;
  KERNELWISE_CASE(float, float, float)
  KERNELWISE_CASE(bf16, bf16, bf16)
  KERNELWISE_CASE(bf16, float, float)
  KERNELWISE_CASE(float, float, bf16)
  KERNELWISE_CASE(fp16, fp16, fp16)
  KERNELWISE_CASE(fp16, float, float)
  KERNELWISE_CASE(float, float, fp16)
  return nullptr;
}

}  // namespace KERNELWISE_ISA
}  // namespace kernelwise
