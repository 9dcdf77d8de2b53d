// What the vector code offers to the operators: plain functions over rows or blocks, one table per instruction set.
//
// The files that fill a table are compiled once per instruction set. Nothing in them may have external linkage besides
// the table itself: an inline function compiled with AVX-512 could otherwise be the copy that the linker keeps for all.
#pragma once

#include <cstdint>
#include <string>

namespace kernelwise {

enum class DType { kFloat32, kBFloat16, kFloat16 };
enum class Activation : int64_t { kSilu = 0, kGelu = 1, kGeluTanh = 2 };

struct RmsNormArgs {
  const void* x;       // [rows, width], rows x_stride apart
  const void* weight;  // [width] or null
  void* y;             // [rows, width], contiguous
  int64_t x_stride, width;
  float eps, offset;
  bool cast_after;  // round to y's dtype after the weight was applied, else round to x's dtype before
};

struct RmsNormBackwardArgs {
  const void* grad;  // [rows, width], rows grad_stride apart
  const void* x;
  const void* weight;
  void* grad_x;          // [rows, width], contiguous
  int64_t grad_stride, x_stride, width;
  float eps, offset;
};

struct RotaryArgs {
  const void* x[2];  // q and k, [batch, heads, positions, width] by strides, unit last stride
  void* y[2];
  int64_t heads[2], x_batch[2], x_head[2], x_position[2], y_batch[2], y_head[2], y_position[2];
  const void* cos;
  const void* sin;
  int64_t cos_batch, cos_position, sin_batch, sin_position;
  int64_t positions, width;
  bool backward;
};

// Dtypes that a function is chosen by. `other` is the weight (norm) or cos and sin (rotary), `out` the result; in a
// backward function `in` is x, `out` the dtype of the incoming gradient (norm).
struct Signature {
  DType in, other, out;
};

using RmsNormRows = void (*)(const RmsNormArgs&, int64_t begin, int64_t end);
// Adds the rows' share of the weight's gradient to grad_weight [width], unless that is null.
using RmsNormBackwardRows = void (*)(const RmsNormBackwardArgs&, float* grad_weight, int64_t begin, int64_t end);
using GatedBlock = void (*)(Activation, const void* gate, const void* up, void* y, int64_t num);
using GatedBackwardBlock =
    void (*)(Activation, const void* grad, const void* gate, const void* up, void* grad_gate, void* grad_up, int64_t num);
using RotaryPositions = void (*)(const RotaryArgs&, int64_t begin, int64_t end);
using Widen = void (*)(const void* from, float* to, int64_t num);
using Narrow = void (*)(const float* from, const float* bias, void* to, int64_t num);
// The most rows that FewRows takes.
constexpr int64_t kMostFewRows = 64;
// y[rows, begin:end] = x[rows, width] weight[begin:end, width]^T + bias; y's rows are y_stride apart.
using FewRows = void (*)(const float* x, const void* weight, const float* bias, void* y, int64_t rows, int64_t width,
                         int64_t y_stride, int64_t begin, int64_t end);

// Each returns null for a combination of dtypes that is not built.
struct Kernels {
  const char* isa;
  RmsNormRows (*rms_norm)(Signature);
  RmsNormBackwardRows (*rms_norm_backward)(Signature);
  GatedBlock (*gated)(DType);
  GatedBackwardBlock (*gated_backward)(DType);
  RotaryPositions (*rotary)(Signature);
  Widen (*widen)(DType);
  Narrow (*narrow)(DType);
  FewRows (*few_rows)(DType);
};

// One set of getters per instruction set; KERNELWISE_ISA is given on the compiler's command line.
#define KERNELWISE_DECLARE(isa)                          \
  namespace isa {                                        \
  RmsNormRows rms_norm(Signature);                       \
  RmsNormBackwardRows rms_norm_backward(Signature);      \
  GatedBlock gated(DType);                               \
  GatedBackwardBlock gated_backward(DType);              \
  RotaryPositions rotary(Signature);                     \
  Widen widen(DType);                                    \
  Narrow narrow(DType);                                  \
  FewRows few_rows(DType);                               \
  }
KERNELWISE_DECLARE(baseline)
KERNELWISE_DECLARE(avx2)
KERNELWISE_DECLARE(avx512)
#undef KERNELWISE_DECLARE

// The best set this processor runs, or what ATEN_CPU_CAPABILITY (default, avx2, avx512) allows at most; chosen once.
const Kernels& kernels();

// The instructions for products of half-precision numbers that this processor has, of avx512_bf16, avx512_fp16, amx_bf16,
// amx_fp16, with spaces between. It is what torch's own products go by, which do not follow ATEN_CPU_CAPABILITY.
std::string half_products();

}  // namespace kernelwise
