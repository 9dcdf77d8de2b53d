// Products of a float32 matrix with a half-precision one, which is widened and laid out panel by panel in the cache. They
// are float32 products in every other respect, as fast as those of a good library: nothing is written to memory and read
// again. Compiled once per instruction set; there are none without AVX2.
#include "vec.h"

namespace kernelwise {
namespace {

#if defined(__AVX2__)

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16, kTall = 8;  // numbers of a register; rows computed together, whose sums fill the registers
#else
constexpr int64_t kLanes = 8, kTall = 4;
#endif
constexpr int64_t kVectors = 3, kPanel = kVectors * kLanes;  // columns that are computed together
constexpr int64_t kPanelDepth = 384;  // of a panel that is laid out at a time

typedef float Vector __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

// sums[i, 0:kPanel] += a[i, 0:depth] panel[0:depth, 0:kPanel] for R rows.
template <int R>
static void rows_by_panel(const float* a, int64_t row_stride, int64_t depth_stride, const float* panel, int64_t depth,
                          float* sums) {
  Vector s[R][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < R; i++)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; j++) s[i][j] = *reinterpret_cast<const Vector*>(sums + i * kPanel + j * kLanes);
  for (int64_t k = 0; k < depth; k++) {
    Vector v[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; j++) v[j] = *reinterpret_cast<const Vector*>(panel + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < R; i++) {
      const float x = a[i * row_stride];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; j++) s[i][j] += v[j] * x;
    }
    a += depth_stride;
    panel += kPanel;
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; i++)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; j++) *reinterpret_cast<Vector*>(sums + i * kPanel + j * kLanes) = s[i][j];
}

using RowsByPanel = void (*)(const float*, int64_t, int64_t, const float*, int64_t, float*);
constexpr RowsByPanel kRowsByPanel[] = {
    rows_by_panel<1>, rows_by_panel<2>, rows_by_panel<3>, rows_by_panel<4>,
#if defined(__AVX512F__)
    rows_by_panel<5>, rows_by_panel<6>, rows_by_panel<7>, rows_by_panel<8>,
#endif
};

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

// panel[0:depth, 0:kPanel] = b[first:first+num, k:k+depth]^T, columns beyond num zero.
template <class T>
static void lay_out(const GemmArgs& a, int64_t first, int64_t num, int64_t k, int64_t depth, float* panel) {
  const T* b = static_cast<const T*>(a.b);
  if (num < kPanel) std::memset(panel, 0, sizeof(float) * kPanel * depth);
  if (a.b_by_depth) {
    for (int64_t j = 0; j < depth; j++) widen(b + (k + j) * a.b_stride + first, panel + j * kPanel, num);
    return;
  }
  for (int64_t n = 0; n < num; n += 8) {
    const T* part = b + (first + n) * a.b_stride + k;
    const int64_t columns = smaller(8, num - n), begin = columns < 8 ? 0 : turn(part, a.b_stride, panel + n, depth);
    for (int64_t j = begin; j < depth; j++)
      for (int64_t i = 0; i < columns; i++) widen(part + i * a.b_stride + j, panel + j * kPanel + n + i, 1);
  }
}

// Asks for the part of b that is laid out next, a share with each tile, while there is time for it to arrive.
template <class T>
struct Ahead {
  const char* row;  // cache lines of a row, rows left, lines asked for in this row, lines with each tile
  int64_t stride, lines, left, line = 0, share;
  Ahead(const GemmArgs& a, int64_t n, int64_t end, int64_t k, int64_t block, int64_t tiles) {
    k += block;
    if (k >= a.depth) n += kPanel, k = 0;
    const int64_t columns = end > n ? smaller(kPanel, end - n) : 0, depth = smaller(block, a.depth - k);
    row = static_cast<const char*>(a.b) + int64_t(sizeof(T)) * (a.b_by_depth ? k * a.b_stride + n : n * a.b_stride + k);
    stride = int64_t(sizeof(T)) * a.b_stride;
    lines = (int64_t(sizeof(T)) * (a.b_by_depth ? columns : depth) + 63) / 64;
    left = columns == 0 ? 0 : a.b_by_depth ? depth : columns;
    share = (lines * left + tiles - 1) / tiles;
  }
  void ask() {
    for (int64_t i = 0; i < share && left > 0; i++) {
      __builtin_prefetch(row + 64 * line);
      if (++line == lines) line = 0, left--, row += stride;
    }
  }
};

template <class T>
static void columns(const GemmArgs& a, float* sums, int64_t begin, int64_t end) {
  alignas(64) float panel[kPanelDepth * kPanel];
  const int64_t tiles = (a.rows + kTall - 1) / kTall;
  const int64_t block = a.rows <= 4 * kTall ? kPanelDepth / 2 : kPanelDepth;
  for (int64_t n = begin; n < end; n += kPanel) {
    const int64_t num = smaller(kPanel, end - n);
    for (int64_t m = 0; m < a.rows; m++) {
      float* sum = sums + m * kPanel;
      std::memset(sum, 0, sizeof(float) * kPanel);
      if (a.bias != nullptr) std::memcpy(sum, a.bias + n, sizeof(float) * num);
    }
    for (int64_t k = 0; k < a.depth; k += block) {
      const int64_t depth = smaller(block, a.depth - k);
      lay_out<T>(a, n, num, k, depth, panel);
      Ahead<T> ahead(a, n, end, k, block, tiles);
      for (int64_t t = 0; t < tiles; t++) {
        ahead.ask();
        const int64_t m = t * a.rows / tiles, rows = (t + 1) * a.rows / tiles - m;
        kRowsByPanel[rows - 1](a.a + m * a.a_row_stride + k * a.a_depth_stride, a.a_row_stride, a.a_depth_stride, panel, depth,
                               sums + m * kPanel);
      }
    }
    T* c = static_cast<T*>(a.c) + n;
    if (num == kPanel) {  // of a size that the compiler knows
      for (int64_t m = 0; m < a.rows; m++) narrow(sums + m * kPanel, c + m * a.c_stride, kPanel);
    } else {
      for (int64_t m = 0; m < a.rows; m++) narrow(sums + m * kPanel, c + m * a.c_stride, num);
    }
  }
}

#endif

}  // namespace

namespace KERNELWISE_ISA {

Gemm gemm(DType dtype) {
#if defined(__AVX2__)
  switch (dtype) {
    case DType::kBFloat16: return {kPanel, columns<bf16>};
    case DType::kFloat16: return {kPanel, columns<fp16>};
    default: break;
  }
#endif
  return {1, nullptr};
}

}  // namespace KERNELWISE_ISA
}  // namespace kernelwise
