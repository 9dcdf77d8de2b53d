// Rotary position embedding of q and k, and the same after RMSNorm over each head.
#include "tensors.h"

namespace kernelwise {
namespace {

// q and k, or gradients in their place, with cos and sin, checked; and room for the results, which lie in memory as
// [batch, positions, heads, width], whatever the order of the dimensions.
struct Rotation {
  Tensor inputs[2], cos, sin, outputs[2];
  RotaryArgs args;
  int64_t num_positions;  // of all sequences together

  template <class F>
  void run(const F& f) const {
    each_row(num_positions, (args.heads[0] + args.heads[1]) * args.width, f);
  }
};

Rotation rotation_of(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, int64_t unsqueeze_dim,
                     ScalarType out_type) {
  STD_TORCH_CHECK(unsqueeze_dim == 1 || unsqueeze_dim == 2, "kernelwise::rotary: unsqueeze_dim must be 1 or 2");
  const View x[2] = {view_of(q), view_of(k)}, angles[2] = {view_of(cos), view_of(sin)};
  STD_TORCH_CHECK(x[0].dims == 4 && x[1].dims == 4, "kernelwise::rotary: q and k must have four dimensions");
  STD_TORCH_CHECK(angles[0].dims == 3, "kernelwise::rotary: cos and sin must be [batch or 1, positions, width]");
  check_same_shape(angles[0], angles[1], "cos and sin");
  const int64_t head_dim = unsqueeze_dim, position_dim = 3 - unsqueeze_dim;
  const int64_t batch = x[0].sizes[0], positions = x[0].sizes[position_dim], width = x[0].sizes[3];
  STD_TORCH_CHECK(x[1].sizes[0] == batch && x[1].sizes[position_dim] == positions && x[1].sizes[3] == width,
                  "kernelwise::rotary: q and k must agree in batch, positions and width");
  const int64_t* const turned = angles[0].sizes;
  STD_TORCH_CHECK(width % 2 == 0 && turned[2] == width, "kernelwise::rotary: the width must be even and that of cos");
  STD_TORCH_CHECK((turned[0] == batch || turned[0] == 1) && turned[1] == positions,
                  "kernelwise::rotary: cos and sin must be [batch or 1, positions, width] for q's positions");
  STD_TORCH_CHECK(q.scalar_type() == k.scalar_type() && cos.scalar_type() == sin.scalar_type(),
                  "kernelwise::rotary: q and k, and cos and sin, must have one dtype");
  const auto result = [&](const View& v) {
    const int64_t heads = std::max<int64_t>(v.sizes[head_dim], 1), w = std::max<int64_t>(width, 1);
    Dims strides{{}, 4}, sizes{{}, 4};
    std::copy(v.sizes, v.sizes + 4, sizes.values);
    strides.values[0] = std::max<int64_t>(positions, 1) * heads * w;
    strides.values[position_dim] = heads * w;
    strides.values[head_dim] = w;
    strides.values[3] = 1;
    return empty(sizes, strides, out_type);
  };
  Rotation r{{unit_last(q, x[0]), unit_last(k, x[1])},
             unit_last(cos, angles[0]),
             unit_last(sin, angles[1]),
             {result(x[0]), result(x[1])},
             {},
             batch * positions};
  RotaryArgs& a = r.args;
  for (int i = 0; i < 2; i++) {
    const View v = has_unit_last(x[i]) ? x[i] : view_of(r.inputs[i]);
    const int64_t heads = v.sizes[head_dim];
    a.x[i] = r.inputs[i].data_ptr();
    a.y[i] = r.outputs[i].data_ptr();
    a.heads[i] = heads;
    a.x_batch[i] = v.strides[0];
    a.x_head[i] = v.strides[head_dim];
    a.x_position[i] = v.strides[position_dim];
    a.y_batch[i] = positions * heads * width;
    a.y_head[i] = width;
    a.y_position[i] = heads * width;
  }
  const View c = has_unit_last(angles[0]) ? angles[0] : view_of(r.cos);
  const View s = has_unit_last(angles[1]) ? angles[1] : view_of(r.sin);
  a.cos = r.cos.data_ptr();
  a.sin = r.sin.data_ptr();
  a.cos_batch = c.sizes[0] == 1 ? 0 : c.strides[0];
  a.sin_batch = s.sizes[0] == 1 ? 0 : s.strides[0];
  a.cos_position = c.strides[1];
  a.sin_position = s.strides[1];
  a.positions = positions;
  a.width = width;
  return r;
}

std::tuple<Tensor, Tensor> rotate(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                                  int64_t unsqueeze_dim, ScalarType out_type, bool backward) {
  Rotation r = rotation_of(q, k, cos, sin, unsqueeze_dim, out_type);
  r.args.backward = backward;
  const DType out = dtype_of(r.outputs[0], "the result");
  const RotaryPositions kernel = kernels().rotary({dtype_of(q, "q"), dtype_of(cos, "cos"), out});
  STD_TORCH_CHECK(kernel != nullptr, "kernelwise::rotary: cos and sin must have q's dtype or float32");
  r.run([&](int64_t begin, int64_t end) { kernel(r.args, begin, end); });
  return {std::move(r.outputs[0]), std::move(r.outputs[1])};
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

// The weight of q's or k's norm with its offset as float32, rounded to its dtype where the layer adds in that.
std::vector<float> scale_of(const MaybeTensor& weight, const Tensor& x, double offset, bool cast_after) {
  if (!weight) return {};
  STD_TORCH_CHECK(weight->dim() == 1 && weight->size(0) == x.size(3),
                  "kernelwise::qk_norm_rotary: a weight must have the shape of the last dimension");
  const DType dtype = dtype_of(*weight, "weight");
  STD_TORCH_CHECK(weight->scalar_type() == x.scalar_type() || dtype == DType::kFloat32,
                  "kernelwise::qk_norm_rotary: a weight must have the dtype of q and k or float32");
  const Tensor w = contiguous(*weight);
  const int64_t width = w.size(0);
  std::vector<float> wide(width);
  kernels().widen(dtype)(w.data_ptr(), wide.data(), width);
  if (offset == 0) return wide;
  for (float& value : wide) value += float(offset);
  if (cast_after || dtype == DType::kFloat32) return wide;
  std::vector<uint16_t> rounded(width);
  kernels().narrow(dtype)(wide.data(), nullptr, rounded.data(), width);
  kernels().widen(dtype)(rounded.data(), wide.data(), width);
  return wide;
}

struct QkNormRotary {
  Rotation rotation;
  std::vector<float> scales[2];
  QkNormRotaryArgs args;
};

QkNormRotary qk_norm_rotary_of(const Tensor& q, const Tensor& k, const MaybeTensor& q_weight, const MaybeTensor& k_weight,
                               const Tensor& cos, const Tensor& sin, double eps, double offset, bool cast_after,
                               int64_t unsqueeze_dim, ScalarType out_type) {
  QkNormRotary n{rotation_of(q, k, cos, sin, unsqueeze_dim, out_type),
                 {scale_of(q_weight, q, offset, cast_after), scale_of(k_weight, k, offset, cast_after)},
                 {}};
  STD_TORCH_CHECK(q.size(3) <= kWidestHead, "kernelwise::qk_norm_rotary: a head may be at most ", kWidestHead, " wide");
  n.args.rotary = n.rotation.args;
  for (int i = 0; i < 2; i++) n.args.weight[i] = n.scales[i].empty() ? nullptr : n.scales[i].data();
  n.args.angles = dtype_of(cos, "cos");
  STD_TORCH_CHECK(cos.scalar_type() == q.scalar_type() || cos.scalar_type() == ScalarType::Float,
                  "kernelwise::qk_norm_rotary: cos and sin must have q's dtype or float32");
  n.args.eps = float(eps);
  return n;
}

// The dtype of one result: what PyTorch promotes x, its weight (unless cast after) and cos to.
ScalarType promoted(const Tensor& x, const MaybeTensor& weight, const Tensor& cos, bool cast_after) {
  const bool wide = cos.scalar_type() == ScalarType::Float ||
                    (weight && !cast_after && weight->scalar_type() == ScalarType::Float);
  return wide ? ScalarType::Float : x.scalar_type();
}

std::tuple<Tensor, Tensor> qk_norm_rotary(const Tensor& q, const Tensor& k, const MaybeTensor& q_weight,
                                          const MaybeTensor& k_weight, const Tensor& cos, const Tensor& sin, double eps,
                                          double offset, bool cast_after, int64_t unsqueeze_dim) {
  const ScalarType out = promoted(q, q_weight, cos, cast_after);
  STD_TORCH_CHECK(out == promoted(k, k_weight, cos, cast_after),
                  "kernelwise::qk_norm_rotary: the weights of q and k must have one dtype");
  QkNormRotary n =
      qk_norm_rotary_of(q, k, q_weight, k_weight, cos, sin, eps, offset, cast_after, unsqueeze_dim, out);
  const DType in = dtype_of(q, "q");
  const QkNormRotaryPositions kernel = kernels().qk_norm_rotary({in, in, dtype_of(n.rotation.outputs[0], "the result")});
  n.rotation.run([&](int64_t begin, int64_t end) { kernel(n.args, begin, end); });
  return {std::move(n.rotation.outputs[0]), std::move(n.rotation.outputs[1])};
}

// Gradients of q, k, and the two weights; the latter two are empty where they are not wanted.
std::tuple<Tensor, Tensor, Tensor, Tensor> qk_norm_rotary_backward(
    const Tensor& grad_q, const Tensor& grad_k, const Tensor& q, const Tensor& k, const MaybeTensor& q_weight,
    const MaybeTensor& k_weight, const Tensor& cos, const Tensor& sin, double eps, double offset, bool cast_after,
    int64_t unsqueeze_dim, bool weight_grads) {
  QkNormRotary n =
      qk_norm_rotary_of(q, k, q_weight, k_weight, cos, sin, eps, offset, cast_after, unsqueeze_dim, q.scalar_type());
  check_same_shape(grad_q, q, "grad_q and q");
  check_same_shape(grad_k, k, "grad_k and k");
  STD_TORCH_CHECK(grad_q.scalar_type() == grad_k.scalar_type() &&
                      grad_q.scalar_type() == promoted(q, q_weight, cos, cast_after),
                  "kernelwise::qk_norm_rotary: gradients must have the dtype of the results");
  const Tensor grads[2] = {unit_last(grad_q), unit_last(grad_k)};
  for (int i = 0; i < 2; i++) {
    n.args.grad[i] = grads[i].data_ptr();
    n.args.grad_batch[i] = grads[i].stride(0);
    n.args.grad_head[i] = grads[i].stride(unsqueeze_dim);
    n.args.grad_position[i] = grads[i].stride(3 - unsqueeze_dim);
  }
  Rotation& r = n.rotation;
  const QkNormRotaryBackwardPositions kernel =
      kernels().qk_norm_rotary_backward({dtype_of(q, "q"), dtype_of(q, "q"), dtype_of(grad_q, "grad_q")});
  const int64_t width = r.args.width;
  const auto grad_of = [&](const MaybeTensor& weight) {
    const bool wanted = weight && weight_grads;
    return empty(Dims{{wanted ? width : 0}, 1}, wanted ? weight->scalar_type() : ScalarType::Float);
  };
  Tensor weights[2] = {grad_of(q_weight), grad_of(k_weight)};
  if (!weight_grads || (!q_weight && !k_weight)) {
    r.run([&](int64_t begin, int64_t end) { kernel(n.args, nullptr, begin, end); });
    return {std::move(r.outputs[0]), std::move(r.outputs[1]), std::move(weights[0]), std::move(weights[1])};
  }
  // As for the norms: groups of positions, each with its own sums, whatever the number of threads.
  const int64_t num = r.num_positions, group = std::max<int64_t>(8, (num + 63) / 64), groups = (num + group - 1) / group;
  std::vector<float> sums(std::max<int64_t>(1, groups) * 2 * width, 0.0f);
  each_row(groups, group * (r.args.heads[0] + r.args.heads[1]) * width, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
      kernel(n.args, sums.data() + i * 2 * width, i * group, std::min(num, (i + 1) * group));
  });
  for (int64_t i = 1; i < groups; i++)
    for (int64_t j = 0; j < 2 * width; j++) sums[j] += sums[i * 2 * width + j];
  for (int i = 0; i < 2; i++)
    if (weights[i].numel() > 0)
      kernels().narrow(dtype_of(weights[i], "weight"))(sums.data() + i * width, nullptr, weights[i].data_ptr(), width);
  return {std::move(r.outputs[0]), std::move(r.outputs[1]), std::move(weights[0]), std::move(weights[1])};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(kernelwise, m) {
  m.def("rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, int unsqueeze_dim=1) -> (Tensor, Tensor)");
  m.def(
      "rotary_backward(Tensor grad_q, Tensor grad_k, Tensor cos, Tensor sin, int unsqueeze_dim, ScalarType dtype) "
      "-> (Tensor, Tensor)");
  m.def(
      "qk_norm_rotary(Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor cos, Tensor sin, float eps, "
      "float offset=0.0, bool cast_after=False, int unsqueeze_dim=1) -> (Tensor, Tensor)");
  m.def(
      "qk_norm_rotary_backward(Tensor grad_q, Tensor grad_k, Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, "
      "Tensor cos, Tensor sin, float eps, float offset, bool cast_after, int unsqueeze_dim, bool weight_grads) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(kernelwise, CPU, m) {
  m.impl("rotary", Boxed<rotary>::call);
  m.impl("rotary_backward", Boxed<rotary_backward>::call);
  m.impl("qk_norm_rotary", Boxed<qk_norm_rotary>::call);
  m.impl("qk_norm_rotary_backward", Boxed<qk_norm_rotary_backward>::call);
}

}  // namespace kernelwise
