// Rows of x -> the integers that a kernel reads, with a scale and a zero point each: once a call for all threads, in
// the same pass that lays the rows out for the kernel. The formulas are those of fastlinear/quantize.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "fastlinear/contract/isa.hpp"
#include "fastlinear/driver/rows.hpp"
#include "fastlinear/formats/int8.hpp"
#include "fastlinear/host/parallel.hpp"

namespace fastlinear {

enum class RowKind : std::uint8_t { symmetric, asymmetric, fixed };

// How the rows of x become integers: by a scale and zero point of each row's own, or by the given ones. `smooth`: k
// numbers that x is multiplied by first, readable up to a multiple of 16, or null. x that is integers already is taken
// as of the given scale.
struct RowQuantizer {
  RowKind kind;
  float scale;
  std::int32_t zero;  // of uint8; int8 lies 128 lower
  const float* smooth;
};

struct IntegerRows {
  Rows rows;
  const RowScale* scales;
};

namespace integer_rows_detail {

inline constexpr std::int32_t kMiddle = 128;  // what int8 lacks to uint8

// int8 <-> uint8: 128 more or less is the other top bit.
inline void add_middle(char* bytes, std::ptrdiff_t n) {
  std::ptrdiff_t i = 0;
  for (; i + 8 <= n; i += 8) {
    std::uint64_t word;
    std::memcpy(&word, bytes + i, sizeof word);
    word ^= 0x8080808080808080u;
    std::memcpy(bytes + i, &word, sizeof word);
  }
  for (; i < n; ++i) bytes[i] = static_cast<char>(bytes[i] ^ kMiddle);
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

class RowWorker {
 public:
  RowWorker(const Rows& x, std::ptrdiff_t k, const Kernel& kernel, std::ptrdiff_t stride, const RowQuantizer& quantizer,
            const Conversion* conversions, const Quantization& quantization, bool sums, char* data, RowScale* scales)
      : x_(x),
        k_(k),
        filled_k_(round_up(k, std::max(Int8::dot_kr, kernel.k_step))),
        format_(kernel.rows),
        stride_(stride),
        quantizer_(quantizer),
        conversions_(conversions),
        quantization_(quantization),
        sums_(sums),
        data_(data),
        scales_(scales) {}

  void run(std::ptrdiff_t r) {
    char* const to = data_ + r * stride_ * element_bytes(format_);
    RowScale& scale = scales_[r];
    if (is_float(x_.format))
      scale = quantize(numbers(r), to);
    else
      scale = shift(r, to);
    if (format_ == Format::int16) scale.zero = 0;  // it is subtracted already
    if (sums_) scale.sum = sum(to, scale.zero);
    std::memset(to + k_ * element_bytes(format_), 0,
                static_cast<std::size_t>((filled_k_ - k_) * element_bytes(format_)));
  }

 private:
  // Row r in fp32 and smoothed: in place, or in memory of this thread.
  const float* numbers(std::ptrdiff_t r) {
    if (x_.format == Format::fp32 && quantizer_.smooth == nullptr) return reinterpret_cast<const float*>(x_.at(r, 0));
    thread_local Scratch memory;
    float* const row = memory.floats(k_);
    if (x_.format == Format::fp32)
      std::memcpy(row, x_.at(r, 0), static_cast<std::size_t>(k_) * sizeof(float));
    else
      conversions_[static_cast<std::size_t>(x_.format)].widen(x_.at(r, 0), row, k_);
    if (quantizer_.smooth != nullptr) quantization_.scale_columns({row, k_, row, k_, 1, k_, quantizer_.smooth});
    return row;
  }

  RowScale quantize(const float* row, char* to) const {
    const RowKind kind = quantizer_.kind;
    RowScale scale{quantizer_.scale, quantizer_.zero, 0};
    bool finite = false;
    if (kind != RowKind::fixed) {
      const Extremes e = (kind == RowKind::symmetric ? quantization_.magnitude : quantization_.extremes)(row, k_);
      scale = scale_of(kind, e);
      finite = e.finite;
    }
    Affine affine = affine_of(kind, scale);
    if (format_ == Format::int16) affine.zero = 0;
    const QuantizeTo& convert = finite ? quantization_.finite : quantization_.any;
    if (!(format_ == Format::int16 ? convert.int16 : convert.uint8)(row, k_, affine, to))
      scale.scale = std::numeric_limits<float>::quiet_NaN();
    return scale;
  }

  RowScale shift(std::ptrdiff_t r, char* to) const {
    if (format_ == Format::int16) {
      const auto* from = reinterpret_cast<const std::uint8_t*>(x_.at(r, 0));
      const int flip = x_.format == Format::int8 ? kMiddle : 0;
      for (std::ptrdiff_t k = 0; k < k_; ++k)
        reinterpret_cast<std::int16_t*>(to)[k] = static_cast<std::int16_t>((from[k] ^ flip) - quantizer_.zero);
    } else {
      std::memcpy(to, x_.at(r, 0), static_cast<std::size_t>(k_));
      if (x_.format == Format::int8) add_middle(to, k_);
    }
    return {quantizer_.scale, quantizer_.zero, 0};
  }

  std::int32_t sum(const char* row, std::int32_t zero) const {
    std::int32_t total = 0;
    if (format_ == Format::int16)
      for (std::ptrdiff_t k = 0; k < k_; ++k) total += reinterpret_cast<const std::int16_t*>(row)[k];
    else
      for (std::ptrdiff_t k = 0; k < k_; ++k) total += reinterpret_cast<const std::uint8_t*>(row)[k] - zero;
    return total;
  }

  const Rows& x_;
  std::ptrdiff_t k_, filled_k_;
  Format format_;
  std::ptrdiff_t stride_;
  const RowQuantizer& quantizer_;
  const Conversion* conversions_;
  const Quantization& quantization_;
  bool sums_;
  char* data_;
  RowScale* scales_;
};

}  // namespace integer_rows_detail

// With less than this to convert (about 10 us) a second thread is not worth waking.
inline constexpr std::ptrdiff_t kSerialElements = 64 << 10;

// The m rows of x as `kernel` reads them, in memory that the calling thread keeps; `sums` where the weight has zero
// points. Throws std::bad_alloc.
inline IntegerRows quantize_rows(const Rows& x, std::ptrdiff_t m, std::ptrdiff_t k, const Kernel& kernel,
                                 const Vectors& vectors, const RowQuantizer& quantizer, bool sums,
                                 std::ptrdiff_t threads) {
  using namespace integer_rows_detail;
  thread_local Scratch data, scales;
  const std::ptrdiff_t stride = scratch_stride(k, kernel);
  auto* const row_scales = static_cast<RowScale*>(scales.bytes(m * std::ptrdiff_t{sizeof(RowScale)}));
  const std::ptrdiff_t row_bytes = stride * element_bytes(kernel.rows), filled_rows = round_up(m, kernel.row_step);
  auto* const rows = static_cast<char*>(data.bytes(filled_rows * row_bytes));
  std::memset(rows + m * row_bytes, 0, static_cast<std::size_t>((filled_rows - m) * row_bytes));
  const auto make = [&] {
    return [worker = RowWorker(x, k, kernel, stride, quantizer, vectors.conversions, *vectors.quantization, sums, rows,
                               row_scales)](std::ptrdiff_t r) mutable { worker.run(r); };
  };
  if (!share_out(m, m * k < kSerialElements ? 1 : threads, make)) throw std::bad_alloc();
  return {{rows, stride, kernel.rows, true}, row_scales};
}

}  // namespace fastlinear
