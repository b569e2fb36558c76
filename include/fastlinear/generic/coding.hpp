// How a weight becomes codes in groups: fastlinear/spec/grouping.py, step by step in fp32 and never fused, so that all
// ISAs give its bits; written once over a vector type V and its integers I. Included inside an ISA's target region.
//
// The names are those of the specification. A group lies padded with zeros, and what its sums are made of, in scratch
// memory that stays in L1.
#pragma once

#include <cstddef>
#include <cstdint>

#include "fastlinear/contract/quantization.hpp"
#include "fastlinear/formats/bf16.hpp"
#include "fastlinear/formats/fp16.hpp"

namespace fastlinear::coding {

// Codes of a group, by what they stand for in the table and, where that is not even, by themselves.
struct Spelling {
  float scale, offset;
  float* numbers;
  std::uint8_t* codes;
};

struct Scaling {
  float scale, offset;
};

[[gnu::always_inline]] inline float hold(Format scales, float x) {
  if (scales == Format::bf16) {
    Bf16 held;
    from_float(x, held);
    return to_float(held);
  }
  if (scales == Format::fp16) {
    Fp16 held;
    from_float(x, held);
    return to_float(held);
  }
  const float far = x * 4097.0f;
  return far - (far - x);
}

[[gnu::always_inline]] inline float magnitude(float x) { return __builtin_fabsf(x); }

template <class V, class I>
struct Coder {
  const CodeSearch& how;
  std::ptrdiff_t count = 0;  // of the group's numbers; the rest, up to how.group, are padding
  float *w, *values, *inside, *sums[3];
  Spelling spellings[4];

  Coder(const CodeSearch& search, float* scratch) : how(search) {
    const std::ptrdiff_t n = how.group;
    w = scratch, values = w + n, inside = values + n;
    for (std::ptrdiff_t i = 0; i < 3; ++i) sums[i] = inside + (1 + i) * n;
    float* numbers = sums[2] + n;
    auto* codes = reinterpret_cast<std::uint8_t*>(numbers + 4 * n);
    for (std::ptrdiff_t i = 0; i < 4; ++i) spellings[i] = {0.0f, 0.0f, numbers + i * n, codes + i * n};
  }

  // Takes the n numbers of a group; false if there is an infinity or a NaN among them.
  bool take(const float* from, std::ptrdiff_t n) {
    count = n;
    for (std::ptrdiff_t i = 0; i < how.group; ++i) w[i] = i < n ? from[i] : 0.0f, inside[i] = i < n ? 1.0f : 0.0f;
    V odd = V::set(0.0f);
    for (std::ptrdiff_t i = 0; i < how.group; i += V::width) odd = odd + V::load(w + i) * V::set(0.0f);
    return all_zero(odd);
  }

  // The codes of what was taken.
  Spelling code() {
    const Extremes e = extremes(w, how.offsets);
    Scaling plain{}, middle{};
    if (how.offsets) {
      const float between = (how.high + how.low) / 2.0f;
      plain.scale = (e.greatest - e.least) / (how.high - how.low);
      middle.offset = (e.greatest + e.least) / 2.0f;
      plain.offset = middle.offset - plain.scale * between;
    } else {
      plain.scale = extreme(e) / (-how.low >= how.high ? how.low : how.high);
    }
    Spelling &first = spellings[0], &second = spellings[1], &third = spellings[2], &fourth = spellings[3];
    const float of_first = code_by(plain, first), of_second = code_by(fitted(plain.scale, middle.offset), second);
    const Spelling& found = of_second < of_first ? second : first;
    if (!how.coded) return found;
    const Spelling spelled = spell(found, first, third, fourth);
    return is_exact(w, second) ? second : spelled;
  }

 private:
  // What was found, or plain rounding, spelled by the first scale that holds it.
  Spelling spell(const Spelling& found, const Spelling& plain, Spelling& one, Spelling& other) {
    stand_for(found);
    if (is_exact(values, one)) return one;
    stand_for(plain);
    if (is_exact(values, other)) return other;
    if (!how.offsets) return plain;
    // What is not told again then is lost in the offset, or finer than scales are.
    code_by({0.0f, plain.offset + plain.scale * (how.high + how.low) / 2.0f}, one);
    return one;
  }

