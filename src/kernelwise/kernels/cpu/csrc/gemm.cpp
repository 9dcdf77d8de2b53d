// Products of a float32 matrix with a half-precision one, which is widened and laid out panel by panel in the cache. They
// are float32 products in every other respect, as fast as those of a good library: nothing is written to memory and read
// again. Compiled once per instruction set; there are none without AVX2.
#include "panels.h"

namespace kernelwise {
namespace {

#if defined(__AVX2__)

constexpr int64_t kPanelDepth = 288;    // of a panel that is laid out at a time: with AVX2 it stays in the first-level cache
constexpr int64_t kFewRowsDepth = 192;  // the same for fewer rows than this, with which it was faster
constexpr int64_t kManyRows = 128;

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

// c[0:rows, 0:num] = sums, rounded.
template <class T>
static void put(const float* sums, int64_t rows, int64_t num, T* c, int64_t stride) {
  if (num == kPanel) {  // of a size that the compiler knows
    for (int64_t m = 0; m < rows; m++) narrow(sums + m * kPanel, c + m * stride, kPanel);
  } else {
    for (int64_t m = 0; m < rows; m++) narrow(sums + m * kPanel, c + m * stride, num);
  }
}

template <class T>
static void columns(const GemmArgs& a, float* sums, int64_t begin, int64_t end) {
  alignas(64) float panel[kPanelDepth * kPanel];
  const int64_t tiles = (a.rows + kTall - 1) / kTall;
  const bool many = a.rows >= kManyRows;
  const int64_t deepest = many ? kPanelDepth : kFewRowsDepth;
  const int64_t blocks = (a.depth + deepest - 1) / deepest, block = (a.depth + blocks * 16 - 1) / (blocks * 16) * 16;
  for (int64_t n = begin; n < end; n += kPanel) {
    const int64_t num = smaller(kPanel, end - n);
    T* const c = static_cast<T*>(a.c) + n;
    float start[kPanel] = {};
    if (a.bias != nullptr) std::memcpy(start, a.bias + n, sizeof(float) * num);
    for (int64_t k = 0; k < a.depth; k += block) {
      const int64_t depth = smaller(block, a.depth - k);
      const bool last = k + block >= a.depth;
      lay_out(static_cast<const T*>(a.b) + (a.b_by_depth ? k * a.b_stride + n : n * a.b_stride + k), a.b_stride, a.b_by_depth, num,
              depth, panel);
      Ahead<T> ahead(a, n, end, k, block, tiles);
      for (int64_t t = 0; t < tiles; t++) {
        ahead.ask();
        const int64_t m = t * a.rows / tiles, rows = (t + 1) * a.rows / tiles - m;
        if (last && many) {  // rows of the result may be a page or more apart: they are asked for while the tile is computed
          for (int64_t i = m; i < m + rows; i++) {
            __builtin_prefetch(c + i * a.c_stride, 1);
            __builtin_prefetch(c + i * a.c_stride + num - 1, 1);
          }
        }
        float* const sum = sums + m * kPanel;
        const bool first = k == 0;
        kRowsByPanel[kVectors - 1][rows - 1]({a.a + m * a.a_stride + k, a.a_stride, panel, depth, first ? start : sum,
                                              first ? 0 : kPanel, sum, kPanel, many ? rows * a.a_stride : 0});
        if (last) put(sum, rows, num, c + m * a.c_stride, a.c_stride);
      }
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
