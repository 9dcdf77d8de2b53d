// A tensor of torch as the operators hold it, and how they are handed to torch's dispatcher. Built against torch's stable ABI.
//
// At one token a call costs more than its arithmetic, and much of that is torch::stable's way to hold a tensor: a count of owners
// on the heap, a second handle for every result, and a table that is searched for every dtype. Here one variable owns a handle.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

namespace kernelwise {

using torch::headeronly::ScalarType;

class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(AtenTensorHandle handle) : handle_(handle), owned_(true) {}
  Tensor(Tensor&& other) noexcept : handle_(other.handle_), owned_(std::exchange(other.owned_, false)) {}
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    std::swap(owned_, other.owned_);
    return *this;
  }
  ~Tensor() {
    if (owned_) aoti_torch_delete_tensor_object(handle_);
  }

  // The same tensor for as long as this one lives.
  Tensor borrowed() const {
    Tensor t;
    t.handle_ = handle_;
    return t;
  }
  AtenTensorHandle get() const { return handle_; }
  AtenTensorHandle release() {
    owned_ = false;
    return handle_;
  }

  int64_t dim() const { return ask<int64_t>(aoti_torch_get_dim); }
  int64_t numel() const { return ask<int64_t>(aoti_torch_get_numel); }
  const int64_t* sizes() const { return ask<int64_t*>(aoti_torch_get_sizes); }
  const int64_t* strides() const { return ask<int64_t*>(aoti_torch_get_strides); }
  int64_t size(int64_t i) const { return sizes()[i]; }
  int64_t stride(int64_t i) const { return strides()[i]; }
  void* data_ptr() const { return ask<void*>(aoti_torch_get_data_ptr); }
  bool is_contiguous() const { return ask<bool>(aoti_torch_is_contiguous); }
  ScalarType scalar_type() const { return ScalarType(ask<int32_t>(aoti_torch_get_dtype)); }
  size_t element_size() const { return aoti_torch_dtype_element_size(int32_t(scalar_type())); }

 private:
  template <class T>
  T ask(AOTITorchError (*question)(AtenTensorHandle, T*)) const {
    T answer;
    STABLE_TORCH_ERROR_CODE_CHECK(question(handle_, &answer));
    return answer;
  }

  AtenTensorHandle handle_ = nullptr;
  bool owned_ = false;
};

using MaybeTensor = std::optional<Tensor>;

inline Tensor contiguous(const Tensor& t) {
  if (t.is_contiguous()) return t.borrowed();
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(t.get(), &handle));
  const torch::stable::Tensor copy = torch::stable::contiguous(torch::stable::Tensor(handle));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(copy.get(), &handle));
  return Tensor(handle);
}

// What the dispatcher calls: it takes the arguments from the stack, owns them for the call, and leaves the results there.
template <auto function>
struct Boxed;

template <class R, class... A, R (*function)(A...)>
struct Boxed<function> {
  static void call(StableIValue* stack, uint64_t, uint64_t) { run(stack, std::index_sequence_for<A...>()); }

 private:
  template <size_t... I>
  static void run(StableIValue* stack, std::index_sequence<I...>) {
    std::tuple<std::decay_t<A>...> arguments{take<std::decay_t<A>>(stack[I])...};
    if constexpr (std::is_void_v<R>) {
      std::apply(function, arguments);
    } else {
      put(stack, std::apply(function, arguments));
    }
  }

  template <class T>
  static T take(StableIValue value) {
    if constexpr (std::is_same_v<T, Tensor>) {
      return Tensor(torch::stable::detail::to<AtenTensorHandle>(value));
    } else if constexpr (std::is_same_v<T, MaybeTensor>) {
      const auto handle = torch::stable::detail::to<std::optional<AtenTensorHandle>>(value);
      return handle ? MaybeTensor(Tensor(*handle)) : std::nullopt;
    } else {
      return torch::stable::detail::to<T>(value);
    }
  }

  static void put(StableIValue* stack, Tensor&& t) { *stack = torch::stable::detail::from(t.release()); }
  static void put(StableIValue* stack, const std::string& s) { *stack = torch::stable::detail::from(s); }
  template <class... T>
  static void put(StableIValue* stack, std::tuple<T...>&& results) {
    std::apply([&](auto&... each) { (put(stack++, std::move(each)), ...); }, results);
  }
};

}  // namespace kernelwise
