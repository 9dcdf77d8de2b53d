// The operators: check, allocate, split among torch's threads, call the vector code. Built against torch's stable ABI.
//
// Rows are independent of each other, and where rows are summed they are summed in groups that depend on the shape alone:
// results are the same for every number of threads.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <pthread.h>
#include <sys/stat.h>
#endif

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace kernelwise {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kSerial = 16384;  // numbers that one thread works through faster than it could wake another

DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    default: STD_TORCH_CHECK(false, "kernelwise: ", name, " must be float32, bfloat16 or float16");
  }
}

ScalarType scalar_type_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return ScalarType::Float;
    case DType::kBFloat16: return ScalarType::BFloat16;
    default: return ScalarType::Half;
  }
}

constexpr int64_t kMostDims = 16;

// Sizes or strides, without memory from the heap: a call at one token takes few microseconds in all.
struct Dims {
  int64_t values[kMostDims];
  int64_t num;
};

Tensor empty(const Dims& sizes, const Dims& strides, ScalarType dtype) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.num, sizes.values, strides.values, int32_t(dtype),
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor empty(const Dims& sizes, ScalarType dtype) {
  Dims strides{{}, sizes.num};
  int64_t stride = 1;
  for (int64_t i = sizes.num; i-- > 0;) {
    strides.values[i] = stride;
    stride *= std::max<int64_t>(sizes.values[i], 1);
  }
  return empty(sizes, strides, dtype);
}

Dims sizes_of(const Tensor& t) {
  const auto sizes = t.sizes();
  STD_TORCH_CHECK(sizes.size() <= size_t(kMostDims), "kernelwise: more than ", kMostDims, " dimensions");
  Dims dims{{}, int64_t(sizes.size())};
  std::copy(sizes.begin(), sizes.end(), dims.values);
  return dims;
}

void check_same_shape(const Tensor& a, const Tensor& b, const char* names) {
  const auto x = a.sizes(), y = b.sizes();
  STD_TORCH_CHECK(x.size() == y.size() && std::equal(x.begin(), x.end(), y.begin()),
                  "kernelwise: ", names, " must have one shape");
}

// A tensor seen as rows of its last dimension, `stride` apart; copied where no single stride does it.
struct Rows {
  std::optional<Tensor> copy;
  const char* data;
  int64_t num, width, stride;
};

std::optional<int64_t> row_stride(const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  const size_t dims = sizes.size();
  if (sizes[dims - 1] > 1 && strides[dims - 1] != 1) return std::nullopt;
  int64_t stride = sizes[dims - 1], expected = -1;
  for (size_t i = dims - 1; i-- > 0;) {
    if (sizes[i] == 1) continue;
    if (expected < 0) {
      stride = strides[i];
    } else if (strides[i] != expected) {
      return std::nullopt;
    }
    expected = strides[i] * sizes[i];
  }
  return stride;
}

Rows rows_of(const Tensor& t) {
  const int64_t dims = t.dim();
  STD_TORCH_CHECK(dims >= 1, "kernelwise: expected at least one dimension");
  const int64_t width = t.size(dims - 1), num = width == 0 ? 0 : t.numel() / width;
  if (const std::optional<int64_t> stride = row_stride(t))
    return {std::nullopt, static_cast<const char*>(t.data_ptr()), num, width, *stride};
  Rows rows{torch::stable::contiguous(t), nullptr, num, width, width};
  rows.data = static_cast<const char*>(rows.copy->data_ptr());
  return rows;
}

// GNU's OpenMP waits for ever in the child of a process that had threads, as torch's own operators then do. There the
// kernels work on the calling thread; a child of a process without further threads may start its own.
bool serial = false;
#if defined(__linux__)
bool threads_at_fork = false;

void before_fork() {
  struct stat task;
  threads_at_fork = stat("/proc/self/task", &task) != 0 || task.st_nlink > 3;  // two links and one for each thread
}

