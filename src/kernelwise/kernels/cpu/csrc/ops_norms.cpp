// RMSNorm and LayerNorm, of x or of x + residual.
#include "tensors.h"

namespace kernelwise {
namespace {

// What is normalised, and the parameters, checked.
struct Norm {
  Rows x;
  MaybeTensor weight, bias;
  DType in, other, out;
  const void* weight_data() const { return weight ? weight->data_ptr() : nullptr; }
  const void* bias_data() const { return bias ? bias->data_ptr() : nullptr; }
};

MaybeTensor parameter(const MaybeTensor& t, const char* name, int64_t width, DType in, DType& other) {
  if (!t) return std::nullopt;
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == width, "kernelwise: ", name,
                  " must have the shape of x's last dimension");
  other = dtype_of(*t, name);
  STD_TORCH_CHECK(other == in || other == DType::kFloat32, "kernelwise: ", name, " must have x's dtype or float32");
  return contiguous(*t);
}

Norm rms_norm_of(const Tensor& x, const MaybeTensor& weight, bool cast_after) {
  const DType in = dtype_of(x, "x");
  Norm n{rows_of(x), std::nullopt, std::nullopt, in, in, in};
  n.weight = parameter(weight, "weight", n.x.width, in, n.other);
  if (weight && !cast_after) n.out = n.other;
  return n;
}

Norm layer_norm_of(const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias) {
  const DType in = dtype_of(x, "x");
  Norm n{rows_of(x), std::nullopt, std::nullopt, in, in, in};
  n.bias = parameter(bias, "bias", n.x.width, in, n.other);
  const DType of_bias = n.other;
  n.weight = parameter(weight, "weight", n.x.width, in, n.other);
  STD_TORCH_CHECK(!bias || !weight || n.other == of_bias, "kernelwise: weight and bias must have one dtype");
  return n;
}

// The result, and x + residual where there is a residual.
std::tuple<Tensor, MaybeTensor> run(NormRows kernel, const Norm& n, const Tensor* residual, double eps,
                                    double offset, bool cast_after) {
  const Dims sizes = sizes_of(n.x.view);
  Tensor y = empty(sizes, scalar_type_of(n.out));
  NormArgs args{n.x.data, nullptr, n.weight_data(), n.bias_data(), y.data_ptr(), nullptr, n.x.stride, 0, n.x.width,
                float(eps), float(offset), cast_after};
  MaybeTensor sum;
  Rows other{};
  if (residual != nullptr) {
    other = rows_of(*residual);
    check_same_shape(n.x.view, other.view, "x and residual");
    STD_TORCH_CHECK(dtype_of(*residual, "residual") == n.in, "kernelwise: x and residual must have one dtype");
    sum = empty(sizes, scalar_type_of(n.in));
    args.residual = other.data;
    args.residual_stride = other.stride;
    args.sum = sum->data_ptr();
  }
  each_row(n.x.num, n.x.width, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return {std::move(y), std::move(sum)};
}

// Gradients of x, weight and bias; the latter two are empty where they are not wanted.
std::tuple<Tensor, Tensor, Tensor> run_backward(NormBackwardRows kernel, const Norm& n, const Tensor& grad, const Tensor& x,
                                                const MaybeTensor& grad_sum, double eps, double offset, bool weight_grad,
                                                bool bias_grad) {
  const Rows g = rows_of(grad);
  check_same_shape(g.view, n.x.view, "grad and x");
  STD_TORCH_CHECK(dtype_of(grad, "grad") == n.out, "kernelwise: grad must have the output's dtype");
  Tensor dx = empty(sizes_of(n.x.view), x.scalar_type());
  NormBackwardArgs args{g.data, n.x.data, nullptr, n.weight_data(), dx.data_ptr(), g.stride, n.x.stride, 0, n.x.width,
                        float(eps), float(offset)};
  Rows more{};
  if (grad_sum) {
    more = rows_of(*grad_sum);
    check_same_shape(more.view, n.x.view, "grad_sum and x");
    STD_TORCH_CHECK(grad_sum->scalar_type() == x.scalar_type(), "kernelwise: grad_sum must have x's dtype");
    args.grad_sum = more.data;
    args.grad_sum_stride = more.stride;
  }
  weight_grad = weight_grad && n.weight;
  bias_grad = bias_grad && n.bias;
  const int64_t width = n.x.width;
  const auto grad_of = [&](bool wanted) {
    return empty(Dims{{wanted ? width : 0}, 1}, wanted ? scalar_type_of(n.other) : ScalarType::Float);
  };
  Tensor dw = grad_of(weight_grad), db = grad_of(bias_grad);
  if (!weight_grad && !bias_grad) {
    each_row(n.x.num, width, [&](int64_t begin, int64_t end) { kernel(args, nullptr, nullptr, begin, end); });
    return {std::move(dx), std::move(dw), std::move(db)};
  }
  // Groups of rows, each with its own sums; a group is never split, so threads do not change the order of additions.
  const int64_t group = std::max<int64_t>(8, (n.x.num + 63) / 64), groups = (n.x.num + group - 1) / group;
  std::vector<float> sums(std::max<int64_t>(1, groups) * 2 * width, 0.0f);
  each_row(groups, group * width, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      float* of_weight = sums.data() + i * 2 * width;
      kernel(args, weight_grad ? of_weight : nullptr, bias_grad ? of_weight + width : nullptr, i * group,
             std::min(n.x.num, (i + 1) * group));
    }
  });
  for (int64_t i = 1; i < groups; i++)
    for (int64_t j = 0; j < 2 * width; j++) sums[j] += sums[i * 2 * width + j];
  const Narrow narrow = kernels().narrow(n.other);
  if (weight_grad) narrow(sums.data(), nullptr, dw.data_ptr(), width);
  if (bias_grad) narrow(sums.data() + width, nullptr, db.data_ptr(), width);
  return {std::move(dx), std::move(dw), std::move(db)};
}

