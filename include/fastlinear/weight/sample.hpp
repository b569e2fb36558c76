// A sample of a weight's memory, by which a dense update of it is seen that torch does not count.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace fastlinear {

// Sixteen runs of a cache line, or all of a small weight. Every run lies in another row and other columns, the first
// and the last where the weight begins and ends: a step of an optimizer that leaves the rows of dead units, or the
// columns of dead inputs, as they were changes some of them, and so does an update that was still under way when they
// were read. Bits are compared, so that NaN equals itself; 1 KiB costs about 30 ns from cache.
class Sample {
 public:
  // data: elements of `bytes` bytes, [shape[0], shape[1]] of them, `stride` elements apart; others in one dimension.
  void take(const char* data, std::ptrdiff_t bytes, const std::int64_t shape[2], const std::int64_t stride[2]) {
    count_ = 0;
    if (shape[0] == 0 || shape[1] == 0) return;
    // Expanded dimensions are one element; the inner dimension is the one whose elements lie closer.
    std::ptrdiff_t n[2], step[2];
    for (int d = 0; d < 2; ++d) {
      n[d] = stride[d] == 0 ? 1 : static_cast<std::ptrdiff_t>(shape[d]);
      step[d] = static_cast<std::ptrdiff_t>(stride[d]) * bytes;
    }
    const int inner = n[0] == 1 || (n[1] != 1 && step[1] <= step[0]) ? 1 : 0, outer = 1 - inner;
    std::ptrdiff_t rows = n[outer], row_step = step[outer];
    std::ptrdiff_t columns = n[inner], column_step = step[inner];
    if (column_step == bytes) {
      columns *= bytes;  // in bytes from here on
      column_step = 1;
      if (rows == 1 || (row_step == columns && (columns < kLine || rows * columns <= kBytes))) {
        columns *= rows;
        rows = 1;
      }
    }
    const std::ptrdiff_t unit = column_step == 1 ? 1 : bytes;  // of the columns, in bytes
    if (rows == 1 && unit == 1 && columns <= kBytes) {
      add(data, 0, columns);
      return;
    }
    const std::ptrdiff_t length = unit == 1 ? std::min(columns, kLine) : bytes;
    const std::ptrdiff_t last = columns - length / unit;  // where in a row a run may begin
    for (std::ptrdiff_t i = 0; i < kRuns; ++i) {
      // Columns in steps of the golden ratio, which fill a row evenly, whatever the number of rows; alone, evenly.
      const std::ptrdiff_t row = (rows - 1) * i / (kRuns - 1);
      const std::ptrdiff_t part = rows == 1        ? (i << 16) / (kRuns - 1)
                                  : i + 1 == kRuns ? 1 << 16
                                                   : i * 40503 % (1 << 16);
      std::ptrdiff_t column = (last >> 16) * part + ((last & 0xffff) * part >> 16);
      if (column != last && unit == 1 && length == kLine) column = column / kLine * kLine;
      add(data, row * row_step + column * column_step, length);
    }
  }

  // Whether the elements at `data`, of the same shape and strides, are what they were.
  bool holds(const char* data) const {
    const char* kept = bytes_;
    for (int i = 0; i < count_; ++i) {
      const Run& run = runs_[i];
      if (run.length == kLine ? !same_line(data + run.offset, kept)
                              : std::memcmp(data + run.offset, kept, static_cast<std::size_t>(run.length)) != 0) {
        return false;
      }
      kept += run.length;
    }
    return true;
  }

 private:
  static constexpr std::ptrdiff_t kLine = 64, kRuns = 16, kBytes = kLine * kRuns;
  struct Run {
    std::ptrdiff_t offset, length;  // bytes
  };

  void add(const char* data, std::ptrdiff_t offset, std::ptrdiff_t length) {
    char* kept = bytes_;
    for (int i = 0; i < count_; ++i) kept += runs_[i].length;
    std::memcpy(kept, data + offset, static_cast<std::size_t>(length));
    runs_[count_++] = {offset, length};
  }

  static bool same_line(const char* a, const char* b) {
    std::uint64_t differ = 0;
    for (std::ptrdiff_t i = 0; i < kLine; i += 8) {
      std::uint64_t x, y;
      std::memcpy(&x, a + i, 8);
      std::memcpy(&y, b + i, 8);
      differ |= x ^ y;
    }
    return differ == 0;
  }

  int count_ = 0;
  Run runs_[kRuns];
  alignas(64) char bytes_[kBytes];
};

}  // namespace fastlinear