void in_child() { serial = serial || threads_at_fork; }

const int watching_fork = pthread_atfork(before_fork, nullptr, in_child);
#endif

template <class F>
void each_row(int64_t rows, int64_t width, const F& f) {
  if (serial || rows * width <= kSerial) {
    if (rows > 0) f(int64_t(0), rows);
    return;
  }
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kSerial / width), f);
}

// ---- RMSNorm ----

struct Norm {
  Rows x;
  MaybeTensor weight;
  DType in, other, out;
};

Norm norm_of(const Tensor& x, const MaybeTensor& weight, bool cast_after) {
  const DType in = dtype_of(x, "x");
  Norm n{rows_of(x), weight, in, in, in};
  if (weight) {
    STD_TORCH_CHECK(weight->dim() == 1 && weight->size(0) == n.x.width,
                    "kernelwise::rms_norm: weight must have the shape of x's last dimension");
    n.other = dtype_of(*weight, "weight");
    STD_TORCH_CHECK(n.other == n.in || n.other == DType::kFloat32,
                    "kernelwise::rms_norm: weight must have x's dtype or float32");
    if (!cast_after) n.out = n.other;
    if (!weight->is_contiguous()) n.weight = torch::stable::contiguous(*weight);
  }
  return n;
}

Tensor rms_norm(const Tensor& x, const MaybeTensor& weight, double eps, double offset, bool cast_after) {
  const Norm n = norm_of(x, weight, cast_after);
  Tensor y = empty(sizes_of(x), scalar_type_of(n.out));
  RmsNormArgs args{n.x.data, n.weight ? n.weight->data_ptr() : nullptr, y.data_ptr(), n.x.stride,
                   n.x.width, float(eps), float(offset), cast_after};
  const RmsNormRows kernel = kernels().rms_norm({n.in, n.other, n.out});
  each_row(n.x.num, n.x.width, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return y;
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const Tensor& x, const MaybeTensor& weight, double eps,
                                             double offset, bool cast_after, bool weight_grad) {
  const Norm n = norm_of(x, weight, cast_after);
  check_same_shape(grad, x, "grad and x");
  STD_TORCH_CHECK(dtype_of(grad, "grad") == n.out, "kernelwise::rms_norm_backward: grad must have the output's dtype");
  const Rows g = rows_of(grad);
  Tensor dx = empty(sizes_of(x), x.scalar_type());
  RmsNormBackwardArgs args{g.data, n.x.data, n.weight ? n.weight->data_ptr() : nullptr, dx.data_ptr(), g.stride,
                           n.x.stride, n.x.width, float(eps), float(offset)};
  const RmsNormBackwardRows kernel = kernels().rms_norm_backward({n.in, n.other, n.out});
  if (!weight_grad || !weight) {
    each_row(n.x.num, n.x.width, [&](int64_t begin, int64_t end) { kernel(args, nullptr, begin, end); });
    return {dx, empty(Dims{{0}, 1}, ScalarType::Float)};
  }
  // Groups of rows, each with its own sum; a group is never split, so threads do not change the order of additions.
  const int64_t group = std::max<int64_t>(8, (n.x.num + 63) / 64), groups = (n.x.num + group - 1) / group;
  std::vector<float> sums(groups * n.x.width, 0.0f);
  each_row(groups, group * n.x.width, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
      kernel(args, sums.data() + i * n.x.width, i * group, std::min(n.x.num, (i + 1) * group));
  });
  for (int64_t i = 1; i < groups; i++)
    for (int64_t j = 0; j < n.x.width; j++) sums[j] += sums[i * n.x.width + j];
  sums.resize(n.x.width, 0.0f);
  Tensor dw = empty(Dims{{n.x.width}, 1}, weight->scalar_type());
  kernels().narrow(n.other)(sums.data(), nullptr, dw.data_ptr(), n.x.width);
  return {dx, dw};
}

