// Panels: parts of a matrix that become float32 and are turned about in the first-level cache, and the product of a few rows
// with one. Only with AVX2.
//
// Everything here is static on purpose, see kernels.h.
#pragma once

#include "vec.h"

#if defined(__AVX2__)

namespace kernelwise {
namespace {

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16, kTall = 8;  // numbers of a register; rows computed together, whose sums fill the registers
#else
constexpr int64_t kLanes = 8, kTall = 4;
#endif
constexpr int64_t kVectors = 3, kPanel = kVectors * kLanes;  // columns that are computed together

typedef float Vector __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

// What rows_by_panel is given: rows of a are `stride` numbers apart, and so on.
struct PanelArgs {
  const float* a;
  int64_t stride;
  const float* panel;
  int64_t depth;
  const float* start;
  int64_t start_stride;
  float* sums;
  int64_t sums_stride;
  int64_t ahead;  // how far behind a the rows are that come next, which are asked for meanwhile; 0: they are not
};

// sums[i, 0:V vectors] = start[i, 0:V vectors] + a[i, 0:depth] panel[0:depth, 0:V vectors] for R rows.
template <int R, int V>
static void rows_by_panel(const PanelArgs& p) {
  Vector s[R][V];
#pragma GCC unroll 16
  for (int i = 0; i < R; i++)
#pragma GCC unroll 4
    for (int j = 0; j < V; j++) s[i][j] = *reinterpret_cast<const Vector*>(p.start + i * p.start_stride + j * kLanes);
  const float *a = p.a, *panel = p.panel;
  const int64_t stride = p.stride;
  const auto step = [&] {
    Vector v[V];
#pragma GCC unroll 4
    for (int j = 0; j < V; j++) v[j] = *reinterpret_cast<const Vector*>(panel + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < R; i++) {
      const float x = a[i * stride];
#pragma GCC unroll 4
      for (int j = 0; j < V; j++) s[i][j] += v[j] * x;
    }
    a++;
    panel += kPanel;
  };
  int64_t k = 0;
  for (; k + 16 <= p.depth; k += 16) {  // a cache line of each row
    if (p.ahead != 0) {
#pragma GCC unroll 16
      for (int i = 0; i < R; i++) __builtin_prefetch(a + i * stride + p.ahead);
    }
#pragma GCC unroll 2
    for (int l = 0; l < 16; l++) step();
  }
  for (; k < p.depth; k++) step();
#pragma GCC unroll 16
  for (int i = 0; i < R; i++)
#pragma GCC unroll 4
    for (int j = 0; j < V; j++) *reinterpret_cast<Vector*>(p.sums + i * p.sums_stride + j * kLanes) = s[i][j];
}

// By number of vectors and of rows, each less one.
using RowsByPanel = void (*)(const PanelArgs&);
#if defined(__AVX512F__)
#define KERNELWISE_ROWS(V)                                                                                               \
  {rows_by_panel<1, V>, rows_by_panel<2, V>, rows_by_panel<3, V>, rows_by_panel<4, V>, rows_by_panel<5, V>,              \
   rows_by_panel<6, V>, rows_by_panel<7, V>, rows_by_panel<8, V>}
#else
#define KERNELWISE_ROWS(V) {rows_by_panel<1, V>, rows_by_panel<2, V>, rows_by_panel<3, V>, rows_by_panel<4, V>}
#endif
constexpr RowsByPanel kRowsByPanel[kVectors][kTall] = {KERNELWISE_ROWS(1), KERNELWISE_ROWS(2), KERNELWISE_ROWS(3)};
#undef KERNELWISE_ROWS

// Two 128-bit parts of rows four apart, one in each half.
static inline __m256i halves(const void* low, const void* high) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(low))),
                                 _mm_loadu_si128(static_cast<const __m128i*>(high)), 1);
}

