// Activations and their derivatives, one number at a time, for loops that become vector code.
#pragma once

#include "vec.h"

namespace kernelwise {
namespace {

constexpr float kInverseSqrtTwoPi = 0.398942280f;
constexpr float kTanhFactor = 1.59576912f;  // 2 * sqrt(2 / pi): 0.5 * (1 + tanh(u)) = 1 / (1 + exp(-2 u))
constexpr float kTanhCube = 0.044715f;

// s = 1 / (1 + e) and 1 - s as e s, which keeps its digits where s is nearly one. An infinite e gives zero for both:
// whatever 1 - s is then multiplied with s.
static inline void sigmoid_of(float e, float& s, float& rest) {
  s = 1.0f / (1.0f + e);
  rest = (e < 3e38f ? e : 3e38f) * s;
}

struct Silu {
  static inline float value(float x) { return x / (1.0f + exp_of(-x)); }
  static inline void both(float x, float& value, float& slope) {
    float s, rest;
    sigmoid_of(exp_of(-x), s, rest);
    value = x * s;
    slope = s * (1.0f + x * rest);
  }
};

struct Gelu {
  static inline float value(float x) { return x * (0.5f + centred_normal_cdf(x)); }
  static inline void both(float x, float& value, float& slope) {
    const float below = 0.5f + centred_normal_cdf(x);
    value = x * below;
    slope = below + x * kInverseSqrtTwoPi * exp_of(-0.5f * x * x);
  }
};

struct GeluTanh {
  static inline float value(float x) { return x / (1.0f + exp_of(-kTanhFactor * (x + kTanhCube * x * x * x))); }
  static inline void both(float x, float& value, float& slope) {
    float s, rest;
    sigmoid_of(exp_of(-kTanhFactor * (x + kTanhCube * x * x * x)), s, rest);
    value = x * s;
    slope = s + value * rest * kTanhFactor * (1.0f + 3.0f * kTanhCube * x * x);
  }
};

struct QuickGelu {
  static inline float value(float x) { return x / (1.0f + exp_of(-1.702f * x)); }
  static inline void both(float x, float& value, float& slope) {
    float s, rest;
    sigmoid_of(exp_of(-1.702f * x), s, rest);
    value = x * s;
    slope = s * (1.0f + 1.702f * x * rest);
  }
};

// Calls f with the functions of an activation.
template <class F>
static void with(Activation activation, const F& f) {
  switch (activation) {
    case Activation::kSilu: return f(Silu{});
    case Activation::kGelu: return f(Gelu{});
    case Activation::kGeluTanh: return f(GeluTanh{});
    case Activation::kQuickGelu: return f(QuickGelu{});
  }
}

}  // namespace
}  // namespace kernelwise
