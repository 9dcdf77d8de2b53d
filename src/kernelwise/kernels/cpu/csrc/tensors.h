// What the operators share: tensors as rows, fresh results, work split among torch's threads.
//
// Rows are independent of each other, and where rows are summed they are summed in groups that depend on the shape alone:
// results are the same for every number of threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <initializer_list>
#include <string>
#include <vector>

#include "kernels.h"
#include "tensor.h"

namespace kernelwise {

constexpr int64_t kSerial = 16384;  // numbers that one thread works through faster than it could wake another

inline DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    default: STD_TORCH_CHECK(false, "kernelwise: ", name, " must be float32, bfloat16 or float16");
  }
}

inline ScalarType scalar_type_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return ScalarType::Float;
    case DType::kBFloat16: return ScalarType::BFloat16;
    default: return ScalarType::Half;
  }
}

constexpr int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

constexpr int64_t kMostDims = 16;

// Sizes or strides, without memory from the heap: a call at one token takes few microseconds in all.
struct Dims {
  int64_t values[kMostDims];
  int64_t num;
};

inline Tensor empty(const Dims& sizes, const Dims& strides, ScalarType dtype) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.num, sizes.values, strides.values, int32_t(dtype),
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline Tensor empty(const Dims& sizes, ScalarType dtype) {
  Dims strides;
  strides.num = sizes.num;
  int64_t stride = 1;
  for (int64_t i = sizes.num; i-- > 0;) {
    strides.values[i] = stride;
    stride *= std::max<int64_t>(sizes.values[i], 1);
  }
  return empty(sizes, strides, dtype);
}

// Sizes and strides of a tensor, asked once: every question is a call through the stable ABI.
struct View {
  const int64_t* sizes;
  const int64_t* strides;
  int64_t dims;
};

inline View view_of(const Tensor& t) {
  return {t.sizes(), t.strides(), t.dim()};
}

inline Dims sizes_of(const View& v) {
  STD_TORCH_CHECK(v.dims <= kMostDims, "kernelwise: more than ", kMostDims, " dimensions");
  Dims dims;
  dims.num = v.dims;
  std::copy(v.sizes, v.sizes + v.dims, dims.values);
  return dims;
}

inline void check_same_shape(const View& a, const View& b, const char* names) {
  STD_TORCH_CHECK(a.dims == b.dims && std::equal(a.sizes, a.sizes + a.dims, b.sizes), "kernelwise: ", names,
                  " must have one shape");
}

inline void check_same_shape(const Tensor& a, const Tensor& b, const char* names) {
  check_same_shape(view_of(a), view_of(b), names);
}

inline bool has_unit_last(const View& v) { return v.dims == 0 || v.sizes[v.dims - 1] <= 1 || v.strides[v.dims - 1] == 1; }

inline Tensor unit_last(const Tensor& t, const View& v) { return has_unit_last(v) ? t.borrowed() : contiguous(t); }

inline Tensor unit_last(const Tensor& t) { return unit_last(t, view_of(t)); }

// A tensor seen as rows of its last dimension, `stride` apart; copied where no single stride does it.
struct Rows {
  View view;  // of the tensor as it is given
  MaybeTensor copy;
  const char* data;
  int64_t num, width, stride;
};

inline std::optional<int64_t> row_stride(const View& v) {
  if (!has_unit_last(v)) return std::nullopt;
  int64_t stride = v.sizes[v.dims - 1], expected = -1;
  for (int64_t i = v.dims - 1; i-- > 0;) {
    if (v.sizes[i] == 1) continue;
    if (expected < 0) {
      stride = v.strides[i];
    } else if (v.strides[i] != expected) {
      return std::nullopt;
    }
    expected = v.strides[i] * v.sizes[i];
  }
  return stride;
}

inline Rows rows_of(const Tensor& t) {
  const View v = view_of(t);
  STD_TORCH_CHECK(v.dims >= 1, "kernelwise: expected at least one dimension");
  const int64_t width = v.sizes[v.dims - 1];
  int64_t num = width == 0 ? 0 : 1;
  for (int64_t i = 0; i < v.dims - 1; i++) num *= v.sizes[i];
  if (const std::optional<int64_t> stride = row_stride(v))
    return {v, std::nullopt, static_cast<const char*>(t.data_ptr()), num, width, *stride};
  Rows rows{v, contiguous(t), nullptr, num, width, width};
  rows.data = static_cast<const char*>(rows.copy->data_ptr());
  return rows;
}

// Whether to work on the calling thread alone: GNU's OpenMP waits for ever in the child of a process that had threads, as
// torch's own operators then do. A child of a process without further threads may start its own.
bool serial();

template <class F>
void each_row(int64_t rows, int64_t width, const F& f) {
  if (serial() || rows * width <= kSerial) {
    if (rows > 0) f(int64_t(0), rows);
    return;
  }
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kSerial / width), f);
}

// The same in shares that threads take when they are ready, the largest first: cores are not equally fast nor always free,
// and parts of the work are not equally long. A share costs more than a chunk, so the work must be worth it.
template <class F>
void each_share(int64_t num, int64_t width, const F& f) {
  const int64_t threads = torch::stable::get_num_threads();
  if (serial() || threads == 1 || num * width <= kSerial) {
    if (num > 0) f(int64_t(0), num);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t begin = next, size; begin < num;) {
      size = std::max<int64_t>(1, (num - begin) / (2 * threads));
      if (!next.compare_exchange_weak(begin, begin + size)) continue;
      f(begin, begin + size);
      begin = next;
    }
  });
}

}  // namespace kernelwise
