// Products of a float32 matrix with a half-precision one, which is widened and laid out panel by panel in the cache. They
// are float32 products in every other respect, as fast as those of a good library: nothing is written to memory and read
// again. Compiled once per instruction set; there are none without AVX2.
#include "panels.h"

namespace kernelwise {
namespace {

#if defined(__AVX2__)

constexpr int64_t kPanelDepth = 192;  // of a panel that is laid out at a time

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
  const int64_t blocks = (a.depth + kPanelDepth - 1) / kPanelDepth, block = (a.depth + blocks * 16 - 1) / (blocks * 16) * 16;
  for (int64_t n = begin; n < end; n += kPanel) {
    const int64_t num = smaller(kPanel, end - n);
    std::memset(sums, 0, sizeof(float) * a.rows * kPanel);
    for (int64_t m = 0; m < a.rows && a.bias != nullptr; m++) std::memcpy(sums + m * kPanel, a.bias + n, sizeof(float) * num);
    for (int64_t k = 0; k < a.depth; k += block) {
      const int64_t depth = smaller(block, a.depth - k);
      lay_out(static_cast<const T*>(a.b) + (a.b_by_depth ? k * a.b_stride + n : n * a.b_stride + k), a.b_stride, a.b_by_depth, num,
              depth, panel);
      Ahead<T> ahead(a, n, end, k, block, tiles);
      for (int64_t t = 0; t < tiles; t++) {
        ahead.ask();
        const int64_t m = t * a.rows / tiles, rows = (t + 1) * a.rows / tiles - m;
        kRowsByPanel[kVectors - 1][rows - 1](a.a + m * a.a_stride + k, a.a_stride, panel, depth, sums + m * kPanel, kPanel);
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
