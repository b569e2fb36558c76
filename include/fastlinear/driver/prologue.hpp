// Rows of x -> what a kernel reads, once a call for all threads and all groups of panels: as they are, read in place;
// or copied one line further apart where they would fight for the same cache sets, gathered, put in the order of the
// weight's columns, or end where the kernel needs zeros; or widened; or rounded; or quantized, with a scale and a zero
// point each, by those of fastlinear/spec/int8.py.
//
// Each way is a function that makes one row. To add one (rows that are normalized first): such a function, and its line
// in the constructor.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "fastlinear/driver/grid.hpp"
#include "fastlinear/driver/problem.hpp"
#include "fastlinear/host/memory.hpp"

namespace fastlinear {

// What a kernel reads: rows of zeros and zeros in each row fill up its steps.
struct PreparedRows {
  Rows rows;
  const RowScale* scales;  // of integer rows
  RowGroups groups{};      // of those that are scaled in groups
};

// A kernel walks mr rows side by side, one line of each in L1 at a time. An L1 way holds 4096 bytes, so rows whose
// stride (in bytes) shares a large power of two with 4096 land in few sets; past 6 lines a set (8 ways, two left for
// the panel) the rows evict one another and every k step goes to L2.
inline bool rows_collide(std::ptrdiff_t stride, std::ptrdiff_t mr) {
  constexpr std::ptrdiff_t kWay = 4096, kLine = 64, kWays = 6;
  const std::ptrdiff_t sets = kWay / std::max(kLine, std::gcd(stride, kWay));
  return (mr + sets - 1) / sets > kWays;
}

// Elements from one made row to the next: whole lines, one apart, that do not collide; `beside` stand behind each row.
inline std::ptrdiff_t made_stride(std::ptrdiff_t k, const Kernel& kernel, std::ptrdiff_t beside = 0) {
  const std::ptrdiff_t element = element_bytes(kernel.rows), line = 64 / element;
  const std::ptrdiff_t stride = round_up(round_up(k, kernel.k_step) + beside, line) + line;
  return rows_collide(stride * element, kernel.mr) ? stride + line : stride;
}

namespace prologue_detail {

inline constexpr std::int32_t kMiddle = 128;  // what int8 lacks to uint8

// Turns int8 into uint8 or back, with the bits of a format's row.
inline void flip_bytes(char* bytes, std::ptrdiff_t n, std::uint8_t flip) {
  std::ptrdiff_t i = 0;
  const std::uint64_t eight = 0x0101010101010101u * flip;
  for (; i + 8 <= n; i += 8) {
    std::uint64_t word;
    std::memcpy(&word, bytes + i, sizeof word);
    word ^= eight;
    std::memcpy(bytes + i, &word, sizeof word);
  }
  for (; i < n; ++i) bytes[i] = static_cast<char>(bytes[i] ^ flip);
}

// To the nearest integer, ties to even, where |x| < 2^22: there 1.5 * 2^23 + x has unit spacing.
inline float nearest(float x) { return (x + 0x1.8p23f) - 0x1.8p23f; }

// What a row gets, of its extremes.
inline RowScale scale_of(RowKind kind, const Extremes& e) {
  if (!e.finite) return {std::numeric_limits<float>::quiet_NaN(), kMiddle, 0};
  const bool symmetric = kind == RowKind::symmetric;
  const float scale = symmetric ? std::max(-e.least, e.greatest) / 127.0f : e.greatest / 255.0f - e.least / 255.0f;
  if (scale < std::numeric_limits<float>::min()) return {0.0f, symmetric ? kMiddle : 0, 0};
  const float zero = symmetric ? 128.0f : std::clamp(nearest(-e.least * (1.0f / scale)), 0.0f, 255.0f);
  return {scale, static_cast<std::int32_t>(zero), 0};
}

inline Affine affine_of(RowKind kind, const RowScale& row) {
  const float inverse = row.scale > 0.0f ? 1.0f / row.scale : 0.0f, zero = static_cast<float>(row.zero);
  if (kind == RowKind::symmetric) return {inverse, -127.0f, 127.0f, row.zero};
  return {inverse, -zero, 255.0f - zero, row.zero};
}

template <class Element>
void reorder(const char* from, const std::int32_t* order, std::ptrdiff_t k, std::byte* to) {
  const auto* const x = reinterpret_cast<const Element*>(from);
  auto* const y = reinterpret_cast<Element*>(to);
  for (std::ptrdiff_t j = 0; j < k; ++j) y[j] = x[order[j]];
}

// Row r of x, [m, k], in the order of a weight's columns: in place, or in memory of this thread.
inline const char* in_order(const Rows& x, std::ptrdiff_t row, std::ptrdiff_t k, const std::int32_t* order) {
  const char* const from = x.at(row, 0);
  if (order == nullptr) return from;
  thread_local Scratch memory;
  const std::ptrdiff_t element = element_bytes(x.format);
  std::byte* const to = memory.bytes(k * element);
  if (element == 4)
    reorder<std::uint32_t>(from, order, k, to);
  else if (element == 2)
    reorder<std::uint16_t>(from, order, k, to);
  else
    reorder<std::uint8_t>(from, order, k, to);
  return reinterpret_cast<const char*>(to);
}

// k elements of a row in fp32 and smoothed: in place, or in memory of this thread.
inline const float* numbers(const char* row, Format format, std::ptrdiff_t k, const float* smooth,
                            const Vectors& vectors) {
  const Conversion& conversion = vectors.conversions[static_cast<std::size_t>(format)];
  const bool wide = conversion.widen == nullptr;  // fp32 already
  if (wide && smooth == nullptr) return reinterpret_cast<const float*>(row);
  thread_local Scratch memory;
  float* const numbers = memory.floats(k);
  if (wide)
    std::memcpy(numbers, row, static_cast<std::size_t>(k) * sizeof(float));
  else
    conversion.widen(row, numbers, k);
  if (smooth != nullptr) vectors.quantization->scale_columns({numbers, k, numbers, k, 1, k, smooth});
  return numbers;
}

// Numbers of a row as integers in a form that kernels read; how they are scaled.
inline RowScale quantize_row(const Quantization& quantization, const RowQuantizer& how, const RowForm& form,
                             const float* x, std::ptrdiff_t k, void* to) {
  const RowKind kind = how.kind;
  RowScale scale{how.scale, how.zero, 0};
  bool finite = false;
  if (kind != RowKind::fixed) {
    const Extremes e = (kind == RowKind::symmetric ? quantization.magnitude : quantization.extremes)(x, k);
    scale = scale_of(kind, e);
    finite = e.finite;
  }
  Affine affine = affine_of(kind, scale);
  if (form.centered) affine.zero = 0;
  if (!(finite ? form.finite : form.any)(x, k, affine, to)) scale.scale = std::numeric_limits<float>::quiet_NaN();
  return scale;
}

}  // namespace prologue_detail

// The rows [part.begin, part.end) of a problem.
class Prologue {
 public:
  Prologue(const Problem& p, const Plan& plan, const Range& part)
      : p_(p), plan_(plan), first_(part.begin), m_(part.size()) {
    const Kernel& kernel = *plan.kernel;
    // A kernel that takes whole lines of K uses each of them up at once.
    const bool whole_lines = kernel.k_step * element_bytes(kernel.rows) >= 64;
    const bool ends = round_up(p.k, kernel.k_step) == p.k && round_up(m_, kernel.row_step) == m_;
    if (kernel.rows == Format::int8)
      make_ = &Prologue::quantize_in_groups;
    else if (plan.form != nullptr)
      make_ = is_float(p.x.format) ? &Prologue::quantize : &Prologue::shift;
    else if (p.quantizer.kind == RowKind::rounded && p.x.format != p.quantizer.format)
      make_ = &Prologue::round;
    else if (p.x.format != kernel.rows)
      make_ = &Prologue::widen;
    else if (!ends || p.x.index != nullptr || p.weight.order != nullptr ||
             (m_ > 1 && !whole_lines && rows_collide(p.x.stride * element_bytes(kernel.rows), rows_of_a_tile())))
      make_ = &Prologue::copy;
    if (make_ == &Prologue::quantize_in_groups) {
      groups_ = ceil_div(p.k, p.weight.groups.size);
      groups_at_ = round_up(p.k, 64);
      stride_ = made_stride(groups_at_, kernel, 3 * 4 * groups_);
    } else if (make_ != nullptr) {
      stride_ = made_stride(p.k, kernel);
    }
  }