  // Padding is 0, unless it is to be as the first number.
  Extremes extremes(const float* numbers, bool skip) const {
    if (skip && count < how.group) {
      float least = numbers[0], greatest = numbers[0];
      for (std::ptrdiff_t i = 1; i < count; ++i) {
        least = numbers[i] < least ? numbers[i] : least;
        greatest = numbers[i] > greatest ? numbers[i] : greatest;
      }
      return {least, greatest, true};
    }
    V low = V::load(numbers) * V::load(inside), high = low;
    for (std::ptrdiff_t i = V::width; i < how.group; i += V::width) {
      const V each = V::load(numbers + i) * V::load(inside + i);
      low = min(each, low);
      high = max(each, high);
    }
    return {least(low), greatest(high), true};
  }

  static float extreme(const Extremes& e) { return e.greatest >= -e.least ? e.greatest : e.least; }

  // By halves, of lanes, too.
  float sum_of(float* numbers) const {
    for (std::ptrdiff_t half = how.group / 2; half >= V::width; half /= 2)
      for (std::ptrdiff_t i = 0; i < half; i += V::width)
        V::store(numbers + i, V::load(numbers + i) + V::load(numbers + half + i));
    return total(V::load(numbers));
  }

  Scaling held(Scaling s) const {
    const float scale = hold(how.scales, s.scale), offset = hold(how.scales, s.offset);
    if (!how.offsets || !how.coded) return {scale, offset};
    const float reach = magnitude(scale), least = magnitude(offset);
    const float far = magnitude(how.low) > magnitude(how.high) ? magnitude(how.low) : magnitude(how.high);
    return {least > reach * (how.high - how.low) * how.more ? 0.0f : scale,
            least < reach * far / how.more ? 0.0f : offset};
  }

  // In the units of the table.
  struct Steps {
    V inverse, offset;
    explicit Steps(Scaling s) : inverse(V::set(s.scale == 0.0f ? 0.0f : 1.0f / s.scale)), offset(V::set(s.offset)) {}
    [[gnu::always_inline]] V operator()(V x) const { return rounded(rounded(x - offset) * inverse); }
  };

  // The numbers of the table that are nearest, and their codes where that is not even.
  [[gnu::always_inline]] V nearest_numbers(V steps, std::uint8_t* codes) const {
    if (how.even) return min(V::set(how.high), max(V::set(how.low), round(steps)));
    V places = V::set(0.0f);
    for (float boundary : how.between) places = places + select_gt(steps, V::set(boundary), V::set(1.0f), V::set(0.0f));
    places = select_nan(steps, V::set(15.0f), places);
    std::uint8_t at[V::width];
    float numbers[V::width];
    I::store(at, nearest(places));
    for (std::ptrdiff_t i = 0; i < V::width; ++i) {
      codes[i] = how.order[at[i]];
      numbers[i] = how.numbers[codes[i]];
    }
    return V::load(numbers);
  }

  [[gnu::always_inline]] static V stood_for(V numbers, V scale, V offset) {
    return rounded(rounded(scale * numbers) + offset);
  }

  void stand_for(const Spelling& s) const {
    for (std::ptrdiff_t i = 0; i < how.group; i += V::width)
      V::store(values + i, stood_for(V::load(s.numbers + i), V::set(s.scale), V::set(s.offset)));
  }

  // Of the codes that each start rounds to, with the scale and offset of least squares, what errs least.
  Scaling fitted(float scale, float middle) {
    const auto n = static_cast<float>(count);
    const float between = (how.high + how.low) / 2.0f;
    float mean_w = 0.0f, best_gain = 0.0f;
    if (how.offsets) {
      for (std::ptrdiff_t i = 0; i < how.group; ++i) sums[0][i] = w[i];
      mean_w = sum_of(sums[0]) / n;
    }
    Scaling best{};
    for (std::ptrdiff_t start = 0; start < kStarts; ++start) {
      const float shrunk = scale * how.shrunk[start];
      const Steps steps({shrunk, how.offsets ? middle - shrunk * between : 0.0f});
      for (std::ptrdiff_t i = 0; i < how.group; i += V::width) {
        const V x = V::load(w + i);
        const V t = nearest_numbers(steps(x), spellings[1].codes + i) * V::load(inside + i);
        V::store(sums[0] + i, t);
        V::store(sums[1] + i, t * t);
        V::store(sums[2] + i, t * x);
      }
      const float mean_t = how.offsets ? sum_of(sums[0]) / n : 0.0f;
      const float square = sum_of(sums[1]) - n * mean_t * mean_t, product = sum_of(sums[2]) - n * mean_t * mean_w;
      const float found = square > 0.0f ? product / square : shrunk;
      const float gain = square > 0.0f ? product * found : 0.0f;
      if (start > 0 && !(gain > best_gain)) continue;
      best_gain = gain;
      best = {found, mean_w - found * mean_t};
    }
    return best;
  }

