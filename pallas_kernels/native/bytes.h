// Registers of bytes, and products of four of them at once: the processor's own (AVX512-VNNI), else by pairs, whose sums
// fit into 16 bits.
#pragma once
#include <utility>

#include "kernels.h"
#include "vectors.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#define OCTAVO_BYTES

namespace octavo::ISA {
namespace {

#ifdef __AVX512F__
#define OCTAVO_WIDE(name) _mm512_##name
typedef __m512i Raw;
#else
#define OCTAVO_WIDE(name) _mm256_##name
typedef __m256i Raw;
#endif
typedef int8_t RawBytes __attribute__((vector_size(LANES * 4)));
typedef uint16_t RawHalves __attribute__((vector_size(LANES * 4)));

#ifdef __AVX512VNNI__
constexpr bool kSigned = false;  // whether int8 weights are multiplied as they are, or 128 more
#else
constexpr bool kSigned = true;
#endif

inline Raw all_bytes(int value) { return (Raw)(RawBytes{} + static_cast<int8_t>(value)); }

// Four vectors of a panel's columns in the order that `quads` leaves them in.
inline void to_quads(Vec (&v)[4]) {
#ifdef __AVX512F__
  const __m512 a = (__m512)v[0], b = (__m512)v[1], c = (__m512)v[2], d = (__m512)v[3];
  const __m512 ab = _mm512_shuffle_f32x4(a, b, 0x44), cd = _mm512_shuffle_f32x4(c, d, 0x44);
  const __m512 ab_high = _mm512_shuffle_f32x4(a, b, 0xee), cd_high = _mm512_shuffle_f32x4(c, d, 0xee);
  v[0] = (Vec)_mm512_shuffle_f32x4(ab, cd, 0x88);
  v[1] = (Vec)_mm512_shuffle_f32x4(ab, cd, 0xdd);
  v[2] = (Vec)_mm512_shuffle_f32x4(ab_high, cd_high, 0x88);
  v[3] = (Vec)_mm512_shuffle_f32x4(ab_high, cd_high, 0xdd);
#else
  const __m256 a = (__m256)v[0], b = (__m256)v[1], c = (__m256)v[2], d = (__m256)v[3];
  v[0] = (Vec)_mm256_permute2f128_ps(a, c, 0x20);
  v[1] = (Vec)_mm256_permute2f128_ps(a, c, 0x31);
  v[2] = (Vec)_mm256_permute2f128_ps(b, d, 0x20);
  v[3] = (Vec)_mm256_permute2f128_ps(b, d, 0x31);
#endif
}

// And back.
inline void from_quads(Vec (&v)[4]) {
#ifdef __AVX512F__
  to_quads(v);
#else
  std::swap(v[1], v[2]);
  to_quads(v);
  std::swap(v[1], v[2]);
#endif
}

// Four rows of bytes become vectors of a column's four bytes each, columns 0 to 3 of every 16, then 4 to 7, and so on.
inline void quads(const Raw (&row)[4], Raw (&out)[4]) {
  const Raw low = OCTAVO_WIDE(unpacklo_epi8)(row[0], row[1]), low_next = OCTAVO_WIDE(unpacklo_epi8)(row[2], row[3]);
  const Raw high = OCTAVO_WIDE(unpackhi_epi8)(row[0], row[1]), high_next = OCTAVO_WIDE(unpackhi_epi8)(row[2], row[3]);
  out[0] = OCTAVO_WIDE(unpacklo_epi16)(low, low_next);
  out[1] = OCTAVO_WIDE(unpackhi_epi16)(low, low_next);
  out[2] = OCTAVO_WIDE(unpacklo_epi16)(high, high_next);
  out[3] = OCTAVO_WIDE(unpackhi_epi16)(high, high_next);
}

// The first `count` of a vector's bytes, zeros behind them.
inline Raw some_bytes(const uint8_t* from, int64_t count) {
#ifdef __AVX512F__
  return _mm512_maskz_loadu_epi8(count == 64 ? ~__mmask64{0} : (__mmask64{1} << count) - 1, from);
#else
  if (count == sizeof(Raw)) return read<Raw>(from);
  Raw out{};
  std::memcpy(&out, from, count);
  return out;
#endif
}

// Sums of products of weights by activations, by columns of quads, of kRoundedRows rows at most.
#ifdef __AVX512VNNI__
template <bool kInt4>
struct Products {
  Raw sum{};
  void add(Raw weights, Raw x) { sum = _mm512_dpbusd_epi32(sum, weights, x); }
  Ints total() const { return (Ints)sum; }
};
#else
// Of int8, magnitudes by activations with the weights' signs: two products are at most 2 * 128 * 127.
template <bool kInt4>
struct Products {
  Ints sum{};
  void add(Raw weights, Raw x) {
#ifdef __AVX512F__
    const Raw turned = _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(weights), Raw{}, x);
#else
    const Raw turned = _mm256_sign_epi8(x, weights);
#endif
    const Raw pairs = OCTAVO_WIDE(maddubs_epi16)(OCTAVO_WIDE(abs_epi8)(weights), turned);
    sum += (Ints)OCTAVO_WIDE(madd_epi16)(pairs, OCTAVO_WIDE(set1_epi16)(1));
  }
  Ints total() const { return sum; }
};
// Of nibbles, which are not negative: kRoundedRows / 2 products are at most 16 * 15 * 127.
template <>
struct Products<true> {
  RawHalves sum{};
  void add(Raw weights, Raw x) { sum += (RawHalves)OCTAVO_WIDE(maddubs_epi16)(weights, x); }
  Ints total() const { return (Ints)OCTAVO_WIDE(madd_epi16)((Raw)sum, OCTAVO_WIDE(set1_epi16)(1)); }
};
static_assert(kRoundedRows / 2 * 15 * 127 < 1 << 15);
#endif

// The nearest integers, ties to even.
#ifdef __AVX512F__
inline Ints nearest(Vec v) { return (Ints)_mm512_cvtps_epi32((__m512)v); }
#else
inline Ints nearest(Vec v) { return (Ints)_mm256_cvtps_epi32((__m256)v); }
#endif

// Integers of -128 to 127, as bytes.
inline void write_bytes(int8_t* to, Ints numbers) {
#ifdef __AVX512F__
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtsepi32_epi8((__m512i)numbers));
#else
  const __m256i all = (__m256i)numbers;
  const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(halves, halves));
#endif
}

}  // namespace
}  // namespace octavo::ISA
#endif