  // How many rows there are to make, and of how many bytes each; at 1 to 3 % of the time of the product copies repay
  // themselves from 14 rows on.
  std::ptrdiff_t rows() const { return make_ == nullptr ? 0 : round_up(m_, plan_.kernel->row_step); }
  std::ptrdiff_t row_bytes() const { return stride_ * element_bytes(plan_.kernel->rows); }

  // `data` for all the rows, at a multiple of 64; `scales` for as many.
  PreparedRows place(char* data, RowScale* scales) {
    data_ = data;
    const bool grouped = groups_at_ > 0;
    scales_ = plan_.form == nullptr || grouped ? nullptr : scales;
    if (make_ == nullptr) return {{p_.x.at(first_, 0), p_.x.stride, p_.x.format}, nullptr};
    return {{data_, stride_, plan_.kernel->rows}, scales_, grouped ? beside(data_) : RowGroups{}};
  }

  // Makes row r; any thread.
  void make(std::ptrdiff_t r) {
    char* const to = data_ + r * row_bytes();
    const std::ptrdiff_t element = element_bytes(plan_.kernel->rows);
    const std::ptrdiff_t made = r < m_ ? p_.k : 0, filled = round_up(p_.k, plan_.kernel->k_step);
    if (r < m_) (this->*make_)(first_ + r, to);
    std::memset(to + made * element, 0, static_cast<std::size_t>((filled - made) * element));
  }

