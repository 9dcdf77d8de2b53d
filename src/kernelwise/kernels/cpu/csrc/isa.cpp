// Which instruction set to use: what the processor and the operating system offer, at most what the user allows.
#include <cctype>
#include <cstdlib>
#include <cstring>

#include "kernels.h"
#if defined(KERNELWISE_X86)
#include <cpuid.h>
#endif

namespace kernelwise {
namespace {

#define KERNELWISE_TABLE(isa)                                                                                    \
  {                                                                                                              \
    #isa, isa::rms_norm, isa::rms_norm_backward, isa::layer_norm, isa::layer_norm_backward,                      \
    isa::activation, isa::activation_backward, isa::gated, isa::gated_backward, isa::rotary,                     \
    isa::qk_norm_rotary, isa::qk_norm_rotary_backward, isa::cross_entropy, isa::cross_entropy_backward,          \
    isa::widen, isa::narrow, isa::few_rows, isa::gemm, isa::attention                                            \
  }

const Kernels kBaseline = KERNELWISE_TABLE(baseline);
#if defined(KERNELWISE_X86)
const Kernels kAvx2 = KERNELWISE_TABLE(avx2);
const Kernels kAvx512 = KERNELWISE_TABLE(avx512);
#endif

const Kernels* choose() {
#if defined(KERNELWISE_X86)
  const char* wish = std::getenv("ATEN_CPU_CAPABILITY");  // as torch reads it; anything unknown means no limit
  const bool none = wish != nullptr && std::strcmp(wish, "default") == 0;
  const bool only_avx2 = wish != nullptr && std::strcmp(wish, "avx2") == 0;
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && !none && !only_avx2) return &kAvx512;
  if (avx2 && !none) return &kAvx2;
#endif
  return &kBaseline;
}

// How many of avx512_bf16, avx512_fp16, amx_bf16 and amx_fp16 oneDNN, which computes torch's products, may use: the user's limit.
int onednn_may_use() {
  const char* wish = std::getenv("ONEDNN_MAX_CPU_ISA");
  if (wish == nullptr) wish = std::getenv("DNNL_MAX_CPU_ISA");
  if (wish == nullptr) return 4;
  std::string limit(wish);
  for (char& letter : limit) letter = static_cast<char>(std::toupper(static_cast<unsigned char>(letter)));
  for (const char* without : {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"})
    if (limit == without) return 0;
  const char* const last[] = {"AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX512_CORE_AMX"};
  for (int i = 0; i < 3; ++i)
    if (limit == last[i]) return i + 1;
  return 4;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels* const chosen = choose();
  return *chosen;
}

std::string half_products() {
  std::string names;
#if defined(KERNELWISE_X86)
  const auto add = [&](bool has, const char* name) {
    if (has) names += (names.empty() ? "" : " ") + std::string(name);
  };
  unsigned eax, ebx, ecx, edx;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) {
    const unsigned leaves = eax, features = edx;
    const bool more = leaves >= 1 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx);
    const int used = onednn_may_use();
    const bool bf16 = more && (eax >> 5 & 1) && used > 0;
    add(bf16, "avx512_bf16");
    add(bf16 && __builtin_cpu_is("amd"), "avx512_bf16_at_double_rate");
    add((features >> 23 & 1) && used > 1, "avx512_fp16");
    add((features >> 22 & 1) && used > 2, "amx_bf16");
    add(more && (eax >> 21 & 1) && used > 3, "amx_fp16");
  }
#endif
  return names;
}

}  // namespace kernelwise
