// exp and tanh on small vectors of float or double, written with the compiler's vector extension so
// that one source serves every instruction set. Errors: exp 2 ulp, tanh 3 ulp (float).

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// Compiled for several x86 levels and chosen at load time; elsewhere the compiler's default.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define BUPO_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define BUPO_CLONES
#endif
#define BUPO_INLINE inline __attribute__((always_inline))

namespace bupo::cpu {

inline constexpr int kVectorBytes = 64;

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float Values __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Bits __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double Values __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Bits __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename VectorOf<T>::Values;
template <class T>
inline constexpr int kLanes = kVectorBytes / sizeof(T);

template <class T>
BUPO_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
BUPO_INLINE void store(T* p, const Vec<T>& v) {
  std::memcpy(p, &v, sizeof v);
}

template <class T>
BUPO_INLINE Vec<T> fill(T x) {
  return x - Vec<T>{};
}

// e^x for x <= 0 (0 below the smallest normal number); nan stays nan.
BUPO_INLINE Vec<float> exp_nonpositive(const Vec<float>& x) {
  using Bits = VectorOf<float>::Bits;
  const Vec<float> floor = fill(-87.3f);
  const Vec<float> y = x < floor ? floor : x;
  const Vec<float> magic = fill(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec<float> shifted = y * 1.44269504088896341f + magic;
  const Vec<float> n = shifted - magic;
  Vec<float> r = y - n * 0.693359375f;  // ln 2 in two parts, the first exact in float
  r = r + n * 2.12194440e-4f;
  Vec<float> poly = fill(1.9875691500e-4f);
  poly = poly * r + 1.3981999507e-3f;
  poly = poly * r + 8.3334519073e-3f;
  poly = poly * r + 4.1665795894e-2f;
  poly = poly * r + 1.6666665459e-1f;
  poly = poly * r + 5.0000001201e-1f;
  poly = poly * (r * r) + r + 1.0f;
  const Bits exponent = ((Bits)shifted - (Bits)magic + 127) << 23;  // 2^n, n in [-126, 0]
  const Vec<float> result = poly * (Vec<float>)exponent;
  return x < floor ? Vec<float>{} : result;
}

BUPO_INLINE Vec<double> exp_nonpositive(const Vec<double>& x) {
  Vec<double> y;
  for (int l = 0; l < kLanes<double>; ++l) y[l] = std::exp(x[l]);
  return y;
}

BUPO_INLINE Vec<float> tanh(const Vec<float>& x) {
  const Vec<float> magnitude = x < 0.0f ? -x : x;
  const Vec<float> e = exp_nonpositive(magnitude * -2.0f);
  const Vec<float> large = (1.0f - e) / (1.0f + e);
  const Vec<float> q = x * x;
  Vec<float> poly = fill(-5.70498872745e-3f);
  poly = poly * q + 2.06390887954e-2f;
  poly = poly * q - 5.37397155531e-2f;
  poly = poly * q + 1.33314422036e-1f;
  poly = poly * q - 3.33332819422e-1f;
  const Vec<float> small = poly * q * x + x;
  return magnitude < 0.625f ? small : (x < 0.0f ? -large : large);
}

BUPO_INLINE Vec<double> tanh(const Vec<double>& x) {
  Vec<double> y;
  for (int l = 0; l < kLanes<double>; ++l) y[l] = std::tanh(x[l]);
  return y;
}

// Round to nearest even; nan stays nan.
BUPO_INLINE uint16_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

BUPO_INLINE void store_bfloat16(uint16_t* p, const Vec<float>& v) {
  using Bits = VectorOf<float>::Bits;
  typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
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
