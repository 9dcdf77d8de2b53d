// Cross-entropy of logits; and of a linear layer, of which only some rows of logits exist at a time.
#include "products.h"

namespace kernelwise {
namespace {

struct Labels {
  Tensor tensor;
  const int64_t* data;
};

Labels labels_of(const Tensor& labels, int64_t rows, int64_t classes, int64_t ignore_index) {
  STD_TORCH_CHECK(labels.scalar_type() == ScalarType::Long && labels.dim() == 1 && labels.size(0) == rows,
                  "kernelwise::cross_entropy: labels must be [rows] in int64");
  Labels l{contiguous(labels), nullptr};
  l.data = static_cast<const int64_t*>(l.tensor.data_ptr());
  for (int64_t i = 0; i < rows; i++)
    STD_TORCH_CHECK(l.data[i] == ignore_index || (l.data[i] >= 0 && l.data[i] < classes),
                    "kernelwise::cross_entropy: label ", l.data[i], " is out of bounds for ", classes, " classes");
  return l;
}

Rows logits_of(const Tensor& logits) {
  STD_TORCH_CHECK(logits.dim() == 2, "kernelwise::cross_entropy: logits must be [rows, classes]");
  return rows_of(logits);
}

// losses [rows] and the statistics that backward needs [rows, 2], both float32.
std::tuple<Tensor, Tensor> cross_entropy(const Tensor& logits, const Tensor& labels, int64_t ignore_index,
                                         double smoothing, double softcap, double z_loss) {
  const Rows rows = logits_of(logits);
  const int64_t num = logits.size(0);
  const Labels l = labels_of(labels, num, rows.width, ignore_index);
  Tensor losses = empty(Dims{{num}, 1}, ScalarType::Float), statistics = empty(Dims{{num, 2}, 2}, ScalarType::Float);
  const CrossEntropyArgs args{rows.data, l.data, rows.stride, rows.width, ignore_index,
                              float(smoothing), float(softcap), float(z_loss)};
  const CrossEntropyRows kernel = kernels().cross_entropy(dtype_of(logits, "logits"));
  float* out = static_cast<float*>(losses.data_ptr());
  float* kept = static_cast<float*>(statistics.data_ptr());
  each_row(num, std::max<int64_t>(1, rows.width), [&](int64_t begin, int64_t end) { kernel(args, out, kept, begin, end); });
  return {std::move(losses), std::move(statistics)};
}

void write_gradient(const Tensor& grad_losses, const Rows& rows, const Tensor& logits, const Tensor& labels,
                    const Tensor& statistics, int64_t ignore_index, double smoothing, double softcap, double z_loss,
                    char* out, int64_t out_stride) {
  const int64_t num = logits.size(0);
  const Labels l = labels_of(labels, num, rows.width, ignore_index);
  STD_TORCH_CHECK(grad_losses.scalar_type() == ScalarType::Float && grad_losses.dim() == 1 && grad_losses.size(0) == num,
                  "kernelwise::cross_entropy: grad must be [rows] in float32");
  STD_TORCH_CHECK(statistics.scalar_type() == ScalarType::Float && statistics.dim() == 2 && statistics.size(0) == num &&
                      statistics.size(1) == 2,
                  "kernelwise::cross_entropy_backward: statistics must be float32 [rows, 2]");
  const Tensor grads = contiguous(grad_losses), kept = contiguous(statistics);
  const CrossEntropyArgs args{rows.data, l.data, rows.stride, rows.width, ignore_index,
                              float(smoothing), float(softcap), float(z_loss)};
  const CrossEntropyBackwardRows kernel = kernels().cross_entropy_backward(dtype_of(logits, "logits"));
  const float* g = static_cast<const float*>(grads.data_ptr());
  const float* s = static_cast<const float*>(kept.data_ptr());
  each_row(num, std::max<int64_t>(1, rows.width),
           [&](int64_t begin, int64_t end) { kernel(args, s, g, out, out_stride, begin, end); });
}

Tensor cross_entropy_backward(const Tensor& grad_losses, const Tensor& logits, const Tensor& labels,
                              const Tensor& statistics, int64_t ignore_index, double smoothing, double softcap,
                              double z_loss) {
  const Rows rows = logits_of(logits);
  Tensor grad = empty(sizes_of(rows.view), logits.scalar_type());
  write_gradient(grad_losses, rows, logits, labels, statistics, ignore_index, smoothing, softcap, z_loss,
                 static_cast<char*>(grad.data_ptr()), rows.width);
  return grad;
}

// The gradient takes the place of the logits.
void cross_entropy_backward_(const Tensor& grad_losses, const Tensor& logits, const Tensor& labels,
                             const Tensor& statistics, int64_t ignore_index, double smoothing, double softcap,
                             double z_loss) {
  const Rows rows = logits_of(logits);
  STD_TORCH_CHECK(!rows.copy, "kernelwise::cross_entropy: logits to be consumed must have evenly spaced rows");
  write_gradient(grad_losses, rows, logits, labels, statistics, ignore_index, smoothing, softcap, z_loss,
                 const_cast<char*>(rows.data), rows.stride);
}

// ---- linear + cross-entropy ----

// A matrix of any dtype, as float32 in blocks of rows: where it is, or converted into scratch memory.
struct Wide {
  const char* data;
  int64_t stride, width;
  DType dtype;
  const float* rows(float* scratch, int64_t first, int64_t num) const {
    if (dtype == DType::kFloat32 && stride == width) return reinterpret_cast<const float*>(data) + first * stride;
    const Widen convert = kernels().widen(dtype);
    const int64_t size = dtype == DType::kFloat32 ? 4 : 2;
    each_row(num, width, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) convert(data + (first + i) * stride * size, scratch + i * width, width);
    });
    return scratch;
  }
};

