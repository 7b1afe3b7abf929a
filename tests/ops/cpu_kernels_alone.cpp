// The kernels of one instruction set without Python or PyTorch, against plain loops in double: for emulators,
// valgrind and sanitizers. CONTRIBUTING.md has the commands; exits 1 and says what differs if anything does.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#include "kernels.h"
#include "tiles.h"

using namespace vimamba;
using std::vector;

#if defined(VIMAMBA_AMX)
static const Kernels& k = kernels_amx();
#elif defined(VIMAMBA_AVX512_BF16)
static const Kernels& k = kernels_avx512_bf16();
#elif defined(VIMAMBA_AVX512)
static const Kernels& k = kernels_avx512();
#elif defined(VIMAMBA_AVX2)
static const Kernels& k = kernels_avx2();
#else
static const Kernels& k = kernels_portable();
#endif

static std::mt19937 generator(1);
static bool failed = false;

static vector<float> normal(int64_t count, float scale = 1, float shift = 0) {
  std::normal_distribution<float> draw;
  vector<float> values(count);
  for (float& value : values) value = draw(generator) * scale + shift;
  return values;
}

static void expect(const char* what, double found, double wanted, double scale) {
  const double error = std::abs(found - wanted) / scale;
  if (error < 1e-5) return;
  std::printf("%s: %.9g instead of %.9g\n", what, found, wanted);
  failed = true;
}

static double softplus(double x) { return x > 20 ? x : std::log1p(std::exp(x)); }
static double silu(double x) { return x / (1 + std::exp(-x)); }

// One batch element: u, delta, z, out (L, D); A (D, N); B, C (L, N); D, bias (D).
struct Problem {
  int64_t D, L, N;
  bool reverse;
  vector<float> u, delta, z, A, B, C, skip, bias;

  Problem(int64_t D, int64_t L, int64_t N, bool reverse)
      : D(D),
        L(L),
        N(N),
        reverse(reverse),
        u(normal(L * D)),
        delta(normal(L * D)),
        z(normal(L * D)),
        A(normal(D * N, 1, -4)),
        B(normal(L * N)),
        C(normal(L * N)),
        skip(normal(D)),
        bias(normal(D, 1, -2)) {}

  vector<vector<float>*> inputs() { return {&u, &delta, &A, &B, &C, &skip, &z, &bias}; }

  // The scan in double, on inputs shifted by `step` along `direction`.
  vector<double> plain(double step = 0, const vector<vector<float>>& direction = {}) {
    vector<vector<double>> v;
    for (size_t i = 0; i < inputs().size(); ++i) {
      v.emplace_back(inputs()[i]->begin(), inputs()[i]->end());
      if (step != 0)
        for (size_t j = 0; j < v[i].size(); ++j) v[i][j] += step * direction[i][j];
    }
    vector<double> out(L * D), h(D * N);
    for (int64_t s = 0; s < L; ++s) {
      const int64_t t = reverse ? L - 1 - s : s;
      for (int64_t d = 0; d < D; ++d) {
        const double delta = softplus(v[1][t * D + d] + v[7][d]), u = v[0][t * D + d];
        double y = v[5][d] * u;
        for (int64_t n = 0; n < N; ++n) {
          double& state = h[d * N + n];
          state = std::exp(delta * v[2][d * N + n]) * state + delta * u * v[3][t * N + n];
          y += state * v[4][t * N + n];
        }
        out[t * D + d] = y * silu(v[6][t * D + d]);
      }
    }
    return out;
  }
};