// ---- gated activations ----

constexpr int64_t kColumns = 2048;  // numbers of one call into the vector code

// Calls f(first index of each of the inputs, of the contiguous output, number) for pieces of all rows.
template <class F>
void each_piece(std::initializer_list<const Rows*> inputs, const F& f) {
  int64_t rows = (*inputs.begin())->num, width = (*inputs.begin())->width;
  if (std::all_of(inputs.begin(), inputs.end(), [](const Rows* r) { return r->num <= 1 || r->stride == r->width; })) {
    width *= rows;
    rows = 1;
  }
  if (rows * width == 0) return;
  const int64_t pieces = (width + kColumns - 1) / kColumns;
  const auto work = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t row = i / pieces, column = i % pieces * kColumns;
      f(row, column, row * width + column, std::min(kColumns, width - column));
    }
  };
  each_row(rows * pieces, std::min(width, kColumns), work);
}

DType check_gated(const Tensor& gate, const Tensor& up, int64_t activation) {
  check_same_shape(gate, up, "gate and up");
  STD_TORCH_CHECK(gate.scalar_type() == up.scalar_type(), "kernelwise::gated_activation: gate and up must have one dtype");
  STD_TORCH_CHECK(activation >= 0 && activation <= 2, "kernelwise::gated_activation: unknown activation ", activation);
  return dtype_of(gate, "gate");
}

Tensor gated_activation(const Tensor& gate, const Tensor& up, int64_t activation) {
  const DType dtype = check_gated(gate, up, activation);
  Tensor y = empty(sizes_of(gate), gate.scalar_type());
  const Rows g = rows_of(gate), u = rows_of(up);
  const int64_t size = int64_t(gate.element_size());
  char* out = static_cast<char*>(y.data_ptr());
  const GatedBlock kernel = kernels().gated(dtype);
  each_piece({&g, &u}, [&](int64_t row, int64_t column, int64_t first, int64_t num) {
    kernel(Activation(activation), g.data + (row * g.stride + column) * size, u.data + (row * u.stride + column) * size,
           out + first * size, num);
  });
  return y;
}

std::tuple<Tensor, Tensor> gated_activation_backward(const Tensor& grad, const Tensor& gate, const Tensor& up,
                                                     int64_t activation) {
  const DType dtype = check_gated(gate, up, activation);
  check_same_shape(grad, gate, "grad and gate");
  STD_TORCH_CHECK(grad.scalar_type() == gate.scalar_type(), "kernelwise::gated_activation: grad must have gate's dtype");
  Tensor dg = empty(sizes_of(gate), gate.scalar_type()), du = empty(sizes_of(gate), gate.scalar_type());
  const Rows d = rows_of(grad), g = rows_of(gate), u = rows_of(up);
  const int64_t size = int64_t(gate.element_size());
  char* out_gate = static_cast<char*>(dg.data_ptr());
  char* out_up = static_cast<char*>(du.data_ptr());
  const GatedBackwardBlock kernel = kernels().gated_backward(dtype);
  each_piece({&d, &g, &u}, [&](int64_t row, int64_t column, int64_t first, int64_t num) {
    kernel(Activation(activation), d.data + (row * d.stride + column) * size, g.data + (row * g.stride + column) * size,
           u.data + (row * u.stride + column) * size, out_gate + first * size, out_up + first * size, num);
  });
  return {dg, du};
}

// ---- rotary ----

Tensor unit_last(const Tensor& t) {
  return t.size(t.dim() - 1) > 1 && t.stride(t.dim() - 1) != 1 ? torch::stable::contiguous(t) : t;
}

