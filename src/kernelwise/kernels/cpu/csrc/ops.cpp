// What is known about the processor, and whether threads can be had.
#include "tensors.h"

#if defined(__linux__)
#include <pthread.h>
#include <sys/stat.h>
#endif

namespace kernelwise {
namespace {

bool on_calling_thread = false;
#if defined(__linux__)
bool threads_at_fork = false;

void before_fork() {
  struct stat task;
  threads_at_fork = stat("/proc/self/task", &task) != 0 || task.st_nlink > 3;  // two links and one for each thread
}

void in_child() { on_calling_thread = on_calling_thread || threads_at_fork; }

const int watching_fork = pthread_atfork(before_fork, nullptr, in_child);
#endif

std::string isa() { return kernels().isa; }
std::string products() { return half_products(); }

}  // namespace

bool serial() { return on_calling_thread; }

STABLE_TORCH_LIBRARY_FRAGMENT(kernelwise, m) {
  m.def("cpu_isa() -> str");
  m.def("cpu_half_products() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(kernelwise, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", Boxed<isa>::call);
  m.impl("cpu_half_products", Boxed<products>::call);
}

}  // namespace kernelwise
