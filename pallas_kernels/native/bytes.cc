// int8 activations times int8 or int4 weights, as integers.
//
// Processors multiply unsigned by signed bytes. A nibble is unsigned; for VNNI int8 is made so by adding 128. What that, or
// a nibble's zero, adds to a sum, `zero` times the sum of the activations' numbers, is taken away behind it.
#include "bytes.h"
#include "kernels.h"
#include "panels.h"
#include "vectors.h"

#ifdef OCTAVO_BYTES
#include <algorithm>

namespace octavo::ISA {
namespace {

constexpr int kVecs = kPanel / kLanes;
constexpr int kTileRows = LANES == 16 ? 3 : 2;        // whose integers stay in registers
constexpr int64_t kQuads = kRoundedRows / 4;          // products of four bytes between two takings of scales
constexpr int64_t kUnpacked = 288;                    // rows of w that become quads at once, which stay in L1
constexpr int64_t kMostUnpacked = kRoundedInt4Group;  // of int4 in large groups

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
        zero(!is_int4 ? (kSigned ? 0 : 128) : m.offsets == nullptr ? 8 : 0) {}

  // Where stored row `row` is.
  const uint8_t* at(int64_t row) const {
    return static_cast<const uint8_t*>(m.w) + place(m.in_panels, m.k / (is_int4 ? 2 : 1), m.n, row, c);
  }

  // Rows [first, end) of w, whole groups of int4, as quads. `ahead` turns once for each stored row.
  void unpack(int64_t first, int64_t end, uint8_t* to, Ahead ahead) const {
    const auto rows = [&](const uint8_t* from, Raw (&out)[kVecs]) {
      Raw row[4];
      for (int i = 0; i < 4; ++i, ahead.turn()) row[i] = some_bytes(from + i * stride, count);
      quads(row, out);
    };
    const auto keep = [](uint8_t* to, Raw bytes) { std::memcpy(to, &bytes, sizeof bytes); };
    Raw bytes[kVecs];
    if (!is_int4) {
      const Raw added = all_bytes(kSigned ? 0 : -128);
      for (int64_t k = first; k < end; k += 4, to += 4 * kPanel) {
        rows(at(k), bytes);
        for (int v = 0; v < kVecs; ++v) keep(to + v * sizeof(Raw), bytes[v] ^ added);
      }
      return;
    }
    const Raw low = all_bytes(15);
    for (int64_t g = first; g < end; g += m.group, to += m.group * kPanel)
      for (int64_t k = 0; k < m.group / 2; k += 4) {
        uint8_t* lows = to + k * kPanel;
        uint8_t* highs = lows + m.group / 2 * kPanel;
        rows(at(g / 2 + k), bytes);
        for (int v = 0; v < kVecs; ++v) {
          keep(lows + v * sizeof(Raw), bytes[v] & low);
          keep(highs + v * sizeof(Raw), (Raw)((RawHalves)bytes[v] >> 4) & low);
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
    to_quads(out);
    for (int v = 0; v < kVecs; ++v) write(to + v * kLanes, out[v]);
  }
};

// Scales and offsets of the groups of some rows of w, in the order of quads: read by every tile.
struct Factors {
  alignas(64) float scales[kMostUnpacked / kRoundedRows][kPanel], offsets[kMostUnpacked / kRoundedRows][kPanel];
};

enum class Applied { kLater, kScales, kOffsets };  // to a group's sum: nothing, or its scales, or its offsets, too

// sums[kRows, a panel] += what rows [first, end) of w, unpacked, give.
template <int kRows, Applied kApplied, bool kInt4>
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
    Products<kInt4> found[kRows][kVecs];
    for (int64_t q = 0; q < kQuads; ++q, unpacked += 4 * kPanel) {
      Raw weights[kVecs];
      for (int v = 0; v < kVecs; ++v) weights[v] = read<Raw>(unpacked + v * sizeof(Raw));
      for (int turn = 0; turn < kTurns; ++turn) ahead.turn();
      for (int r = 0; r < kRows; ++r) {
        const Raw four = (Raw)(Ints{} + read<int32_t>(numbers + r * m.k + 4 * q));
        for (int v = 0; v < kVecs; ++v) found[r][v].add(weights[v], four);
      }
    }
    const int64_t g = kApplied == Applied::kLater ? 0 : k / m.group - first / m.group;
    for (int r = 0; r < kRows; ++r) {
      const float x_scale = x_scales[r * scales], x_total = x_scale * static_cast<float>(totals[r * parts]);
      for (int v = 0; v < kVecs; ++v) {
        const Vec value = floats(found[r][v].total() - static_cast<int32_t>(w.zero) * totals[r * parts]) * x_scale;
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
    const auto tile = w.is_int4 ? byte_tile<height, kApplied, true> : byte_tile<height, kApplied, false>;
    tile(w, r, first, end, unpacked, factors, sums + r * kPanel, ahead);
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
    from_quads(out);
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

// The highest magnitude of `count` numbers from `first` on; NaN where one is not finite.
inline float magnitude(const Rounded& r, int64_t first, int64_t count) {
  Vec highest{}, nothing{};
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec value = number_of(r, first + i), size = (Vec)((Bits)value & 0x7fffffff);
    nothing += value * 0.0f;
    highest = size > highest ? size : highest;
  }
  return top(highest) + total(nothing);
}

}  // namespace

void round(const Rounded& r, int64_t begin, int64_t end) {
  constexpr float kTiny = 1.17549435e-38f;
  for (int64_t first = begin * r.k; first < end * r.k; first += r.group) {
    const float wanted = magnitude(r, first, r.group) / 127.0f, scale = wanted < kTiny ? kTiny : wanted;
    const float inverse = 1.0f / scale;
    r.scales[first / r.group] = scale;
    for (int64_t part = first; part < first + r.group; part += kRoundedRows) {
      Ints sum{};
      for (int64_t i = part; i < part + kRoundedRows; i += kLanes) {
        const Ints number = nearest(number_of(r, i) * inverse);
        sum += number;
        write_bytes(r.numbers + i, number);
      }
      r.sums[part / kRoundedRows] = static_cast<int32_t>(total(floats(sum)));  // exact: integers below 2**24
    }
  }
}

void rounded_columns(const Matmul& m, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; c += kPanel) multiply(Columns(m, c, std::min(kPanel, end - c)));
}

}  // namespace octavo::ISA
#endif