// Results lie in memory as [batch, positions, heads, width], whatever the order of the dimensions.
std::tuple<Tensor, Tensor> rotate(const Tensor& q_, const Tensor& k_, const Tensor& cos_, const Tensor& sin_,
                                  int64_t unsqueeze_dim, ScalarType out_type, bool backward) {
  STD_TORCH_CHECK(unsqueeze_dim == 1 || unsqueeze_dim == 2, "kernelwise::rotary: unsqueeze_dim must be 1 or 2");
  STD_TORCH_CHECK(q_.dim() == 4 && k_.dim() == 4, "kernelwise::rotary: q and k must have four dimensions");
  STD_TORCH_CHECK(cos_.dim() == 3, "kernelwise::rotary: cos and sin must be [batch or 1, positions, width]");
  check_same_shape(cos_, sin_, "cos and sin");
  const Tensor inputs[2] = {unit_last(q_), unit_last(k_)};
  const Tensor cos = unit_last(cos_), sin = unit_last(sin_);
  const int64_t head_dim = unsqueeze_dim, position_dim = 3 - unsqueeze_dim;
  const int64_t batch = q_.size(0), num_positions = q_.size(position_dim), width = q_.size(3);
  STD_TORCH_CHECK(k_.size(0) == batch && k_.size(position_dim) == num_positions && k_.size(3) == width,
                  "kernelwise::rotary: q and k must agree in batch, positions and width");
  STD_TORCH_CHECK(width % 2 == 0 && cos.size(2) == width, "kernelwise::rotary: the width must be even and that of cos");
  STD_TORCH_CHECK((cos.size(0) == batch || cos.size(0) == 1) && cos.size(1) == num_positions,
                  "kernelwise::rotary: cos and sin must be [batch or 1, positions, width] for q's positions");
  STD_TORCH_CHECK(q_.scalar_type() == k_.scalar_type() && cos_.scalar_type() == sin_.scalar_type(),
                  "kernelwise::rotary: q and k, and cos and sin, must have one dtype");
  Tensor outputs[2] = {q_, k_};
  RotaryArgs a{};
  for (int i = 0; i < 2; i++) {
    const Tensor& x = inputs[i];
    const int64_t heads = x.size(head_dim);
    Dims strides{{}, 4};
    strides.values[0] = std::max<int64_t>(num_positions, 1) * std::max<int64_t>(heads, 1) * std::max<int64_t>(width, 1);
    strides.values[position_dim] = std::max<int64_t>(heads, 1) * std::max<int64_t>(width, 1);
    strides.values[head_dim] = std::max<int64_t>(width, 1);
    strides.values[3] = 1;
    outputs[i] = empty(sizes_of(x), strides, out_type);
    a.x[i] = x.data_ptr();
    a.y[i] = outputs[i].data_ptr();
    a.heads[i] = heads;
    a.x_batch[i] = x.stride(0);
    a.x_head[i] = x.stride(head_dim);
    a.x_position[i] = x.stride(position_dim);
    a.y_batch[i] = strides.values[0];
    a.y_head[i] = width;
    a.y_position[i] = heads * width;
  }
  a.cos = cos.data_ptr();
  a.sin = sin.data_ptr();
  a.cos_batch = cos.size(0) == 1 ? 0 : cos.stride(0);
  a.sin_batch = sin.size(0) == 1 ? 0 : sin.stride(0);
  a.cos_position = cos.stride(1);
  a.sin_position = sin.stride(1);
  a.positions = num_positions;
  a.width = width;
  a.backward = backward;
  const DType out = out_type == ScalarType::Float      ? DType::kFloat32
                    : out_type == ScalarType::BFloat16 ? DType::kBFloat16
                                                       : DType::kFloat16;
  const RotaryPositions kernel = kernels().rotary({dtype_of(q_, "q"), dtype_of(cos_, "cos"), out});
  STD_TORCH_CHECK(kernel != nullptr, "kernelwise::rotary: cos and sin must have q's dtype or float32");
  each_row(batch * num_positions, (a.heads[0] + a.heads[1]) * width,
           [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return {outputs[0], outputs[1]};
}

std::tuple<Tensor, Tensor> rotary(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                                  int64_t unsqueeze_dim) {
  const bool wider = cos.scalar_type() == ScalarType::Float;
  return rotate(q, k, cos, sin, unsqueeze_dim, wider ? ScalarType::Float : q.scalar_type(), false);
}

std::tuple<Tensor, Tensor> rotary_backward(const Tensor& grad_q, const Tensor& grad_k, const Tensor& cos,
                                           const Tensor& sin, int64_t unsqueeze_dim, ScalarType dtype) {
  return rotate(grad_q, grad_k, cos, sin, unsqueeze_dim, dtype, true);
}

// ---- linear ----

constexpr int64_t kRowTile = 1024;         // rows of x that are float32 at a time
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
void multiply(const Matrix& out, const Matrix& a, const Matrix& b, bool add) {
  if (add) {
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_cpu_addmm_out(out.tensor.get(), out.tensor.get(), a.tensor.get(), b.tensor.get(), 1.0, 1.0));
  } else {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.tensor.get(), a.tensor.get(), b.tensor.get()));
  }
}

