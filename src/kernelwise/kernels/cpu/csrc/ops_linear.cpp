// The linear layer with half-precision weights, and with few rows in float32.
//
// Few rows go through dot products, more through panels of the weight that are widened in the cache. Without AVX2 there are
// no panels: the weight is widened block by block for torch's float32 product. So it is for the weight's gradient everywhere.
#include <cstring>
#include <memory>

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

constexpr int64_t kMostWideRows = 8;  // with float32 weights

DType half_of(const Tensor& t, const char* name) {
  const DType dtype = dtype_of(t, name);
  STD_TORCH_CHECK(dtype != DType::kFloat32, "kernelwise::linear: ", name, " must be bfloat16 or float16");
  return dtype;
}

LinearShape linear_of(const Tensor& x, const Tensor& weight) {
  const DType dtype = dtype_of(weight, "weight");
  STD_TORCH_CHECK(x.scalar_type() == weight.scalar_type(), "kernelwise::linear: x and weight must have one dtype");
  STD_TORCH_CHECK(weight.dim() == 2, "kernelwise::linear: weight must be [out, in]");
  Rows rows = rows_of(x);
  const int64_t num = rows.num, in = rows.width;
  STD_TORCH_CHECK(in == weight.size(1), "kernelwise::linear: x [..., in] does not fit weight [out, in]");
  return {std::move(rows), contiguous(weight), dtype, num, in, weight.size(0)};
}

std::vector<float> widened(const MaybeTensor& bias, const LinearShape& s) {
  if (!bias) return {};
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == s.out && bias->scalar_type() == s.weight.scalar_type(),
                  "kernelwise::linear: bias must be [out] in weight's dtype");
  const Tensor b = contiguous(*bias);
  std::vector<float> wide(s.out);
  kernels().widen(s.dtype)(b.data_ptr(), wide.data(), s.out);
  return wide;
}

// Weight rows at a time: as many as fit kWideWeights, in whole multiples of what products like.
int64_t block_of(const LinearShape& s) {
  return std::min(s.out, std::max<int64_t>(64, kWideWeights / std::max<int64_t>(1, s.in) / 64 * 64));
}

// Eight rows of the weight at a time, with up to four of x and then, while they are in the cache, with the next.
void by_few_rows(const LinearShape& s, const float* bias, char* y) {
  const int64_t size = size_of(s.dtype);
  const bool as_it_is = s.dtype == DType::kFloat32 && (s.rows == 1 || s.x.stride == s.in);
  const std::unique_ptr<float[]> laid_out(as_it_is ? nullptr : new float[s.rows * s.in]);
  const float* const x = as_it_is ? reinterpret_cast<const float*>(s.x.data) : laid_out.get();
  if (!as_it_is) {
    const Widen lay_out = kernels().few_rows(s.dtype, 1).lay_out;
    for (int64_t m = 0; m < s.rows; m++) lay_out(s.x.data + m * s.x.stride * size, laid_out.get() + m * s.in, s.in);
  }
  const int64_t groups = (s.rows + kMostFewRows - 1) / kMostFewRows;
  each_row((s.out + 7) / 8, 8 * s.in * groups, [&](int64_t begin, int64_t end) {
    const int64_t step = groups == 1 ? end - begin : 1;
    for (int64_t n = begin; n < end; n += step)
      for (int64_t m = 0; m < s.rows; m += kMostFewRows)
        kernels().few_rows(s.dtype, std::min(kMostFewRows, s.rows - m)).columns(
            x + m * s.in, s.weight.data_ptr(), bias, y + m * s.out * size, s.in, s.out, 8 * n, std::min(s.out, 8 * (n + step)));
  });
}

constexpr int64_t kSharedRows = 64;  // with fewer it is the weight's way from memory that takes the time

void by_panels(const Gemm& gemm, const GemmArgs& args, int64_t columns) {
  const int64_t panels = (columns + gemm.panel - 1) / gemm.panel;
  const int64_t width = gemm.panel * args.depth * std::min<int64_t>(args.rows, 16);
  const auto multiply = [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> sums(new float[args.rows * gemm.panel]);
    gemm.columns(args, sums.get(), begin * gemm.panel, std::min(columns, end * gemm.panel));
  };
  if (args.rows < kSharedRows) return each_row(panels, width, multiply);
  each_share(panels, width, multiply);
}