void narrow_rows(const float* from, char* to, DType dtype, int64_t num, int64_t width) {
  const Narrow convert = kernels().narrow(dtype);
  const int64_t size = dtype == DType::kFloat32 ? 4 : 2;
  each_row(num, width, [&](int64_t begin, int64_t end) {
    convert(from + begin * width, nullptr, to + begin * width * size, (end - begin) * width);
  });
}

// losses [N] float32, and with `grad_losses` [N] the gradients that are wanted of the sum of grad_losses * losses with
// respect to hidden, weight and bias (else empty). Rows of logits are float32, as many at a time as fit `chunk_bytes`, for
// the rows alone whose labels count. The weights' gradient is summed in float32.
std::tuple<Tensor, Tensor, Tensor, Tensor> linear_cross_entropy(
    const Tensor& hidden, const Tensor& weight, const MaybeTensor& bias, const Tensor& labels,
    const MaybeTensor& grad_losses, int64_t ignore_index, double smoothing, double softcap, double z_loss,
    int64_t chunk_bytes, bool need_hidden, bool need_weight, bool need_bias) {
  const DType dtype = dtype_of(hidden, "hidden");
  STD_TORCH_CHECK(hidden.dim() == 2 && weight.dim() == 2 && hidden.size(1) == weight.size(1),
                  "kernelwise::linear_cross_entropy: hidden must be [rows, in] and weight [classes, in]");
  STD_TORCH_CHECK(hidden.scalar_type() == weight.scalar_type(),
                  "kernelwise::linear_cross_entropy: hidden and weight must have one dtype");
  const int64_t num = hidden.size(0), in = hidden.size(1), classes = weight.size(0);
  const Labels l = labels_of(labels, num, classes, ignore_index);
  const Rows h = rows_of(hidden);
  const Tensor w_contiguous = contiguous(weight);
  const Wide w{static_cast<const char*>(w_contiguous.data_ptr()), in, in, dtype};
  const int64_t size = int64_t(hidden.element_size());
  std::vector<float> wide_bias;
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == classes && bias->scalar_type() == weight.scalar_type(),
                    "kernelwise::linear_cross_entropy: bias must be [classes] in weight's dtype");
    const Tensor b = contiguous(*bias);
    wide_bias.resize(classes);
    kernels().widen(dtype)(b.data_ptr(), wide_bias.data(), classes);
  }
  Tensor grads;
  const float* grad_of_row = nullptr;
  if (grad_losses) {
    STD_TORCH_CHECK(grad_losses->scalar_type() == ScalarType::Float && grad_losses->dim() == 1 &&
                        grad_losses->size(0) == num,
                    "kernelwise::linear_cross_entropy: grad must be [rows] in float32");
    grads = contiguous(*grad_losses);
    grad_of_row = static_cast<const float*>(grads.data_ptr());
  }
  need_hidden = need_hidden && grad_losses;
  need_weight = need_weight && grad_losses;
  need_bias = need_bias && grad_losses && bias;

  Tensor losses = empty(Dims{{num}, 1}, ScalarType::Float);
  float* out = static_cast<float*>(losses.data_ptr());
  std::fill(out, out + num, 0.0f);
  Tensor dh = need_hidden ? empty(Dims{{num, in}, 2}, hidden.scalar_type()) : empty(Dims{{0}, 1}, ScalarType::Float);
  Tensor dw = need_weight ? empty(Dims{{classes, in}, 2}, weight.scalar_type()) : empty(Dims{{0}, 1}, ScalarType::Float);
  Tensor db = need_bias ? empty(Dims{{classes}, 1}, weight.scalar_type()) : empty(Dims{{0}, 1}, ScalarType::Float);
  char* dh_data = static_cast<char*>(dh.data_ptr());
  if (need_hidden) std::memset(dh_data, 0, num * in * size);

  std::vector<int64_t> counted;
  for (int64_t i = 0; i < num; i++)
    if (l.data[i] != ignore_index) counted.push_back(i);
  const int64_t total = int64_t(counted.size());
  const int64_t chunk = std::min(total, std::max<int64_t>(1, chunk_bytes / (4 * std::max<int64_t>(1, classes))));
  const bool wide = dtype == DType::kFloat32;
  const int64_t block = wide ? classes : std::min(classes, std::max<int64_t>(64, kWideWeights / std::max<int64_t>(1, in) / 64 * 64));
  // Sums over the chunks: in the result itself, in memory of their own, or none where one chunk holds all rows.
  const bool kept = need_weight && !wide && total > chunk;
  const Scratch logits(chunk * classes), wide_h(chunk * in), wide_w(wide ? 0 : block * in),
      dh_sum(need_hidden ? chunk * in : 0), dw_sum(need_weight && !wide ? (kept ? classes : block) * in : 0);
  std::vector<double> db_sum(need_bias ? classes : 0, 0.0);  // rows that share a label add up a number near -1 again and again
  float* dw_wide = wide && need_weight ? static_cast<float*>(dw.data_ptr()) : dw_sum.data;
  if (need_weight && total == 0) std::memset(dw.data_ptr(), 0, classes * in * size);
  std::vector<int64_t> chunk_labels(chunk);
  std::vector<float> chunk_losses(chunk), chunk_grads(chunk), statistics(2 * chunk);
  const Widen widen = kernels().widen(dtype);
  const CrossEntropyRows forward = kernels().cross_entropy(DType::kFloat32);
  const CrossEntropyBackwardRows backward = kernels().cross_entropy_backward(DType::kFloat32);

  for (int64_t m = 0; m < total; m += chunk) {
    const int64_t rows = std::min(chunk, total - m);
    for (int64_t i = 0; i < rows; i++) {
      const int64_t row = counted[m + i];
      chunk_labels[i] = l.data[row];
      chunk_grads[i] = grad_of_row == nullptr ? 0.0f : grad_of_row[row];
      widen(h.data + row * h.stride * size, wide_h.data + i * in, in);
    }
    for (int64_t n = 0; n < classes; n += block) {
      const int64_t columns = std::min(block, classes - n);
      const float* part = w.rows(wide_w.data, n, columns);
      multiply({logits.data + n, rows, columns, classes, 1}, {wide_h.data, rows, in, in, 1},
               {const_cast<float*>(part), in, columns, 1, in}, false);
    }
    const CrossEntropyArgs args{logits.data, chunk_labels.data(), classes, classes, -1,
                                float(smoothing), float(softcap), float(z_loss)};
    each_row(rows, std::max<int64_t>(1, classes), [&](int64_t begin, int64_t end) {
      if (bias)
        for (int64_t i = begin; i < end; i++)
          for (int64_t j = 0; j < classes; j++) logits.data[i * classes + j] += wide_bias[j];
      forward(args, chunk_losses.data(), statistics.data(), begin, end);
      if (grad_of_row != nullptr)
        backward(args, statistics.data(), chunk_grads.data(), logits.data, classes, begin, end);
    });
    for (int64_t i = 0; i < rows; i++) out[counted[m + i]] = chunk_losses[i];
    for (int64_t n = 0; n < classes && (need_hidden || need_weight); n += block) {
      const int64_t columns = std::min(block, classes - n);
      if (need_hidden) {
        const float* part = w.rows(wide_w.data, n, columns);
        multiply({dh_sum.data, rows, in, in, 1}, {logits.data + n, rows, columns, classes, 1},
                 {const_cast<float*>(part), columns, in, in, 1}, n > 0);
      }
      if (need_weight) {
        float* sum = dw_wide + (wide || kept ? n * in : 0);
        multiply({sum, columns, in, in, 1}, {logits.data + n, columns, rows, 1, classes}, {wide_h.data, rows, in, in, 1},
                 m > 0);
        if (!wide && m + rows == total)
          narrow_rows(sum, static_cast<char*>(dw.data_ptr()) + n * in * size, dtype, columns, in);
      }
    }
    if (need_hidden) {
      const Narrow narrow = kernels().narrow(dtype);
      for (int64_t i = 0; i < rows; i++)
        narrow(dh_sum.data + i * in, nullptr, dh_data + counted[m + i] * in * size, in);
    }
    if (need_bias)
      each_row(classes, rows, [&](int64_t begin, int64_t end) {
        for (int64_t i = 0; i < rows; i++)
          for (int64_t j = begin; j < end; j++) db_sum[j] += logits.data[i * classes + j];
      });
  }
  if (need_bias) {
    const std::vector<float> sums(db_sum.begin(), db_sum.end());
    kernels().narrow(dtype)(sums.data(), nullptr, db.data_ptr(), classes);
  }
  return {std::move(losses), std::move(dh), std::move(dw), std::move(db)};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(kernelwise, m) {
  m.def(
      "cross_entropy(Tensor logits, Tensor labels, int ignore_index, float smoothing, float softcap, float z_loss) -> "
      "(Tensor, Tensor)");
  m.def(
      "cross_entropy_backward(Tensor grad, Tensor logits, Tensor labels, Tensor statistics, int ignore_index, "
      "float smoothing, float softcap, float z_loss) -> Tensor");
  m.def(
      "cross_entropy_backward_(Tensor grad, Tensor(a!) logits, Tensor labels, Tensor statistics, int ignore_index, "
      "float smoothing, float softcap, float z_loss) -> ()");
  m.def(
      "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? grad, int ignore_index, "
      "float smoothing, float softcap, float z_loss, int chunk_bytes, bool need_hidden, bool need_weight, "
      "bool need_bias) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(kernelwise, CPU, m) {
  m.impl("cross_entropy", Boxed<cross_entropy>::call);
  m.impl("cross_entropy_backward", Boxed<cross_entropy_backward>::call);
  m.impl("cross_entropy_backward_", Boxed<cross_entropy_backward_>::call);
  m.impl("linear_cross_entropy", Boxed<linear_cross_entropy>::call);
}

}  // namespace kernelwise