// Half-precision matrix in memory and conversion of a part of it, by torch's threads.
struct Half {
  char* data;
  int64_t stride;
  DType dtype;
  void widen(float* to, int64_t row, int64_t column, int64_t rows, int64_t columns) const {
    const Widen convert = kernels().widen(dtype);
    each_row(rows, columns, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++)
        convert(data + ((row + i) * stride + column) * 2, to + i * columns, columns);
    });
  }
  void narrow(const float* from, const float* bias, int64_t row, int64_t column, int64_t rows, int64_t columns) const {
    const Narrow convert = kernels().narrow(dtype);
    each_row(rows, columns, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++)
        convert(from + i * columns, bias, data + ((row + i) * stride + column) * 2, columns);
    });
  }
};

// Uninitialised float32 memory from torch's allocator.
struct Scratch {
  Tensor tensor;
  float* data;
  explicit Scratch(int64_t num) : tensor(empty(Dims{{num}, 1}, ScalarType::Float)), data(static_cast<float*>(tensor.data_ptr())) {}
};

struct LinearShape {
  Rows x;
  Tensor weight;
  DType dtype;
  int64_t rows, in, out;
  Half x_half() const { return {const_cast<char*>(x.data), x.stride, dtype}; }
  Half weight_half() const { return {static_cast<char*>(weight.data_ptr()), in, dtype}; }
};

LinearShape linear_of(const Tensor& x, const Tensor& weight) {
  const DType dtype = dtype_of(weight, "weight");
  STD_TORCH_CHECK(dtype != DType::kFloat32, "kernelwise::linear: weight must be bfloat16 or float16");
  STD_TORCH_CHECK(x.scalar_type() == weight.scalar_type(), "kernelwise::linear: x and weight must have one dtype");
  STD_TORCH_CHECK(weight.dim() == 2, "kernelwise::linear: weight must be [out, in]");
  Rows rows = rows_of(x);
  STD_TORCH_CHECK(rows.width == weight.size(1), "kernelwise::linear: x [..., in] does not fit weight [out, in]");
  LinearShape s{rows, weight.is_contiguous() ? weight : torch::stable::contiguous(weight), dtype, rows.num, rows.width,
                weight.size(0)};
  return s;
}

std::vector<float> widened(const MaybeTensor& bias, const LinearShape& s) {
  if (!bias) return {};
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == s.out && bias->scalar_type() == s.weight.scalar_type(),
                  "kernelwise::linear: bias must be [out] in weight's dtype");
  const Tensor b = torch::stable::contiguous(*bias);
  std::vector<float> wide(s.out);
  kernels().widen(s.dtype)(b.data_ptr(), wide.data(), s.out);
  return wide;
}

// Weight rows at a time: as many as fit kWideWeights, in whole multiples of what products like.
int64_t block_of(const LinearShape& s) {
  return std::min(s.out, std::max<int64_t>(64, kWideWeights / std::max<int64_t>(1, s.in) / 64 * 64));
}