Tensor rms_norm(const Tensor& x, const MaybeTensor& weight, double eps, double offset, bool cast_after) {
  const Norm n = rms_norm_of(x, weight, cast_after);
  return std::get<0>(run(kernels().rms_norm({n.in, n.other, n.out}), n, nullptr, eps, offset, cast_after));
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const MaybeTensor& weight, double eps,
                                        double offset, bool cast_after) {
  const Norm n = rms_norm_of(x, weight, cast_after);
  auto [y, sum] = run(kernels().rms_norm({n.in, n.other, n.out}), n, &residual, eps, offset, cast_after);
  return {std::move(y), std::move(*sum)};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const Tensor& x, const MaybeTensor& weight, double eps,
                                             double offset, bool cast_after, bool weight_grad,
                                             const MaybeTensor& grad_sum) {
  const Norm n = rms_norm_of(x, weight, cast_after);
  const NormBackwardRows kernel = kernels().rms_norm_backward({n.in, n.other, n.out});
  auto [dx, dw, db] = run_backward(kernel, n, grad, x, grad_sum, eps, offset, weight_grad, false);
  return {std::move(dx), std::move(dw)};
}

Tensor layer_norm(const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias, double eps, double offset) {
  const Norm n = layer_norm_of(x, weight, bias);
  return std::get<0>(run(kernels().layer_norm({n.in, n.other, n.out}), n, nullptr, eps, offset, true));
}

std::tuple<Tensor, Tensor> add_layer_norm(const Tensor& x, const Tensor& residual, const MaybeTensor& weight,
                                          const MaybeTensor& bias, double eps, double offset) {
  const Norm n = layer_norm_of(x, weight, bias);
  auto [y, sum] = run(kernels().layer_norm({n.in, n.other, n.out}), n, &residual, eps, offset, true);
  return {std::move(y), std::move(*sum)};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& grad, const Tensor& x, const MaybeTensor& weight,
                                                       const MaybeTensor& bias, double eps, double offset,
                                                       bool weight_grad, bool bias_grad, const MaybeTensor& grad_sum) {
  const Norm n = layer_norm_of(x, weight, bias);
  const NormBackwardRows kernel = kernels().layer_norm_backward({n.in, n.other, n.out});
  return run_backward(kernel, n, grad, x, grad_sum, eps, offset, weight_grad, bias_grad);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(kernelwise, m) {
  m.def("rms_norm(Tensor x, Tensor? weight, float eps, float offset=0.0, bool cast_after=False) -> Tensor");
  m.def(
      "add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps, float offset=0.0, bool cast_after=False) -> "
      "(Tensor, Tensor)");
  m.def(
      "rms_norm_backward(Tensor grad, Tensor x, Tensor? weight, float eps, float offset, bool cast_after, "
      "bool weight_grad, Tensor? grad_sum=None) -> (Tensor, Tensor)");
  m.def("layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, float offset=0.0) -> Tensor");
  m.def(
      "add_layer_norm(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, float offset=0.0) -> "
      "(Tensor, Tensor)");
  m.def(
      "layer_norm_backward(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, float eps, float offset, "
      "bool weight_grad, bool bias_grad, Tensor? grad_sum=None) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(kernelwise, CPU, m) {
  m.impl("rms_norm", Boxed<rms_norm>::call);
  m.impl("add_rms_norm", Boxed<add_rms_norm>::call);
  m.impl("rms_norm_backward", Boxed<rms_norm_backward>::call);
  m.impl("layer_norm", Boxed<layer_norm>::call);
  m.impl("add_layer_norm", Boxed<add_layer_norm>::call);
  m.impl("layer_norm_backward", Boxed<layer_norm_backward>::call);
}

}  // namespace kernelwise
