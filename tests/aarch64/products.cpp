// Multiplies on every scalar kernel: exact small integers against sums of int64, and random numbers, of whose results a
// hash is printed that has to be the same on every architecture. At the end, what the library takes the machine for.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <string_view>
#include <vector>

#include "fastlinear/driver/gemm.hpp"
#include "fastlinear/epilogues/all.hpp"
#include "fastlinear/formats/fp8.hpp"
#include "fastlinear/weight/pack.hpp"

using namespace fastlinear;
using std::ptrdiff_t;

namespace {

std::uint64_t state = 1;

int below(int limit) {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<int>(state >> 33) % limit;
}

template <class Element>
void store(std::vector<char>& to, std::size_t i, float value) {
  Element element;
  from_float(value, element);
  std::memcpy(to.data() + i * sizeof element, &element, sizeof element);
}

template <class Element>
Element load(const std::vector<char>& from, std::size_t i) {
  Element element;
  std::memcpy(&element, from.data() + i * sizeof element, sizeof element);
  return element;
}

// The fp8 that a number is.
Fp8 fp8_of(float value) {
  std::uint8_t bits = 0;
  while (to_float(Fp8{bits}) != value) ++bits;
  return {bits};
}

// `count` numbers in a format; what they became is left in `values`.
std::vector<char> in_format(Format format, std::vector<float>& values) {
  const auto bytes = static_cast<std::size_t>(format == Format::int4 ? 1 : element_bytes(format));
  std::vector<char> data(values.size() * bytes);
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (format == Format::fp32) std::memcpy(data.data() + 4 * i, &values[i], 4);
    if (format == Format::bf16) store<Bf16>(data, i, values[i]);
    if (format == Format::fp16) store<Fp16>(data, i, values[i]);
    if (bytes == 1) data[i] = static_cast<char>(static_cast<int>(values[i]));
    if (format == Format::fp8) data[i] = static_cast<char>(fp8_of(values[i]).bits);
  }
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (format == Format::bf16) values[i] = to_float(load<Bf16>(data, i));
    if (format == Format::fp16) values[i] = to_float(load<Fp16>(data, i));
  }
  return data;
}

struct Shape {
  ptrdiff_t m, n, k;
};

std::vector<char> pack(const Layout& layout, Shape s, std::vector<float>& values) {
  const std::vector<char> data = in_format(layout.format, values);
  std::vector<char> packed(static_cast<std::size_t>(packed_bytes(layout, s.n, s.k)));
  const WeightView<void> view{const_cast<char*>(data.data()), s.n, s.k, s.k, 1};
  pack_weight(layout, view, packed.data());
  const std::vector<float> ones(static_cast<std::size_t>(s.n * (s.k + 1)), 1.0f);
  if (info(layout.format).grouped) {
    const Weight w = weight_at(layout, s.n, s.k, packed.data());
    auto* const scales = reinterpret_cast<float*>(const_cast<char*>(w.groups.scales));
    const std::ptrdiff_t bytes = ceil_div(s.n, layout.nr) * arrays_of_panels(layout, s.k)[1];
    std::fill_n(scales, bytes / std::ptrdiff_t{sizeof(float)}, 1.0f);
    if (w.groups.table != nullptr)
      std::iota(const_cast<float*>(w.groups.table), const_cast<float*>(w.groups.table) + Int4::codes, 0.0f);
  } else if (info(layout.format).arrays > 0) {
    pack_channels(layout, view, ones.data(), nullptr, packed.data());
  }
  return packed;
}

std::uint64_t hash(std::uint64_t sum, const std::vector<float>& values) {
  for (const float value : values) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    sum = (sum ^ bits) * 1099511628211u;
  }
  return sum;
}