 private:
  std::ptrdiff_t rows_of_a_tile() const { return ceil_div(m_, ceil_div(m_, plan_.kernel->mr)); }

  const char* elements(std::ptrdiff_t row) const { return prologue_detail::in_order(p_.x, row, p_.k, p_.weight.order); }

  void copy(std::ptrdiff_t row, char* to) { std::copy_n(elements(row), p_.k * element_bytes(p_.x.format), to); }

  void widen(std::ptrdiff_t row, char* to) { conversion().widen(elements(row), reinterpret_cast<float*>(to), p_.k); }

  // To the format that was asked for; a kernel of fp32 rows reads the same numbers.
  void round(std::ptrdiff_t row, char* to) {
    const Format format = p_.quantizer.format;
    const Conversion& rounding = plan_.vectors->conversions[static_cast<std::size_t>(format)];
    const float* const x = numbers(row);
    if (plan_.kernel->rows == format) return rounding.narrow(x, to, p_.k);
    thread_local Scratch memory;
    std::byte* const rounded = memory.bytes(p_.k * element_bytes(format));
    rounding.narrow(x, rounded, p_.k);
    rounding.widen(rounded, reinterpret_cast<float*>(to), p_.k);
  }

  const float* numbers(std::ptrdiff_t row) const {
    return prologue_detail::numbers(elements(row), p_.x.format, p_.k, p_.quantizer.smooth, *plan_.vectors);
  }

  void quantize(std::ptrdiff_t row, char* to) {
    const Quantization& quantization = *plan_.vectors->quantization;
    finish(row, to, prologue_detail::quantize_row(quantization, p_.quantizer, *plan_.form, numbers(row), p_.k, to));
  }

  RowGroups beside(char* row) const {
    auto* const numbers = reinterpret_cast<float*>(row + groups_at_);
    return {numbers, reinterpret_cast<std::int32_t*>(numbers + groups_), numbers + 2 * groups_};
  }

  // One scale of the row's own, or one for each group.
  void quantize_in_groups(std::ptrdiff_t row, char* to) {
    const Quantization& quantization = *plan_.vectors->quantization;
    const float* const x = numbers(row);
    float scale = -1.0f;
    if (p_.quantizer.kind == RowKind::symmetric)
      scale = prologue_detail::scale_of(RowKind::symmetric, quantization.magnitude(x, p_.k)).scale;
    const ScaledGroups& how = p_.weight.groups;
    auto* const numbers = reinterpret_cast<float*>(to + groups_at_);
    quantization.by_groups({x, p_.k, how.size, scale, how.unit, reinterpret_cast<std::int8_t*>(to), numbers,
                            reinterpret_cast<std::int32_t*>(numbers + groups_), numbers + 2 * groups_});
  }

  // Integers already.
  void shift(std::ptrdiff_t row, char* to) {
    const std::uint8_t flip = info(p_.x.format).flip;
    if (plan_.form->centered) {
      const auto* from = reinterpret_cast<const std::uint8_t*>(elements(row));
      for (std::ptrdiff_t k = 0; k < p_.k; ++k)
        reinterpret_cast<std::int16_t*>(to)[k] = static_cast<std::int16_t>((from[k] ^ flip) - p_.quantizer.zero);
    } else {
      copy(row, to);
      if (flip != 0) prologue_detail::flip_bytes(to, p_.k, flip);
    }
    finish(row, to, {p_.quantizer.scale, p_.quantizer.zero, 0});
  }

  void finish(std::ptrdiff_t row, const char* made, RowScale scale) {
    if (plan_.form->centered) scale.zero = 0;  // it is subtracted already
    if (p_.weight.zeros != nullptr) scale.sum = sum(made, scale.zero);
    scales_[row - first_] = scale;
  }

  std::int32_t sum(const char* row, std::int32_t zero) const {
    std::int32_t total = 0;
    if (plan_.form->centered)
      for (std::ptrdiff_t k = 0; k < p_.k; ++k) total += reinterpret_cast<const std::int16_t*>(row)[k];
    else
      for (std::ptrdiff_t k = 0; k < p_.k; ++k) total += reinterpret_cast<const std::uint8_t*>(row)[k] - zero;
    return total;
  }

  const Conversion& conversion() const { return plan_.vectors->conversions[static_cast<std::size_t>(p_.x.format)]; }

  const Problem& p_;
  const Plan& plan_;
  std::ptrdiff_t first_, m_, stride_ = 0;
  std::ptrdiff_t groups_ = 0, groups_at_ = 0;  // how many a row has, and where in it what is beside them begins
  void (Prologue::*make_)(std::ptrdiff_t row, char* to) = nullptr;  // null: rows are read in place
  char* data_ = nullptr;
  RowScale* scales_ = nullptr;
};

}  // namespace fastlinear
