// Products of float32 matrices by torch, over memory of our own, and matrices that are float32 for a while.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "tensors.h"

namespace kernelwise {

constexpr int64_t kRowTile = 1024;         // rows of x that are float32 at a time
constexpr int64_t kWideRows = 1 << 22;     // numbers of a gradient that are float32 at a time (16 MiB)
constexpr int64_t kWideWeights = 1 << 20;  // numbers of the weight that are float32 at a time (4 MiB)

struct Matrix {  // float32, over memory that somebody else owns
  Tensor tensor;
  Matrix(float* data, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride)
      : tensor(make(data, rows, columns, row_stride, column_stride)) {}
  static Tensor make(float* data, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride) {
    const int64_t sizes[2] = {rows, columns}, strides[2] = {row_stride, column_stride};
    AtenTensorHandle handle;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(data, 2, sizes, strides, 0, aoti_torch_dtype_float32(),
                                                                     aoti_torch_device_type_cpu(), 0, &handle));
    return Tensor(handle);
  }
};

// out = a b, or out += a b.
inline void multiply(const Matrix& out, const Matrix& a, const Matrix& b, bool add) {
  if (add) {
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_cpu_addmm_out(out.tensor.get(), out.tensor.get(), a.tensor.get(), b.tensor.get(), 1.0, 1.0));
  } else {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.tensor.get(), a.tensor.get(), b.tensor.get()));
  }
}

// Matrix in memory, of any dtype, and conversion of a part of it, by torch's threads.
struct Half {
  char* data;
  int64_t stride;
  DType dtype;
  void widen(float* to, int64_t row, int64_t column, int64_t rows, int64_t columns) const {
    const Widen convert = kernels().widen(dtype);
    each_row(rows, columns, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++)
        convert(data + ((row + i) * stride + column) * size_of(dtype), to + i * columns, columns);
    });
  }
  void narrow(const float* from, const float* bias, int64_t row, int64_t column, int64_t rows, int64_t columns) const {
    const Narrow convert = kernels().narrow(dtype);
    each_row(rows, columns, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++)
        convert(from + i * columns, bias, data + ((row + i) * stride + column) * size_of(dtype), columns);
    });
  }
};

// Uninitialised float32 memory from torch's allocator.
struct Scratch {
  Tensor tensor;
  float* data;
  explicit Scratch(int64_t num) : tensor(empty(Dims{{num}, 1}, ScalarType::Float)), data(static_cast<float*>(tensor.data_ptr())) {}
};

}  // namespace kernelwise