// 8 rows of 8 numbers of 32 bits, `stride` bytes apart, turned about.
static inline void transpose(const char* from, int64_t stride, __m256i* to) {
  for (int h = 0; h < 2; h++) {
    const char* p = from + 16 * h;
    const __m256i a = halves(p, p + 4 * stride), b = halves(p + stride, p + 5 * stride);
    const __m256i c = halves(p + 2 * stride, p + 6 * stride), d = halves(p + 3 * stride, p + 7 * stride);
    const __m256i e = _mm256_unpacklo_epi32(a, b), f = _mm256_unpackhi_epi32(a, b);
    const __m256i g = _mm256_unpacklo_epi32(c, d), i = _mm256_unpackhi_epi32(c, d);
    to[4 * h] = _mm256_unpacklo_epi64(e, g);
    to[4 * h + 1] = _mm256_unpackhi_epi64(e, g);
    to[4 * h + 2] = _mm256_unpacklo_epi64(f, i);
    to[4 * h + 3] = _mm256_unpackhi_epi64(f, i);
  }
}

// panel[k, 0:8] = b[0:8, k] for as many k as vectors take; returns how many.
// Numbers of 16 bits are turned about in pairs; bfloat16 is the upper half of a float32.
static int64_t turn(const bf16* b, int64_t stride, float* panel, int64_t depth) {
  const __m256i upper = _mm256_set1_epi32(int(0xffff0000u));
  __m256i t[8];
  int64_t k = 0;
  for (; k + 16 <= depth; k += 16) {
    transpose(reinterpret_cast<const char*>(b + k), stride * 2, t);
    for (int i = 0; i < 8; i++) {
      float* out = panel + (k + 2 * i) * kPanel;
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_slli_epi32(t[i], 16));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + kPanel), _mm256_and_si256(t[i], upper));
    }
  }
  return k;
}

static int64_t turn(const fp16* b, int64_t stride, float* panel, int64_t depth) {
  const __m256i order = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15, 0, 1, 4, 5, 8, 9, 12, 13, 2, 3,
                                         6, 7, 10, 11, 14, 15);
  __m256i t[8];
  int64_t k = 0;
  for (; k + 16 <= depth; k += 16) {
    transpose(reinterpret_cast<const char*>(b + k), stride * 2, t);
    for (int i = 0; i < 8; i++) {
      float* out = panel + (k + 2 * i) * kPanel;
      const __m256i apart = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(t[i], order), 0xd8);
      _mm256_storeu_ps(out, _mm256_cvtph_ps(_mm256_castsi256_si128(apart)));
      _mm256_storeu_ps(out + kPanel, _mm256_cvtph_ps(_mm256_extracti128_si256(apart, 1)));
    }
  }
  return k;
}

static int64_t turn(const float* b, int64_t stride, float* panel, int64_t depth) {
  __m256i t[8];
  int64_t k = 0;
  for (; k + 8 <= depth; k += 8) {
    transpose(reinterpret_cast<const char*>(b + k), stride * 4, t);
    for (int i = 0; i < 8; i++) _mm256_storeu_si256(reinterpret_cast<__m256i*>(panel + (k + i) * kPanel), t[i]);
  }
  return k;
}

// panel[0:depth, 0:kPanel] = b[0:num, 0:depth]^T or, with by_depth, b[0:depth, 0:num]; columns beyond num are zero.
template <class T>
static void lay_out(const T* b, int64_t stride, bool by_depth, int64_t num, int64_t depth, float* panel) {
  if (num < kPanel) std::memset(panel, 0, sizeof(float) * kPanel * depth);
  if (by_depth) {
    for (int64_t k = 0; k < depth; k++) widen(b + k * stride, panel + k * kPanel, num);
    return;
  }
  for (int64_t n = 0; n < num; n += 8) {
    const T* part = b + n * stride;
    const int64_t columns = smaller(8, num - n), begin = columns < 8 ? 0 : turn(part, stride, panel + n, depth);
    for (int64_t k = begin; k < depth; k++)
      for (int64_t i = 0; i < columns; i++) widen(part + i * stride + k, panel + k * kPanel + n + i, 1);
  }
}

}  // namespace
}  // namespace kernelwise

#endif
