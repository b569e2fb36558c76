// What kernels of groups that have a single row, and only stream their panels and scales, ask for before they read it:
// lines some way ahead, across the pages at which the hardware's own prefetching ends, and on at the panels that come
// next.
//
// Included inside an ISA's target region.
#pragma once

#include <cstddef>

namespace fastlinear {

// So many bytes of a panel's codes, and the scales of so many groups, are brought into L2. Memory takes as long as the
// work on some 20 lines of codes, more than L1 waits for at a time. How far is best depends on the CPU more than on the
// kernel: a page on Emerald Rapids, where with four panels side by side anything is, a quarter of one on Zen 4, where a
// page takes 1.2 times as long with four panels, and no distance is as good with two. So the tuner chooses, by panels.
constexpr std::ptrdiff_t codes_ahead(std::ptrdiff_t panels) { return panels < 4 ? 4096 : 1024; }
inline constexpr std::ptrdiff_t kGroupsAhead = 4;

// The same where panels are read one after the other, a single stream, which goes into L1 at once. Zen 5 reads 38 GB/s
// that way, of 40 that its memory gives, and 27 to 32 by any of the above.
inline constexpr std::ptrdiff_t kStreamAhead = 8192, kStreamGroupsAhead = 16;

// How far ahead of a place in a panel that is: `ahead` bytes on or, where the panel's `bytes` end before that, at the
// beginning of the one that comes `stride` bytes behind it, which is read next.
// Inline wherever it is used: a function of its own would be one for all ISAs, with the instructions of one of them.
class Ahead {
 public:
  [[gnu::always_inline]] Ahead(std::ptrdiff_t ahead, std::ptrdiff_t bytes, std::ptrdiff_t stride)
      : ahead_(ahead), left_(bytes - ahead), jump_(stride - bytes) {
    if (left_ <= 0) cross();
  }
  // Then the place moves on by so many bytes.
  [[gnu::always_inline]] std::ptrdiff_t step(std::ptrdiff_t bytes) {
    const std::ptrdiff_t ahead = ahead_;
    left_ -= bytes;
    if (left_ == 0) cross();
    return ahead;
  }

 private:
  [[gnu::always_inline]] void cross() { ahead_ += jump_; }
  std::ptrdiff_t ahead_, left_, jump_;
};

}  // namespace fastlinear