// x W^T and then `function`, in fp32, on this kernel: with its defaults, a number as its operand, and of a gate the
// channels as they come.
std::vector<float> product(const Kernel& kernel, const Layout& layout, Shape s, const std::vector<float>& x,
                           const std::vector<char>& packed, ptrdiff_t slices, std::uint32_t function) {
  const EpilogueFunction& named = *function_at(function);
  const ptrdiff_t columns = named.gate ? s.n / 2 : s.n;
  std::vector<float> y(static_cast<std::size_t>(s.m * columns), -77.0f);
  const Plan plan = make_plan(kernel, 2, slices, {1024, 4096, 1 << 20});  // so small that K is cut
  const Segment segment{reinterpret_cast<char*>(y.data()), columns, Format::fp32};
  EpilogueProgram program{};
  program.count = 1;
  program.gated = named.gate;
  program.steps[0] = {function, -1, {named.defaults[0], named.defaults[1]}};
  if (named.operands > 0) program.steps[0].params[0] = 0.75f;
  RowQuantizer rows{};
  if (kernel.accumulate == Format::int32) rows = {.kind = RowKind::fixed, .scale = 1.0f, .zero = 128};
  if (kernel.rows == Format::int8) rows = {.kind = RowKind::symmetric};  // products of groups
  const Rows of_x{reinterpret_cast<const char*>(x.data()), s.k, Format::fp32};
  Weight weight = weight_at(layout, s.n, s.k, packed.data());
  if (layout.format == Format::int4) find_integers(weight.groups);
  if (!gemm({s.m, s.n, s.k, of_x, rows, weight, {}, {&segment, 1}, program, nullptr, nullptr}, plan)) std::abort();
  return y;
}

bool check(const Kernel& kernel, const Layout& layout) {
  std::uint64_t sum = 14695981039346656037u;
  const bool codes = layout.format == Format::int4;
  for (const Shape s : {Shape{1, 1, 1}, {3, 37, 9}, {9, 16, 64}, {21, 70, 131}, {8, 33, 300}})
    for (const ptrdiff_t slices : {1, 3}) {
      std::vector<float> x(static_cast<std::size_t>(s.m * s.k)), w(static_cast<std::size_t>(s.n * s.k));
      for (float& value : x) value = static_cast<float>(below(9) - 4);
      for (ptrdiff_t i = 0; i < s.m; ++i) x[i * s.k] = 127.0f;  // so that the scale of symmetric rows is 1
      for (float& value : w) value = static_cast<float>(codes ? below(16) : below(9) - 4);
      std::vector<char> packed = pack(layout, s, w);
      const std::vector<float> y = product(kernel, layout, s, x, packed, slices, kIdentity);
      for (ptrdiff_t i = 0; i < s.m; ++i)
        for (ptrdiff_t j = 0; j < s.n; ++j) {
          std::int64_t want = 0;
          for (ptrdiff_t k = 0; k < s.k; ++k)
            want += static_cast<std::int64_t>(x[i * s.k + k]) * static_cast<std::int64_t>(w[j * s.k + k]);
          if (y[i * s.n + j] == static_cast<float>(want)) continue;
          std::printf("%s is wrong at %td %td %td: y[%td, %td]\n", kernel.name, s.m, s.n, s.k, i, j);
          return false;
        }
      sum = hash(sum, y);
      for (float& value : x) value = static_cast<float>(below(2000001) - 1000000) * 3e-6f;
      if (info(layout.format).floating) {
        for (float& value : w) value = static_cast<float>(below(2000001) - 1000000) * 1e-7f;
        packed = pack(layout, s, w);
      }
      for (std::uint32_t f = 0; const EpilogueFunction* function = function_at(f); ++f)
        if (!function->gate || s.n % 2 == 0) sum = hash(sum, product(kernel, layout, s, x, packed, slices, f));
    }
  std::printf("%s on %s %016llx\n", kernel.name, info(layout.format).name, static_cast<unsigned long long>(sum));
  return true;
}

}  // namespace

int main() {
  bool good = true;
  for (std::size_t i = 0; const Kernel* kernel = kernel_at(i); ++i) {
    if (std::string_view(kernel->isa.name) != "scalar") continue;
    Layout layout = kernel->layout;
    if (info(layout.format).grouped) layout.groups.size = 32;
    good &= check(*kernel, layout);
  }
  const CpuSource source = this_cpu();
  const Cpu cpu = detect_cpu(source);
  std::printf("cpu %s %s %x %x", cpu.vendor, cpu.model, cpu.family, cpu.number);
  for (std::size_t i = 0; const Isa* isa = isa_at(i); ++i)
    if (refusal(source, *isa) == nullptr) std::printf(" %s", isa->name);
  const std::pair<const char*, CpuBit> bits[] = {{"asimd", cpu_bits::kAsimd},     {"asimdhp", cpu_bits::kAsimdHalf},
                                                 {"asimddp", cpu_bits::kDotprod}, {"i8mm", cpu_bits::kI8mm},
                                                 {"bf16", cpu_bits::kBf16},       {"sve", cpu_bits::kSve}};
  for (const auto& [name, bit] : bits)
    if (has_all(source, {&bit, 1})) std::printf(" %s", name);
  std::printf("\n");
  flush(reinterpret_cast<const char*>(bits), sizeof bits);
  return good ? 0 : 1;
}