  // Codes of w; the squared error.
  float code_by(Scaling scaling, Spelling& to) {
    scaling = held(scaling);
    to.scale = scaling.scale, to.offset = scaling.offset;
    const Steps steps(scaling);
    for (std::ptrdiff_t i = 0; i < how.group; i += V::width) {
      const V x = V::load(w + i), error = of(x, steps, to, i);
      V::store(sums[0] + i, error * error);
    }
    return sum_of(sums[0]);
  }

  // The error of x, the numbers from i on, whose spelling is stored.
  [[gnu::always_inline]] V of(V x, const Steps& steps, Spelling& to, std::ptrdiff_t i) const {
    V at = steps(x);
    if (how.even) at = select_nan(at, V::set(0.0f), at);
    const V numbers = nearest_numbers(at, to.codes + i);
    V::store(to.numbers + i, numbers);
    return rounded(rounded(x - stood_for(numbers, V::set(to.scale), V::set(to.offset))) * V::load(inside + i));
  }

  // Whether some scale holds the numbers without an error, and their spelling by the first that does.
  bool is_exact(const float* numbers, Spelling& to) const {
    const Extremes e = extremes(numbers, how.offsets);
    for (std::ptrdiff_t end = 0; end < how.ends; ++end) {
      const auto [number, upper] = how.extremes[end];
      Scaling scaling{};
      if (how.offsets) {
        const float scale = (e.greatest - e.least) / number;
        scaling.scale = scale == 0.0f ? scale : hold(how.scales, scale);
        scaling.offset = e.greatest - scaling.scale * upper;
      } else {
        scaling.scale = extreme(e) / number;
      }
      scaling = held(scaling);
      to.scale = scaling.scale, to.offset = scaling.offset;
      const Steps steps(scaling);
      bool exact = true;
      for (std::ptrdiff_t i = 0; exact && i < how.group; i += V::width) {
        const V error = of(V::load(numbers + i), steps, to, i);
        exact = all_zero(rounded(error * error));
      }
      if (exact) return true;
    }
    return false;
  }
};

[[gnu::always_inline]] inline void store(Format scales, char* to, std::ptrdiff_t i, float x) {
  if (scales == Format::bf16)
    from_float(x, reinterpret_cast<Bf16*>(to)[i]);
  else if (scales == Format::fp16)
    from_float(x, reinterpret_cast<Fp16*>(to)[i]);
  else
    reinterpret_cast<float*>(to)[i] = x;
}

template <class V, class I>
void code_row(const CodedRow& row) {
  const CodeSearch& how = *row.how;
  Coder<V, I> coder(how, row.scratch);
  for (std::ptrdiff_t begin = 0, g = 0; begin < row.k; begin += how.group, ++g) {
    const std::ptrdiff_t n = row.k - begin < how.group ? row.k - begin : how.group;
    if (!coder.take(row.w + begin, n)) {
      store(how.scales, row.scales, g, __builtin_nanf(""));
      if (how.offsets) store(how.scales, row.offsets, g, 0.0f);
      continue;
    }
    const Spelling found = coder.code();
    store(how.scales, row.scales, g, found.scale);
    if (how.offsets) store(how.scales, row.offsets, g, found.offset);
    for (std::ptrdiff_t i = 0; i < n; ++i) {
      const float number = found.numbers[i];
      const auto code = static_cast<std::int32_t>(how.coded ? number - how.low : number);
      row.codes[begin + i] = static_cast<std::uint8_t>(how.even ? code : found.codes[i]);
    }
  }
}

}  // namespace fastlinear::coding
