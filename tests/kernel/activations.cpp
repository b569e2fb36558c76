// Measures every activation of every ISA this CPU runs against a double reference, over all floats or every n-th.
//
//   activations STRIDE [CASE]    STRIDE 1: all 2^32 bit patterns; else every STRIDE-th, and all near powers of two
//                                CASE: the cases whose name starts so: "gelu", "elu(1,"
//
// Prints one line a case and ISA: name(parameters) isa checked max_ulp at_x max_relative at_x failures. An ulp is the
// spacing of floats at the true value; the relative error is taken where the true value is a normal float. A value
// fails beyond both 4 ulp and 1e-6. Exit status 1 if any did.
// Linked with csrc/*.cpp, so what is measured is what is shipped.
#include <bit>
#include <cfloat>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "fastlinear/contract/isa.hpp"
#include "fastlinear/host/cpu.hpp"

namespace {

using fastlinear::Isa;

constexpr std::size_t kBlock = 4096;
constexpr double kMaxUlp = 4, kMaxRelative = 1e-6;

// e^x, without libm's slow path for the results that are 0 or 1 + e^x beyond any float.
double exp(double x) { return x < -300 ? 0 : std::exp(x > 300 ? 300 : x); }

double sigmoid(double x) { return x < -300 ? 0 : 1 / (1 + exp(-x)); }

double softplus(double x, const float* p) {
  const double beta = p[0], y = x * beta;
  return y > p[1] ? x : (std::fmax(y, 0) + std::log1p(exp(-std::fabs(y)))) / beta;
}

double mish(double x) {
  const double w = exp(x), m = w * (w + 2);
  return x * (m / (m + 2));
}

double gelu_tanh(double x) {
  const double u = std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x);
  return x * sigmoid(2 * u);
}

double clamp(double x, double low, double high) { return x < low ? low : x > high ? high : x; }

struct Case {
  const char* name;
  float params[fastlinear::kMaxParams];
  double (*reference)(double x, const float* params);
};

// torch's formulas, rearranged only where a double would cancel or overflow.
const Case kCases[] = {
    {"identity", {}, [](double x, const float*) { return x; }},
    {"relu", {}, [](double x, const float*) { return x < 0 ? 0 : x; }},
    {"relu6", {}, [](double x, const float*) { return clamp(x, 0, 6); }},
    {"gelu", {}, [](double x, const float*) { return 0.5 * x * std::erfc(-x * M_SQRT1_2); }},
    {"gelu_tanh", {}, [](double x, const float*) { return gelu_tanh(x); }},
    {"quick_gelu", {}, [](double x, const float*) { return x * sigmoid(1.702 * x); }},
    {"silu", {}, [](double x, const float*) { return x * sigmoid(x); }},
    {"sigmoid", {}, [](double x, const float*) { return sigmoid(x); }},
    {"tanh", {}, [](double x, const float*) { return std::tanh(x); }},
    {"hardswish", {}, [](double x, const float*) { return x * (clamp(x + 3, 0, 6) / 6); }},
    {"hardsigmoid", {}, [](double x, const float*) { return clamp(x + 3, 0, 6) / 6; }},
    {"hardtanh", {-1, 1}, [](double x, const float* p) { return clamp(x, p[0], p[1]); }},
    {"hardtanh", {-0.3f, 7.5f}, [](double x, const float* p) { return clamp(x, p[0], p[1]); }},
    {"leaky_relu", {0.01f}, [](double x, const float* p) { return x > 0 ? x : x * p[0]; }},
    {"leaky_relu", {0}, [](double x, const float* p) { return x > 0 ? x : x * p[0]; }},
    {"leaky_relu", {-1.7f}, [](double x, const float* p) { return x > 0 ? x : x * p[0]; }},
    {"elu", {1}, [](double x, const float* p) { return x > 0 ? x : p[0] * std::expm1(x); }},
    {"elu", {0}, [](double x, const float* p) { return x > 0 ? x : p[0] * std::expm1(x); }},
    {"elu", {-2.3f}, [](double x, const float* p) { return x > 0 ? x : p[0] * std::expm1(x); }},
    {"softplus", {1, 20}, softplus},
    {"softplus", {2, 20}, softplus},
    {"softplus", {0.3f, 5}, softplus},
    {"softplus", {-1.1f, 200}, softplus},
    {"mish", {}, [](double x, const float*) { return mish(x); }},
    {"relu2", {}, [](double x, const float*) { return x < 0 ? 0 : x * x; }},
};

std::string label(const Case& c) {
  char text[64];
  std::snprintf(text, sizeof text, "%s(%g,%g)", c.name, c.params[0], c.params[1]);
  return text;
}

struct Worst {
  double ulp = 0, relative = 0;
  float ulp_at = 0, relative_at = 0;
  std::size_t failures = 0;
};

