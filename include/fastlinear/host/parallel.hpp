// parallel_for over torch's own thread pool; the only file that knows threads exist.
//
// libtorch is already in the process when fastlinear is imported, so its stable C symbols are found by dlsym: no link
// against libtorch, no second OpenMP, torch.set_num_threads obeyed. Without them everything runs on the caller.
#pragma once

#include <dlfcn.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

namespace fastlinear {

class ThreadPool {
 public:
  // `library` is the path of libtorch_cpu, already loaded by `import torch`. False if it lacks the symbols.
  bool attach(const char* library) {
    void* handle = dlopen(library, RTLD_NOW | RTLD_NOLOAD);
    if (handle == nullptr) return false;
    for_ = reinterpret_cast<ParallelFor>(dlsym(handle, "torch_parallel_for"));
    count_ = reinterpret_cast<NumThreads>(dlsym(handle, "torch_get_num_threads"));
    pause_ = reinterpret_cast<Pause>(dlsym(handle, "omp_pause_resource_all"));
    dlclose(handle);
    return for_ != nullptr && count_ != nullptr;
  }

  // A child forked after a parallel region has no workers and would wait for them forever, in torch's own operators,
  // too. So OpenMP is asked before a fork to let the workers of this thread go (0.5 ms; the next region starts new
  // ones). Where it cannot, or fork() was called inside a region, the child runs on one thread.
  void before_fork() { paused_ = pause_ != nullptr && pause_(kPauseSoft) == 0; }
  void after_fork() { forked_ = forked_ || !paused_; }
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
  using Pause = int (*)(int);
  static constexpr int kPauseSoft = 1;  // omp_pause_soft
  ParallelFor for_ = nullptr;
  NumThreads count_ = nullptr;
  Pause pause_ = nullptr;
  bool paused_ = false;  // for the fork that is under way
  bool forked_ = false;
};

// The kernel's ids of the threads that work for the caller, itself first.
inline std::vector<long> thread_ids(const ThreadPool& pool) {
  std::vector<long> ids(static_cast<std::size_t>(pool.size()));
  pool.run(pool.size(), [&](std::ptrdiff_t i) { ids[static_cast<std::size_t>(i)] = syscall(SYS_gettid); });
  return ids;
}

inline ThreadPool& thread_pool() {
  static ThreadPool pool;
  return pool;
}

// Where the share of worker w of n things begins.
constexpr std::ptrdiff_t share_begin(std::ptrdiff_t n, std::ptrdiff_t w, std::ptrdiff_t workers) {
  return n * w / workers;
}

// Gives each thread a share of n things in a row, so that it prefetches what it will use itself and meets the same
// panels in its L2 at the next call; whoever is done with its own share takes from the others'. make() is called once a
// thread and gives what does one thing. False, or std::bad_alloc, when memory ran out.
template <class Make>
bool share_out(std::ptrdiff_t n, std::ptrdiff_t threads, const Make& make) {
  struct alignas(64) Share {
    std::atomic<std::ptrdiff_t> next;
    std::ptrdiff_t end;
  };
  const std::ptrdiff_t workers = std::min(threads, n);
  if (workers == 1) {
    auto work = make();
    for (std::ptrdiff_t i = 0; i < n; ++i) work(i);
    return true;
  }
  std::atomic<bool> failed{false};
  std::vector<Share> shares(static_cast<std::size_t>(workers));
  for (std::ptrdiff_t w = 0; w < workers; ++w) {
    shares[static_cast<std::size_t>(w)].next = share_begin(n, w, workers);
    shares[static_cast<std::size_t>(w)].end = share_begin(n, w + 1, workers);
  }
  thread_pool().run(workers, [&](std::ptrdiff_t me) {
    try {
      auto work = make();
      for (std::ptrdiff_t w = 0; w < workers; ++w) {
        Share& share = shares[static_cast<std::size_t>((me + w) % workers)];
        for (std::ptrdiff_t i = share.next++; i < share.end; i = share.next++) work(i);
      }
    } catch (const std::bad_alloc&) {
      failed = true;
    }
  });
  return !failed;
}

}  // namespace fastlinear
