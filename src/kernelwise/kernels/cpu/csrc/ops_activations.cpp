// Activations, and activation(gate) * up.
#include "tensors.h"

namespace kernelwise {
namespace {

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

void check_known(int64_t activation) {
  STD_TORCH_CHECK(activation >= 0 && activation <= int64_t(Activation::kQuickGelu), "kernelwise: unknown activation ",
                  activation);
}

Tensor activation(const Tensor& x, int64_t activation) {
  check_known(activation);
  const DType dtype = dtype_of(x, "x");
  const Rows in = rows_of(x);
  Tensor y = empty(sizes_of(in.view), x.scalar_type());
  const int64_t size = int64_t(x.element_size());
  char* out = static_cast<char*>(y.data_ptr());
  const ActivationBlock kernel = kernels().activation(dtype);
  each_piece({&in}, [&](int64_t row, int64_t column, int64_t first, int64_t num) {
    kernel(Activation(activation), in.data + (row * in.stride + column) * size, out + first * size, num);
  });
  return y;
}

Tensor activation_backward(const Tensor& grad, const Tensor& x, int64_t activation) {
  check_known(activation);
  const DType dtype = dtype_of(x, "x");
  const Rows d = rows_of(grad), in = rows_of(x);
  check_same_shape(d.view, in.view, "grad and x");
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type(), "kernelwise::activation: grad must have x's dtype");
  Tensor dx = empty(sizes_of(in.view), x.scalar_type());
  const int64_t size = int64_t(x.element_size());
  char* out = static_cast<char*>(dx.data_ptr());
  const ActivationBackwardBlock kernel = kernels().activation_backward(dtype);
  each_piece({&d, &in}, [&](int64_t row, int64_t column, int64_t first, int64_t num) {
    kernel(Activation(activation), d.data + (row * d.stride + column) * size, in.data + (row * in.stride + column) * size,
           out + first * size, num);
  });
  return dx;
}

DType check_gated(const Tensor& gate, const Tensor& up, int64_t activation) {
  STD_TORCH_CHECK(gate.scalar_type() == up.scalar_type(), "kernelwise::gated_activation: gate and up must have one dtype");
  check_known(activation);
  return dtype_of(gate, "gate");
}

Tensor gated_activation(const Tensor& gate, const Tensor& up, int64_t activation) {
  const DType dtype = check_gated(gate, up, activation);
  const Rows g = rows_of(gate), u = rows_of(up);
  check_same_shape(g.view, u.view, "gate and up");
  Tensor y = empty(sizes_of(g.view), gate.scalar_type());
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
  const Rows d = rows_of(grad), g = rows_of(gate), u = rows_of(up);
  check_same_shape(g.view, u.view, "gate and up");
  check_same_shape(d.view, g.view, "grad and gate");
  STD_TORCH_CHECK(grad.scalar_type() == gate.scalar_type(), "kernelwise::gated_activation: grad must have gate's dtype");
  Tensor dg = empty(sizes_of(g.view), gate.scalar_type()), du = empty(sizes_of(g.view), gate.scalar_type());
  const int64_t size = int64_t(gate.element_size());
  char* out_gate = static_cast<char*>(dg.data_ptr());
  char* out_up = static_cast<char*>(du.data_ptr());
  const GatedBackwardBlock kernel = kernels().gated_backward(dtype);
  each_piece({&d, &g, &u}, [&](int64_t row, int64_t column, int64_t first, int64_t num) {
    kernel(Activation(activation), d.data + (row * d.stride + column) * size, g.data + (row * g.stride + column) * size,
           u.data + (row * u.stride + column) * size, out_gate + first * size, out_up + first * size, num);
  });
  return {std::move(dg), std::move(du)};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(kernelwise, m) {
  m.def("activation(Tensor x, int activation) -> Tensor");
  m.def("activation_backward(Tensor grad, Tensor x, int activation) -> Tensor");
  m.def("gated_activation(Tensor gate, Tensor up, int activation) -> Tensor");
  m.def("gated_activation_backward(Tensor grad, Tensor gate, Tensor up, int activation) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(kernelwise, CPU, m) {
  m.impl("activation", Boxed<activation>::call);
  m.impl("activation_backward", Boxed<activation_backward>::call);
  m.impl("gated_activation", Boxed<gated_activation>::call);
  m.impl("gated_activation_backward", Boxed<gated_activation_backward>::call);
}

}  // namespace kernelwise