// The reciprocal of the spacing of floats at y, denormal spacing below FLT_MIN.
double inverse_ulp(float y) {
  const std::uint32_t field = std::bit_cast<std::uint32_t>(y) >> 23 & 255;
  const std::uint64_t exponent = field > 0 ? field : 1;
  return std::bit_cast<double>((1023 + 150 - exponent) << 52);
}

void compare(const float* x, const float* y, const double* truth, std::size_t n, Worst& worst) {
  for (std::size_t i = 0; i < n; ++i) {
    const float rounded = static_cast<float>(truth[i]);
    // Most values end here: exact, or the float nearest to the truth, which cannot be the worst once half an ulp was
    // seen.
    const bool half_ulp_seen = worst.ulp >= 0.5 && worst.relative >= FLT_EPSILON / 2;
    if (y[i] == truth[i] || (y[i] == rounded && (half_ulp_seen || std::isinf(rounded)))) continue;
    if (std::isnan(y[i]) && std::isnan(rounded)) continue;
    const double error = std::fabs(y[i] - truth[i]);
    const double ulp = error * inverse_ulp(rounded);
    const double relative = std::fabs(rounded) >= FLT_MIN ? error / std::fabs(truth[i]) : 0;
    if (ulp > worst.ulp) worst.ulp = ulp, worst.ulp_at = x[i];
    if (relative > worst.relative) worst.relative = relative, worst.relative_at = x[i];
    // Written so that a NaN or an infinity on one side alone fails.
    worst.failures += !(ulp <= kMaxUlp) && !(relative > 0 && relative <= kMaxRelative);
  }
}

class Checker {
 public:
  Checker(const Case& c, std::size_t index, const std::vector<const Isa*>& isas)
      : case_(c), isas_(isas), worst_(isas.size()) {
    for (const Isa* isa : isas) steps_.push_back(isa->vectors->steps[index]);
  }

  void add(std::uint32_t bits) {
    x_[count_++] = std::bit_cast<float>(bits);
    if (count_ == kBlock) flush();
  }

  void flush() {
    for (std::size_t i = 0; i < count_; ++i) truth_[i] = case_.reference(x_[i], case_.params);
    const auto n = static_cast<std::ptrdiff_t>(count_);
    for (std::size_t s = 0; s < steps_.size(); ++s) {
      steps_[s]({x_, n, y_, n, 1, n, nullptr, case_.params, nullptr, 0});
      compare(x_, y_, truth_, count_, worst_[s]);
    }
    checked_ += count_;
    count_ = 0;
  }

  std::size_t report() const {
    std::size_t failures = 0;
    for (std::size_t s = 0; s < isas_.size(); ++s) {
      const Worst& w = worst_[s];
      std::printf("%s %s %zu %.2f %.9g %.2e %.9g %zu\n", label(case_).c_str(), isas_[s]->name, checked_, w.ulp,
                  w.ulp_at, w.relative, w.relative_at, w.failures);
      failures += w.failures;
    }
    std::fflush(stdout);
    return failures;
  }

 private:
  const Case& case_;
  const std::vector<const Isa*>& isas_;
  std::vector<fastlinear::Step> steps_;
  std::vector<Worst> worst_;
  std::size_t count_ = 0, checked_ = 0;
  alignas(64) float x_[kBlock], y_[kBlock];
  double truth_[kBlock];
};

std::size_t check(const Case& c, std::size_t index, const std::vector<const Isa*>& isas, std::uint64_t stride) {
  static constexpr std::uint64_t kAll = std::uint64_t{1} << 32, kExponent = std::uint64_t{1} << 23, kNear = 256;
  Checker checker(c, index, isas);
  for (std::uint64_t bits = 0; bits < kAll; bits += stride) checker.add(static_cast<std::uint32_t>(bits));
  if (stride > 1)
    for (std::uint64_t power = 0; power < kAll; power += kExponent)
      for (std::uint64_t i = 0; i < 2 * kNear; ++i) checker.add(static_cast<std::uint32_t>(power + i - kNear));
  checker.flush();
  return checker.report();
}

std::size_t index_of(const char* name) {
  for (std::size_t i = 0; const auto* function = fastlinear::function_at(i); ++i)
    if (std::strcmp(function->name, name) == 0) return i;
  std::fprintf(stderr, "no activation %s in the registry\n", name);
  std::exit(2);
}

}  // namespace

int main(int argc, char** argv) {
  const std::uint64_t stride = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 0;
  if (stride == 0) return std::fprintf(stderr, "usage: %s STRIDE [CASE]\n", argv[0]), 2;
  std::vector<const Isa*> isas;
  for (std::size_t i = 0; const Isa* isa = fastlinear::isa_at(i); ++i)  // those that add arithmetic borrow the vectors
    if (isa->vectors != nullptr && fastlinear::refusal(fastlinear::this_cpu(), *isa) == nullptr) isas.push_back(isa);
  std::size_t failures = 0;
  for (const Case& c : kCases)
    if (argc < 3 || label(c).starts_with(argv[2])) failures += check(c, index_of(c.name), isas, stride);
  return failures != 0;
}
