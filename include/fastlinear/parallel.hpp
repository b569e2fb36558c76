// parallel_for over torch's own thread pool; the only file that knows threads exist.
//
// libtorch is already in the process when fastlinear is imported, so its stable C symbols are found by dlsym: no link
// against libtorch, no second OpenMP, torch.set_num_threads obeyed. Without them everything runs on the caller.
#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace fastlinear {

class ThreadPool {
 public:
  // `library` is the path of libtorch_cpu, already loaded by `import torch`. False if it lacks the symbols.
  bool attach(const char* library) {
    void* handle = dlopen(library, RTLD_NOW | RTLD_NOLOAD);
    if (handle == nullptr) return false;
    for_ = reinterpret_cast<ParallelFor>(dlsym(handle, "torch_parallel_for"));
    count_ = reinterpret_cast<NumThreads>(dlsym(handle, "torch_get_num_threads"));
    dlclose(handle);
    return for_ != nullptr && count_ != nullptr;
  }

  // A child forked after a parallel region has no workers and would wait for them forever.
  void stop_after_fork() { forked_ = true; }
  bool forked() const { return forked_; }

  std::ptrdiff_t size() const {
    std::uint32_t threads = 1;
    if (forked_ || for_ == nullptr || count_ == nullptr || count_(&threads) != 0) return 1;
    return static_cast<std::ptrdiff_t>(threads);
  }

  // Calls work(i) for every i in [0, n), at most n at the same time. The calls must not wait for one another: the pool
  // may run several on one thread. `work` must not throw.
  template <class Work>
  void run(std::ptrdiff_t n, const Work& work) const {
    if (n > 1 && size() > 1) {
      const auto call = [](std::int64_t begin, std::int64_t end, void* context) {
        for (std::int64_t i = begin; i < end; ++i) (*static_cast<const Work*>(context))(static_cast<std::ptrdiff_t>(i));
      };
      if (for_(0, n, 1, call, const_cast<Work*>(&work)) == 0) return;
    }
    for (std::ptrdiff_t i = 0; i < n; ++i) work(i);
  }

 private:
  using Range = void (*)(std::int64_t, std::int64_t, void*);
  using ParallelFor = std::int32_t (*)(std::int64_t, std::int64_t, std::int64_t, Range, void*);
  using NumThreads = std::int32_t (*)(std::uint32_t*);
  ParallelFor for_ = nullptr;
  NumThreads count_ = nullptr;
  bool forked_ = false;
};

inline ThreadPool& thread_pool() {
  static ThreadPool pool;
  return pool;
}

}  // namespace fastlinear
