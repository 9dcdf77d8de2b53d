// Pieces of the linear layer with half-precision weights: conversion of whole blocks, and a product for few rows that
// widens the weights in the cache. Compiled once per instruction set.
#include "vec.h"

namespace kernelwise {
namespace {

constexpr int64_t kTile = 4;      // rows of the weight that are widened together
constexpr int64_t kDepth = 1024;  // numbers of each row at a time: the tile takes 16 KiB, x two rows of 4 KiB

template <class T>
static void widen_all(const void* from, float* to, int64_t num) {
  widen(static_cast<const T*>(from), to, num);
}

template <class T>
static void narrow_all(const float* from, const float* bias, void* to, int64_t num) {
  T* out = static_cast<T*>(to);
  if (bias == nullptr) return narrow(from, out, num);
  float sum[kBlock];
  for (int64_t j = 0; j < num; j += kBlock) {
    const int64_t n = smaller(kBlock, num - j);
#pragma omp simd
    for (int64_t k = 0; k < n; k++) sum[k] = from[j + k] + bias[j + k];
    narrow(sum, out + j, n);
  }
}

static inline void one_by_four(const float* x, const float* w, int64_t depth, float* sums) {
  const float *w0 = w, *w1 = w + kDepth, *w2 = w + 2 * kDepth, *w3 = w + 3 * kDepth;
  float a0 = 0, a1 = 0, a2 = 0, a3 = 0;
#pragma omp simd reduction(+ : a0, a1, a2, a3)
  for (int64_t k = 0; k < depth; k++) {
    const float u = x[k];
    a0 += u * w0[k];
    a1 += u * w1[k];
    a2 += u * w2[k];
    a3 += u * w3[k];
  }
  sums[0] += a0;
  sums[1] += a1;
  sums[2] += a2;
  sums[3] += a3;
}

static inline void two_by_four(const float* x, int64_t x_stride, const float* w, int64_t depth, float* sums) {
  const float *w0 = w, *w1 = w + kDepth, *w2 = w + 2 * kDepth, *w3 = w + 3 * kDepth;
  const float* z = x + x_stride;
  float a0 = 0, a1 = 0, a2 = 0, a3 = 0, b0 = 0, b1 = 0, b2 = 0, b3 = 0;
#pragma omp simd reduction(+ : a0, a1, a2, a3, b0, b1, b2, b3)
  for (int64_t k = 0; k < depth; k++) {
    const float u = x[k], v = z[k];
    a0 += u * w0[k];
    a1 += u * w1[k];
    a2 += u * w2[k];
    a3 += u * w3[k];
    b0 += v * w0[k];
    b1 += v * w1[k];
    b2 += v * w2[k];
    b3 += v * w3[k];
  }
  sums[0] += a0;
  sums[1] += a1;
  sums[2] += a2;
  sums[3] += a3;
  sums[4] += b0;
  sums[5] += b1;
  sums[6] += b2;
  sums[7] += b3;
}

template <class T>
static void few(const float* x, const void* weight, const float* bias, void* y, int64_t rows, int64_t width,
                int64_t y_stride, int64_t begin, int64_t end) {
  float tile[kTile * kDepth], sums[kMostFewRows * kTile];
  const T* w = static_cast<const T*>(weight);
  T* out = static_cast<T*>(y);
  for (int64_t n = begin; n < end; n += kTile) {
    const int64_t num = smaller(kTile, end - n);
    std::memset(sums, 0, sizeof(float) * rows * kTile);
    if (num < kTile) std::memset(tile, 0, sizeof(tile));
    for (int64_t k = 0; k < width; k += kDepth) {
      const int64_t depth = smaller(kDepth, width - k);
      for (int64_t t = 0; t < num; t++) widen(w + (n + t) * width + k, tile + t * kDepth, depth);
      int64_t m = 0;
      for (; m + 1 < rows; m += 2) two_by_four(x + m * width + k, width, tile, depth, sums + m * kTile);
      if (m < rows) one_by_four(x + m * width + k, tile, depth, sums + m * kTile);
    }
    for (int64_t m = 0; m < rows; m++) {
      if (bias != nullptr)
        for (int64_t t = 0; t < num; t++) sums[m * kTile + t] += bias[n + t];
      narrow(sums + m * kTile, out + m * y_stride + n, num);
    }
  }
}

}  // namespace

namespace KERNELWISE_ISA {

Widen widen(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return widen_all<float>;
    case DType::kBFloat16: return widen_all<bf16>;
    case DType::kFloat16: return widen_all<fp16>;
  }
  return nullptr;
}

Narrow narrow(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return narrow_all<float>;
    case DType::kBFloat16: return narrow_all<bf16>;
    case DType::kFloat16: return narrow_all<fp16>;
  }
  return nullptr;
}

FewRows few_rows(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16: return few<bf16>;
    case DType::kFloat16: return few<fp16>;
    default: return nullptr;
  }
}

}  // namespace KERNELWISE_ISA
}  // namespace kernelwise