Tensor linear(const Tensor& x, const Tensor& weight, const MaybeTensor& bias) {
  const LinearShape s = linear_of(x, weight);
  const std::vector<float> wide_bias = widened(bias, s);
  const float* b = bias ? wide_bias.data() : nullptr;
  Dims sizes = sizes_of(s.x.view);
  sizes.values[sizes.num - 1] = s.out;
  Tensor y = empty(sizes, x.scalar_type());
  if (y.numel() == 0) return y;
  char* y_data = static_cast<char*>(y.data_ptr());
  if (s.in == 0) {  // sums of nothing
    const Half out{y_data, s.out, s.dtype};
    const std::vector<float> nothing(s.out, 0.0f);
    for (int64_t m = 0; m < y.numel() / s.out; m++) out.narrow(nothing.data(), b, m, 0, 1, s.out);
    return y;
  }
  const bool wide = s.dtype == DType::kFloat32;
  if (s.rows <= (wide ? kMostWideRows : kMostFewRows) && kernels().few_rows(s.dtype, 1).columns != nullptr) {
    by_few_rows(s, b, y_data);
    return y;
  }
  STD_TORCH_CHECK(!wide, "kernelwise::linear: float32 weights are multiplied with at most ", kMostWideRows,
                  " rows, and with AVX2 alone");
  const Gemm gemm = kernels().gemm(s.dtype);
  const int64_t tile = std::min(s.rows, kRowTile);
  const Half in = s.x_half(), w = s.weight_half(), out{y_data, s.out, s.dtype};
  const Scratch wide_x(tile * s.in);
  if (gemm.columns != nullptr) {
    for (int64_t m = 0; m < s.rows; m += tile) {
      const int64_t rows = std::min(tile, s.rows - m);
      in.widen(wide_x.data, m, 0, rows, s.in);
      by_panels(gemm, {wide_x.data, s.in, w.data, s.in, false, b, y_data + m * s.out * 2, s.out, rows, s.in}, s.out);
    }
    return y;
  }
  const int64_t block = block_of(s);
  const Scratch wide_w(block * s.in), product(tile * block);
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
  Rows g = rows_of(grad);
  const int64_t num = g.num;
  const LinearShape s{std::move(g), contiguous(weight), half_of(weight, "weight"), num, weight.size(1), weight.size(0)};
  Dims sizes = sizes_of(s.x.view);
  sizes.values[sizes.num - 1] = s.in;
  Tensor dx = empty(sizes, grad.scalar_type());
  if (dx.numel() == 0) return dx;
  if (s.out == 0) {  // sums of nothing
    std::memset(dx.data_ptr(), 0, sizeof(uint16_t) * dx.numel());
    return dx;
  }
  if (const Gemm gemm = kernels().gemm(s.dtype); gemm.columns != nullptr) {
    const int64_t most = std::min(s.rows, std::min(kRowTile, std::max<int64_t>(64, kWideRows / s.out)));
    const Scratch wide(most * s.out);
    for (int64_t m = 0; m < s.rows; m += most) {
      const int64_t rows = std::min(most, s.rows - m);
      s.x_half().widen(wide.data, m, 0, rows, s.out);
      by_panels(gemm, {wide.data, s.out, s.weight.data_ptr(), s.in, true, nullptr,
                       static_cast<char*>(dx.data_ptr()) + m * s.in * 2, s.in, rows, s.out}, s.in);
    }
    return dx;
  }
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
  const Rows g = rows_of(grad);
  Rows rows = rows_of(x);
  const int64_t num = rows.num, width = rows.width;
  Tensor dw = empty(Dims{{g.width, width}, 2}, grad.scalar_type());
  if (dw.numel() == 0) return dw;
  STD_TORCH_CHECK(g.num == num, "kernelwise::linear_grad_weight: grad does not fit x");
  const LinearShape s{std::move(rows), dw.borrowed(), half_of(grad, "grad"), num, width, g.width};
  const Half from{const_cast<char*>(g.data), g.stride, s.dtype}, in = s.x_half(), out = s.weight_half();
  const int64_t block = block_of(s), tile = std::max<int64_t>(1, std::min(s.rows, kRowTile));
  const Scratch wide_g(tile * block), wide_x(tile * s.in), sum(block * s.in);
  for (int64_t n = 0; n < s.out; n += block) {
    const int64_t columns = std::min(block, s.out - n);
    if (s.rows == 0) std::fill(sum.data, sum.data + columns * s.in, 0.0f);
    for (int64_t m = 0; m < s.rows; m += tile) {
      const int64_t part = std::min(tile, s.rows - m);
      from.widen(wide_g.data, m, n, part, columns);
      in.widen(wide_x.data, m, 0, part, s.in);
      multiply({sum.data, columns, s.in, s.in, 1}, {wide_g.data, columns, part, 1, columns},
               {wide_x.data, part, s.in, s.in, 1}, m > 0);
    }
    out.narrow(sum.data, nullptr, n, 0, columns, s.in);
  }
  return dw;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(kernelwise, m) {
  m.def("linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor");
  m.def("linear_grad_x(Tensor grad, Tensor weight) -> Tensor");
  m.def("linear_grad_weight(Tensor grad, Tensor x) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(kernelwise, CPU, m) {
  m.impl("linear", Boxed<linear>::call);
  m.impl("linear_grad_x", Boxed<linear_grad_x>::call);
  m.impl("linear_grad_weight", Boxed<linear_grad_weight>::call);
}

}  // namespace kernelwise
