// int8 activations times int8 or int4 weights, by the processor's products of four bytes (AVX512-VNNI).
//
// The processor multiplies unsigned by signed bytes. The weights are made unsigned, int8 by adding 128 (a nibble is so
// already), and what that adds to a sum, `zero` times the sum of the activations' numbers, is where the sum begins.
#include "kernels.h"
#include "panels.h"
#include "vectors.h"

#ifdef __AVX512VNNI__
#include <algorithm>

namespace octavo::ISA {
namespace {

constexpr int kVecs = kPanel / kLanes;
constexpr int kTileRows = 3;                          // integers and sums of so many rows fill the registers
constexpr int64_t kQuads = kRoundedRows / 4;          // products of four bytes between two takings of scales
constexpr int64_t kUnpacked = 288;                    // rows of w that become quads at once, which stay in L1
constexpr int64_t kMostUnpacked = kRoundedInt4Group;  // of int4 in large groups

// Columns [0, kPanel) in the order that `quads` leaves them in, of four vectors in their own; and back again.
inline void reorder(Vec (&v)[kVecs]) {
  const __m512 a = (__m512)v[0], b = (__m512)v[1], c = (__m512)v[2], d = (__m512)v[3];
  const __m512 ab = _mm512_shuffle_f32x4(a, b, 0x44), cd = _mm512_shuffle_f32x4(c, d, 0x44);
  const __m512 ab_high = _mm512_shuffle_f32x4(a, b, 0xee), cd_high = _mm512_shuffle_f32x4(c, d, 0xee);
  v[0] = (Vec)_mm512_shuffle_f32x4(ab, cd, 0x88);
  v[1] = (Vec)_mm512_shuffle_f32x4(ab, cd, 0xdd);
  v[2] = (Vec)_mm512_shuffle_f32x4(ab_high, cd_high, 0x88);
  v[3] = (Vec)_mm512_shuffle_f32x4(ab_high, cd_high, 0xdd);
}

// Four rows of bytes become vectors of a column's four bytes each, columns 0 to 3 of every 16, then 4 to 7, and so on.
inline void quads(const __m512i (&row)[4], __m512i (&out)[kVecs]) {
  const __m512i low = _mm512_unpacklo_epi8(row[0], row[1]), low_next = _mm512_unpacklo_epi8(row[2], row[3]);
  const __m512i high = _mm512_unpackhi_epi8(row[0], row[1]), high_next = _mm512_unpackhi_epi8(row[2], row[3]);
  out[0] = _mm512_unpacklo_epi16(low, low_next);
  out[1] = _mm512_unpackhi_epi16(low, low_next);
  out[2] = _mm512_unpacklo_epi16(high, high_next);
  out[3] = _mm512_unpackhi_epi16(high, high_next);
}

// Some columns of w, at most a panel, from c on.
struct Columns {
  const Matmul& m;
  int64_t c, count;
  bool is_int4;
  int64_t stride, zero;

  Columns(const Matmul& m, int64_t c, int64_t count)
      : m(m),
        c(c),
        count(count),
        is_int4(m.type == Type::kInt4),
        stride(m.in_panels ? kPanel : m.n),
        zero(!is_int4 ? 128 : m.offsets == nullptr ? 8 : 0) {}

  // Where stored row `row` is.
  const uint8_t* at(int64_t row) const {
    return static_cast<const uint8_t*>(m.w) + place(m.in_panels, m.k / (is_int4 ? 2 : 1), m.n, row, c);
  }

  // Rows [first, end) of w, whole groups of int4, as unsigned quads. `ahead` turns once for each stored row.
  void unpack(int64_t first, int64_t end, uint8_t* to, Ahead ahead) const {
    const __mmask64 mask = count == kPanel ? ~__mmask64{0} : (__mmask64{1} << count) - 1;
    const auto rows = [&](const uint8_t* from, __m512i (&out)[kVecs]) {
      __m512i row[4];
      for (int i = 0; i < 4; ++i, ahead.turn()) row[i] = _mm512_maskz_loadu_epi8(mask, from + i * stride);
      quads(row, out);
    };
    __m512i bytes[kVecs];
    if (!is_int4) {
      for (int64_t k = first; k < end; k += 4, to += 4 * kPanel) {
        rows(at(k), bytes);
        for (int v = 0; v < kVecs; ++v) _mm512_store_si512(to + v * 64, _mm512_xor_si512(bytes[v], _mm512_set1_epi8(-128)));
      }
      return;
    }
    const __m512i low = _mm512_set1_epi8(15);
    for (int64_t g = first; g < end; g += m.group, to += m.group * kPanel)
      for (int64_t k = 0; k < m.group / 2; k += 4) {
        uint8_t* lows = to + k * kPanel;
        uint8_t* highs = lows + m.group / 2 * kPanel;
        rows(at(g / 2 + k), bytes);
        for (int v = 0; v < kVecs; ++v) {
          _mm512_store_si512(lows + v * 64, _mm512_and_si512(bytes[v], low));
          _mm512_store_si512(highs + v * 64, _mm512_and_si512(_mm512_srli_epi16(bytes[v], 4), low));
        }
      }
  }

