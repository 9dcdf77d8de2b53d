// Attention over keys and values that heads may share.
#include <cmath>
#include <memory>

#include "tensors.h"

namespace kernelwise {
namespace {

MaskKind kind_of(const Tensor& mask, const Tensor& q) {
  if (mask.scalar_type() == ScalarType::Bool) return MaskKind::kBool;
  if (mask.scalar_type() == ScalarType::Float) return MaskKind::kFloat32;
  STD_TORCH_CHECK(mask.scalar_type() == q.scalar_type(), "kernelwise::attention: a mask must be bool, float32 or of q's dtype");
  return MaskKind::kOwn;
}

// The result lies in memory as [batch, positions, heads, width].
Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, std::optional<double> scale, const MaybeTensor& mask,
                 bool causal) {
  View x[3] = {view_of(q), view_of(k), view_of(v)};
  STD_TORCH_CHECK(x[0].dims == 4 && x[1].dims == 4 && x[2].dims == 4,
                  "kernelwise::attention: q, k and v must be [batch, heads, positions, width]");
  const ScalarType dtype = q.scalar_type();
  STD_TORCH_CHECK(dtype == k.scalar_type() && dtype == v.scalar_type(), "kernelwise::attention: q, k and v must have one dtype");
  const Attention kernel = kernels().attention(dtype_of(q, "q"));
  STD_TORCH_CHECK(kernel.tasks != nullptr, "kernelwise::attention: it needs a processor with AVX2");
  AttentionArgs a{};
  a.heads = x[0].sizes[1], a.positions = x[0].sizes[2], a.keys = x[1].sizes[2], a.width = x[0].sizes[3];
  a.value_width = x[2].sizes[3];
  const int64_t batch = x[0].sizes[0], shared = x[1].sizes[1];
  STD_TORCH_CHECK(x[1].sizes[0] == batch && x[2].sizes[0] == batch && x[2].sizes[1] == shared && x[2].sizes[2] == a.keys &&
                      x[1].sizes[3] == a.width && shared > 0 && a.heads % shared == 0,
                  "kernelwise::attention: k and v must fit q, with as many heads or a divisor of its number");
  a.group = a.heads / shared;
  const Tensor in[3] = {unit_last(q, x[0]), unit_last(k, x[1]), unit_last(v, x[2])};
  for (int i = 0; i < 3; i++)
    if (!has_unit_last(x[i])) x[i] = view_of(in[i]);
  a.q = in[0].data_ptr(), a.q_batch = x[0].strides[0], a.q_head = x[0].strides[1], a.q_position = x[0].strides[2];
  a.k = in[1].data_ptr(), a.k_batch = x[1].strides[0], a.k_head = x[1].strides[1], a.k_position = x[1].strides[2];
  a.v = in[2].data_ptr(), a.v_batch = x[2].strides[0], a.v_head = x[2].strides[1], a.v_position = x[2].strides[2];
  a.scale = float(scale ? *scale : 1 / std::sqrt(double(std::max<int64_t>(a.width, 1)))), a.causal = causal;
  MaybeTensor rows;  // the mask with unit last stride
  if (mask) {
    STD_TORCH_CHECK(mask->dim() == 4 && mask->size(3) == a.keys && (mask->size(2) == 1 || mask->size(2) == a.positions) &&
                        (mask->size(1) == 1 || mask->size(1) == a.heads) && (mask->size(0) == 1 || mask->size(0) == batch),
                    "kernelwise::attention: a mask must be [batch or 1, heads or 1, positions or 1, keys]");
    a.mask_kind = kind_of(*mask, q);
    rows = unit_last(*mask);
    a.mask = rows->data_ptr();
    a.mask_batch = rows->size(0) == 1 ? 0 : rows->stride(0);
    a.mask_head = rows->size(1) == 1 ? 0 : rows->stride(1);
    a.mask_position = rows->size(2) == 1 ? 0 : rows->stride(2);
  }
  const int64_t h = std::max<int64_t>(a.heads, 1), s = std::max<int64_t>(a.positions, 1), w = std::max<int64_t>(a.value_width, 1);
  Tensor out = empty(Dims{{batch, a.heads, a.positions, a.value_width}, 4}, Dims{{s * h * w, w, h * w, 1}, 4}, dtype);
  if (batch * a.heads * a.positions * a.value_width == 0) return out;
  a.out = out.data_ptr();
  a.together = std::min(a.group, kernel.rows), a.each = std::min(kernel.rows / a.together, a.positions);
  const int64_t blocks = (a.positions + a.each - 1) / a.each, few = batch * shared * blocks;
  if (const int64_t threads = torch::stable::get_num_threads(); a.together * a.each <= kernel.few && few < threads)
    a.together = std::max<int64_t>(1, a.together * few / threads);  // decoding: a task for every thread
  const int64_t parts = (a.group + a.together - 1) / a.together;
  const int64_t width = std::max<int64_t>(1, a.together * a.each * a.keys * 4);
  const auto attend = [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> memory(new float[kernel.scratch(a)]);
    kernel.tasks(a, memory.get(), begin, end);
  };
  if (blocks == 1) {
    each_row(few * parts, width, attend);
  } else {
    each_share(few * parts, width, attend);  // later positions see more keys
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(kernelwise, m) {
  m.def("attention(Tensor q, Tensor k, Tensor v, float? scale=None, Tensor? mask=None, bool causal=False) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(kernelwise, CPU, m) { m.impl("attention", Boxed<attention>::call); }

}  // namespace kernelwise
