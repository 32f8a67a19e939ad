// exp, tanh and log on small vectors of float or double, written with the compiler's vector
// extension so that one source serves every instruction set. Errors: exp 2 ulp, tanh 3 ulp (float).
//
// A vector is as wide as a register of the CPU: GCC turns comparisons and selections of wider ones
// into one scalar instruction an element.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#define BUPO_INLINE inline __attribute__((always_inline))

namespace bupo::cpu {

template <class T, int kBytes>
struct VectorOf {
  typedef T Values __attribute__((vector_size(kBytes)));
};
template <class T, int kBytes>
using Vec = typename VectorOf<T, kBytes>::Values;
// Integers of the same width and number, as comparisons give them.
template <class V>
using BitsOf = decltype(V{} < V{});
template <class V>
using ElementOf = std::remove_reference_t<decltype(V{}[0])>;
template <class V>
inline constexpr int kLanes = sizeof(V) / sizeof(ElementOf<V>);

// body(std::integral_constant<int, bytes>) compiled for several levels of x86, each with vectors of
// its width; called is the best one that this CPU has. body is inlined into each.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
template <class Body>
__attribute__((target("arch=x86-64-v4"))) void with_512_bits(const Body& body) {
  body(std::integral_constant<int, 64>{});
}

template <class Body>
__attribute__((target("arch=x86-64-v3"))) void with_256_bits(const Body& body) {
  body(std::integral_constant<int, 32>{});
}

// BUPO_CPU_VECTORS=128 or 256 bounds it: for tests of the others.
inline int vector_bytes() {
  static const int bytes = [] {
    const char* given = std::getenv("BUPO_CPU_VECTORS");
    const auto bound = [&](const char* bits) { return given && std::strcmp(given, bits) == 0; };
    if (bound("128") || !__builtin_cpu_supports("x86-64-v3")) return 16;
    return bound("256") || !__builtin_cpu_supports("x86-64-v4") ? 32 : 64;
  }();
  return bytes;
}

template <class Body>
void with_vectors(const Body& body) {
  switch (vector_bytes()) {
    case 64:
      return with_512_bits(body);
    case 32:
      return with_256_bits(body);
    default:
      return body(std::integral_constant<int, 16>{});
  }
}
#else
inline int vector_bytes() { return 16; }

template <class Body>
void with_vectors(const Body& body) {
  body(std::integral_constant<int, 16>{});
}
#endif

template <class V>
BUPO_INLINE V load(const ElementOf<V>* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class V>
BUPO_INLINE void store(ElementOf<V>* p, const V& v) {
  std::memcpy(p, &v, sizeof v);
}

template <class V>
BUPO_INLINE V fill(ElementOf<V> x) {
  return x - V{};
}

template <class V, class Function>
BUPO_INLINE V each(const V& x, const Function& function) {
  V y;
  for (int l = 0; l < kLanes<V>; ++l) y[l] = function(x[l]);
  return y;
}

// e^x for x <= 0 (0 below the smallest normal number); nan stays nan.
template <class V>
BUPO_INLINE V exp_nonpositive(const V& x) {
  if constexpr (std::is_same_v<ElementOf<V>, double>) {
    return each(x, [](double d) { return std::exp(d); });
  } else {
    using Bits = BitsOf<V>;
    const V floor = fill<V>(-87.3f);
    const V y = x < floor ? floor : x;
    const V magic = fill<V>(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const V shifted = y * 1.44269504088896341f + magic;
    const V n = shifted - magic;
    V r = y - n * 0.693359375f;  // ln 2 in two parts, the first exact in float
    r = r + n * 2.12194440e-4f;
    V poly = fill<V>(1.9875691500e-4f);
    poly = poly * r + 1.3981999507e-3f;
    poly = poly * r + 8.3334519073e-3f;
    poly = poly * r + 4.1665795894e-2f;
    poly = poly * r + 1.6666665459e-1f;
    poly = poly * r + 5.0000001201e-1f;
    poly = poly * (r * r) + r + 1.0f;
    const Bits exponent = ((Bits)shifted - (Bits)magic + 127) << 23;  // 2^n, n in [-126, 0]
    const V result = poly * (V)exponent;
    return x < floor ? V{} : result;
  }
}

template <class V>
BUPO_INLINE V tanh(const V& x) {
  if constexpr (std::is_same_v<ElementOf<V>, double>) {
    return each(x, [](double d) { return std::tanh(d); });
  } else {
    const V magnitude = x < 0.0f ? -x : x;
    const V e = exp_nonpositive<V>(magnitude * -2.0f);
    const V large = (1.0f - e) / (1.0f + e);
    const V q = x * x;
    V poly = fill<V>(-5.70498872745e-3f);
    poly = poly * q + 2.06390887954e-2f;
    poly = poly * q - 5.37397155531e-2f;
    poly = poly * q + 1.33314422036e-1f;
    poly = poly * q - 3.33332819422e-1f;
    const V small = poly * q * x + x;
    return magnitude < 0.625f ? small : (x < 0.0f ? -large : large);
  }
}

// log(1 + x) for -1 < x <= 0: log(2^n m) = n log 2 + 2 atanh((m - 1) / (m + 1)).
template <class V>
BUPO_INLINE V log1p_nonpositive(const V& x) {
  if constexpr (std::is_same_v<ElementOf<V>, double>) {
    return each(x, [](double d) { return std::log1p(d); });
  } else {
    using Bits = BitsOf<V>;
    const V y = x + 1.0f;
    const Bits n = ((Bits)y - 0x3f3504f3) >> 23;  // m in [sqrt(1/2), sqrt(2))
    const V m = (V)((Bits)y - (n << 23));
    const V s = (n == 0 ? x : m - 1.0f) / (n == 0 ? x + 2.0f : m + 1.0f), q = s * s;
    V poly = fill<V>(1.0f / 9);
    poly = poly * q + 1.0f / 7;
    poly = poly * q + 1.0f / 5;
    poly = poly * q + 1.0f / 3;
    const V of_m = 2.0f * s + 2.0f * s * (q * poly);
    return of_m + __builtin_convertvector(n, V) * 0.69314718056f;
  }
}

// Round to nearest even; nan stays nan.
BUPO_INLINE uint16_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

template <class V>
BUPO_INLINE void store_bfloat16(uint16_t* p, const V& v) {
  using Bits = BitsOf<V>;
  using Half = Vec<uint16_t, sizeof(V) / 2>;
  const Bits bits = (Bits)v;
  Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  rounded = v != v ? Bits{} + 0x7fc0 : rounded;
  const Half half = __builtin_convertvector(rounded, Half);
  std::memcpy(p, &half, sizeof half);
}

BUPO_INLINE float from_bfloat16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}

}  // namespace bupo::cpu