static void check_scan(int64_t D, int64_t L, int64_t N, bool reverse) {
  Problem p(D, L, N, reverse);
  vector<float> out(L * D), last(D * N), states((L + kChunk - 1) / kChunk * D * N);
  auto rows = [&, L = L, D = D](vector<float>& data) { return Rows{data.data(), L * D, D}; };
  auto projection = [&](vector<float>& data) { return Projection{data.data(), L * N, 0, 1, N, false}; };
  const Scan scan = {.batch = 1,
                     .dim = D,
                     .length = L,
                     .state = N,
                     .groups = 1,
                     .bf16 = false,
                     .softplus = true,
                     .reverse = reverse,
                     .u = rows(p.u),
                     .delta = rows(p.delta),
                     .z = rows(p.z),
                     .B = projection(p.B),
                     .C = projection(p.C),
                     .A = p.A.data(),
                     .D = p.skip.data(),
                     .bias = p.bias.data(),
                     .out = rows(out),
                     .last = last.data(),
                     .states = states.data()};
  const int64_t blocks = blocks_of(D, 1, k.lanes);
  vector<float> scratch(k.scan_scratch(scan, blocks));
  k.scan_forward(scan, 0, 0, blocks, scratch.data());
  const vector<double> plain = p.plain();
  for (int64_t i = 0; i < L * D; ++i) expect("scan forward", out[i], plain[i], 1 + std::abs(plain[i]));

  // Gradients: along a random direction, against a difference of two plain scans.
  vector<float> dout = normal(L * D);
  vector<vector<float>> grads, direction;
  for (auto* input : p.inputs())
    grads.emplace_back(input->size()), direction.push_back(normal(input->size()));
  const ScanGradients grad = {.dout = rows(dout),
                              .du = rows(grads[0]),
                              .ddelta = rows(grads[1]),
                              .dz = rows(grads[6]),
                              .dlast = nullptr,
                              .dA = grads[2].data(),
                              .dD = grads[5].data(),
                              .dbias = grads[7].data(),
                              .dB = grads[3].data(),
                              .dC = grads[4].data()};
  scratch.resize(k.scan_backward_scratch(scan, blocks));
  k.scan_backward(scan, grad, 0, 0, 0, blocks, scratch.data());
  const double step = 1e-5;
  const vector<double> above = p.plain(step, direction), below = p.plain(-step, direction);
  double wanted = 0, found = 0, scale = 1;
  for (int64_t i = 0; i < L * D; ++i) wanted += dout[i] * (above[i] - below[i]) / (2 * step);
  for (size_t i = 0; i < grads.size(); ++i)
    for (size_t j = 0; j < grads[i].size(); ++j) {
      found += double(grads[i][j]) * direction[i][j];
      scale += std::abs(double(grads[i][j]) * direction[i][j]);
    }
  expect("scan backward", found, wanted, scale);
}

// The product in two halves of the panels, of M rows of `words` words each.
static vector<float> multiply(Product product, int64_t M,
                              const std::function<void(int64_t, int64_t, float*)>& pack) {
  vector<float> out(M * product.N);
  product.out = out.data();
  const int64_t panels = k.linear_panels(product.N), half = panels / 2;
  for (const auto& [first, last] : {std::pair{int64_t{0}, half}, {half, panels}}) {
    vector<float> packed(k.linear_packed(last - first, words_of(product.element, product.K)));
    product.packed = packed.data();
    pack(first, last, packed.data());
    k.linear_multiply(product, 0, M, first, last);
  }
  return out;
}