Tensor linear(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, int64_t few_rows) {
  const LinearShape s = linear_of(x, weight);
  const std::vector<float> wide_bias = widened(bias, s);
  const float* b = bias ? wide_bias.data() : nullptr;
  Dims sizes = sizes_of(x);
  sizes.values[sizes.num - 1] = s.out;
  Tensor y = empty(sizes, x.scalar_type());
  if (y.numel() == 0) return y;
  const Half in = s.x_half(), w = s.weight_half(), out{static_cast<char*>(y.data_ptr()), s.out, s.dtype};
  if (s.rows <= std::min(few_rows, kMostFewRows)) {
    const Scratch wide_x(s.rows * s.in);
    in.widen(wide_x.data, 0, 0, s.rows, s.in);
    const FewRows kernel = kernels().few_rows(s.dtype);
    const int64_t quads = (s.out + 3) / 4;
    each_row(quads, 4 * s.in, [&](int64_t begin, int64_t end) {
      kernel(wide_x.data, w.data, b, out.data, s.rows, s.in, s.out, 4 * begin, std::min(s.out, 4 * end));
    });
    return y;
  }
  const int64_t block = block_of(s), tile = std::min(s.rows, kRowTile);
  const Scratch wide_x(tile * s.in), wide_w(block * s.in), product(tile * block);
  for (int64_t m = 0; m < s.rows; m += tile) {
    const int64_t rows = std::min(tile, s.rows - m);
    in.widen(wide_x.data, m, 0, rows, s.in);
    for (int64_t n = 0; n < s.out; n += block) {
      const int64_t columns = std::min(block, s.out - n);
      w.widen(wide_w.data, n, 0, columns, s.in);
      multiply({product.data, rows, columns, columns, 1}, {wide_x.data, rows, s.in, s.in, 1},
               {wide_w.data, s.in, columns, 1, s.in}, false);
      out.narrow(product.data, b == nullptr ? nullptr : b + n, m, n, rows, columns);
    }
  }
  return y;
}

Tensor linear_grad_x(const Tensor& grad, const Tensor& weight) {
  STD_TORCH_CHECK(grad.dim() >= 1 && weight.dim() == 2 && grad.size(grad.dim() - 1) == weight.size(0) &&
                      grad.scalar_type() == weight.scalar_type(),
                  "kernelwise::linear_grad_x: grad [..., out] does not fit weight [out, in]");
  const Rows g = rows_of(grad);
  const Tensor contiguous = torch::stable::contiguous(weight);
  const LinearShape s{g, contiguous, dtype_of(weight, "weight"), g.num, weight.size(1), weight.size(0)};
  Dims sizes = sizes_of(grad);
  sizes.values[sizes.num - 1] = s.in;
  Tensor dx = empty(sizes, grad.scalar_type());
  if (dx.numel() == 0) return dx;
  const Half from = s.x_half(), w = s.weight_half(), out{static_cast<char*>(dx.data_ptr()), s.in, s.dtype};
  const int64_t block = block_of(s), tile = std::min(s.rows, kRowTile);
  const Scratch wide_g(tile * block), wide_w(block * s.in), sum(tile * s.in);
  for (int64_t m = 0; m < s.rows; m += tile) {
    const int64_t rows = std::min(tile, s.rows - m);
    for (int64_t n = 0; n < s.out; n += block) {
      const int64_t columns = std::min(block, s.out - n);
      w.widen(wide_w.data, n, 0, columns, s.in);
      from.widen(wide_g.data, m, n, rows, columns);
      multiply({sum.data, rows, s.in, s.in, 1}, {wide_g.data, rows, columns, columns, 1},
               {wide_w.data, columns, s.in, s.in, 1}, n > 0);
    }
    out.narrow(sum.data, nullptr, m, 0, rows, s.in);
  }
  return dx;
}

