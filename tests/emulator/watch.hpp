// What hardware does not tell: which bytes a tile may be loaded from, and what went wrong unpunished.
#pragma once

#include <atomic>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>

namespace emulator {

// Rows of an operand that lie `stride` bytes apart; of what lies between them, and so belongs to nobody, nothing may be
// loaded.
struct Matrix {
  const unsigned char* data;
  std::size_t rows, row_bytes, stride;
  char name[32];
};

class Watch {
 public:
  // Handlers read while nobody writes: matrices are added between calls, not during one.
  bool add(const Matrix& matrix) {
    const std::size_t n = matrices_used_.load();
    if (n == kMatrices) return false;
    matrices_[n] = matrix;
    matrices_used_.store(n + 1);
    return true;
  }

  void forget() {
    matrices_used_.store(0);
    reports_used_.store(0);
  }

  void check_load(const unsigned char* from, std::size_t bytes) {
    const std::size_t used = matrices_used_.load(std::memory_order_acquire);
    for (std::size_t i = 0; i < used; ++i) {
      const Matrix& m = matrices_[i];
      const auto begin = from - m.data;
      const auto n = static_cast<std::ptrdiff_t>(bytes), span = static_cast<std::ptrdiff_t>(m.rows * m.stride);
      if (begin >= span || begin + n <= 0) continue;
      const std::ptrdiff_t row = begin < 0 ? 0 : begin / static_cast<std::ptrdiff_t>(m.stride);
      const std::ptrdiff_t in_row = begin - row * static_cast<std::ptrdiff_t>(m.stride);
      if (in_row < 0 || in_row + n > static_cast<std::ptrdiff_t>(m.row_bytes))
        report("%zu bytes are loaded from byte %td of row %td of %s, which has %zu", bytes, in_row, row, m.name,
               m.row_bytes);
    }
  }

  [[gnu::format(printf, 2, 3)]] void report(const char* format, ...) {
    const std::size_t n = reports_used_.fetch_add(1);
    if (n >= kReports) return;
    std::va_list values;
    va_start(values, format);
    std::vsnprintf(reports_[n], sizeof reports_[n], format, values);
    va_end(values);
  }

  std::size_t reports() const { return reports_used_.load(); }
  const char* text(std::size_t i) const { return i < kReports && i < reports() ? reports_[i] : nullptr; }

 private:
  static constexpr std::size_t kMatrices = 64, kReports = 64;
  Matrix matrices_[kMatrices];
  char reports_[kReports][160];
  std::atomic<std::size_t> matrices_used_{0}, reports_used_{0};
};

inline Watch& watch() {
  static Watch instance;
  return instance;
}

}  // namespace emulator
