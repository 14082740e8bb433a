// GCC's vector types: one source for AVX2, AVX-512, NEON and whatever the compiler knows else.
// ISA (a name) and LANES (floats in a vector) come from the build. Everything has the object's own copy: what two
// instruction sets shared would be compiled for one of them.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
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

// To bfloat16, ties to even; NaN stays NaN.
inline void narrow(uint16_t* to, Vec value) {
#if defined(__AVX512BF16__)
  const __m256bh half = _mm512_cvtneps_pbh((__m512)value);
  std::memcpy(to, &half, sizeof(half));
#else
  const Bits bits = (Bits)value, even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Half half = __builtin_convertvector(value == value ? even : (Bits{} + 0x7fc0), Half);
  std::memcpy(to, &half, sizeof(half));
#endif
}

// In the type that is there.
inline void put(float* to, Vec value) { write(to, value); }
inline void put(uint16_t* to, Vec value) { narrow(to, value); }

inline Vec splat(float value) { return value - Vec{}; }

#if defined(__AVX2__) && !defined(__AVX512F__)
// combine(x, y) of all numbers of a vector.
template <typename Combine>
inline float folded(Vec v, Combine combine) {
  const __m128 four = combine(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  const __m128 two = combine(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(combine(two, _mm_movehdup_ps(two)));
}
#endif

inline float total(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#elif defined(__AVX2__)
  return folded(v, [](__m128 a, __m128 b) { return _mm_add_ps(a, b); });
#else
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
#endif
}

// The highest, of numbers.
inline float top(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#elif defined(__AVX2__)
  return folded(v, [](__m128 a, __m128 b) { return _mm_max_ps(a, b); });
#else
  float most = v[0];
  for (int i = 1; i < kLanes; ++i) most = v[i] > most ? v[i] : most;
  return most;
#endif
}

#if defined(__AVX512F__)
// combine(x, y) of all numbers of each of 16 vectors, always in the same order.
template <typename Combine>
inline __m512 reduced(const Vec* v, Combine combine) {
  const auto quarters = [&](__m512 a, __m512 b) {
    return combine(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  __m512 fours[4];
  for (int i = 0; i < 4; ++i) {
    __m512d pairs[2];
    for (int j = 0; j < 2; ++j) {
      const __m512 a = (__m512)v[4 * i + 2 * j], b = (__m512)v[4 * i + 2 * j + 1];
      pairs[j] = _mm512_castps_pd(combine(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
    }
    fours[i] = combine(_mm512_castpd_ps(_mm512_unpacklo_pd(pairs[0], pairs[1])),
                       _mm512_castpd_ps(_mm512_unpackhi_pd(pairs[0], pairs[1])));
  }
  return quarters(quarters(fours[0], fours[1]), quarters(fours[2], fours[3]));
}
#endif

// Sums to 0, each on its own: as one array they would be kept in memory.
template <int kRows, int kCols, typename T>
inline void clear(T (&sum)[kRows][kCols]) {
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kCols; ++c) sum[r][c] = T{};
}
template <int kRows, int kCols, int kVecs>
inline void clear(Vec (&sum)[kRows][kCols][kVecs]) {
  for (int r = 0; r < kRows; ++r) clear(sum[r]);
}

// The totals of kCount vectors; of kTotals at once as quickly as of a few.
#if defined(__AVX512F__)
constexpr int kTotals = 16;
inline void totals(const Vec* v, float* to, std::integral_constant<int, kTotals>) {
  write(to, (Vec)reduced(v, [](__m512 a, __m512 b) { return a + b; }));
}
#else
constexpr int kTotals = 1;
#endif
template <int kCount>
inline void totals(const Vec* v, float* to, std::integral_constant<int, kCount>) {
  for (int i = 0; i < kCount; ++i) to[i] = total(v[i]);
}

// The highest numbers of kLanes vectors.
inline void tops(const Vec* v, float* to) {
#if defined(__AVX512F__)
  write(to, (Vec)reduced(v, [](__m512 a, __m512 b) { return _mm512_max_ps(a, b); }));
#else
  for (int i = 0; i < kLanes; ++i) {
    to[i] = v[i][0];
    for (int j = 1; j < kLanes; ++j) to[i] = v[i][j] > to[i] ? v[i][j] : to[i];
  }
#endif
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

// one(height, r) for tiles of `rows` rows, r the first of a tile: of kMost, then of 4 and 3 if that is more, 2 and 1. Two
// vectors wide these are at least eight sums at once where they can be, which hides a product's latency.
template <int kMost, typename One>
inline void in_heights(int64_t rows, One one) {
  int64_t r = 0;
  constexpr int kPoor = kMost > 4 ? 2 : 1;  // a rest that is better shared with the tile before
  if constexpr (kMost != 4)
    for (; rows - r >= kMost && rows - r != kMost + kPoor; r += kMost) one(std::integral_constant<int, kMost>(), r);
  if constexpr (kMost >= 4)
    for (; rows - r >= 4; r += 4) one(std::integral_constant<int, 4>(), r);
  if constexpr (kMost > 4)
    if (rows - r == 3) return one(std::integral_constant<int, 3>(), r);
  for (; rows - r >= 2; r += 2) one(std::integral_constant<int, 2>(), r);
  if (r < rows) one(std::integral_constant<int, 1>(), r);
}

#ifdef __AVX512BF16__
// Pairs of bfloat16 that the processor multiplies and adds to a float32, denormal numbers taken as 0.
inline Vec add_pairs(Vec sum, __m512i x, __m512i w) {
  return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
}

// 32 numbers in bfloat16.
inline __m512i halves(const uint16_t* w) { return _mm512_loadu_si512(w); }
inline __m512i halves(const int8_t* w) {
  return (__m512i)_mm512_cvtne2ps_pbh((__m512)widen(w + kLanes), (__m512)widen(w));
}

// Two rows of 32 bfloat16 beside each other, as unpacking leaves them: the first register has columns 0-3, 8-11, 16-19
// and 24-27, the second the others.
inline void in_order(const Vec (&sum)[2], Vec& low, Vec& high) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  low = (Vec)_mm512_permutex2var_ps((__m512)sum[0], first, (__m512)sum[1]);
  high = (Vec)_mm512_permutex2var_ps((__m512)sum[0], second, (__m512)sum[1]);
}
inline void in_pair_order(Vec low, Vec high, Vec (&sum)[2]) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
  const __m512i second = _mm512_setr_epi32(4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  sum[0] = (Vec)_mm512_permutex2var_ps((__m512)low, first, (__m512)high);
  sum[1] = (Vec)_mm512_permutex2var_ps((__m512)low, second, (__m512)high);
}

// Rows become columns, of 16 times 16 numbers of 32 bits.
inline void transpose(__m512i (&rows)[16]) {
  __m512i part[16];
  for (int i = 0; i < 16; i += 2) {
    part[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    part[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      rows[i + 2 * j] = _mm512_unpacklo_epi64(part[i + j], part[i + j + 2]);
      rows[i + 2 * j + 1] = _mm512_unpackhi_epi64(part[i + j], part[i + j + 2]);
    }
  // rows[4 * g + c] has column c + 4 * q of rows 4 * g to 4 * g + 3 in its quarter q.
  for (int c = 0; c < 4; ++c)
    for (int g = 0; g < 2; ++g) {
      part[8 * g + c] = _mm512_shuffle_i32x4(rows[8 * g + c], rows[8 * g + 4 + c], 0x88);
      part[8 * g + 4 + c] = _mm512_shuffle_i32x4(rows[8 * g + c], rows[8 * g + 4 + c], 0xdd);
    }
  // part[8 * g + c] has quarters 0 and 2 of two such, part[8 * g + 4 + c] 1 and 3.
  for (int c = 0; c < 4; ++c) {
    rows[c] = _mm512_shuffle_i32x4(part[c], part[8 + c], 0x88);
    rows[8 + c] = _mm512_shuffle_i32x4(part[c], part[8 + c], 0xdd);
    rows[4 + c] = _mm512_shuffle_i32x4(part[4 + c], part[12 + c], 0x88);
    rows[12 + c] = _mm512_shuffle_i32x4(part[4 + c], part[12 + c], 0xdd);
  }
}
#endif

}  // namespace
}  // namespace octavo::ISA
