// A kernel that takes whole steps only, between enter and leave only, and says what it met.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "fastlinear/contract/isa.hpp"
#include "fastlinear/driver/gemm.hpp"
#include "fastlinear/weight/pack.hpp"

// clang-format off: the vector type comes first
#include "fastlinear/isa/scalar/vec.hpp"
#include "fastlinear/isa/scalar/codes.hpp"
#include "fastlinear/generic/convert.hpp"
#include "fastlinear/generic/quantize.hpp"
#include "fastlinear/epilogues/all.hpp"
// clang-format on

using namespace fastlinear;

namespace {

// Of the scalar ISA's functions those that a product is made of: instrumented, all take thrice as long to compile.
constexpr Vectors kVectors{
    .steps = FunctionList<epilogues::Identity, epilogues::Relu>::steps<scalar::F32>,
    .conversions = conversions<scalar::F32, scalar::Codes, scalar::Bytes, scalar::Halves>,
    .quantization = &quantization<scalar::F32, scalar::I32>,
    .norm = nullptr,
    .attention = nullptr,
    .few_queries = nullptr,
    .rounded_attention = nullptr,
    .rotation = nullptr,
    .expand_scales = nullptr,
};
const Isa kIsa{
    .name = "steps", .base = nullptr, .needs = {}, .saved = 0, .above = {}, .kernels = {}, .vectors = &kVectors};

constexpr std::ptrdiff_t kRows = 4, kK = 8, kNr = 16;
std::atomic<int> entered{0}, left{0};
thread_local int live = 0, saved = 41;

void check(bool good, const char* what) {
  if (good) return;
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

const Session kSession{[](void* state) {
                         ++entered;
                         std::memcpy(state, &saved, sizeof saved);
                         saved = 0;
                         ++live;
                       },
                       [](const void* state) {
                         ++left;
                         std::memcpy(&saved, state, sizeof saved);
                         --live;
                       }};

// As AMX reads: whole steps of rows and K, of which the driver has to have filled up what is not there.
void run(const TileArgs& t) {
  check(live == 1, "a tile outside a session");
  check(t.rows > 0 && t.rows <= 2 * kRows, "rows of no tile");
  const auto* a = static_cast<const float*>(t.a);
  const auto* w = static_cast<const float*>(t.panel);
  auto* tile = static_cast<float*>(t.tile);
  for (std::ptrdiff_t r = 0; r < round_up(t.rows, kRows); ++r)
    for (std::ptrdiff_t k = 0; k < round_up(t.k, kK); ++k)
      check((r < t.rows && k < t.k) || a[r * t.lda + k] == 0, "no zeros where the operands end");
  for (std::ptrdiff_t r = 0; r < round_up(t.rows, kRows); ++r)
    for (std::ptrdiff_t j = 0; j < kNr; ++j) {
      float sum = t.accumulate ? tile[r * kNr + j] : 0;
      for (std::ptrdiff_t k = 0; k < t.k; ++k) sum += a[r * t.lda + k] * w[k * kNr + j];
      tile[r * kNr + j] = sum;
    }
}

const Kernel kKernel{
    "fp32/steps/8x16", kIsa, Format::fp32, {Format::fp32, kNr, 1}, 2 * kRows, 1, run, Format::fp32, kRows, kK,
    &kSession};

}  // namespace

int main() {
  for (std::ptrdiff_t m : {1, 3, 4, 8, 9, 21})
    for (std::ptrdiff_t n : {1, 16, 37})
      for (std::ptrdiff_t k : {0, 1, 7, 8, 9, 64, 100})
        for (std::ptrdiff_t slices : {1, 2, 5}) {
          std::vector<float> x(m * k), w(n * k), y(m * n, -1);
          for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i * 7 % 11) - 5;
          for (std::size_t i = 0; i < w.size(); ++i) w[i] = static_cast<float>(i * 5 % 13) - 6;
          const Layout layout{Format::fp32, kNr, 1};
          std::vector<float> packed(packed_bytes(layout, n, k) / 4);  // exactly: what lies behind is not ours
          pack_weight(layout, {w.data(), n, k, k, 1}, packed.data());
          // Caches so small that K is cut.
          const Plan plan = make_plan(kKernel, 2, slices, {1024, 2048, 1 << 20});
          const Segment segment{reinterpret_cast<char*>(y.data()), n, Format::fp32};
          EpilogueProgram program{};
          program.count = 1;
          program.steps[0].operand = -1;
          const Weight weight = weight_at(layout, n, k, reinterpret_cast<const char*>(packed.data()));
          entered = left = 0;
          check(gemm({m,
                      n,
                      k,
                      {reinterpret_cast<const char*>(x.data()), k, Format::fp32},
                      {},
                      weight,
                      {},
                      {&segment, 1},
                      program,
                      nullptr,
                      nullptr},
                     plan),
                "no memory");
          check(entered == left && entered >= 1 && entered <= 2, "a session a thread and call");
          check(saved == 41, "what was configured before is lost");
          for (std::ptrdiff_t i = 0; i < m; ++i)
            for (std::ptrdiff_t j = 0; j < n; ++j) {
              float sum = 0;
              for (std::ptrdiff_t l = 0; l < k; ++l) sum += x[i * k + l] * w[j * k + l];
              check(y[i * n + j] == sum, "a wrong sum");
            }
        }
  std::puts("held");
}