// The nearest bfloat16, ties to even.
static uint16_t rounded(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

static float widened(uint16_t half) {
  const uint32_t bits = uint32_t{half} << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

static void check_linear(int64_t M, int64_t K, int64_t N) {
  const vector<float> x = normal(M * K), weight = normal(N * K), bias = normal(N);
  Product product = {Element::float32, false, x.data(), nullptr, bias.data(), nullptr, K, N, N, K};
  const auto check = [&](const char* what, const vector<float>& out, auto x_at, auto weight_at) {
    for (int64_t m = 0; m < M; ++m)
      for (int64_t n = 0; n < N; ++n) {
        double sum = bias[n];
        for (int64_t i = 0; i < K; ++i) sum += double(x_at(m, i)) * weight_at(n, i);
        expect(what, out[m * N + n], sum, 1 + std::sqrt(double(K)));
      }
  };
  check(
      "linear",
      multiply(product, M,
               [&](int64_t first, int64_t last, float* packed) {
                 k.linear_pack(weight.data(), N, K, first, last, packed);
               }),
      [&](int64_t m, int64_t i) { return x[m * K + i]; },
      [&](int64_t n, int64_t i) { return weight[n * K + i]; });

  // Rows of bfloat16, padded to whole words.
  const int64_t pairs = words_of(Element::bfloat16, K);
  vector<uint16_t> halves(M * pairs * 2);
  for (int64_t m = 0; m < M; ++m)
    for (int64_t i = 0; i < K; ++i) halves[m * pairs * 2 + i] = rounded(x[m * K + i]);
  product.element = Element::bfloat16, product.x = halves.data(), product.x_stride = pairs;
  check(
      "linear of bfloat16",
      multiply(product, M,
               [&](int64_t first, int64_t last, float* packed) {
                 k.linear_pack_bfloat16(weight.data(), N, K, first, last, packed);
               }),
      [&](int64_t m, int64_t i) { return widened(rounded(x[m * K + i])); },
      [&](int64_t n, int64_t i) { return widened(rounded(weight[n * K + i])); });

  const int64_t words = words_of(Element::int8, K);
  vector<int8_t> integers(M * words * 4), of_weight(N * K);
  vector<float> scales(M), of_features(N, 0.01f);
  vector<int32_t> sums(M);
  for (int64_t i = 0; i < N * K; ++i)
    of_weight[i] = int8_t(std::lround(std::fmax(-127.0f, std::fmin(127.0f, 50 * weight[i]))));
  k.linear_quantize(x.data(), M, K, integers.data(), scales.data(), sums.data());
  for (int64_t i = 0; i < M * K; ++i)
    expect("integers", integers[i / K * words * 4 + i % K] * double(scales[i / K]), x[i],
           1e5 * 0.51 * scales[i / K]);
  product.element = Element::int8, product.x = integers.data(), product.x_stride = words;
  product.x_scales = scales.data(), product.x_sums = sums.data(), product.scales = of_features.data();
  check(
      "linear of integers",
      multiply(product, M,
               [&](int64_t first, int64_t last, float* packed) {
                 k.linear_pack_int8(of_weight.data(), N, K, first, last, packed);
               }),
      [&](int64_t m, int64_t i) { return integers[m * words * 4 + i] * scales[m]; },
      [&](int64_t n, int64_t i) { return of_weight[n * K + i] * 0.01f; });
}

// Any change of a byte, and any length, gives other numbers.
static void check_fingerprint() {
  vector<uint8_t> bytes(1000, 7);
  const auto numbers = [&](int64_t count) {
    vector<uint64_t> sums(kFingerprint);
    k.fingerprint(bytes.data(), count, sums.data());
    return sums;
  };
  const vector<uint64_t> whole = numbers(1000);
  for (const size_t at : {0, 255, 256, 700, 999}) {
    bytes[at] ^= 64;
    expect("fingerprint", whole == numbers(1000), 0, 1);
    bytes[at] ^= 64;
  }
  expect("fingerprint", whole == numbers(1000), 1, 1);
}

// Sizes of a mixer of one direction, and which way round its convolution and its scan run.
struct Sizes {
  int64_t D, L, N, R;
  bool conv_reverse, scan_reverse;
};

// The mixer in double, with a scale of 1; v: x, z (L, D), then the weights in the order of Direction. `terms`
// takes how large the terms are that each output is the sum of: rounding goes by those, not by their sum.
static vector<double> plain_mixer(const Sizes& s, const vector<vector<double>>& v,
                                  vector<double>* terms = nullptr) {
  const auto [D, L, N, R, conv_reverse, scan_reverse] = s;
  const auto &x = v[0], &z = v[1], &taps = v[2], &conv_bias = v[3], &x_proj = v[4], &dt_proj = v[5];
  vector<double> c(L * D), projected(L * (R + 2 * N)), h(D * N), out(L * D);
  for (int64_t t = 0; t < L; ++t)
    for (int64_t d = 0; d < D; ++d) {
      double sum = conv_bias[d];
      for (int64_t j = 0; j < 4; ++j) {
        const int64_t from = conv_reverse ? t + j : t - j;
        if (from >= 0 && from < L) sum += taps[d * 4 + 3 - j] * x[from * D + d];
      }
      c[t * D + d] = silu(sum);
    }
  for (int64_t t = 0; t < L; ++t)
    for (int64_t e = 0; e < R + 2 * N; ++e)
      for (int64_t d = 0; d < D; ++d) projected[t * (R + 2 * N) + e] += x_proj[e * D + d] * c[t * D + d];
  for (int64_t step = 0; step < L; ++step) {
    const int64_t t = scan_reverse ? L - 1 - step : step;
    const double *dt = &projected[t * (R + 2 * N)], *B = dt + R, *C = B + N;
    for (int64_t d = 0; d < D; ++d) {
      double raw = v[6][d], y = v[8][d] * c[t * D + d], size = std::abs(y);
      for (int64_t r = 0; r < R; ++r) raw += dt_proj[d * R + r] * dt[r];
      const double delta = softplus(raw);
      for (int64_t n = 0; n < N; ++n) {
        double& state = h[d * N + n];
        state = std::exp(-delta * std::exp(v[7][d * N + n])) * state + delta * c[t * D + d] * B[n];
        y += state * C[n], size += std::abs(state * C[n]);
      }
      out[t * D + d] = y * silu(z[t * D + d]);
      if (terms) (*terms)[t * D + d] = std::abs(size * silu(z[t * D + d]));
    }
  }
  return out;
}

// x, z, dout (L, D) and their gradients, as the kernels are to have them: float32 or bfloat16.
struct Activation {
  vector<float> floats;
  vector<uint16_t> halves;

  Activation(const vector<float>& values, bool bf16) : floats(values) {
    if (bf16)
      for (const float value : values) halves.push_back(rounded(value));
  }
  Rows rows(const Sizes& s) {
    void* data = floats.data();
    if (!halves.empty()) data = halves.data();
    return {data, s.L * s.D, s.D};
  }
  vector<float> read() const {
    vector<float> values = floats;
    for (size_t i = 0; i < halves.size(); ++i) values[i] = widened(halves[i]);
    return values;
  }
};

// What the kernels make of v as in plain_mixer, with a scale of 0.5: the output with the gates, in two calls;
// then, of a mixer without gates, the gradients of v from dout.
static vector<vector<float>> run_mixer(const Sizes& s, const vector<vector<float>>& v,
                                       const vector<float>& gates, const vector<float>& given_dout,
                                       bool bf16) {
  const auto [D, L, N, R, conv_reverse, scan_reverse] = s;
  Activation x(v[0], bf16), z(v[1], bf16), dout(given_dout, bf16);
  Activation out(vector<float>(L * D), bf16), dx = out, dz = out;
  vector<float> states(chunks_of(L) * D * N);
  Mixer mixer = {.batch = 1,
                 .dim = D,
                 .length = L,
                 .state = N,
                 .dt_rank = R,
                 .width = 4,
                 .bf16 = bf16,
                 .scale = 0.5f,
                 .x = x.rows(s),
                 .z = z.rows(s),
                 .out = out.rows(s),
                 .gates = gates.data(),
                 .gate_batch_stride = L,
                 .gate_time_stride = 1};
  const Direction way = {.index = 0,
                         .conv_weight = v[2].data(),
                         .conv_bias = v[3].data(),
                         .x_proj = v[4].data(),
                         .dt_proj = v[5].data(),
                         .dt_bias = v[6].data(),
                         .A_log = v[7].data(),
                         .D = v[8].data(),
                         .conv_reverse = conv_reverse,
                         .scan_reverse = scan_reverse,
                         .states = states.data()};
  const int64_t blocks = blocks_of(D, 1, k.lanes), meet = L / 3;
  vector<float> packed(k.mixer_packed(mixer)), scratch(k.mixer_scratch(mixer)), state(blocks * N * k.lanes);
  k.mixer_pack(mixer, way, packed.data());
  for (const auto [begin, end] : {std::pair(int64_t{0}, meet), std::pair(meet, L)})
    k.mixer_scan(mixer, way, packed.data(), 0, begin, end, 0, blocks, nullptr, state.data(), true, true,
                 scratch.data());

  mixer.gates = nullptr;
  vector<vector<float>> found = {out.read()};
  for (const auto& input : v) found.emplace_back(input.size());
  packed.resize(k.mixer_backward_packed(mixer)), scratch.resize(k.mixer_backward_scratch(mixer));
  vector<float> sums(k.mixer_backward_sums(mixer));
  k.mixer_backward_pack(mixer, way, packed.data());
  k.mixer_backward(mixer, way, {.dout = dout.rows(s), .dx = dx.rows(s), .dz = dz.rows(s)}, packed.data(), 0,
                   true, sums.data(), scratch.data());
  k.mixer_backward_unpack(mixer, packed.data(), sums.data(),
                          {.conv_weight = found[3].data(),
                           .conv_bias = found[4].data(),
                           .x_proj = found[5].data(),
                           .dt_proj = found[6].data(),
                           .dt_bias = found[7].data(),
                           .A_log = found[8].data(),
                           .D = found[9].data()});
  found[1] = dx.read(), found[2] = dz.read();

  // With what chooses constant; the values are tested against autograd, the memory here.
  mixer.gates = gates.data();
  k.mixer_frozen_backward(mixer, way, {.dout = dout.rows(s), .dx = dx.rows(s)}, packed.data(), 0, true,
                          scratch.data());
  for (const float each : dx.read()) expect("frozen mixer backward", std::isfinite(each), 1, 1);
  return found;
}

static vector<float> as_bfloat16(vector<float> values) {
  for (float& value : values) value = widened(rounded(value));
  return values;
}

static void check_mixer(const Sizes& s) {
  const auto [D, L, N, R, conv_reverse, scan_reverse] = s;
  const vector<vector<float>> v = {as_bfloat16(normal(L * D)),
                                   as_bfloat16(normal(L * D)),
                                   normal(D * 4),
                                   normal(D),
                                   normal((R + 2 * N) * D, 0.2),
                                   normal(D * R, 0.3),
                                   normal(D, 1, -2),
                                   normal(D * N, 0.5),
                                   normal(D)};
  vector<double> terms(L * D);
  auto shifted = [&](double step, const vector<vector<float>>& along) {
    vector<vector<double>> doubles;
    for (size_t i = 0; i < v.size(); ++i) {
      doubles.emplace_back(v[i].begin(), v[i].end());
      if (step != 0)
        for (size_t j = 0; j < v[i].size(); ++j) doubles[i][j] += step * along[i][j];
    }
    return plain_mixer(s, doubles, step == 0 ? &terms : nullptr);
  };
  const vector<float> gates = normal(L), dout = as_bfloat16(normal(L * D));
  const vector<vector<float>> exact = run_mixer(s, v, gates, dout, false);
  const vector<double> plain = shifted(0, v);
  for (int64_t i = 0; i < L * D; ++i)
    expect("mixer", exact[0][i], 0.5 * gates[i / D] * plain[i], 1 + terms[i]);

  // Gradients as those of the scan.
  vector<vector<float>> along;
  for (const auto& input : v) along.push_back(normal(input.size()));
  const double step = 1e-5;
  const vector<double> above = shifted(step, along), below = shifted(-step, along);
  double wanted = 0, found = 0, scale = 1;
  for (int64_t i = 0; i < L * D; ++i) wanted += 0.5 * dout[i] * (above[i] - below[i]) / (2 * step);
  for (size_t i = 0; i < along.size(); ++i)
    for (size_t j = 0; j < along[i].size(); ++j) {
      found += double(exact[i + 1][j]) * along[i][j];
      scale += std::abs(double(exact[i + 1][j]) * along[i][j]);
    }
  expect("mixer backward", found, wanted, scale);

  // Activations of bfloat16: what is stored is rounded (1.7e-3), and x_proj's product where there are
  // instructions for it; what lies between has a relative error of 1e-4.
  const vector<vector<float>> coarse = run_mixer(s, v, gates, dout, true);
  for (size_t i = 0; i < exact.size(); ++i) {
    double error = 0, size = 0;
    for (size_t j = 0; j < exact[i].size(); ++j)
      error += std::pow(double(coarse[i][j]) - exact[i][j], 2), size += std::pow(double(exact[i][j]), 2);
    expect("mixer of bfloat16", std::sqrt(error / (size + 1e-30)), 0, k.has_bf16 ? 2000 : 300);
  }
}

int main() {
#if defined(VIMAMBA_AMX)
  may_use_tiles();
#endif
  check_fingerprint();
  for (const int64_t M : {1, 7, 50})
    check_linear(M, 37, 101), check_linear(M, 3, 5), check_linear(M, 192, 85);
  for (const bool reverse : {false, true}) {
    for (const int64_t N : {1, 5, 16, 19}) check_scan(37, 131, N, reverse);
    check_scan(1, 1, 16, reverse);
    for (const bool opposite : {false, true}) check_mixer({37, 135, 16, 3, reverse != opposite, reverse});
    check_mixer({32, 1, 5, 2, reverse, reverse});
  }
  std::printf("%s: %s\n", k.name, failed ? "wrong" : "ok");
  return failed;
}
