// GCC's vector types: one source for AVX2, AVX-512, NEON and whatever the compiler knows else.
// ISA (a name) and LANES (floats in a vector) come from the build. Everything has the object's own copy: what two
// instruction sets shared would be compiled for one of them.
#pragma once
#include <cstdint>
#include <cstring>
#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace octavo::ISA {
namespace {

constexpr int64_t kLanes = LANES;

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef uint32_t Bits __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint16_t Half __attribute__((vector_size(LANES * 2)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));
typedef uint8_t Pairs __attribute__((vector_size(LANES)));

template <typename T>
inline T read(const void* from) {
  T out;
  std::memcpy(&out, from, sizeof(T));
  return out;
}

inline void write(float* to, Vec value) { std::memcpy(to, &value, sizeof(Vec)); }

inline Vec widen(const float* w) { return read<Vec>(w); }
#if defined(__AVX512F__)
inline Vec widen(const uint16_t* w) { return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(read<__m256i>(w)), 16); }
inline Vec widen(const int8_t* w) { return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(read<__m128i>(w))); }
#elif defined(__AVX2__)
inline Vec widen(const uint16_t* w) { return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(read<__m128i>(w)), 16); }
inline Vec widen(const int8_t* w) {
  return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(w))));
}
#else
inline Vec widen(const uint16_t* w) { return (Vec)(__builtin_convertvector(read<Half>(w), Bits) << 16); }
inline Vec widen(const int8_t* w) { return __builtin_convertvector(__builtin_convertvector(read<Bytes>(w), Ints), Vec); }
#endif

// Bytes as integers.
inline Ints bytes(const uint8_t* w) {
#if defined(__AVX512F__)
  return (Ints)_mm512_cvtepu8_epi32(read<__m128i>(w));
#elif defined(__AVX2__)
  return (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(w)));
#else
  return __builtin_convertvector(read<Pairs>(w), Ints);
#endif
}

inline Vec floats(Ints numbers) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtepi32_ps((__m512i)numbers);
#elif defined(__AVX2__)
  return (Vec)_mm256_cvtepi32_ps((__m256i)numbers);
#else
  return __builtin_convertvector(numbers, Vec);
#endif
}

inline Vec splat(float value) { return value - Vec{}; }

inline float total(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#elif defined(__AVX2__)
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
#endif
}

inline float largest(Vec v) {
  float top = v[0];
  for (int i = 1; i < kLanes; ++i) top = v[i] > top ? v[i] : top;
  return top;
}

// e**x of x <= 88 to two units in the last place, 0 below -87; NaN stays NaN. Range reduction and polynomial as in
// Cephes' expf (S. Moshier, 1989).
inline Vec exponential(Vec x) {
  const Vec floor = splat(-87.0f), x_in = x < floor ? floor : x;
  const Vec magic = splat(12582912.0f);  // adding it rounds to an integer
  const Vec n = (x_in * 1.44269504088896341f + magic) - magic;
  const Vec r = (x_in - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const Vec fraction = p * (r * r) + r + 1.0f;
  const Vec power = (Vec)((__builtin_convertvector(n, Ints) + 127) << 23);
  const Vec result = fraction * power;
  return x < floor ? Vec{} : result;
}

}  // namespace
}  // namespace octavo::ISA