  // Asks for what the groups that come next have.
  void fetch_factors(int64_t g, int64_t groups) const {
    const int64_t size = m.scales_type == Type::kBFloat16 ? 2 : 4, row = m.in_panels ? kPanel : m.n;
    const int64_t first = place(m.in_panels, m.k / m.group, m.n, g, c) * size;
    for (int64_t i = 0; i < groups; ++i)
      for (int64_t line = 0; line < kPanel * size; line += 64) {
        const int64_t at = first + i * row * size + line;
        __builtin_prefetch(static_cast<const char*>(m.scales) + at);
        if (m.offsets != nullptr) __builtin_prefetch(static_cast<const char*>(m.offsets) + at);
      }
  }

  // Of group g, in the order of quads.
  void factors(const void* from, int64_t g, float* to) const {
    Vec out[kVecs];
    const int64_t first = place(m.in_panels, m.k / m.group, m.n, g, c);
    for (int v = 0; v < kVecs; ++v) {
      if (v * kLanes >= count) out[v] = Vec{};
      else if (m.scales_type == Type::kBFloat16) out[v] = widen(static_cast<const uint16_t*>(from) + first + v * kLanes);
      else out[v] = widen(static_cast<const float*>(from) + first + v * kLanes);
    }
    reorder(out);
    for (int v = 0; v < kVecs; ++v) write(to + v * kLanes, out[v]);
  }
};

// Scales and offsets of the groups of some rows of w, in the order of quads: read by every tile.
struct Factors {
  alignas(64) float scales[kMostUnpacked / kRoundedRows][kPanel], offsets[kMostUnpacked / kRoundedRows][kPanel];
};

enum class Applied { kLater, kScales, kOffsets };  // to a group's sum: nothing, or its scales, or its offsets, too

// sums[kRows, a panel] += what rows [first, end) of w, unpacked, give. Integers and their sums all stay in registers.
template <int kRows, Applied kApplied>
__attribute__((noinline)) void byte_tile(const Columns& w, int64_t row, int64_t first, int64_t end,
                                         const uint8_t* unpacked, const Factors& factors, float* sums, Ahead& ahead) {
  const Matmul& m = w.m;
  const Rounded& x = m.rounded;
  const int64_t parts = m.k / kRoundedRows, scales = m.k / x.group;
  Vec sum[kRows][kVecs];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVecs; ++v) sum[r][v] = read<Vec>(sums + r * kPanel + v * kLanes);
  for (int64_t k = first; k < end; k += kRoundedRows) {
    const int8_t* numbers = x.numbers + row * m.k + k;
    const int32_t* totals = x.sums + row * parts + k / kRoundedRows;
    const float* x_scales = x.scales + row * scales + k / x.group;
    Ints found[kRows][kVecs];
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVecs; ++v) found[r][v] = Ints{} - static_cast<int32_t>(w.zero) * totals[r * parts];
    for (int64_t q = 0; q < kQuads; ++q, unpacked += 4 * kPanel) {
      __m512i weights[kVecs];
      for (int v = 0; v < kVecs; ++v) weights[v] = _mm512_load_si512(unpacked + v * 64);
      for (int turn = 0; turn < kTurns; ++turn) ahead.turn();
      for (int r = 0; r < kRows; ++r) {
        const __m512i four = _mm512_set1_epi32(read<int32_t>(numbers + r * m.k + 4 * q));
        for (int v = 0; v < kVecs; ++v) found[r][v] = (Ints)_mm512_dpbusd_epi32((__m512i)found[r][v], weights[v], four);
      }
    }
    const int64_t g = kApplied == Applied::kLater ? 0 : k / m.group - first / m.group;
    for (int r = 0; r < kRows; ++r) {
      const float x_scale = x_scales[r * scales], x_total = x_scale * static_cast<float>(totals[r * parts]);
      for (int v = 0; v < kVecs; ++v) {
        const Vec value = floats(found[r][v]) * x_scale;
        if constexpr (kApplied == Applied::kLater) sum[r][v] += value;
        else sum[r][v] += value * read<Vec>(factors.scales[g] + v * kLanes);
        if constexpr (kApplied == Applied::kOffsets) sum[r][v] += x_total * read<Vec>(factors.offsets[g] + v * kLanes);
      }
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVecs; ++v) write(sums + r * kPanel + v * kLanes, sum[r][v]);
}

template <Applied kApplied>
void byte_tiles(const Columns& w, int64_t first, int64_t end, const uint8_t* unpacked, float* sums, Ahead& ahead) {
  static thread_local Factors factors;
  const Matmul& m = w.m;
  if (kApplied != Applied::kLater)
    for (int64_t g = first / m.group, i = 0; g * m.group < end; ++g, ++i) {
      w.factors(m.scales, g, factors.scales[i]);
      if (kApplied == Applied::kOffsets) w.factors(m.offsets, g, factors.offsets[i]);
    }
  in_heights<kTileRows>(m.tokens, [&](auto height, int64_t r) {
    byte_tile<height, kApplied>(w, r, first, end, unpacked, factors, sums + r * kPanel, ahead);
  });
}

// Sums of all of w's columns are there: one scale a column, if it is left to the end, and into their order.
void finish(const Columns& w, bool scaled, const float* sums) {
  const Matmul& m = w.m;
  alignas(64) float scales[kPanel];
  if (!scaled) w.factors(m.scales, 0, scales);
  for (int64_t r = 0; r < m.tokens; ++r, sums += kPanel) {
    Vec out[kVecs];
    for (int v = 0; v < kVecs; ++v) {
      out[v] = read<Vec>(sums + v * kLanes);
      if (!scaled) out[v] *= read<Vec>(scales + v * kLanes);
    }
    reorder(out);
    for (int64_t v = 0; v * kLanes < w.count; ++v) write_y(m, r * m.n + w.c + v * kLanes, out[v]);
  }
}

// Some rows of w at a time become quads, for all rows of x. What follows is fetched meanwhile: by whichever takes long.
void multiply(const Columns& w) {
  alignas(64) static thread_local uint8_t unpacked[kMostUnpacked * kPanel];
  const Matmul& m = w.m;
  const bool scaled = m.group < m.k || m.offsets != nullptr;
  const int64_t tiles = (m.tokens + kTileRows - 1) / kTileRows, unit = w.is_int4 ? m.group : kRoundedRows;
  const int64_t deep = std::max(unit, kUnpacked / unit * unit);
  const int64_t stored = w.is_int4 ? 2 : 1, step = 4 * w.stride / (stored * kTurns);
  float* sums = cleared_sums(m.tokens);
  for (int64_t first = 0, end; first < m.k; first = end) {
    end = std::min(m.k, first + deep);
    const char* next = reinterpret_cast<const char*>(w.at(end / stored));
    w.unpack(first, end, unpacked, {next, tiles == 1 ? w.stride : 0});
    Ahead ahead{next, tiles == 1 ? 0 : step / tiles};
    if (scaled) w.fetch_factors(end / m.group, deep / m.group);
    if (m.offsets != nullptr) byte_tiles<Applied::kOffsets>(w, first, end, unpacked, sums, ahead);
    else if (scaled) byte_tiles<Applied::kScales>(w, first, end, unpacked, sums, ahead);
    else byte_tiles<Applied::kLater>(w, first, end, unpacked, sums, ahead);
  }
  finish(w, scaled, sums);
}

inline Vec number_of(const Rounded& r, int64_t i) {
  return r.is_bfloat16 ? widen(static_cast<const uint16_t*>(r.x) + i) : widen(static_cast<const float*>(r.x) + i);
}

// The highest magnitude of `count` numbers from `first` on; NaN where one is.
inline float magnitude(const Rounded& r, int64_t first, int64_t count) {
  __m512 highest = _mm512_setzero_ps();
  __mmask16 unordered = 0;
  for (int64_t i = 0; i < count; i += kLanes) {
    const __m512 value = (__m512)number_of(r, first + i);
    unordered |= _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    highest = _mm512_max_ps(highest, _mm512_abs_ps(value));
  }
  return unordered ? __builtin_nanf("") : _mm512_reduce_max_ps(highest);
}

}  // namespace

void round(const Rounded& r, int64_t begin, int64_t end) {
  constexpr float kTiny = 1.17549435e-38f;
  for (int64_t first = begin * r.k; first < end * r.k; first += r.group) {
    const float wanted = magnitude(r, first, r.group) / 127.0f, scale = wanted < kTiny ? kTiny : wanted;
    const float inverse = 1.0f / scale;
    r.scales[first / r.group] = scale;
    for (int64_t part = first; part < first + r.group; part += kRoundedRows) {
      __m512i total = _mm512_setzero_si512();
      for (int64_t i = part; i < part + kRoundedRows; i += kLanes) {
        const __m512i number = _mm512_cvtps_epi32((__m512)(number_of(r, i) * inverse));
        total = _mm512_add_epi32(total, number);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(r.numbers + i), _mm512_cvtsepi32_epi8(number));
      }
      r.sums[part / kRoundedRows] = _mm512_reduce_add_epi32(total);
    }
  }
}

void rounded_columns(const Matmul& m, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; c += kPanel) multiply(Columns(m, c, std::min(kPanel, end - c)));
}

}  // namespace octavo::ISA
#endif