Tensor linear_grad_weight(const Tensor& grad, const Tensor& x) {
  STD_TORCH_CHECK(grad.dim() == x.dim() && grad.scalar_type() == x.scalar_type(),
                  "kernelwise::linear_grad_weight: grad does not fit x");
  const Rows g = rows_of(grad), rows = rows_of(x);
  STD_TORCH_CHECK(g.num == rows.num, "kernelwise::linear_grad_weight: grad does not fit x");
  Tensor dw = empty(Dims{{g.width, rows.width}, 2}, grad.scalar_type());
  const LinearShape s{rows, dw, dtype_of(grad, "grad"), rows.num, rows.width, g.width};
  const Half from{const_cast<char*>(g.data), g.stride, s.dtype}, in = s.x_half(), out = s.weight_half();
  const int64_t block = block_of(s), tile = std::max<int64_t>(1, std::min(s.rows, kRowTile));
  const Scratch wide_g(tile * block), wide_x(tile * s.in), sum(block * s.in);
  for (int64_t n = 0; n < s.out; n += block) {
    const int64_t columns = std::min(block, s.out - n);
    if (s.rows == 0) std::fill(sum.data, sum.data + columns * s.in, 0.0f);
    for (int64_t m = 0; m < s.rows; m += tile) {
      const int64_t num = std::min(tile, s.rows - m);
      from.widen(wide_g.data, m, n, num, columns);
      in.widen(wide_x.data, m, 0, num, s.in);
      multiply({sum.data, columns, s.in, s.in, 1}, {wide_g.data, columns, num, 1, columns},
               {wide_x.data, num, s.in, s.in, 1}, m > 0);
    }
    out.narrow(sum.data, nullptr, n, 0, columns, s.in);
  }
  return dw;
}

std::string isa() { return kernels().isa; }
std::string products() { return half_products(); }

}  // namespace

STABLE_TORCH_LIBRARY(kernelwise, m) {
  m.def("rms_norm(Tensor x, Tensor? weight, float eps, float offset=0.0, bool cast_after=False) -> Tensor");
  m.def(
      "rms_norm_backward(Tensor grad, Tensor x, Tensor? weight, float eps, float offset, bool cast_after, "
      "bool weight_grad) -> (Tensor, Tensor)");
  m.def("gated_activation(Tensor gate, Tensor up, int activation) -> Tensor");
  m.def("gated_activation_backward(Tensor grad, Tensor gate, Tensor up, int activation) -> (Tensor, Tensor)");
  m.def("rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, int unsqueeze_dim) -> (Tensor, Tensor)");
  m.def(
      "rotary_backward(Tensor grad_q, Tensor grad_k, Tensor cos, Tensor sin, int unsqueeze_dim, ScalarType dtype) "
      "-> (Tensor, Tensor)");
  m.def("linear(Tensor x, Tensor weight, Tensor? bias, int few_rows) -> Tensor");
  m.def("linear_grad_x(Tensor grad, Tensor weight) -> Tensor");
  m.def("linear_grad_weight(Tensor grad, Tensor x) -> Tensor");
  m.def("cpu_isa() -> str");
  m.def("cpu_half_products() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(kernelwise, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
  m.impl("gated_activation", TORCH_BOX(&gated_activation));
  m.impl("gated_activation_backward", TORCH_BOX(&gated_activation_backward));
  m.impl("rotary", TORCH_BOX(&rotary));
  m.impl("rotary_backward", TORCH_BOX(&rotary_backward));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_grad_x", TORCH_BOX(&linear_grad_x));
  m.impl("linear_grad_weight", TORCH_BOX(&linear_grad_weight));
}

STABLE_TORCH_LIBRARY_IMPL(kernelwise, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&isa));
  m.impl("cpu_half_products", TORCH_BOX(&products));
}

}  // namespace kernelwise
