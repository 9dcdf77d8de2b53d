// What the vector code offers to the operators: plain functions over rows or blocks, one table per instruction set.
//
// The files that fill a table are compiled once per instruction set. Nothing in them may have external linkage besides
// the table itself: an inline function compiled with AVX-512 could otherwise be the copy that the linker keeps for all.
#pragma once

#include <cstdint>
#include <string>

namespace kernelwise {

enum class DType { kFloat32, kBFloat16, kFloat16 };
enum class Activation : int64_t { kSilu = 0, kGelu = 1, kGeluTanh = 2, kQuickGelu = 3 };

// RMSNorm and LayerNorm. What is normalised is x, or x + residual in their dtype, which is then written to `sum`.
struct NormArgs {
  const void* x;         // [rows, width], rows x_stride apart
  const void* residual;  // the same, residual_stride apart; or null
  const void* weight;    // [width] or null
  const void* bias;      // [width] in the weight's dtype, or null (LayerNorm alone)
  void* y;               // [rows, width], contiguous
  void* sum;             // the same in x's dtype; or null
  int64_t x_stride, residual_stride, width;
  float eps, offset;
  bool cast_after;  // RMSNorm: round to y's dtype after the weight was applied, else round to x's dtype before
};

struct NormBackwardArgs {
  const void* grad;      // [rows, width], rows grad_stride apart
  const void* x;         // what was normalised
  const void* grad_sum;  // [rows, width] in x's dtype, grad_sum_stride apart: added to the result; or null
  const void* weight;
  void* grad_x;  // [rows, width], contiguous
  int64_t grad_stride, x_stride, grad_sum_stride, width;
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

// RMSNorm over the width of q and k, then the rotation, backward the same in reverse. Strides as in RotaryArgs.
struct QkNormRotaryArgs {
  RotaryArgs rotary;
  const void* grad[2];  // backward: gradients of the results, [batch, heads, positions, width] by strides, unit last stride
  int64_t grad_batch[2], grad_head[2], grad_position[2];
  const float* weight[2];  // [width] with the offset, as the layer's own code has them, but in float32; or null
  DType angles;            // of cos and sin
  float eps;
};

struct CrossEntropyArgs {
  const void* logits;  // [rows, width], rows stride apart
  const int64_t* labels;
  int64_t stride, width, ignore_index;
  float smoothing, softcap, z_loss;  // softcap 0: none
};

enum class MaskKind { kNone, kBool, kFloat32, kOwn };  // own: the dtype of q

// q [batch, heads, positions, width], k and v [batch, heads / group, keys, width], by strides, unit last stride.
struct AttentionArgs {
  const void *q, *k, *v;
  int64_t q_batch, q_head, q_position, k_batch, k_head, k_position, v_batch, v_head, v_position;
  int64_t heads, group, positions, keys, width, value_width;
  int64_t together, each;  // heads and positions of a task at most
  const void* mask;  // added to the scores, unit last stride; or null
  MaskKind mask_kind;
  int64_t mask_batch, mask_head, mask_position;
  float scale;
  bool causal;  // position i sees the keys up to i
  void* out;    // [batch, positions, heads, value_width]
};

// Dtypes that a function is chosen by. `other` is the weight (norm) or cos and sin (rotary), `out` the result; in a
// backward function `in` is x, `out` the dtype of the incoming gradient (norm).
struct Signature {
  DType in, other, out;
};

using NormRows = void (*)(const NormArgs&, int64_t begin, int64_t end);
// Adds the rows' share of the gradients of weight and bias to grad_weight [width] and grad_bias [width], if not null.
using NormBackwardRows =
    void (*)(const NormBackwardArgs&, float* grad_weight, float* grad_bias, int64_t begin, int64_t end);
using ActivationBlock = void (*)(Activation, const void* x, void* y, int64_t num);
using ActivationBackwardBlock = void (*)(Activation, const void* grad, const void* x, void* grad_x, int64_t num);
using GatedBlock = void (*)(Activation, const void* gate, const void* up, void* y, int64_t num);
using GatedBackwardBlock =
    void (*)(Activation, const void* grad, const void* gate, const void* up, void* grad_gate, void* grad_up, int64_t num);
using RotaryPositions = void (*)(const RotaryArgs&, int64_t begin, int64_t end);
constexpr int64_t kWidestHead = 1024;  // numbers of a head that QkNormRotary takes
using QkNormRotaryPositions = void (*)(const QkNormRotaryArgs&, int64_t begin, int64_t end);
// Adds the positions' share of the weights' gradients to grad_weights [2, width], unless that is null.
using QkNormRotaryBackwardPositions =
    void (*)(const QkNormRotaryArgs&, float* grad_weights, int64_t begin, int64_t end);
// losses [rows]; statistics [rows, 2]: the largest logit and the sum of e^(logit - largest) of each row.
using CrossEntropyRows =
    void (*)(const CrossEntropyArgs&, float* losses, float* statistics, int64_t begin, int64_t end);
// grad_losses [rows]; grad_logits has the logits' dtype, its rows are grad_stride apart, and it may be the logits.
using CrossEntropyBackwardRows = void (*)(const CrossEntropyArgs&, const float* statistics, const float* grad_losses,
                                          void* grad_logits, int64_t grad_stride, int64_t begin, int64_t end);
using Widen = void (*)(const void* from, float* to, int64_t num);
using Narrow = void (*)(const float* from, const float* bias, void* to, int64_t num);
// y[rows, begin:end] = x[rows, width] weight[begin:end, width]^T + bias for one number of rows; y's rows are y_stride apart,
// x is float32 and was written by lay_out, row by row. Null where there are none, as in Gemm.
constexpr int64_t kMostFewRows = 4;
struct FewRows {
  Widen lay_out;
  void (*columns)(const float* x, const void* weight, const float* bias, void* y, int64_t width, int64_t y_stride,
                  int64_t begin, int64_t end);
};
// c[rows, columns] = a[rows, depth] b^T + bias, b being [columns, depth], or with b_by_depth [depth, columns].
struct GemmArgs {
  const float* a;  // rows a_stride apart
  int64_t a_stride;
  const void* b;  // rows b_stride apart, unit last stride
  int64_t b_stride;
  bool b_by_depth;
  const float* bias;  // [columns] or null
  void* c;            // in b's dtype, rows c_stride apart
  int64_t c_stride, rows, depth;
};
// Columns begin to end of c; begin is a multiple of `panel`. sums: [rows, panel], for the caller's thread alone.
struct Gemm {
  int64_t panel;
  void (*columns)(const GemmArgs&, float* sums, int64_t begin, int64_t end);
};
// A task is up to `rows` rows: `each` positions of `together` heads that share their keys. Null where there is none, as in
// Gemm.
struct Attention {
  int64_t rows, few;  // tasks of up to `few` rows may be cut between heads, their rows do not change
  int64_t (*scratch)(const AttentionArgs&);  // numbers of memory for the caller's thread alone
  void (*tasks)(const AttentionArgs&, float* scratch, int64_t begin, int64_t end);
};

// Each returns null for a combination of dtypes that is not built.
struct Kernels {
  const char* isa;
  NormRows (*rms_norm)(Signature);
  NormBackwardRows (*rms_norm_backward)(Signature);
  NormRows (*layer_norm)(Signature);
  NormBackwardRows (*layer_norm_backward)(Signature);
  ActivationBlock (*activation)(DType);
  ActivationBackwardBlock (*activation_backward)(DType);
  GatedBlock (*gated)(DType);
  GatedBackwardBlock (*gated_backward)(DType);
  RotaryPositions (*rotary)(Signature);
  QkNormRotaryPositions (*qk_norm_rotary)(Signature);
  QkNormRotaryBackwardPositions (*qk_norm_rotary_backward)(Signature);
  CrossEntropyRows (*cross_entropy)(DType);
  CrossEntropyBackwardRows (*cross_entropy_backward)(DType);
  Widen (*widen)(DType);
  Narrow (*narrow)(DType);
  FewRows (*few_rows)(DType, int64_t rows);
  Gemm (*gemm)(DType);
  Attention (*attention)(DType);
};

// One set of getters per instruction set; KERNELWISE_ISA is given on the compiler's command line.
#define KERNELWISE_DECLARE(isa)                                                           \
  namespace isa {                                                                         \
  NormRows rms_norm(Signature);                                                           \
  NormBackwardRows rms_norm_backward(Signature);                                          \
  NormRows layer_norm(Signature);                                                         \
  NormBackwardRows layer_norm_backward(Signature);                                        \
  ActivationBlock activation(DType);                                                      \
  ActivationBackwardBlock activation_backward(DType);                                     \
  GatedBlock gated(DType);                                                                \
  GatedBackwardBlock gated_backward(DType);                                               \
  RotaryPositions rotary(Signature);                                                      \
  QkNormRotaryPositions qk_norm_rotary(Signature);                                        \
  QkNormRotaryBackwardPositions qk_norm_rotary_backward(Signature);                       \
  CrossEntropyRows cross_entropy(DType);                                                  \
  CrossEntropyBackwardRows cross_entropy_backward(DType);                                 \
  Widen widen(DType);                                                                     \
  Narrow narrow(DType);                                                                   \
  FewRows few_rows(DType, int64_t rows);                                                  \
  Gemm gemm(DType);                                                                       \
  Attention attention(DType);                                                             \
  }
KERNELWISE_DECLARE(baseline)
KERNELWISE_DECLARE(avx2)
KERNELWISE_DECLARE(avx512)
#undef KERNELWISE_DECLARE

// The best set this processor runs, or what ATEN_CPU_CAPABILITY (default, avx2, avx512) allows at most; chosen once.
const Kernels& kernels();

// The instructions for products of half-precision numbers that this processor has, of avx512_bf16, avx512_fp16, amx_bf16,
// amx_fp16, with spaces between. It is what torch's own products go by, which follow ONEDNN_MAX_CPU_ISA and not
// ATEN_CPU_CAPABILITY. AMD's avx512_bf16 multiplies twice as fast as float32, Intel's no faster: that is named
// avx512_bf16_at_double_rate.
std::string half_products();

}  // namespace kernelwise
