// What torch's dispatcher puts before its own kernels in this thread, read where torch keeps it.
//
// A mode, a transform, a tracer and an autocast all work by dispatch keys that their thread includes or no longer
// excludes. So two words tell whether any of them is on, and reading them takes a nanosecond where asking torch for
// each takes sixty. Which bits mean what is torch's own affair: a state of the words counts as plain once torch was
// asked for everything in it. The symbols are found by dlsym, like the thread pool's; without them torch is asked in
// each call.
#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace fastlinear {

class Dispatch {
 public:
  // Paths of libc10 and libtorch_cpu, already loaded by `import torch`. False if they lack the symbols.
  bool attach(const char* core, const char* cpu) {
#ifdef __SANITIZE_THREAD__
    // ThreadSanitizer takes what dlsym finds in a new thread for memory of its own, of a size that it makes up.
    (void)core, (void)cpu;
    return false;
#endif
    core_ = dlopen(core, RTLD_NOW | RTLD_NOLOAD);
    void* handle = dlopen(cpu, RTLD_NOW | RTLD_NOLOAD);
    if (core_ == nullptr || handle == nullptr || keys() == nullptr) return false;
    gradients_ = reinterpret_cast<Flag>(dlsym(core_, "_ZN3c108GradMode10is_enabledEv"));
    modes_ = reinterpret_cast<Count>(dlsym(handle, "_ZN2at4impl22PythonTorchFunctionTLS9stack_lenEv"));
    attached_ = gradients_ != nullptr && modes_ != nullptr;
    return attached_;
  }
  bool attached() const { return attached_; }

  // Whether the keys of this thread are as they once were when nothing watched, by `learn`; with the GIL.
  bool plain() const {
    if (!attached_) return false;
    const Keys now = *keys();
    return std::any_of(known_, known_ + count_,
                       [&](const Keys& k) { return k.included == now.included && k.excluded == now.excluded; });
  }
  void learn() {
    if (attached_ && count_ < kKnown && !plain()) known_[count_++] = *keys();
  }

  // torch.is_grad_enabled(), and the number of torch function modes, which use no key; once attached.
  bool gradients() const { return gradients_(); }
  std::int64_t function_modes() const { return modes_(); }

 private:
  struct Keys {
    std::uint64_t included, excluded;
  };
  using Flag = bool (*)();
  using Count = std::int64_t (*)();

  const Keys* keys() const {
    static thread_local const Keys* mine = nullptr;  // a thread's own, which dlsym finds for the thread that asks
    if (mine == nullptr) {
      mine = static_cast<const Keys*>(dlsym(core_, "_ZN3c104impl26raw_local_dispatch_key_setE"));
    }
    return mine;
  }

  // In and out of inference mode, under a guard or two of torch's own.
  static constexpr std::size_t kKnown = 8;
  void* core_ = nullptr;
  Flag gradients_ = nullptr;
  Count modes_ = nullptr;
  bool attached_ = false;
  std::size_t count_ = 0;
  Keys known_[kKnown] = {};
};

}  // namespace fastlinear
