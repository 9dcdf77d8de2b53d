// The linear layer with half-precision weights.
#include "products.h"

namespace kernelwise {
namespace {

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

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(kernelwise, m) {
  m.def("linear(Tensor x, Tensor weight, Tensor? bias, int few_rows) -> Tensor");
  m.def("linear_grad_x(Tensor grad, Tensor weight) -> Tensor");
  m.def("linear_grad_weight(Tensor grad, Tensor x) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(kernelwise, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_grad_x", TORCH_BOX(&linear_grad_x));
  m.impl("linear_grad_weight", TORCH_BOX(&linear_grad_weight));
}

}  // namespace kernelwise
